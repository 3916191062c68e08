"""What is measured of gradients A'G, from their factors or from the gradients themselves, formed in chunks."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdjax._trees import wide
from gdjax.ghost import _cost as ghost_cost
from gdjax.ghost._cost import Sizes

Measured = tuple[Any, Any]
"""(gradients summed over examples, or None where they were not formed on the way; the measure)."""


FORMED = 2**8
"""Entries of a weight up to which its gradients are formed while they are squared: one program for XLA, not three."""


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
    gradients = lax.optimization_barrier(wide(gradients))  # XLA would square what a row is multiplied with apart
    return jnp.sum(gradients**2, tuple(range(1, gradients.ndim)))


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
    # Its memory is taken whether it is needed or not.
    few = ghost_cost.fitting(sizes.b, sizes.k * sizes.i * sizes.o, "rare")
    other = partial(norms_by, ghost_cost.Way("in chunks", few), of, sizes, want_total=False)
    return total, lax.cond(is_bad, lambda x, g: other(x, g)[1], lambda x, g: norms, x, g)


@jax.jit
def _row_norms(rows, g):
    """Add up what goes to the same row: of few positions at each, so that a row is counted as often as it is read."""
    if rows.shape[2] > ghost_cost.FEW:
        return jnp.sum(jax.vmap(jax.vmap(_sorted_norm))(rows, g), 1)
    same = (rows[..., :, None] == rows[..., None, :]).astype(g.dtype)
    return jnp.sum(jnp.sum(jnp.einsum("bkts,bkso->bkto", same, g) ** 2, 3) / jnp.sum(same, 3), (1, 2))


def _sorted_norm(rows, g):
    order = jnp.argsort(rows)
    rows = rows[order]
    number = jnp.cumsum(jnp.append(0, rows[1:] != rows[:-1]))
    return jnp.sum(jax.ops.segment_sum(g[order], number, len(rows), indices_are_sorted=True) ** 2)


def _balanced(a, g):
    """Move the size of every example's g to its a."""
    return balanced(a, g, axes=(1, 2, 3))


def balanced(a, g, axes=None):
    """Move the size of g along these axes to a, as a power of two, so that no square overflows or vanishes alone."""
    kind = jnp.finfo(g.dtype)
    size = lax.reduce_precision(jnp.max(jnp.abs(g), axes, keepdims=axes is not None, initial=0), kind.nexp, 0)
    size = jnp.where((size == 0) | ((size >= kind.tiny) & jnp.isfinite(size)), size, 1)
    # Were cotangents constant, XLA would square a and the size apart.
    size = lax.optimization_barrier(size)
    return a * size, g / jnp.where(size > 0, size, 1)


@jax.jit
def _product(a, g):
    """Return |a|^2 |g|^2, also where only one of them has squares that overflow or vanish.

    It is `_balanced` with fewer steps, as every leaf of a program compiles them.
    """
    if a.shape[3] * g.shape[3] <= FORMED:
        return jnp.sum((a[..., :, None] * g[..., None, :]) ** 2, (1, 2, 3, 4))
    kind = jnp.finfo(g.dtype)
    largest = jnp.clip(jnp.max(jnp.abs(g), (2, 3), keepdims=True, initial=0), kind.tiny, kind.max)
    largest = lax.optimization_barrier(largest)  # were cotangents constant, XLA would square a and norms apart
    norms = jnp.sqrt(jnp.sum((g / largest) ** 2, (2, 3), keepdims=True))
    return jnp.sum((a * largest * norms) ** 2, (1, 2, 3))


@jax.jit
def _gram_norms(a, g):
    """Return the sums of AA' * GG' (Li et al. 2022, arXiv 2110.05679), and whether rounding has spoilt one.

    With S = (sum over positions of |a_t| |g_t|)^2, the norm that nothing cancelled in, rounding is about eps S at most.
    Where a norm is NaN, or below 2^10 eps S, so that it may be wrong by a thousandth, A'G itself should be formed.
    """
    a, g = _balanced(a, g)
    inner = jnp.einsum("bkti,bksi->bkts", a, a) * jnp.einsum("bkto,bkso->bkts", g, g)
    norms = jnp.sum(inner, (1, 2, 3))
    straight = jnp.sum(jnp.sum(jnp.sqrt(jnp.diagonal(inner, axis1=2, axis2=3)), 2) ** 2, 1)
    # Not `<`: a square that overflows, where the cotangent is zero, has made it NaN.
    return jnp.maximum(norms, 0), jnp.any(~(norms >= 2**10 * jnp.finfo(norms.dtype).eps * straight))


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
    if sizes.t != 1:
        return total, inner_products(jax.vmap(lambda a, g: gradient(sizes, a, g))(a, g))
    a, g = (a, wide(g)) if sizes.is_index else _balanced(wide(a), wide(g))
    a, g = a[:, :, 0], g[:, :, 0]
    alike = a.T[:, :, None] == a.T[:, None, :] if sizes.is_index else jnp.einsum("bki,cki->kbc", a, a)
    return total, jnp.sum(alike * jnp.einsum("bko,cko->kbc", g, g), 0)


NORMS = Measure(_norms_of_factors, squared_norms, lambda chunked, rest: jnp.append(chunked.reshape(-1), rest))
MOMENTS = Measure(_moments_of_factors, lambda g: jnp.sum(wide(g) ** 2, 0), lambda chunked, rest: chunked.sum(0) + rest)
GRAM = Measure(_gram_of_factors, inner_products, None)
