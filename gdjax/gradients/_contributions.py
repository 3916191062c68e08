"""Contributions of the examples to a clipped gradient, added up with their bound kept.

**The bound** |contribution| <= C holds to 1e-6 in every dtype. Two ways lead to the sum of the contributions. Where the
program of the loss is in float32 or wider, norms come from `ghost` and the sum from one more backward pass, of the
losses weighted by the factors: no example's gradient is held. That scales cotangents by the factors, which is as good
as scaling gradients only where the backward pass is linear to float32's rounding. A program that computes in bfloat16
or float16, rounds as if it did (`lax.reduce_precision`), or brings a backward pass of its own (`jax.custom_vjp`, which
may clip or clean what it is given), may not be; and with several groups of leaves there are several factors an example.
Then the gradients themselves are formed, some examples at a time, and clipped: what is clipped is what `per_example`
returns, whatever the backward pass does.

In float32 the sum is right for norms from 1e-30 to 1e30 and C from 1e-18 to 1e18: norms whose squares overflow or
vanish are measured again, scaled, and factors C / norm, as small as 1e-48, enter the backward pass times a power of
two. Where a factor of the user's own vanishes in float32, so does the contribution.

On a GPU or TPU, products of float32 are rounded further unless `jax.default_matmul_precision("highest")` forbids it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gdjax import ghost
from gdjax._trees import wide
from gdjax.gradients._weights import filled, sums
from gdjax.problem import Loss, Params


def _coefficients(bounds, factor, norms, weights):
    """Return {group: (the weights [B] times the factors times 2^e, 2^-e)}, e such that none of them vanishes.

    Half the exponent of the smallest factor is what centres the range of the factors, from there up to 1.
    """

    def of_group(norm, bound):
        bound = jnp.asarray(bound, norm.dtype)
        (fraction, exponent), (own, its) = jnp.frexp(bound), jnp.frexp(norm)
        is_clipped = (weights > 0) & (norm > bound) & jnp.isfinite(norm)
        shift = jnp.max(jnp.where(is_clipped, its - exponent, 0), initial=0) // 2
        most = jnp.ldexp(fraction / own, exponent - its + shift)
        factors = jnp.clip(jnp.ldexp(factor(norm, bound), shift), 0, most)
        unit = jnp.ldexp(jnp.ones_like(norm[0]), -shift)
        return jnp.where(weights > 0, weights.astype(norm.dtype) * factors, 0), unit

    return {group: of_group(norms[group], bounds[group]) for group in bounds}


def _kept(weights, losses, norms):
    """Return the weights, zero where a loss or norm is not finite."""
    finite = jnp.stack([jnp.isfinite(x) for x in (losses, *norms.values())])
    return jnp.where(finite.all(0), weights, 0)


def by_weighting(loss, train, names, bounds, factor, drop, batch, weights):
    """Return (sum of contributions, (losses, norms, weights)) from norms and a backward pass of weighted losses."""
    [group] = bounds

    (losses, _, _), norm = ghost.norms(loss, smallest=bounds[group])(train, batch)
    norms = {group: jnp.where(weights > 0, weights.astype(norm.dtype) * norm, 0)}
    if drop:
        weights = _kept(weights, losses, norms)
        batch = filled(batch, weights)
    [(coefficients, unit)] = _coefficients(bounds, factor, norms, weights).values()
    (_, grad, _), _ = sums(loss, train, batch, coefficients)
    grad = jax.tree.map(lambda g: g * unit.astype(g.dtype), grad)
    return _unless_empty(grad, weights), (losses, norms, weights)


def by_forming(loss, train, names, bounds, factor, drop, batch, weights):
    """Return the same from the gradients of the examples."""
    losses, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(train, batch)
    leaves, structure = jax.tree.flatten(jax.tree.map(wide, grads))
    norms = {}
    for group in bounds:
        own = [_norm(leaf) for leaf, name in zip(leaves, names, strict=True) if name == group]
        norm = _norm(jnp.stack([jnp.asarray(x, float) for x in own], 1))
        norms[group] = jnp.where(weights > 0, weights.astype(norm.dtype) * norm, 0)
    if drop:
        weights = _kept(weights, losses, norms)
        leaves = [jnp.where(jnp.expand_dims(weights > 0, range(1, leaf.ndim)), leaf, 0) for leaf in leaves]
    coefficients = _coefficients(bounds, factor, norms, weights)

    def total(name, leaf):
        factors, unit = (x.astype(leaf.dtype) for x in coefficients[name])
        return unit * jnp.tensordot(factors, leaf, 1, precision=lax.Precision.HIGHEST)

    grad = jax.tree.unflatten(structure, [total(*pair) for pair in zip(names, leaves, strict=True)])
    return _unless_empty(grad, weights), (losses, norms, weights)


def _unless_empty(grad: Params, weights: jax.Array) -> Params:
    """Return zero where all weights are zero, so that no example was there to stand in for the others."""
    return jax.tree.map(lambda g: jnp.where(jnp.any(weights > 0), g, 0), grad)


def _norm(x: jax.Array) -> jax.Array:
    """Return |x_b|, [B], of x [B, ...], without squares that overflow."""
    x = x.reshape(len(x), -1)
    largest = jnp.max(jnp.abs(x), 1, initial=0)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * jnp.sqrt(jnp.sum((x / scale[:, None]) ** 2, 1))


def is_linear(loss: Loss, train: Params, example: Any) -> bool:
    """Whether the program of the loss neither computes in less than float32 nor brings a backward pass of its own."""

    def fits(jaxpr) -> bool:
        for equation in jaxpr.eqns:
            if equation.primitive.name.startswith("custom_vjp") or _is_simulation(equation):
                return False
            if any(_is_narrow(v.aval) for v in (*equation.invars, *equation.outvars)):
                return False
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
                if _is_program(value) and not fits(value):
                    return False
        return True

    program = jax.make_jaxpr(loss)(train, example)
    return fits(program) and not any(_is_narrow(v.aval) for v in program.jaxpr.outvars)


def _is_program(x: Any) -> bool:
    return hasattr(x, "eqns")


def _is_simulation(equation: Any) -> bool:
    """Whether a value in float32 is rounded to less, as its cotangent then is."""
    kept, bits = equation.params, jnp.finfo(jnp.float32)
    is_rounding = equation.primitive.name == "reduce_precision"
    return is_rounding and (kept["mantissa_bits"] < bits.nmant or kept["exponent_bits"] < bits.nexp)


def _is_narrow(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
