"""Rules: how the gradients of the examples are measured at one use of a parameter, without keeping them.

A rule speaks for one primitive in which a parameter w meets an activation x. It says what the gradient of one example
is, of x and of the cotangent g of the result: `Factors` of it, A'G with A [K, T, I], made of x, and G [K, T, O], made
of g, where T runs over the positions that share the weight (tokens, pixels) and K over axes that w, x and the result
share (heads, groups); or its `Entries`, where they are no more than those of x. Uses without a rule are materialised.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax._trees import wide

Equation = Any


class Factors(NamedTuple):
    """A rule for gradients that are A'G.

    Attributes:
        of: (x, g) of one example -> (A [K, T, I], G [K, T, O]); x is a list where w meets more than one operand.
        shape: w is reshaped to this,
        axes: of which these (in three groups) are K, I and O.
        is_index: whether A is integers [K, T] instead, the places in I of rows that are 0 but for a 1.
    """

    of: Callable[..., tuple[jax.Array, jax.Array]]
    shape: tuple[int, ...]
    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    is_index: bool = False


class Entries(NamedTuple):
    """A rule for gradients that take no more than x does: `of` is (x, g) of one example -> gradient like w."""

    of: Callable[[Any, Any], jax.Array]


Rule = Factors | Entries


def dot_general(equation: Equation, position: int) -> Rule | None:
    """Products w @ x and x @ w, with any contracted, shared and free axes."""
    contracting, shared = equation.params["dimension_numbers"]
    w_contract, w_shared = contracting[position], shared[position]
    x_contract, x_shared = contracting[1 - position], shared[1 - position]
    w, x = (equation.invars[i].aval for i in (position, 1 - position))
    w_free = [i for i in range(w.ndim) if i not in (*w_contract, *w_shared)]
    x_free = [i for i in range(x.ndim) if i not in (*x_contract, *x_shared)]
    # The result has the shared axes first, then the free axes of the left and of the right operand.
    first = len(x_shared)
    first_x, first_w = (first + len(w_free), first) if position == 0 else (first, first + len(x_free))

    def factors(x, g):
        g_groups = range(first), range(first_x, first_x + len(x_free)), range(first_w, first_w + len(w_free))
        return _grouped(x, x_shared, x_free, x_contract), _grouped(g, *g_groups)

    return Factors(factors, w.shape, (tuple(w_shared), tuple(w_contract), tuple(w_free)))


def _grouped(x: jax.Array, *groups) -> jax.Array:
    """Bring the axes of each group together and into one: [...] -> [group, group, ...]."""
    sizes = [int(np.prod([x.shape[i] for i in group], dtype=int)) for group in groups]
    return x.transpose([i for group in groups for i in group]).reshape(sizes)


def conv_general_dilated(equation: Equation, position: int) -> Rule | None:
    """Convolution by a kernel w: a product with the patches of x, K being the groups."""
    parameters = equation.params
    if position != 1 or parameters["batch_group_count"] != 1:
        return None
    lhs, rhs, out = parameters["dimension_numbers"]
    groups, strides = parameters["feature_group_count"], parameters["window_strides"]
    kernel = equation.invars[1].aval.shape
    window, num_out, num_in = [kernel[i] for i in rhs[2:]], kernel[rhs[0]], kernel[rhs[1]]

    def factors(x, g):
        x = x.transpose(lhs[0], *lhs[2:], lhs[1])
        padding = zip(parameters["padding"], parameters["lhs_dilation"], strict=True)
        inner = [(low, high, step - 1) for (low, high), step in padding]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *inner, (0, 0, 0)])
        g = g.transpose(out[0], *out[2:], out[1])
        patches = []
        for offset in np.ndindex(*window):
            start = [o * step for o, step in zip(offset, parameters["rhs_dilation"], strict=True)]
            stop = [s + (n - 1) * step + 1 for s, n, step in zip(start, g.shape[1:-1], strides, strict=True)]
            patches.append(lax.slice(x, [0, *start, 0], [len(x), *stop, x.shape[-1]], [1, *strides, 1]))
        # [positions, window, channels]; the groups divide the channels.
        a = jnp.stack(patches, -2).reshape(-1, len(patches), groups, num_in).transpose(2, 0, 1, 3)
        return a.reshape(groups, -1, len(patches) * num_in), g.reshape(-1, groups, num_out // groups).swapaxes(0, 1)

    shape = (*kernel[: rhs[0]], groups, num_out // groups, *kernel[rhs[0] + 1 :])
    inside = tuple(i + (i > rhs[0]) for i in (*rhs[2:], rhs[1]))
    return Factors(factors, shape, ((rhs[0],), inside, (rhs[0] + 1,)))


def gather(equation: Equation, position: int) -> Rule | None:
    """Rows of a table w, found by some of its axes: positions that read the same row add up before they are squared."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    table, mode = equation.invars[0].aval.shape, equation.params["mode"]
    if position != 0 or numbers.operand_batching_dims or not (axes := _row_axes(table, sizes)):
        return None

    def factors(index, g):
        places = [i for i in range(g.ndim) if i not in numbers.offset_dims]
        rows, index = _grouped(g, places, numbers.offset_dims), index.reshape(-1, index.shape[-1])
        starts = dict(zip(numbers.start_index_map, index.T, strict=True))
        limits = {axis: table[axis] - sizes[axis] for axis in starts}
        if mode != lax.GatherScatterMode.CLIP:
            inside = [starts[axis] == _clipped(starts[axis], limit) for axis, limit in limits.items()]
            rows = jnp.where(jnp.all(jnp.stack(inside), 0)[:, None], rows, 0)  # outside, what it reads is a constant
        return _row_numbers(starts, table, axes[0])[None], rows[None]

    return Factors(factors, table, ((), *axes), is_index=True)


