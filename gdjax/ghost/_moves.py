"""Equations that move the entries of a parameter, or scale them all alike, and so keep what its factors say."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gdjax.ghost._jaxpr import is_real, literal
from gdjax.ghost._plan import Top

ADDED = ("add", "sub", "add_any")
SAME = ("copy", "copy_p", "convert_element_type", "sharding_constraint")


Moved = tuple[Sequence[Any], tuple[int, ...], tuple, Callable | None]


def moved(equation, ins, function, tops, constant: Callable, known: Callable) -> Moved:
    """Return what an equation makes of the entries of one leaf: (views of the outputs, strides, scalars, move or None).

    `constant` takes the value of a literal and returns it as a Top value; `known` takes a Top value and returns its
    numbers, for all iterations, where they are known.
    """
    nothing = [None] * len(equation.outvars), (), (), None
    weights = [top for top in tops if top.leaves]
    if len(weights) != 1 or not weights[0].isometric or not equation.outvars:
        return nothing
    name, parameters, shape = equation.primitive.name, equation.params, equation.outvars[0].aval.shape
    view, strides, scales = weights[0].view, weights[0].strides, weights[0].scales
    if name in ("mul", "div", *ADDED):
        return _combined(equation, ins, weights[0], constant) or nothing
    if name in SAME or name == "neg":
        return [view], strides, (*scales, (name, -1)) if name == "neg" else scales, _identity
    if name == "dynamic_slice":
        return _sliced(equation, ins, tops, known) or nothing
    if name not in MOVES or (name == "broadcast_in_dim" and equation.invars[0].aval.size != int(np.prod(shape))):
        return nothing
    if view is None:
        return nothing[0], strides, scales, function
    views = MOVES[name](view, parameters, shape)
    return [v if v.size == 0 or np.may_share_memory(v, view) else None for v in views], strides, scales, function


def _combined(equation, ins, weight: Top, constant) -> Moved | None:
    """A weight times or over a scalar, or one that a constant is added to."""
    name, place = equation.primitive.name, next(i for i, kind in enumerate(ins) if kind is weight)
    variable, other = equation.invars[1 - place], ins[1 - place]
    if other is None:
        other = constant(literal(variable))
    is_moved = equation.outvars[0].aval.shape == equation.invars[place].aval.shape and not other.leaves
    if name in ADDED:
        is_in_step = all(weight.loops[i][1] or not is_sliced for i, (_, is_sliced) in enumerate(other.loops))
        scales = [("neg", -1)] if name == "sub" and place == 1 else []
        return (
            ([weight.view], weight.strides, (*weight.scales, *scales), _identity) if is_moved and is_in_step else None
        )
    is_scalar = variable.aval.size == 1 and is_real(variable.aval) and not any(sliced for _, sliced in other.loops)
    if not (is_moved and is_scalar) or (name == "div" and place == 1):
        return None
    return [weight.view], weight.strides, (*weight.scales, (name, other.slot)), _identity


def _sliced(equation, ins, tops, known) -> Moved | None:
    """A slice that every iteration takes for itself: entry i of one axis, where i is known and always another."""
    weight, *starts = ins
    shape, sizes = equation.invars[0].aval.shape, equation.params["slice_sizes"]
    axes = [axis for axis, size in enumerate(sizes) if size != shape[axis]]
    if len(axes) != 1 or sizes[axes[0]] != 1 or not isinstance(starts[axes[0]], Top):
        return None
    [axis], start = axes, starts[axes[0]]
    places = known(start.slot)
    if places is None or any(top is not start and any(is_sliced for _, is_sliced in top.loops) for top in tops):
        return None
    places = np.clip(places.astype(int), 0, shape[axis] - 1)
    if not places.size or len(np.unique(places)) != places.size:
        return None

    def move(array):
        return [jnp.expand_dims(jnp.moveaxis(array, axis, 0)[places], places.ndim + axis)]

    first, steps = places.reshape(-1)[0], [np.diff(places, axis=i).reshape(-1) for i in range(places.ndim)]
    if weight.view is None or any(len(set(step.tolist())) > 1 for step in steps):
        return [None], (), weight.scales, move
    view = weight.view[(*[slice(None)] * axis, slice(first, first + 1))]
    strides = tuple(weight.view.strides[axis] * int(step[0] if step.size else 0) for step in steps)
    return [view], strides, weight.scales, move


def _identity(x):
    return [x]


def _reshaped(view, parameters, shape):
    return [view.reshape(shape)]


def _slice(view, parameters, shape):
    bounds = parameters["start_indices"], parameters["limit_indices"], parameters["strides"] or [1] * view.ndim
    return [view[tuple(map(slice, *bounds))]]


MOVES: dict[str, Callable] = {
    **dict.fromkeys(("reshape", "squeeze", "expand_dims", "broadcast_in_dim"), _reshaped),
    "transpose": lambda view, parameters, shape: [view.transpose(parameters["permutation"])],
    "rev": lambda view, parameters, shape: [np.flip(view, parameters["dimensions"])],
    "slice": _slice,
    "split": lambda view, parameters, shape: np.split(view, np.cumsum(parameters["sizes"])[:-1], parameters["axis"]),
}
"""Primitives that move the entries of a parameter and neither change nor repeat one, as done to a view of them."""
