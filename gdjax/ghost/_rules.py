"""Rules: how the gradients of the examples are measured at one use of a parameter, without keeping them.

A rule speaks for one primitive in which a parameter w meets an activation x. It says what the gradient of one example
is, of x and of the cotangent g of the result: `Factors` of it, A'G with A [K, T, I], made of x, and G [K, T, O], made
of g, where T runs over the positions that share the weight (tokens, pixels) and K over axes that w, x and the result
share (heads, groups); or its `Entries`, where they are no more than those of x. Uses without a rule are materialised.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax._trees import wide
from gdjax.ghost import _cost as ghost_cost
from gdjax.ghost._cost import Sizes

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
Measured = tuple[Any, Any]
"""(gradients summed over examples, or None where they were not formed on the way; the measure)."""


class Measure(NamedTuple):
    """What is wanted of the gradients of the examples.

    Attributes:
        of_factors: (factors of one example, sizes, x [B, ...], g [B, ...], chunk for a device) -> Measured, [K, I, O].
        of_gradients: gradients [B, ...] -> measure.
        of_chunks: measures of chunks -> measure, or None where all gradients have to be there at once.
    """

    of_factors: Callable[..., Measured]
    of_gradients: Callable[[jax.Array], jax.Array]
    of_chunks: Callable[[jax.Array, jax.Array], jax.Array] | None


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


def in_chunks(
    form: Callable, data: Any, size: int, chunk_size: int, measure: Measure, *, want_total: bool = True
) -> Measured:
    """Form the gradients of one chunk of examples after the other; return (their sums or None, their measures).

    Args:
        form: data of one example -> list of gradients.
        data: pytree of arrays [B, ...].
    """

    def formed(data):
        gradients = jax.vmap(form)(data)
        return [summed(g) if want_total else None for g in gradients], [measure.of_gradients(g) for g in gradients]

    if chunk_size >= size or measure.of_chunks is None:
        return formed(data)
    even = size - size % chunk_size

    def step(total, chunk):
        added, measures = formed(chunk)
        total = jax.tree.map(jnp.add, total, added)
        return total, measures

    total, last = formed(jax.tree.map(lambda x: x[even:], data))  # of no example where the chunks come out even
    chunks = jax.tree.map(lambda x: x[:even].reshape(-1, chunk_size, *x.shape[1:]), data)
    total, measures = lax.scan(step, total, chunks)
    return total, [measure.of_chunks(chunked, rest) for chunked, rest in zip(measures, last, strict=True)]


def gradient(sizes: Sizes, a: jax.Array, g: jax.Array) -> jax.Array:
    """Return A'G [K, I, O] of one example."""
    if sizes.is_index:
        empty = jnp.zeros((sizes.i, sizes.o), g.dtype)
        return jax.vmap(lambda rows, g: empty.at[rows].add(g))(a, g)
    return jnp.einsum("kti,kto->kio", *_alike(a, g))


def _alike(a, g):
    return (a, g) if a.dtype == g.dtype else (wide(a), wide(g))


# Functions that every leaf passes through are compiled with the program around them; `jit` has JAX trace them once for
# all leaves of the same shapes.
@partial(jax.jit, static_argnums=2)
def _total(a: jax.Array, g: jax.Array, sizes: Sizes) -> jax.Array:
    """Return the sum over examples of A'G, in float32 at least."""
    if sizes.is_index:
        by_group = (x.swapaxes(0, 1).reshape(sizes.k, -1, *x.shape[3:]) for x in (a, wide(g)))
        empty = jnp.zeros((sizes.i, sizes.o), wide(g).dtype)
        return jax.vmap(lambda rows, g: empty.at[rows].add(g))(*by_group)
    return jnp.einsum("bkti,bkto->kio", wide(a), wide(g))


def _norms_of_factors(of, sizes: Sizes, x, g, want_total: bool) -> Measured:
    """For T = 1, |a|^2 |g|^2 (Goodfellow 2015, arXiv 1510.01799); else the cheaper of the Gram form and A'G itself."""
    on_cpu, elsewhere = (partial(norms_by, way, of, sizes, want_total=want_total) for way in ghost_cost.ways(sizes))
    if on_cpu.args[0] == elsewhere.args[0]:
        return on_cpu(x, g)
    return lax.platform_dependent(x, g, cpu=on_cpu, default=elsewhere)


def norms_by(way: ghost_cost.Way, of, sizes: Sizes, x, g, *, want_total: bool) -> Measured:
    """Return (summed gradient [K, I, O] or None, squared norms [B]), taken in this way."""
    if way.name == "in chunks":
        [total], [norms] = in_chunks(
            lambda both: [gradient(sizes, *of(*both))], (x, g), sizes.b, way.chunk_size, NORMS, want_total=want_total
        )
        return total, norms
    a, g_factor = jax.vmap(of)(x, g)
    total = _total(a, g_factor, sizes) if want_total else None
    if sizes.is_index:
        return total, _row_norms(a, wide(g_factor))
    if way.name == "product":
        return total, _product(wide(a), wide(g_factor))
    norms, is_bad = _gram_norms(wide(a), wide(g_factor))
    chunks = ghost_cost.Way("in chunks", ghost_cost.chunk_size(sizes, ghost_cost.device()))
    other = partial(norms_by, chunks, of, sizes, want_total=False)
    return total, lax.cond(is_bad, lambda x, g: other(x, g)[1], lambda x, g: norms, x, g)


