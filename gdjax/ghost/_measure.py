"""The measure of the gradients of a leaf, from what its sites left behind: their operands and their cotangents."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax._trees import wide
from gdjax.ghost import _cost as ghost_cost
from gdjax.ghost import _factors as ghost_factors
from gdjax.ghost._evaluate import Env, run_steps
from gdjax.ghost._factors import NORMS, Measure, Measured
from gdjax.ghost._jaxpr import asks_for_zeros, differentiable
from gdjax.ghost._leaves import Group, LeafPlan, Use, factor_sizes, formed_numbers
from gdjax.ghost._plan import Plan, Step, Top
from gdjax.ghost._rules import Entries, Factors


def tap(plan: Plan, how: LeafPlan) -> Callable:
    """Return (operands [B, ...], cotangents [B, ...]) of the one site of a leaf -> squared norms [B]."""
    [group] = how.groups or []
    [use] = group.uses
    inner = use._replace(top=use.top._replace(loops=(), scales=()))

    def norms(x, g):
        sizes = factor_sizes(inner, plan.sites[use.site], len(g))
        of = partial(factors, {}, group._replace(uses=(inner,), sizes=sizes))
        return NORMS.of_factors(of, sizes, {use.site: x}, {use.site: [g]}, False)[1]

    return norms


def _merged(factor: jax.Array, loops) -> jax.Array:
    """Loops in which the weight is sliced come to K, the others to T: [loops, K, T, ...] -> [K, T, ...]."""
    if not loops:
        return factor
    sliced = [i for i, (_, is_sliced) in enumerate(loops) if is_sliced]
    shared = [i for i, (_, is_sliced) in enumerate(loops) if not is_sliced]
    depth = len(loops)
    moved = factor.transpose(*sliced, depth, *shared, depth + 1, *range(depth + 2, factor.ndim))
    k = int(np.prod(moved.shape[: len(sliced) + 1], dtype=int))
    t = int(np.prod(moved.shape[len(sliced) + 1 : depth + 2], dtype=int))
    return moved.reshape(k, t, *moved.shape[depth + 2 :])


def _reordered(factor: jax.Array, shape, order) -> jax.Array:
    split = factor.reshape(*factor.shape[:2], *shape)
    return split.transpose(0, 1, *(2 + i for i in order)).reshape(factor.shape)


def _arranged(use: Use, array: jax.Array) -> jax.Array:
    """Bring an array like the parameter at a use, slices in front, to [K, I, O]."""
    lead = [length for length, is_sliced in use.top.loops if is_sliced]
    k, i, o = ([axis + len(lead) for axis in axes] for axes in use.rule.axes)
    split = array.reshape(*lead, *use.rule.shape).transpose(*range(len(lead)), *k, *i, *o)
    sizes = [int(np.prod([use.rule.shape[axis] for axis in axes], dtype=int)) for axes in use.rule.axes]
    return split.reshape(-1, *sizes[1:])


def _back(use: Use, product: jax.Array) -> jax.Array:
    """Undo `_arranged`."""
    lead = [length for length, is_sliced in use.top.loops if is_sliced]
    order = [axis for axes in use.rule.axes for axis in axes]
    split = product.reshape(*lead, *(use.rule.shape[axis] for axis in order))
    places = [len(lead) + int(i) for i in np.argsort(order)]
    return split.transpose(*range(len(lead)), *places).reshape(*lead, *use.aval.shape)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a plan has left when it was executed on a batch: values by slot; operands and cotangents by site."""

    plan: Plan
    env: Env
    records: dict[int, list[jax.Array]]
    cotangents: dict[int, list[jax.Array]]

    @functools.cached_property
    def writers(self) -> dict[int, int]:
        """Return by slot the number of the step that writes it."""
        return {slot: number for number, step in enumerate(self.plan.steps) for slot in step.outs}

    def data(self, uses: Sequence[Use]) -> tuple[dict, dict]:
        """Return the operands and cotangents of the sites of these uses."""
        sites = dict.fromkeys(use.site for use in uses)
        return {site: self.records[site] for site in sites}, {site: self.cotangents[site] for site in sites}

    def before(self, slots: Sequence[int], leaves: Sequence[int]) -> list[Step]:
        """Return the steps between these leaves and these slots, in order."""
        found, waiting = set(), list(slots)
        while waiting:
            number = self.writers.get(waiting.pop())
            if number is not None and number not in found and not self.plan.steps[number].leaves.isdisjoint(leaves):
                found.add(number)
                waiting += self.plan.steps[number].ins
        return [self.plan.steps[number] for number in sorted(found)]

    def move(self, leaf: int, use: Use, array: jax.Array) -> jax.Array:
        """Move an array like the leaf, of any dtype, to where its entries are at a use, without the scales."""
        env = {leaf: array}
        for step in self.before([use.top.slot], [leaf]):
            [source] = [i for i in step.ins if i in env]
            env.update(zip(step.outs, step.move(env[source]), strict=True))
        return env[use.top.slot]

    def move_back(self, leaf: int, use: Use, product: jax.Array) -> jax.Array:
        """Move [K, I, O] of the first use of a group to where its entries are in the leaf, in float32 at least."""
        array = _back(use, product)
        if use.top.slot == leaf:
            return array
        like = jax.eval_shape(lambda x: x.astype(array.dtype), self.env[leaf])
        return jax.linear_transpose(partial(self.move, leaf, use), like)(array)[0]

    def pull(self, leaves: Sequence[int], slots: Sequence[int]) -> Callable[[list], list]:
        """Return the function from cotangents of slots to cotangents of leaves."""
        steps, num_leaves = self.before(slots, leaves), len(leaves)
        if not steps:
            return lambda bars: bars
        if asks_for_zeros(self.plan.jaxpr):
            every = frozenset().union(*(step.leaves for step in steps))
            steps, leaves = self.before(slots, sorted(every)), [*leaves, *sorted(every.difference(leaves))]

        def values(arrays):
            env = run_steps(steps, self.env | dict(zip(leaves, arrays, strict=True)))
            return [env[slot] for slot in slots]

        pulled = jax.vjp(values, [self.env[leaf] for leaf in leaves])[1]
        return lambda bars: pulled(bars)[0][:num_leaves]

    def factors(self, group: Group) -> Callable:
        """Return ({site: operands}, {site: cotangents}) of one example -> (A, G) of a group."""
        return partial(factors, self.env, group)

    def bar(self, use: Use, records, cotangents) -> jax.Array:
        """Return the gradient of one example for the parameter at a use; slices of a loop stand in front."""
        site, (x, g) = self.plan.sites[use.site], (records[use.site], cotangents[use.site])
        if isinstance(use.rule, Factors):
            sizes = factor_sizes(use, site, 1)
            unscaled = use._replace(top=use.top._replace(scales=()))
            a, g = factors(self.env, Group((unscaled,), (False,), (None,), sizes), records, cotangents)
            return _back(use, ghost_factors.gradient(sizes, a, g)).astype(use.aval.dtype)
        weights = [i for i in site.weights if i != use.place]
        tops: Any = [site.operands[i] for i in weights]

        def one(weight, x, others, g):
            if isinstance(use.rule, Entries):
                return use.rule.of(x[0] if len(x) == 1 else x, g[0]).astype(weight.dtype)
            rest = iter(x)

            def outs(known):
                operands = [known[i] if i in known else next(rest) for i in range(len(site.operands))]
                return [out for out in site.function(*operands) if differentiable(out)]

            known = {use.place: weight} | dict(zip(weights, others, strict=True))
            return jax.vjp(outs, known)[1](g)[0][use.place]

        function = one
        for depth in reversed(range(len(use.top.loops))):
            is_sliced = use.top.loops[depth][1]
            axes = 0 if is_sliced else None, 0, [0 if top.loops[depth][1] else None for top in tops], 0
            function = _over_loop(jax.vmap(function, axes), is_sliced)
        return function(self.env[use.top.slot], x, [self.env[top.slot] for top in tops], g)

    @functools.cached_property
    def directions(self) -> dict[int, dict[int, jax.Array]]:
        """Return by slot of a value of size one its gradient with respect to every leaf: see `measure_factors`."""
        return {}

    def direction(self, top: Top, leaf: int) -> jax.Array:
        if top.slot not in self.directions:
            leaves = sorted(top.leaves)
            [*gradients] = self.pull(leaves, [top.slot])([jnp.ones_like(self.env[top.slot])])
            self.directions[top.slot] = dict(zip(leaves, gradients, strict=True))
        return wide(self.directions[top.slot][leaf])

    def measure_factors(self, leaf: int, how: LeafPlan, measure: Measure) -> Measured:
        """Return (sum of the gradients of a leaf or None, measure), from its factors."""
        totals, measures = [], []
        for group in how.groups or []:
            added, found = measure.of_factors(self.factors(group), group.sizes, *self.data(group.uses), how.is_given)
            first = group.uses[0]
            totals += [self.move_back(leaf, first, added)] if how.is_given else []
            measures.append(self.move_back(leaf, first, found) if measure is ghost_factors.MOMENTS else found)
        dtype = wide(self.env[leaf]).dtype
        if how.commons:
            norms = sum((found.astype(dtype) for found in measures), jnp.zeros((), dtype))
            added, norms = self.add_common(leaf, how, norms)
            totals, measures = [*totals, added], [norms]
        total, measured = (
            functools.reduce(jnp.add, [part.astype(dtype) for part in parts]) if parts else None
            for parts in (totals if how.is_given else [], measures)
        )
        return total, measured

    def add_common(self, leaf: int, how: LeafPlan, squares: jax.Array) -> Measured:
        """Return what directions c that all examples share add to the sum, and |a|^2 + 2 k <a, c> + k^2 |c|^2.

        Where that is below 2^10 eps (|a| + |k c|)^2, or NaN, rounding has spoilt it: see `_gram_norms`.
        """
        dtype = wide(self.env[leaf]).dtype
        coefficients = [
            jax.vmap(partial(self.bar, use))(*self.data([use])).reshape(-1).astype(dtype) for use in how.commons
        ]
        directions = [self.direction(use.top, leaf).astype(dtype) for use in how.commons]
        total = sum(k.sum() * c for k, c in zip(coefficients, directions, strict=True))
        pairs = [ghost_factors.balanced(k, c) for k, c in zip(coefficients, directions, strict=True)]
        norms = squares + sum(k * m * jnp.vdot(c, d) for k, c in pairs for m, d in pairs)
        lengths = jnp.sqrt(squares) + sum(jnp.abs(k) * jnp.linalg.norm(c) for k, c in pairs)
        for group in how.groups or []:
            a, g = jax.vmap(self.factors(group))(*self.data(group.uses))
            a, g = a if group.sizes.is_index else a.astype(dtype), g.astype(dtype)
            for k, c in pairs:
                c = _arranged(group.uses[0], self.move(leaf, group.uses[0], c))
                rows = (
                    jax.vmap(lambda c, a: c[a], (0, 1), 1)(c, a)
                    if group.sizes.is_index
                    else jax.vmap(jnp.matmul, (1, 0), 1)(a, c)
                )
                norms += 2 * k * jnp.sum(rows * g, (1, 2, 3))
        is_bad = jnp.any(~(norms >= 2**10 * jnp.finfo(dtype).eps * lengths**2))
        formed = partial(self.measure_formed, [leaf], how._replace(is_given=False), NORMS, "rare")
        return total, lax.cond(is_bad, lambda: formed()[1][0].astype(dtype), lambda: norms)

    def measure_formed(
        self, leaves: Sequence[int], how: LeafPlan, measure: Measure, device: str = ""
    ) -> tuple[list, list]:
        """Return (sums of the gradients or None, measures) of leaves with these uses, from their gradients."""
        uses = how.uses
        slots = list(dict.fromkeys(use.top.slot for use in uses))
        pull = self.pull(leaves, slots)

        def form(data):
            bars = [[self.bar(use, *data) for use in uses if use.top.slot == slot] for slot in slots]
            return pull([functools.reduce(jnp.add, own) for own in bars])

        data = self.data(uses)
        size = len(jax.tree.leaves(data)[0])
        numbers = formed_numbers(self.plan, uses) + sum(self.env[leaf].size for leaf in leaves)
        chunk = ghost_cost.fitting(size, numbers, device or ghost_cost.device())
        return ghost_factors.in_chunks(form, data, size, chunk, measure, want_total=how.is_given)