def dynamic_slice(equation: Equation, position: int) -> Rule | None:
    """One row of a table w, found by some of its axes."""
    table, sizes = equation.invars[0].aval.shape, equation.params["slice_sizes"]
    if position != 0 or not (axes := _row_axes(table, sizes)):
        return None
    variables = list(dict.fromkeys(v for v in equation.invars[1:] if not hasattr(v, "val")))

    def factors(x, g):
        values = dict(zip(variables, x if isinstance(x, list) else [x], strict=True))
        starts = {i: jnp.reshape(values[v] if v in variables else v.val, 1) for i, v in enumerate(equation.invars[1:])}
        return _row_numbers(starts, table, axes[0])[None], g.reshape(1, 1, -1)

    return Factors(factors, table, ((), *axes), is_index=True)


def _row_axes(table, sizes) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the axes of which one entry is read, and those that are read whole; None where some are neither."""
    found = tuple(i for i, n in enumerate(sizes) if n != table[i])
    return (found, tuple(set(range(len(table))) - set(found))) if all(sizes[i] == 1 for i in found) else None


def _row_numbers(starts, table, axes) -> jax.Array:
    index = [_clipped(starts[axis], table[axis] - 1).astype(jnp.int32) for axis in axes]
    places = jnp.ravel_multi_index(index, [table[axis] for axis in axes], mode="clip") if axes else None
    return jnp.zeros_like(next(iter(starts.values())), jnp.int32) if places is None else places


def _clipped(start: jax.Array, limit: int) -> jax.Array:
    return jnp.clip(start, 0, min(limit, jnp.iinfo(start.dtype).max))  # 300 in uint8 would be 44


def add(equation: Equation, position: int) -> Rule | None:
    """Biases: the gradient is the cotangent, summed over the axes along which w is repeated."""
    shape = equation.invars[position].aval.shape
    is_negative = equation.primitive.name == "sub" and position == 1
    return Entries(lambda x, g: -_collapsed(g, shape) if is_negative else _collapsed(g, shape))


def mul(equation: Equation, position: int) -> Rule | None:
    """Scales, as of LayerNorm."""
    shape = equation.invars[position].aval.shape
    return Entries(lambda x, g: _collapsed(g * x, shape))


def _collapsed(g: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    axes = [i for i in range(g.ndim) if not shape or shape[i] != g.shape[i]]
    return jnp.sum(wide(g), axes).reshape(shape) if axes else wide(g)


RULES: dict[str, Callable[[Equation, int], Rule | None]] = {
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
    "gather": gather,
    "dynamic_slice": dynamic_slice,
    **dict.fromkeys(("add", "sub", "add_any"), add),
    "mul": mul,
}


def find(equation: Equation, position: int) -> Rule | None:
    """Return the rule for the parameter at this operand of an equation, or None."""
    rule = RULES.get(equation.primitive.name)
    return rule(equation, position) if rule else None
