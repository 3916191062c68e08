"""Rules: how the gradients of the examples are measured at one use of a parameter, without keeping them.

A rule speaks for one primitive in which a parameter w meets an activation x. Most uses have *factors*: the gradient
of one example is A'G with A [K, T, I], made of x, and G [K, T, O], made of the cotangent of the result; T runs over
the positions that share the weight (tokens, pixels), K over axes that w, x and the result share (heads, groups).

To add a rule: write `(equation, position of w) -> Backward or None`, None where the equation is not of the kind that
the rule can do, and add it to `RULES` under the name of its primitive; with factors, `from_factors` does the rest.
Uses without a rule are materialised.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax._trees import wide
from gdjax.ghost import _cost as ghost_cost

Equation = Any
Factors = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""(x, cotangent g) of one example -> (A [K, T, I], G [K, T, O])."""
Measured = tuple[jax.Array | None, jax.Array]
"""(gradient of w summed over examples, or None where it was not formed on the way; the measure)."""


class Measure(NamedTuple):
    """What is wanted of the gradients of the examples at a use.

    Attributes:
        of_factors: (factors, back, x [B, ...], g [B, ...]) -> Measured; `back` takes [K, I, O] to the shape of w.
        of_gradients: gradients [B, ...] -> measure.
        shape: (B, shape of w) -> shape of the measure.
        like_weight: whether that is the shape of w, so that the measure follows the reshapes of w.
    """

    of_factors: Callable[[Factors, Callable, jax.Array, jax.Array], Measured]
    of_gradients: Callable[[jax.Array], jax.Array]
    shape: Callable[[int, tuple[int, ...]], tuple[int, ...]]
    like_weight: bool


Backward = Callable[[Measure, jax.Array, jax.Array, jax.Array], Measured]
"""(measure, w, x [B, ...], g [B, ...]) -> Measured."""


def squared_norms(gradients: jax.Array) -> jax.Array:
    """Return |g_b|^2, [B], of gradients [B, ...]."""
    return jnp.sum(wide(gradients) ** 2, tuple(range(1, gradients.ndim)))


def inner_products(gradients: jax.Array) -> jax.Array:
    """Return g_b . g_c, [B, B], of gradients [B, ...]."""
    flat = wide(gradients).reshape(len(gradients), -1)
    return flat @ flat.T


def summed(gradients: jax.Array) -> jax.Array:
    """Return the sum over examples, [...], of gradients [B, ...], in float32 at least.

    A product with ones: the plain sum over the leading axis walks down one column after the other on a CPU, twenty
    times slower where their stride is a power of two.
    """
    gradients = wide(gradients)
    return jnp.tensordot(jnp.ones(len(gradients), gradients.dtype), gradients, 1, precision=lax.Precision.HIGHEST)


def _norms_of_factors(factors: Factors, back: Callable, x: jax.Array, g: jax.Array) -> Measured:
    """For T = 1, |a|^2 |g|^2 (Goodfellow 2015, arXiv 1510.01799); else the cheaper of the Gram form and A'G itself."""
    a_shape, g_shape = (f.shape for f in jax.eval_shape(jax.vmap(factors), x, g))
    size = x[0].size
    on_cpu, elsewhere = (ghost_cost.cheapest(a_shape, g_shape, size, device) for device in ("cpu", "accelerator"))
    if on_cpu == elsewhere:
        total, norms = norms_by(on_cpu, factors, x, g)
        return None if total is None else back(total), norms

    def with_total(way):
        def run(x, g):
            total, norms = norms_by(way, factors, x, g)
            if total is None:
                a, g = jax.vmap(factors)(x, g)
                total = wide(_gradient(a, g, "bkti,bkto->kio"))
            return total, norms

        return run

    total, norms = lax.platform_dependent(x, g, cpu=with_total(on_cpu), default=with_total(elsewhere))
    return back(total), norms


def norms_by(way: ghost_cost.Way, factors: Factors, x: jax.Array, g: jax.Array) -> Measured:
    """Return (summed gradient [K, I, O] or None, squared norms [B]), taken in this way."""
    if way.name == "in chunks":
        return _in_chunks(factors, x, g, way.chunk_size)
    return {"product": _product, "gram": _gram_norms}[way.name](factors, x, g)


def _product(factors, x, g):
    a, g = map(wide, jax.vmap(factors)(x, g))
    return None, jnp.sum(jnp.sum(a**2, (2, 3)) * jnp.sum(g**2, (2, 3)), 1)


def _gram_norms(factors, x, g):
    """Sum AA' * GG' (Li et al. 2022, arXiv 2110.05679)."""
    a, g = map(wide, jax.vmap(factors)(x, g))
    inner = jnp.einsum("bkti,bksi->bkts", a, a) * jnp.einsum("bkto,bkso->bkts", g, g)
    # Rounding can leave a small negative number where the true norm is zero.
    return None, jnp.maximum(jnp.sum(inner, (1, 2, 3)), 0)


def _in_chunks(factors, x, g, chunk_size):
    """Form A'G of one chunk of examples after the other, of which the summed gradient is the sum."""

    def formed(x, g):
        gradients = _gradients(factors, x, g)
        return summed(gradients), squared_norms(gradients)

    def chunk(total, both):
        added, norms = formed(*both)
        return total + added, norms

    even = len(x) - len(x) % chunk_size
    total, last = formed(x[even:], g[even:])  # of no example where the chunks come out even
    chunks = tuple(v[:even].reshape(-1, chunk_size, *v.shape[1:]) for v in (x, g))
    total, norms = lax.scan(chunk, total, chunks)
    return total, jnp.concatenate([norms.reshape(-1), last])