def _over_loop(mapped: Callable, is_sliced: bool) -> Callable:
    return mapped if is_sliced else lambda *arguments: mapped(*arguments).sum(0)


def factors(env: Env, group: Group, records, cotangents) -> tuple[jax.Array, jax.Array]:
    """Return (A, G) of a group, of operands and cotangents of one example by site."""
    parts = []
    for use, is_swapped, order in zip(group.uses, group.swapped, group.orders, strict=True):
        x, [g] = records[use.site], cotangents[use.site]
        function = use.rule.of
        for _ in use.top.loops:
            function = jax.vmap(function)
        a, g = (_merged(factor, use.top.loops) for factor in function(x[0] if len(x) == 1 else x, g))
        for name, slot in use.top.scales:
            scale = jnp.asarray(-1, g.dtype) if name == "neg" else env[slot].reshape(())
            dtype = jnp.promote_types(wide(g).dtype, scale.dtype)  # a cast to float16 may have come after the scale
            g, scale = g.astype(dtype), scale.astype(dtype)
            g = g / scale if name == "div" else g * scale
        if use.rule.is_index and not group.sizes.is_index:
            a = jax.nn.one_hot(a, group.sizes.i, dtype=g.dtype)
        a, g = (g, a) if is_swapped else (a, g)
        if order is not None:
            a, g = (_reordered(*factor) for factor in zip((a, g), *order, strict=True))
        parts.append((a, g))
    if len(parts) == 1:
        return parts[0]
    widest = max((g for _, g in parts), key=lambda g: g.dtype.itemsize)
    dtype = wide(widest).dtype if len({g.dtype for _, g in parts}) > 1 else widest.dtype
    a = jnp.concatenate([a if group.sizes.is_index else a.astype(dtype) for a, _ in parts], 1)
    return a, jnp.concatenate([g.astype(dtype) for _, g in parts], 1)
