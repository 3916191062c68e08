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
>>> with_sq_norms(loss)(params, batch).aux.sq_norms
Array([ 1.,  4., 36., 49.], dtype=float32)
>>> float(clipped(loss, max_norm=2.0)(params, batch).grad)  # -(1 + 2 + 2 + 2) / 4
-1.75
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gdjax import ghost, problem
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


class SquaredNorms(NamedTuple):
    """Losses [B] and squared gradient norms of the examples of a batch: a pytree like the gradient, each leaf [B]."""

    losses: jax.Array
    sq_norms: Params


class Clipped(NamedTuple):
    """Losses [B] and gradient norms [B], over all parameters and before clipping, of the examples of a batch."""

    losses: jax.Array
    norms: jax.Array


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
    """Return `(params, batch) -> Estimate`, equal to `mean` but with the activations of `microbatch_size` examples.

    Where examples weigh about as much as their activations it can take more memory than `mean`: 142 % for a dense
    network at B = 1024, 6 % for a convolutional one (experiments/memory.py).

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


def with_sq_norms(loss: Loss) -> Gradient:
    """Return `(params, batch) -> Estimate` whose `aux` is `SquaredNorms`, for the price of a gradient (see `ghost`)."""
    measured = ghost.sq_norms(loss)

    def gradient(params: Params, batch: Batch) -> Estimate:
        losses, grad, sq_norms = measured(params, batch)
        return Estimate(losses.mean(), grad, SquaredNorms(losses, sq_norms))

    return gradient


def clipped(
    loss: Loss,
    max_norm: float,
    *,
    noise_multiplier: float = 0.0,
    noise_key: Callable[[Batch], jax.Array] | None = None,
    expected_batch_size: int | None = None,
) -> Gradient:
    """Return `(params, batch) -> Estimate` with every example's gradient clipped, `aux` being `Clipped`.

    The gradient is (1 / L) (sum_i g_i / max(1, |g_i| / C) + N(0, (sigma C)^2 I)), the norm taken over all parameters
    (Abadi et al. 2016, arXiv 1607.00133, algorithm 1): norms first, then one backward pass of the weighted losses, so
    that no example's gradient is held. The loss reported is not clipped.

    Args:
        loss: (params, example) -> scalar.
        max_norm: C, positive; infinity clips nothing.
        noise_multiplier: sigma.
        noise_key: batch -> PRNG key of this batch's noise; needed where sigma > 0. The batch carries its randomness, so
            that a replayed stream replays the run.
        expected_batch_size: L, examples; default the size of the batch.

    Raises:
        ValueError: for max_norm <= 0, a negative noise_multiplier, noise without a key or with infinite max_norm, and
            expected_batch_size < 1.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive")
    if not noise_multiplier >= 0:
        raise ValueError(f"noise_multiplier={noise_multiplier} must be at least 0")
    if noise_multiplier and (noise_key is None or max_norm == float("inf")):
        raise ValueError(f"noise_multiplier={noise_multiplier} needs a noise_key and a finite max_norm={max_norm}")
    if expected_batch_size is not None and expected_batch_size < 1:
        raise ValueError(f"expected_batch_size={expected_batch_size} must be at least 1")
    measured = ghost.sq_norms(loss)

    def gradient(params: Params, batch: Batch) -> Estimate:
        losses, _, sq_norms = measured(params, batch)
        # Leaves may differ in their dtypes.
        norms = jnp.sqrt(sum(jnp.asarray(leaf, float) for leaf in jax.tree.leaves(sq_norms)))
        size = expected_batch_size or len(losses)
        weights = (1 / jnp.maximum(1, norms / max_norm)).astype(losses.dtype) / size
        train, frozen = problem.trainable(params)

        def weighted(train):
            return jnp.sum(weights * jax.vmap(loss, (None, 0))(problem.merge(train, frozen), batch))

        grad = jax.grad(weighted)(train)
        if noise_multiplier and noise_key is not None:
            noise = optax.tree.random_like(noise_key(batch), grad, jax.random.normal)
            grad = jax.tree.map(lambda g, n: g + (noise_multiplier * max_norm / size) * n, grad, noise)
        return Estimate(losses.mean(), grad, Clipped(losses, norms))

    return gradient
