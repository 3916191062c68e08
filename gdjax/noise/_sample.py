"""A sample of examples in groups, which of them count and how much, and the unit that their gradients have."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdjax import batching, curvature, gradients, problem
from gdjax._trees import scaled
from gdjax.problem import Batch, Loss, Params, Weight

ORDINARY, LARGEST = 30, 120  # exponents of two: of gradients whose fourth powers float32 holds, and of float32 itself


class Groups(NamedTuple):
    """A sample in groups: the data, indices [K, M], which of them count [K, M] (0 or 1), and weights [K, M] or None."""

    data: Batch
    indices: jax.Array
    present: jax.Array
    weights: jax.Array | None = None

    @property
    def sizes(self) -> jax.Array:
        """Examples in each group, [K]."""
        return self.present.sum(1)

    @property
    def inputs(self) -> tuple[jax.Array, jax.Array]:
        """What `examples` takes, a group after the other: indices [K, M], and how much each counts [K, M]."""
        return self.indices, self.present if self.weights is None else self.weights

    def examples(self, group) -> tuple[Batch, jax.Array]:
        """Return the examples of a group (indices [M], how much each counts [M]), and the latter."""
        indices, counts = group
        return batching.take(self.data, indices), counts


def weighed(weight: Weight | None, groups: Groups) -> Groups:
    """Return the groups with their weights, times a power of two: only ratios count, and squares must be held.

    Zero times a gradient that is NaN is NaN: the example of largest weight stands in for those of weight zero.
    """
    if weight is None:
        return groups
    weights = lax.map(lambda indices: problem.weights(weight, batching.take(groups.data, indices)), groups.indices)
    weights = weights.astype(groups.present.dtype) * groups.present
    indices = jnp.where(weights == 0, groups.indices.reshape(-1)[jnp.argmax(weights)], groups.indices)
    return groups._replace(indices=indices, weights=scaled(weights))


def in_range(loss: Loss, params: Params, groups: Groups) -> tuple[Loss, jax.Array]:
    """Return (loss / unit, unit), a power of two that makes gradients of the size of one, by those of the first group.

    Squares of gradients, and their squares, may be none that float32 holds. Where they are it stays at one: a backward
    pass in float16 would not hold every unit.
    """
    batch, _ = groups.examples(jax.tree.map(lambda x: x[0], groups.inputs))
    gradient = gradients.mean(loss)(jax.tree.map(jnp.asarray, params), batch).grad
    _, exponent = jnp.frexp(curvature.magnitude(gradient))
    exponent = jnp.where(jnp.abs(exponent) > ORDINARY, jnp.clip(exponent, -LARGEST, LARGEST), 0)
    unit = jnp.ldexp(jnp.ones(()), exponent)

    def in_unit(params, example):
        value = loss(params, example)
        return value / unit.astype(value.dtype)

    return in_unit, unit


def split(indices: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Cut indices [n] into groups [K, size]; the last one is filled up by examples that do not count."""
    num_groups = -(-len(indices) // size)
    filling = num_groups * size - len(indices)
    present = jnp.ones(len(indices))
    indices = jnp.concatenate([indices, jnp.broadcast_to(indices[:1], (filling,))])
    return indices.reshape(num_groups, size), jnp.pad(present, (0, filling)).reshape(num_groups, size)