@jax.jit
def _row_norms(rows, g):
    """Add up what goes to the same row, at each of its positions; such a row is counted as often as it is read."""
    same = (rows[..., :, None] == rows[..., None, :]).astype(g.dtype)
    return jnp.sum(jnp.sum(jnp.einsum("bkts,bkso->bkto", same, g) ** 2, 3) / jnp.sum(same, 3), (1, 2))


def _balanced(a, g):
    """Move the size of every example's g to its a, as a power of two: neither has squares that overflow or vanish
    where those of their product do not.
    """
    kind = jnp.finfo(g.dtype)
    size = lax.reduce_precision(jnp.max(jnp.abs(g), (1, 2, 3), keepdims=True, initial=0), kind.nexp, 0)
    # Were cotangents constant, XLA would square a and the size apart.
    size = lax.optimization_barrier(jnp.where((size >= kind.tiny) & jnp.isfinite(size), size, 1))
    return a * size, g / size


@jax.jit
def _product(a, g):
    a, g = _balanced(a, g)
    norms = jnp.sqrt(jnp.sum(g**2, (2, 3), keepdims=True))
    return jnp.sum((a * norms) ** 2, (1, 2, 3))


@jax.jit
def _gram_norms(a, g):
    """Return the sums of AA' * GG' (Li et al. 2022, arXiv 2110.05679), and whether rounding has spoilt one.

    With S = (sum over positions of |a_t| |g_t|)^2, the norm that nothing cancelled in, rounding is about eps S at most.
    Where a norm is below 2^10 eps S, so that it may be wrong by a thousandth, A'G itself should be formed.
    """
    a, g = _balanced(a, g)
    inner = jnp.einsum("bkti,bksi->bkts", a, a) * jnp.einsum("bkto,bkso->bkts", g, g)
    norms = jnp.sum(inner, (1, 2, 3))
    straight = jnp.sum(jnp.sum(jnp.sqrt(jnp.diagonal(inner, axis1=2, axis2=3)), 2) ** 2, 1)
    return jnp.maximum(norms, 0), jnp.any(norms < 2**10 * jnp.finfo(norms.dtype).eps * straight)


def _moments_of_factors(of, sizes: Sizes, x, g, want_total: bool) -> Measured:
    """Sum the squares of every element; for T = 1 that is (a * a)'(g * g) (Dangel et al. 2020, arXiv 1912.10985)."""
    if sizes.t == 1:
        a, g = jax.vmap(of)(x, g)
        total = _total(a, g, sizes) if want_total else None
        if sizes.is_index:
            return total, _total(a, wide(g) ** 2, sizes)
        a, g = _balanced(wide(a), wide(g))
        return total, _total(a**2, g**2, sizes)
    chunk = ghost_cost.chunk_size(sizes, "cpu")
    [total], [moments] = in_chunks(lambda both: [gradient(sizes, *of(*both))], (x, g), sizes.b, chunk, MOMENTS)
    return total, moments


def _gram_of_factors(of, sizes: Sizes, x, g, want_total: bool) -> Measured:
    """Return inner products of all pairs of gradients; for T = 1 without forming the gradients."""
    a, g = jax.vmap(of)(x, g)
    total = _total(a, g, sizes) if want_total else None
    if sizes.t > 1:
        return total, inner_products(jax.vmap(lambda a, g: gradient(sizes, a, g))(a, g))
    a, g = (a, wide(g)) if sizes.is_index else _balanced(wide(a), wide(g))
    a, g = a[:, :, 0], g[:, :, 0]
    alike = a.T[:, :, None] == a.T[:, None, :] if sizes.is_index else jnp.einsum("bki,cki->kbc", a, a)
    return total, jnp.sum(alike * jnp.einsum("bko,cko->kbc", g, g), 0)


NORMS = Measure(_norms_of_factors, squared_norms, lambda chunked, rest: jnp.append(chunked.reshape(-1), rest))
MOMENTS = Measure(_moments_of_factors, lambda g: jnp.sum(wide(g) ** 2, 0), lambda chunked, rest: chunked.sum(0) + rest)
GRAM = Measure(_gram_of_factors, inner_products, None)


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
            inside = [(starts[axis] >= 0) & (starts[axis] <= limit) for axis, limit in limits.items()]
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
    index = [jnp.clip(starts[axis].astype(jnp.int32), 0, table[axis] - 1) for axis in axes]
    places = jnp.ravel_multi_index(index, [table[axis] for axis in axes], mode="clip") if axes else None
    return jnp.zeros_like(next(iter(starts.values())), jnp.int32) if places is None else places


def add(equation: Equation, position: int) -> Rule | None:
    """Biases: the gradient is the cotangent, summed over the axes along which w is repeated."""
    shape = equation.invars[position].aval.shape
    sign = -1 if equation.primitive.name == "sub" and position == 1 else 1
    return Entries(lambda x, g: sign * _collapsed(g, shape))


def mul(equation: Equation, position: int) -> Rule | None:
    """Scales, as of LayerNorm."""
    shape = equation.invars[position].aval.shape
    return Entries(lambda x, g: _collapsed(g * x, shape))


def _collapsed(g: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    axes = [i for i in range(g.ndim) if not shape or shape[i] != g.shape[i]]
    return jnp.sum(wide(g), axes).reshape(shape)


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
