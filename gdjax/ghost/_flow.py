"""Where parameters go in a jaxpr: the static half of `ghost`. Everything that touches jax.extend.core is here."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gdjax.ghost import _rules as ghost_rules

INLINED = ("jit", "pjit", "closed_call", "core_call")
REMAT = ("remat2", "checkpoint", "remat")
# Equations that move the entries of a parameter and neither change, repeat nor drop one: norms pass through them.
ISOMETRIES = ("reshape", "transpose", "squeeze", "rev", "copy", "copy_p", "convert_element_type")


class Chain(NamedTuple):
    """A value that depends on parameters alone.

    Attributes:
        leaves: the parameter leaves it depends on.
        isometric: whether it is one leaf, or a slice of one in a scan, up to order of entries.
        repeats: how often one and the same value is used by the loops around.
    """

    leaves: frozenset[int]
    isometric: bool = False
    repeats: int = 1


FIXED, BATCHED = "fixed", "batched"
Kind = str | Chain


class Use(NamedTuple):
    """A use of a chain: the leaves in it, the primitive, and why no rule can take it ('' where one can)."""

    leaves: frozenset[int]
    primitive: str
    obstacle: str


class Plan(NamedTuple):
    """How a leaf is measured: the name of a rule, 'materialised' or 'unused'; and a description of its uses."""

    method: str
    uses: str


def plan(jaxpr: core.Jaxpr, num_leaves: int) -> list[Plan]:
    """Return a plan for each of the first `num_leaves` inputs of the jaxpr of the loss of one example."""
    kinds: list[Kind] = [Chain(frozenset([i]), isometric=True) for i in range(num_leaves)]
    uses: list[Use] = []
    kinds += [BATCHED] * (len(jaxpr.invars) - num_leaves)
    [out] = flow(jaxpr, kinds, uses)
    if isinstance(out, Chain):
        uses.append(Use(out.leaves, "the loss", "depends on no example"))
    return [_leaf_plan([use for use in uses if i in use.leaves]) for i in range(num_leaves)]


def _leaf_plan(uses: list[Use]) -> Plan:
    if not uses:
        return Plan("unused", "")
    texts = [f"{use.primitive}: {use.obstacle}" if use.obstacle else use.primitive for use in uses]
    described = ", ".join(dict.fromkeys(texts))
    if len(uses) > 1:
        return Plan("materialised", f"{len(uses)} uses ({described})")
    return Plan("materialised" if uses[0].obstacle else uses[0].primitive, described)


def flow(jaxpr: core.Jaxpr, kinds: Sequence[Kind], uses: list[Use]) -> list[Kind]:
    """Return the kinds of the outputs for these kinds of inputs, and append every use on the way to `uses`."""
    env: dict[Any, Kind] = dict.fromkeys(jaxpr.constvars, FIXED)
    env.update(zip(jaxpr.invars, kinds, strict=True))
    for equation in jaxpr.eqns:
        ins = [FIXED if isinstance(v, core.Literal) else env[v] for v in equation.invars]
        env.update(zip(equation.outvars, _outputs(equation, ins, uses), strict=True))
    return [FIXED if isinstance(v, core.Literal) else env[v] for v in jaxpr.outvars]


def _outputs(equation, ins: list[Kind], uses: list[Use]) -> list[Kind]:
    chains = [kind for kind in ins if isinstance(kind, Chain)]
    name = equation.primitive.name
    if not chains:
        return [BATCHED if BATCHED in ins else FIXED] * len(equation.outvars)
    if name in INLINED:
        return flow(equation.params["jaxpr"].jaxpr, ins, uses)
    if BATCHED not in ins:
        isometric = len(chains) == 1 and chains[0].isometric and name in ISOMETRIES
        leaves = frozenset().union(*(chain.leaves for chain in chains))
        chain = Chain(leaves, isometric, max(chain.repeats for chain in chains))
        return [chain if differentiable(v.aval) else FIXED for v in equation.outvars]
    if name in REMAT:
        return flow(equation.params["jaxpr"], ins, uses)
    if name == "scan":
        return scan_kinds(equation, ins, uses)[1]
    for position, chain in enumerate(ins):
        if isinstance(chain, Chain):
            uses.append(Use(chain.leaves, name, _obstacle(equation, position, chain, len(chains))))
    return [BATCHED] * len(equation.outvars)


def _obstacle(equation, position: int, chain: Chain, num_chains: int) -> str:
    name = equation.primitive.name
    if ghost_rules.find(equation, position) is None:
        return f"no rule for {'this ' if name in ghost_rules.RULES else ''}{name}"
    if num_chains > 1:
        return "two parameters in one equation"
    if not chain.isometric:
        return "computed from the parameter"
    if chain.repeats > 1:
        return f"used {chain.repeats} times in a loop"
    return ""


def scan_kinds(equation, ins: Sequence[Kind], uses: list[Use]) -> tuple[list[Kind], list[Kind]]:
    """Return the kinds of the inputs of a scan's body and of the scan's outputs.

    A weight that is carried from iteration to iteration becomes batched: what it is depends on the iteration. A fixed
    value that is carried stays fixed unless the body makes it batched.
    """
    parameters = equation.params
    num_consts, num_carry = scan_sizes(equation)
    consts = [
        kind._replace(repeats=kind.repeats * parameters["length"]) if isinstance(kind, Chain) else kind
        for kind in ins[:num_consts]
    ]
    initial, xs = ins[num_consts : num_consts + num_carry], ins[num_consts + num_carry :]
    uses += [Use(kind.leaves, "scan", "initial state of a loop") for kind in initial if isinstance(kind, Chain)]
    carry = [FIXED if kind == FIXED else BATCHED for kind in initial]
    while True:
        inner: list[Use] = []
        outs = flow(parameters["jaxpr"].jaxpr, [*consts, *carry, *xs], inner)
        widened = [FIXED if old == out == FIXED else BATCHED for old, out in zip(carry, outs, strict=False)]
        if widened == carry:
            break
        carry = widened
    uses += inner
    for kind in outs:
        if isinstance(kind, Chain):
            uses.append(Use(kind.leaves, "scan", "output of a loop"))
    ys = [BATCHED if isinstance(kind, Chain) else kind for kind in outs[num_carry:]]
    return [*consts, *carry, *xs], [*carry, *ys]


def scan_sizes(equation) -> tuple[int, int]:
    """Return how many of a scan's operands are constants, and how many are carried; the rest are scanned."""
    if "num_consts" in equation.params:
        return equation.params["num_consts"], equation.params["num_carry"]
    consts, carry, _ = equation.params["ft_in"].unpack()  # jax 0.12
    return len(list(consts.vals)), len(list(carry.vals))


def differentiable(aval) -> bool:
    """Whether a value has gradients: floating-point or complex."""
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def shape_of(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x))


def read(env: dict[Any, Any], variable) -> Any:
    """Return the value of a variable or literal."""
    return variable.val if isinstance(variable, core.Literal) else env[variable]


def function_of(jaxpr: core.Jaxpr, equation, ins: Sequence[Any]) -> tuple[list[Any], Callable]:
    """Return the operands of an equation, each once and without literals, and its outputs as a function of them.

    The function keeps whatever derivative rule the equation has.
    """
    operands = {v: x for v, x in zip(equation.invars, ins, strict=True) if not isinstance(v, core.Literal)}
    part = jaxpr.replace(
        constvars=[],
        invars=list(operands),
        outvars=equation.outvars,
        eqns=[equation],
        effects=equation.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return list(operands.values()), core.jaxpr_as_fun(core.ClosedJaxpr(part, []))
