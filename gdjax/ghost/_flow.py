"""Where parameters go in the jaxpr of a loss: a plan, made from the program alone.

Every variable becomes a numbered slot. A value that depends on neither the example nor the state of a loop is a `Top`
value: its equations, wherever they stand, are taken out into `steps`, which run once for the batch. All else is in
`actions`, which run for one example under vmap: 'plain' equations, 'site's, where a parameter meets an example, and
'scan', 'remat', 'switch' and 'choice', which hold actions of their own. `_evaluate` executes them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gdjax.ghost import _rules as ghost_rules
from gdjax.ghost._jaxpr import (
    INLINED,
    REMAT,
    Jaxpr,
    default_branch,
    function_of,
    increment,
    is_literal,
    literal,
    nonlinear_rules,
    reached,
    scan_sizes,
    struct,
    traced,
)
from gdjax.ghost._plan import Action, Choice, Kind, Plan, Scan, Site, Top
from gdjax.ghost._tops import Tops, detached, entered, same


def plan(function: Callable, leaves: Sequence[Any], example: Any) -> Plan:
    """Trace `function(leaves, example)`, remove what does not reach the loss, and plan it. Leaf i has slot i."""
    jaxpr, consts = traced(function, leaves, example)
    planner = _Planner()
    inputs = [
        planner.top(leaves=frozenset([i]), isometric=True, view=np.empty(np.shape(leaf), bool))
        for i, leaf in enumerate(leaves)
    ]
    examples = [planner.local() for _ in jaxpr.invars[len(leaves) :]]
    actions, outs = planner.flow(jaxpr, consts, [*inputs, *examples])
    [loss] = planner.settled(outs, jaxpr.outvars, actions)
    return Plan(planner.constants, planner.steps, planner.sites, actions, examples, loss, jaxpr)


class _Planner(Tops):
    def __init__(self):
        super().__init__()
        self.sites: list[Site] = []
        self.inside = 0

    def flow(
        self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Kind], marks: Sequence[bool] | None = None
    ) -> tuple[list[Action], Sequence[Kind]]:
        """Return the actions of a jaxpr and the kinds of its outputs, of which the marked ones get a gradient."""
        alive = reached(jaxpr, [True] * len(jaxpr.outvars) if marks is None else marks)
        env: dict[Any, Kind] = dict(zip(jaxpr.constvars, map(self.constant, consts), strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))
        actions: list[Action] = []
        for equation in jaxpr.eqns:
            ins = [None if is_literal(v) else env[v] for v in equation.invars]
            marks = [v in alive for v in equation.outvars]
            if not any(marks):  # what computes it need have no derivative, as a while_loop has none
                ins = [detached(kind) if isinstance(kind, Top) else kind for kind in ins]
            outs = self.equation(jaxpr, equation, ins, actions, marks)
            env.update(zip(equation.outvars, outs, strict=True))
        return actions, [self.constant(literal(v)) if is_literal(v) else env[v] for v in jaxpr.outvars]

    def equation(self, jaxpr, equation, ins: list[Kind | None], actions: list[Action], marks) -> Sequence[Kind]:
        """Decide what becomes of one equation; the only place that does."""
        name, parameters = equation.primitive.name, equation.params
        weights = any(isinstance(kind, Top) and kind.leaves for kind in ins)
        if weights and name == "optimization_barrier":
            return self.kinds(equation, ins)
        if weights and (branch := default_branch(equation)) is not None:
            inner, outs = self.flow(branch.jaxpr, branch.consts, self.kinds(equation, ins)[1:], marks)
            actions += inner
            return outs
        if not (weights and name in INLINED) and not any(isinstance(kind, int) for kind in ins):
            # A rule that is not linear has to see the cotangent of every iteration, not their sum.
            stays = weights and self.lengths and nonlinear_rules(jaxpr, [equation])
            return self.act(actions, "site", jaxpr, equation, ins) if stays else self.step(jaxpr, equation, ins)
        if not weights:
            return self.act(actions, "plain", jaxpr, equation, ins)
        if name not in (*INLINED, *REMAT, "scan", "cond"):
            return self.act(actions, "site", jaxpr, equation, ins)
        kinds = self.kinds(equation, ins)
        if name in INLINED:
            inner, outs = self.flow(parameters["jaxpr"].jaxpr, parameters["jaxpr"].consts, kinds, marks)
            actions += inner
            return outs
        if name == "cond" and isinstance(kinds[0], int):
            return self.switch(equation, kinds, actions, marks)
        self.inside += 1
        outs = {"scan": self.scan, "cond": self.choice}.get(name, self.remat)(equation, kinds, actions, marks)
        self.inside -= 1
        return self.act(actions, "site", jaxpr, equation, ins) if outs is None else outs

    def act(self, actions, name: str, jaxpr, equation, ins) -> Sequence[Kind]:
        """Add an equation as an action; a site also says how its parameters are measured."""
        places, function = function_of(jaxpr, equation, self.functions)
        operands = tuple(ins[i] for i in places)
        outs = [self.local() for _ in equation.outvars]
        index = None
        if name == "site":
            index = len(self.sites)
            weights = tuple(i for i, kind in enumerate(operands) if isinstance(kind, Top) and kind.leaves)
            avals = tuple(struct(v.aval) for v in equation.outvars)
            rules = tuple(_rule(equation, places[i], ins) for i in weights)
            lengths, primitive = tuple(self.lengths), equation.primitive.name
            of = tuple(struct(equation.invars[places[i]].aval) for i in weights)
            read = sum(equation.invars[place].aval.size for i, place in enumerate(places) if i not in weights)
            read *= int(np.prod(lengths, dtype=int))
            inside = self.inside > 0
            self.sites.append(Site(function, operands, weights, avals, rules, lengths, primitive, inside, of, read))
        actions.append(Action(name, function, tuple(map(self.slot, operands)), tuple(outs), index))
        return outs

    def settled(self, kinds: Sequence[Kind], variables, actions) -> list[int]:
        """Return slots for values that leave the Top; a parameter among them is used there, as it is."""
        slots = []
        for kind, v in zip(kinds, variables, strict=True):
            if isinstance(kind, Top) and kind.leaves:
                aval = struct(v.aval)
                rule = (ghost_rules.Entries(lambda x, g: g), "")
                lengths = tuple(self.lengths)
                self.sites.append(
                    Site(same, (kind,), (0,), (aval,), (rule,), lengths, "itself", self.inside > 0, (aval,), 0)
                )
                actions.append(Action("site", same, (self.slot(kind),), (self.local(),), len(self.sites) - 1))
                slots.append(actions[-1].outs[0])
            else:
                slots.append(self.slot(kind))
        return slots

    def remat(self, equation, kinds, actions, marks) -> Sequence[Kind]:
        first_site = len(self.sites)
        inner, outs = self.flow(equation.params["jaxpr"], [], kinds, marks)
        ins = tuple(kind for kind in kinds if isinstance(kind, int))
        locals_ = tuple(kind for kind in outs if isinstance(kind, int))
        options = {name: equation.params[name] for name in ("policy", "prevent_cse")}
        actions.append(Action("remat", options, ins, locals_, (inner, range(first_site, len(self.sites)))))
        return outs

    def switch(self, equation, kinds, actions, marks) -> Sequence[Kind]:
        """Both branches and a selection, which is what vmap makes of a choice that depends on the example."""
        branches, returned = [], []
        for closed in equation.params["branches"]:
            inner, outs = self.flow(closed.jaxpr, closed.consts, kinds[1:], marks)
            returned.append(self.settled(outs, closed.jaxpr.outvars, inner))
            branches += inner
        outs = [self.local() for _ in equation.outvars]
        actions += [*branches, Action("switch", None, (kinds[0],), tuple(outs), returned)]
        return outs

    def choice(self, equation, kinds, actions, marks) -> Sequence[Kind] | None:
        """A branch that is the same for all examples; None where a zero from one not taken might become NaN."""
        num_steps, first_site, sliced = len(self.steps), len(self.sites), [set(slots) for slots in self.sliced]
        cases = []
        for closed in equation.params["branches"]:
            inner, outs = self.flow(closed.jaxpr, closed.consts, kinds[1:], marks)
            cases.append((inner, self.settled(outs, closed.jaxpr.outvars, inner)))
        sites = range(first_site, len(self.sites))
        is_safe = all(map(_is_linear, self.sites[first_site:]))
        if not is_safe or any(step.leaves and step.move is None for step in self.steps[num_steps:]):
            del self.steps[num_steps:], self.sites[first_site:]
            self.sliced[:] = sliced
            return None
        outs = [self.local() for _ in equation.outvars]
        actions.append(Action("choice", None, (self.slot(kinds[0]),), tuple(outs), Choice(cases, sites)))
        return outs

    def scan(self, equation, kinds, actions, marks) -> Sequence[Kind]:
        parameters, body = equation.params, equation.params["jaxpr"]
        first, num_carry = scan_sizes(equation)
        last = first + num_carry
        initial = self.settled(kinds[first:last], equation.invars[first:last], actions)
        length, first_site = parameters["length"], len(self.sites)
        scanned = tuple(self.slot(kind) for kind in kinds[last:] if isinstance(kind, int))
        consts = [entered(kind, length, False) for kind in kinds[:first]]
        added = [increment(body.jaxpr, first + i, i) for i in range(num_carry)]
        counters = [
            self.counter(*each, length, parameters["reverse"]) for each in zip(kinds[first:last], added, strict=True)
        ]
        self.lengths.append(length)
        self.sliced.append(set())
        carry = [self.local() for _ in initial]
        whole = {kind.slot for kind in kinds[:first] if isinstance(kind, Top)}
        xs = [
            entered(self.renamed(kind) if kind.slot in whole else kind, length, True)
            if isinstance(kind, Top)
            else self.local()
            for kind in kinds[last:]
        ]
        known = [entered(top, length, True) if top else slot for top, slot in zip(counters, carry, strict=True)]
        inner, outs = self.flow(
            body.jaxpr, body.consts, [*consts, *known, *xs], [*[True] * num_carry, *marks[num_carry:]]
        )
        returned = self.settled(outs, body.jaxpr.outvars, inner)
        self.lengths.pop()
        sliced = sorted(self.sliced.pop())
        options = {name: parameters[name] for name in ("length", "reverse", "unroll")}
        sites = range(first_site, len(self.sites))
        new_xs = [x for x in xs if isinstance(x, int)]
        result = [self.local() for _ in equation.outvars]
        details = Scan(inner, carry, new_xs, sliced, returned, sites, options)
        actions.append(Action("scan", num_carry, (*initial, *scanned), tuple(result), details))
        return result


def _is_linear(site: Site) -> bool:
    """Whether zeros for operands and cotangents give a gradient of zero."""
    tops: list[Any] = [site.operands[place] for place in site.weights]
    return all(rule for rule, _ in site.rules) and all(top.isometric and not top.scales for top in tops)


def _rule(equation, position: int, ins) -> tuple[Any, str]:
    """Return (the rule for the parameter at this operand, ''), or (None, why there is none)."""
    name = equation.primitive.name
    values = [equation.invars[i].aval for i in range(len(ins))] + [v.aval for v in equation.outvars]
    if any(jnp.issubdtype(aval.dtype, jnp.complexfloating) for aval in values):
        return None, f"{name} of complex values"
    if sum(isinstance(kind, Top) and bool(kind.leaves) for kind in ins) > 1:
        return None, f"two parameters in one {name}"
    if (
        any(aval.size == 0 for aval in (equation.invars[position].aval, equation.outvars[0].aval))
        or (rule := ghost_rules.find(equation, position)) is None
    ):
        return None, f"no rule for {'this ' if name in ghost_rules.RULES else ''}{name}"
    return rule, ""
