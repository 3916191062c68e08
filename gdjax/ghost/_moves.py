"""Equations that move the entries of a parameter, or scale them all alike, and so keep what its factors say."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gdjax.ghost._jaxpr import is_real, literal

SAME = ("copy", "copy_p", "convert_element_type", "sharding_constraint")


def moved(equation, ins, function, tops, constant: Callable) -> tuple[Sequence[Any], tuple, Callable | None]:
    """Return what an equation makes of the entries of one leaf: (views of the outputs, scalars, move or None).

    `constant` takes the value of a literal and returns it as a Top value.
    """
    nothing = [None] * len(equation.outvars), (), None
    weights = [top for top in tops if top.leaves]
    if len(weights) != 1 or not weights[0].isometric or not equation.outvars:
        return nothing
    name, parameters, shape = equation.primitive.name, equation.params, equation.outvars[0].aval.shape
    view, scales = weights[0].view, weights[0].scales
    if name in ("mul", "div"):
        place = next(i for i, kind in enumerate(ins) if kind is weights[0])
        variable, scalar = equation.invars[1 - place], ins[1 - place]
        if scalar is None:
            scalar = constant(literal(variable))
        is_scalar = variable.aval.size == 1 and is_real(variable.aval) and not scalar.leaves
        if (name == "div" and place == 1) or not is_scalar or shape != equation.invars[place].aval.shape:
            return nothing
        if any(is_sliced for _, is_sliced in scalar.loops):
            return nothing
        return [view], (*scales, (name, scalar.slot)), _identity
    if name in SAME or name == "neg":
        return [view], (*scales, (name, -1)) if name == "neg" else scales, _identity
    if name not in MOVES:
        return nothing
    if name == "broadcast_in_dim" and equation.outvars[0].aval.size != equation.invars[0].aval.size:
        return nothing
    if view is None:
        return nothing[0], scales, function
    views = MOVES[name](view, parameters, shape)
    return [v if v.size == 0 or np.may_share_memory(v, view) else None for v in views], scales, function


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
