"""From the sites where a parameter leaf is used to the measure of its gradients.

A leaf whose sites all have factors of its entries in the same arrangement is measured from these, which stand behind
each other along T. Values of size one that were computed from the leaf, such as a penalty on it, add a direction c that
all examples share: |a + k c|^2 = |a|^2 + 2 k <a, c> + k^2 |c|^2. Of all other leaves the gradients are formed, for a
chunk of examples at a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdjax import ghost_cost, ghost_rules
from gdjax.ghost_cost import Sizes
from gdjax.ghost_eval import Env, run_steps
from gdjax.ghost_flow import Plan, Site, Step, Top, differentiable, is_real
from gdjax.ghost_rules import NORMS, Entries, Factors, Measure, Measured, Rule, wide


class Use(NamedTuple):
    """A site where a leaf is used: its number, which of its operands, its kind, shape, rule, and why there is none."""

    site: int
    place: int
    top: Top
    aval: jax.ShapeDtypeStruct
    rule: Rule | None
    obstacle: str


class Group(NamedTuple):
    """Uses of the same entries of a leaf in one arrangement.

    Attributes:
        uses: the uses.
        swapped: for each, whether its A and G change places.
        orders: for each, the order of the columns of A and of G, None where it is the first use's.
        sizes: of the factors together.
    """

    uses: tuple[Use, ...]
    swapped: tuple[bool, ...]
    orders: tuple[Any, ...]
    sizes: Sizes


class LeafPlan(NamedTuple):
    """How a leaf is measured.

    Attributes:
        uses: all its uses.
        groups: of factors, or None where its gradients are formed.
        commons: the uses of values of size one that were computed from it.
        is_given: whether its gradient comes from its factors, and not from the backward pass.
        tap: the site where its norm is taken in the backward pass, or None.
    """

    uses: list[Use]
    groups: list[Group] | None
    commons: list[Use]
    is_given: bool
    tap: int | None


def uses_of(plan: Plan, num_leaves: int) -> list[list[Use]]:
    """Return the uses of every leaf."""
    uses: list[list[Use]] = [[] for _ in range(num_leaves)]
    for number, site in enumerate(plan.sites):
        for place, aval, (rule, obstacle) in zip(site.weights, site.avals, site.rules, strict=True):
            top: Any = site.operands[place]
            for leaf in top.leaves:
                uses[leaf].append(Use(number, place, top, aval, rule, obstacle))
    return uses


def leaf_plan(plan: Plan, leaf, uses: list[Use], measure: Measure, batch_size: int) -> LeafPlan:
    """Decide how a leaf is measured."""
    commons = [use for use in uses if is_common(use, plan)]
    rest = [use for use in uses if not is_common(use, plan)]
    has_factors = all(isinstance(use.rule, Factors) and use.top.isometric for use in rest)
    groups = _aligned(plan, rest, batch_size) if has_factors and uses else None
    is_low = any(jnp.finfo(x.dtype).bits < 32 for x in (leaf, *(use.aval for use in uses)))
    if groups is None or (commons and measure is not NORMS):
        is_plain = not is_low and all(isinstance(use.rule, Entries) and not use.top.custom for use in uses)
        return LeafPlan(uses, None, [], not is_plain, None)
    if measure is NORMS and len(rest) == 1 and not (commons or is_low):
        [use] = rest
        if plan.sites[use.site].inside and not use.top.scales and all(is_sliced for _, is_sliced in use.top.loops):
            return LeafPlan(uses, groups, [], False, use.site)
    is_given = is_low or any(
        (measure is NORMS and any(way.name == "in chunks" for way in ghost_cost.ways(group.sizes)))
        or (any(use.rule.is_index for use in group.uses) and ghost_cost.has_few_rows(group.sizes))
        for group in groups
    )
    return LeafPlan(uses, groups, commons, is_given, None)


def tap(plan: Plan, how: LeafPlan) -> Callable:
    """Return (operands [B, ...], cotangents [B, ...]) of the one site of a leaf -> squared norms [B]."""
    [group] = how.groups or []
    [use] = group.uses
    inner = use._replace(top=use.top._replace(loops=(), scales=()))

    def norms(x, g):
        sizes = _factor_sizes(inner, plan.sites[use.site], len(g))
        of = partial(factors, {}, group._replace(uses=(inner,), sizes=sizes))
        return NORMS.of_factors(of, sizes, {use.site: x}, {use.site: [g]}, False)[1]

    return norms


def is_common(use: Use, plan: Plan) -> bool:
    """Whether a use is of one number that was computed from leaves, linearly as far as derivatives go."""
    lengths = plan.sites[use.site].lengths
    return not use.top.isometric and use.aval.size == 1 and is_real(use.aval) and not use.top.custom and not lengths


def _factor_sizes(use: Use, site: Site, batch_size: int, *, with_loops: bool = True) -> Sizes:
    shape, (k_axes, i_axes, o_axes) = use.rule.shape, use.rule.axes
    k, i, o = (int(np.prod([shape[axis] for axis in axes], dtype=int)) for axes in (k_axes, i_axes, o_axes))
    t = site.out[0].size // (k * o)
    for length, is_sliced in use.top.loops if with_loops else ():
        k, t = (k * length, t) if is_sliced else (k, t * length)
    return Sizes(batch_size, k, t, i, o, 0, use.rule.is_index)


def _aligned(plan: Plan, uses: list[Use], batch_size: int) -> list[Group] | None:
    """Return groups of uses whose factors have the same rows and columns; None where entries overlap otherwise."""
    if len(uses) == 1:
        return [Group(tuple(uses), (False,), (None,), _factor_sizes(uses[0], plan.sites[uses[0].site], batch_size))]
    found: dict[Any, list] = {}
    for use in uses:
        view = use.top.view
        split = None if view is None else view.reshape(use.rule.shape)
        if split is None or not np.may_share_memory(split, view):
            return None
        labels = [
            tuple((split.shape[axis], split.strides[axis]) for axis in axes if split.shape[axis] > 1)
            for axes in use.rule.axes
        ]
        sides = frozenset(tuple(sorted(side)) for side in labels[1:])
        sliced = tuple(length for length, is_sliced in use.top.loops if is_sliced)
        key = split.__array_interface__["data"][0], labels[0], sides, sliced
        found.setdefault(key, []).append((use, labels[1], labels[2]))
    keys = list(found)
    for i, key in enumerate(keys):
        for other in keys[:i]:
            if key[3] != other[3] or _overlap(found[key][0][0].top.view, found[other][0][0].top.view):
                return None
    groups = [_group(plan, members, batch_size) for members in found.values()]
    return None if None in groups else groups


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    try:
        return np.shares_memory(a, b, max_work=10**4)
    except np.exceptions.TooHardError:
        return True


def _group(plan: Plan, members, batch_size: int) -> Group | None:
    sizes = [_factor_sizes(use, plan.sites[use.site], batch_size) for use, _, _ in members]
    first = next((i for i, size in enumerate(sizes) if size.is_index), 0)
    _, rows, columns = members[first]
    swapped, orders = [], []
    for (_, own_rows, own_columns), size in zip(members, sizes, strict=True):
        is_swapped = sorted(own_rows) != sorted(rows)
        if is_swapped:
            own_rows, own_columns = own_columns, own_rows
        order = [[own.index(label) for label in side] for own, side in ((own_rows, rows), (own_columns, columns))]
        if size.is_index and (is_swapped or order[0] != sorted(order[0])):
            return None
        swapped.append(is_swapped)
        shapes = [[n for n, _ in own] for own in (own_rows, own_columns)]
        orders.append(None if all(o == sorted(o) for o in order) else (shapes, order))
    uses = tuple(use for use, _, _ in members)
    total = sizes[first]._replace(t=sum(size.t for size in sizes), is_index=all(size.is_index for size in sizes))
    return Group(uses, tuple(swapped), tuple(orders), total)


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
        like = jax.ShapeDtypeStruct(self.env[leaf].shape, array.dtype)
        return jax.linear_transpose(partial(self.move, leaf, use), like)(array)[0]

    def pull(self, leaves: Sequence[int], slots: Sequence[int]) -> Callable[[list], list]:
        """Return the function from cotangents of slots to cotangents of leaves."""
        steps = self.before(slots, leaves)
        if not steps:
            return lambda bars: bars

        def values(arrays):
            env = run_steps(steps, self.env | dict(zip(leaves, arrays, strict=True)))
            return [env[slot] for slot in slots]

        pulled = jax.vjp(values, [self.env[leaf] for leaf in leaves])[1]
        return lambda bars: pulled(bars)[0]

    def factors(self, group: Group) -> Callable:
        """Return ({site: operands}, {site: cotangents}) of one example -> (A, G) of a group."""
        return partial(factors, self.env, group)

    def bar(self, use: Use, records, cotangents) -> jax.Array:
        """Return the gradient of one example for the parameter at a use; slices of a loop stand in front."""
        site, (x, g) = self.plan.sites[use.site], (records[use.site], cotangents[use.site])
        if isinstance(use.rule, Factors):
            sizes = _factor_sizes(use, site, 1)
            unscaled = use._replace(top=use.top._replace(scales=()))
            a, g = factors(self.env, Group((unscaled,), (False,), (None,), sizes), records, cotangents)
            return _back(use, ghost_rules.gradient(a, g, sizes)).astype(use.aval.dtype)
        weights = [i for i in site.weights if i != use.place]
        tops: Any = [site.operands[i] for i in weights]

        def one(weight, x, others, g):
            if isinstance(use.rule, Entries):
                return use.rule.of(x[0] if len(x) == 1 else x, g[0]).astype(weight.dtype)
            rest, values = iter(x), dict(zip(weights, others, strict=True))

            def outs(weight):
                known = {use.place: weight} | values
                operands = [known[i] if i in known else next(rest) for i in range(len(site.operands))]
                return [out for out in site.function(*operands) if differentiable(out)]

            [gradient] = jax.vjp(outs, weight)[1](g)
            return gradient

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
            measures.append(self.move_back(leaf, first, found) if measure is ghost_rules.MOMENTS else found)
        if how.commons:
            added, found = self.add_common(leaf, how)
            totals.append(added)
            measures.append(found)
        return sum(totals) if how.is_given else None, sum(measures)

    def add_common(self, leaf: int, how: LeafPlan) -> Measured:
        """Return what directions c that all examples share add to the sum, and to |a|^2: 2 k <a, c> + k^2 |c|^2."""
        coefficients = [wide(jax.vmap(partial(self.bar, use))(*self.data([use])).reshape(-1)) for use in how.commons]
        directions = [self.direction(use.top, leaf) for use in how.commons]
        norms = sum(
            k * m * jnp.vdot(c, d)
            for k, c in zip(coefficients, directions, strict=True)
            for m, d in zip(coefficients, directions, strict=True)
        )
        for group in how.groups or []:
            a, g = jax.vmap(self.factors(group))(*self.data(group.uses))
            for k, c in zip(coefficients, directions, strict=True):
                c = _arranged(group.uses[0], self.move(leaf, group.uses[0], c))
                rows = (
                    jax.vmap(lambda c, a: c[a], (0, 1), 1)(c, a)
                    if group.sizes.is_index
                    else jnp.einsum("bkti,kio->bkto", a, c)
                )
                norms += 2 * k * jnp.sum(rows * g, (1, 2, 3))
        return sum(k.sum() * c for k, c in zip(coefficients, directions, strict=True)), norms

    def measure_formed(self, leaves: Sequence[int], how: LeafPlan, measure: Measure) -> tuple[list, list]:
        """Return (sums of the gradients or None, measures) of leaves with these uses, from their gradients."""
        uses = how.uses
        slots = list(dict.fromkeys(use.top.slot for use in uses))
        pull = self.pull(leaves, slots)

        def form(data):
            bars = dict.fromkeys(slots, 0.0)
            for use in uses:
                bars[use.top.slot] = bars[use.top.slot] + self.bar(use, *data)
            return pull([bars[slot] for slot in slots])

        data = self.data(uses)
        size = len(jax.tree.leaves(data)[0])
        numbers = formed_numbers(self.plan, uses) + sum(self.env[leaf].size for leaf in leaves)
        chunk = ghost_cost.fitting(size, numbers, ghost_cost.device())
        return ghost_rules.in_chunks(form, data, size, chunk, measure, want_total=how.is_given)


def _over_loop(mapped: Callable, is_sliced: bool) -> Callable:
    return mapped if is_sliced else lambda *arguments: mapped(*arguments).sum(0)


def described(plan: Plan, how: LeafPlan) -> tuple[str, str]:
    """Return (method, description of the uses) of a leaf."""
    if not how.uses:
        return "unused", ""
    texts = []
    for use in how.uses:
        reason = use.obstacle or ("" if use.top.isometric or use in how.commons else "computed from the parameter")
        times = int(np.prod([length for length, is_sliced in use.top.loops if not is_sliced], dtype=int))
        looped = f" {times} times in a loop" if times > 1 else ""
        texts.append(plan.sites[use.site].primitive + looped + (f": {reason}" if reason else ""))
    found = ", ".join(dict.fromkeys(texts))
    names = " + ".join(dict.fromkeys(plan.sites[use.site].primitive for use in how.uses))
    has_entries = len(how.uses) == 1 and isinstance(how.uses[0].rule, Entries)
    method = names if how.groups is not None or has_entries else "materialised"
    return method, f"{len(how.uses)} uses ({found})" if len(how.uses) > 1 else found


def num_bytes(plan: Plan, leaf, how: LeafPlan, batch_size: int) -> int:
    """Return about how many bytes the squared norms of a leaf take beside a plain gradient."""
    if how.groups is None:
        numbers = formed_numbers(plan, how.uses) + leaf.size
        total = numbers * ghost_cost.fitting(batch_size, numbers, ghost_cost.device())
    else:
        total = sum(ghost_cost.numbers(group.sizes, ghost_cost.device()) for group in how.groups)
    return total * max(leaf.dtype.itemsize, 4)


def formed_numbers(plan: Plan, uses: list[Use]) -> int:
    """Return how many numbers the gradients of one example at these uses take, while they are formed."""
    return sum(int(np.prod([use.aval.size, *plan.sites[use.site].lengths])) for use in uses)


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
            scale = jnp.asarray(-1.0 if name == "neg" else env[slot]).astype(g.dtype).reshape(())
            g = g / scale if name == "div" else g * scale
        if use.rule.is_index and not group.sizes.is_index:
            a = jax.nn.one_hot(a, group.sizes.i, dtype=g.dtype)
        a, g = (g, a) if is_swapped else (a, g)
        if order is not None:
            a, g = (_reordered(*factor) for factor in zip((a, g), *order, strict=True))
        parts.append((a, g))
    return tuple(jnp.concatenate(part, 1) for part in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
