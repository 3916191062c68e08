"""Gradient estimators: from the loss of one example to the mean gradient of a batch.

Each factory takes `loss(params, example)` and returns `(params, batch) -> Estimate`. All of them compute the same mean
gradient; they differ in memory, and in what they return beside it.

>>> import jax.numpy as jnp
>>> loss = lambda mean, x: 0.5 * (mean - x) ** 2
>>> params, batch = jnp.asarray(0.0), jnp.asarray([1.0, 2.0, 6.0, 7.0])
>>> estimate = mean(loss)(params, batch)
>>> float(estimate.loss), float(estimate.grad)
(11.25, -4.0)
>>> float(microbatched(loss, microbatch_size=2)(params, batch).grad)
-4.0
>>> per_example(loss)(params, batch).aux.grads
Array([-1., -2., -6., -7.], dtype=float32, weak_type=True)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from gdjax import problem
from gdjax.problem import Batch, Loss, Params


class Estimate(NamedTuple):
    """What an estimator says of a batch.

    Attributes:
        loss: mean loss over the batch, scalar.
        grad: mean gradient, shaped like the floating-point leaves of the parameters (None at the others).
        aux: whatever else the estimator measured, or None.
    """

    loss: jax.Array
    grad: Params
    aux: Any = None


class PerExample(NamedTuple):
    """Losses [B] and gradients [B, ...] of the examples of a batch."""

    losses: jax.Array
    grads: Params


Gradient = Callable[[Params, Batch], Estimate]


def mean(loss: Loss) -> Gradient:
    """Return `(params, batch) -> Estimate`, the gradient of the mean of the examples' losses, by one backward pass."""

    def gradient(params: Params, batch: Batch) -> Estimate:
        train, frozen = problem.trainable(params)
        batch_size = problem.num_examples(batch, "batch")

        def mean_loss(train):
            losses = jax.vmap(loss, (None, 0))(problem.merge(train, frozen), batch)
            problem.check_loss(losses, (batch_size,))
            return losses.mean()

        return Estimate(*jax.value_and_grad(mean_loss)(train))

    return gradient


def microbatched(loss: Loss, *, microbatch_size: int) -> Gradient:
    """Return `(params, batch) -> Estimate`, equal to `mean` but with the memory of `microbatch_size` examples.

    The batch is read in B / microbatch_size pieces by `optax.microbatching`; a piece holds every
    (B / microbatch_size)-th example, so that a sharded batch axis stays sharded.

    Raises:
        ValueError: where `microbatch_size` does not divide the batch, so that examples would be dropped.
    """
    if microbatch_size < 1:
        raise ValueError(f"microbatch_size={microbatch_size} must be at least 1")
    pieces = optax.microbatching.microbatch(
        mean(loss),
        argnums=1,
        microbatch_size=microbatch_size,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )

    def gradient(params: Params, batch: Batch) -> Estimate:
        batch_size = problem.num_examples(batch, "batch")
        if batch_size % microbatch_size:
            raise ValueError(f"microbatch_size={microbatch_size} must divide the batch of {batch_size} examples")
        return pieces(params, batch)

    return gradient


def per_example(loss: Loss) -> Gradient:
    """Return `(params, batch) -> Estimate` whose `aux` is `PerExample(losses [B], grads [B, ...])`.

    Every gradient of the batch is held in memory: B times the parameters.
    """

    def gradient(params: Params, batch: Batch) -> Estimate:
        train, frozen = problem.trainable(params)
        problem.num_examples(batch, "batch")

        def one(train, example):
            value = loss(problem.merge(train, frozen), example)
            problem.check_loss(value)
            return value

        losses, grads = jax.vmap(jax.value_and_grad(one), (None, 0))(train, batch)
        return Estimate(losses.mean(), jax.tree.map(lambda g: g.mean(0), grads), PerExample(losses, grads))

    return gradient
