"""From the sites where a parameter leaf is used to the measure of its gradients.

A leaf whose sites all have factors of its entries in the same arrangement is measured from these, which stand behind
each other along T. Values of size one that were computed from the leaf, such as a penalty on it, add a direction c that
all examples share: |a + k c|^2 = |a|^2 + 2 k <a, c> + k^2 |c|^2. Of all other leaves the gradients are formed, for a
chunk of examples at a time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import as_strided

from gdjax.ghost import _cost as ghost_cost
from gdjax.ghost._cost import Sizes
from gdjax.ghost._factors import NORMS, Measure
from gdjax.ghost._jaxpr import is_real
from gdjax.ghost._plan import Plan, Site, Top
from gdjax.ghost._rules import Entries, Factors


class Use(NamedTuple):
    """A site where a leaf is used: its number, which of its operands, its kind, shape, rule, and why there is none."""

    site: int
    place: int
    top: Top
    aval: jax.ShapeDtypeStruct
    rule: Any  # a Rule or None
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
    is_low |= any(use.top.is_low for use in uses)
    if groups is None or (commons and measure is not NORMS):
        is_plain = not is_low and all(isinstance(use.rule, Entries) and not use.top.custom for use in uses)
        return LeafPlan(uses, None, [], not is_plain, None)
    if measure is NORMS and len(rest) == 1 and not (commons or is_low):
        [use] = rest
        if plan.sites[use.site].inside and not use.top.scales and all(is_sliced for _, is_sliced in use.top.loops):
            return LeafPlan(uses, groups, [], False, use.site)
    ways = (way for group in groups for way in ghost_cost.ways(group.sizes))
    is_given = is_low or (measure is NORMS and any(way.name == "in chunks" for way in ways))
    # One product over the positions of all uses, which stand together for the norms anyway, is cheaper than one each.
    is_given |= any(len(group.uses) > 1 and len({use.rule.is_index for use in group.uses}) == 1 for group in groups)
    return LeafPlan(uses, groups, commons, is_given, None)


def is_common(use: Use, plan: Plan) -> bool:
    """Whether a use is of one number that was computed from leaves, linearly as far as derivatives go."""
    lengths = plan.sites[use.site].lengths
    return not use.top.isometric and use.aval.size == 1 and is_real(use.aval) and not use.top.custom and not lengths


def factor_sizes(use: Use, site: Site, batch_size: int) -> Sizes:
    shape, (k_axes, i_axes, o_axes) = use.rule.shape, use.rule.axes
    k, i, o = (int(np.prod([shape[axis] for axis in axes], dtype=int)) for axes in (k_axes, i_axes, o_axes))
    t = site.out[0].size // (k * o)
    for length, is_sliced in use.top.loops:
        k, t = (k * length, t) if is_sliced else (k, t * length)
    return Sizes(batch_size, k, t, i, o, site.num_read, use.rule.is_index)


def _aligned(plan: Plan, uses: list[Use], batch_size: int) -> list[Group] | None:
    """Return groups of uses whose factors have the same rows and columns; None where entries overlap otherwise."""
    if len(uses) == 1:
        return [Group(tuple(uses), (False,), (None,), factor_sizes(uses[0], plan.sites[uses[0].site], batch_size))]
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
        key = split.__array_interface__["data"][0], labels[0], sides, _lengths(use.top), use.top.strides
        found.setdefault(key, []).append((use, labels[1], labels[2]))
    keys = list(found)
    for i, key in enumerate(keys):
        for other in keys[:i]:
            if _overlap(_whole(found[key][0][0].top), _whole(found[other][0][0].top)):
                return None
    groups = [group for members in found.values() if (group := _group(plan, members, batch_size))]
    return groups if len(groups) == len(found) else None


def _lengths(top: Top) -> tuple[int, ...]:
    return tuple(length for length, is_sliced in top.loops if is_sliced)


def _whole(top: Top) -> np.ndarray:
    """Return the view of what all iterations of the loops around see together."""
    view: Any = top.view
    return as_strided(view, (*_lengths(top), *view.shape), (*top.strides, *view.strides))


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    try:
        return bool(np.shares_memory(a, b, max_work=10**4))  # pyright: ignore[reportArgumentType]
    except np.exceptions.TooHardError:
        return True


def _group(plan: Plan, members, batch_size: int) -> Group | None:
    sizes = [factor_sizes(use, plan.sites[use.site], batch_size) for use, _, _ in members]
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
    t, x, is_index = sum(size.t for size in sizes), sum(size.x for size in sizes), all(size.is_index for size in sizes)
    total = sizes[first]._replace(t=t, x=x, is_index=is_index)
    return Group(uses, tuple(swapped), tuple(orders), total)


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