def _moments_of_factors(factors: Factors, back: Callable, x: jax.Array, g: jax.Array) -> Measured:
    """Sum the squares of every element; for T = 1 that is (a * a)'(g * g) (Dangel et al. 2020, arXiv 1912.10985)."""
    if jax.eval_shape(factors, x[0], g[0])[0].shape[1] == 1:
        a, g = map(wide, jax.vmap(factors)(x, g))
        return None, back(jnp.einsum("bkti,bkto->kio", a**2, g**2))

    def one(sums, both):
        gradient = _gradient(*factors(*both))
        return (sums[0] + gradient, sums[1] + wide(gradient) ** 2), None

    zero = jnp.zeros_like(_gradient(*factors(x[0], g[0])))
    (total, squares), _ = lax.scan(one, (zero, wide(zero)), (x, g))
    return back(total), back(squares)


def _gram_of_factors(factors: Factors, back: Callable, x: jax.Array, g: jax.Array) -> Measured:
    """Return inner products of all pairs of gradients; for T = 1 without forming the gradients."""
    if jax.eval_shape(factors, x[0], g[0])[0].shape[1] == 1:
        a, g = (wide(f)[:, :, 0] for f in jax.vmap(factors)(x, g))
        return None, jnp.sum(jnp.einsum("bki,cki->kbc", a, a) * jnp.einsum("bko,cko->kbc", g, g), 0)
    gradients = _gradients(factors, x, g)
    return back(summed(gradients)), inner_products(gradients)


def _gradient(a: jax.Array, g: jax.Array, product: str = "kti,kto->kio") -> jax.Array:
    if a.dtype != g.dtype:
        a, g = wide(a), wide(g)
    return jnp.einsum(product, a, g)


def _gradients(factors, x, g):
    a, g = jax.vmap(factors)(x, g)
    return _gradient(a, g, "bkti,bkto->bkio")


NORMS = Measure(_norms_of_factors, squared_norms, lambda b, w: (b,), like_weight=False)
MOMENTS = Measure(_moments_of_factors, lambda g: jnp.sum(wide(g) ** 2, 0), lambda b, w: w, like_weight=True)
GRAM = Measure(_gram_of_factors, inner_products, lambda b, w: (b, b), like_weight=False)


def from_factors(factors: Factors, back: Callable[[tuple[int, ...]], Callable]) -> Backward:
    """Return the backward pass of a use with factors; `back(shape of w)` takes [K, I, O] to that shape."""
    return lambda measure, w, x, g: measure.of_factors(factors, back(w.shape), x, g)


def dot_general(equation: Equation, position: int) -> Backward | None:
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
        a = _grouped(x, x_shared, x_free, x_contract)
        return a, _grouped(
            g, range(first), range(first_x, first_x + len(x_free)), range(first_w, first_w + len(w_free))
        )

    def back(shape):
        order = [*w_shared, *w_contract, *w_free]
        return lambda product: product.reshape([shape[i] for i in order]).transpose(np.argsort(order))

    return from_factors(factors, back)


def _grouped(x: jax.Array, *groups) -> jax.Array:
    """Bring the axes of each group together and into one: [...] -> [group, group, ...]."""
    sizes = [int(np.prod([x.shape[i] for i in group], dtype=int)) for group in groups]
    return x.transpose([i for group in groups for i in group]).reshape(sizes)


def conv_general_dilated(equation: Equation, position: int) -> Backward | None:
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

    def back(shape):
        def to_kernel(product):
            by_axis = product.reshape(groups, *window, num_in, num_out // groups)
            by_axis = jnp.moveaxis(by_axis, (-1, -2), (1, 2)).reshape(num_out, num_in, *window)
            return by_axis.transpose(np.argsort(rhs))

        return to_kernel

    return from_factors(factors, back)


def gather(equation: Equation, position: int) -> Backward | None:
    """Rows of a table w: positions that read the same row add up before they are squared."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    table = equation.invars[0].aval
    whole_rows = tuple(sizes) == (1, *table.shape[1:]) and tuple(numbers.start_index_map) == (0,)
    plain = tuple(numbers.collapsed_slice_dims) == (0,) and not numbers.operand_batching_dims
    if position != 0 or not (whole_rows and plain):
        return None

    def rows_of(index, g):
        """Return (row numbers [T], their cotangents [T, D]) of one example; a row outside the table counts zero."""
        places = [i for i in range(g.ndim) if i not in numbers.offset_dims]
        rows, index = _grouped(g, places, numbers.offset_dims), index.reshape(-1)
        if equation.params["mode"] == lax.GatherScatterMode.CLIP:
            return jnp.clip(index, 0, table.shape[0] - 1), rows
        return index, rows * ((index >= 0) & (index < table.shape[0]))[:, None].astype(rows.dtype)

    def backward(measure, w, x, g):
        index, rows = jax.vmap(rows_of)(x, g)
        if measure is NORMS:
            same = (index[:, :, None] == index[:, None, :]).astype(wide(rows).dtype)
            inner = jnp.einsum("btd,bsd->bts", wide(rows), wide(rows))
            return None, jnp.maximum(jnp.sum(inner * same, (1, 2)), 0)
        empty = jnp.zeros((table.shape[0], rows.shape[-1]), rows.dtype)
        gradients = jax.vmap(lambda index, rows: empty.at[index].add(rows))(index, rows)
        return None, measure.of_gradients(gradients.reshape(len(x), *w.shape))

    return backward


RULES: dict[str, Callable[[Equation, int], Backward | None]] = {
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
    "gather": gather,
}


def find(equation: Equation, position: int) -> Backward | None:
    """Return the rule for the parameter at this operand of an equation, or None."""
    rule = RULES.get(equation.primitive.name)
    return rule(equation, position) if rule else None
