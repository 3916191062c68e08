"""The estimators that do not clip: one backward pass, in pieces, by example, and with norms."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdjax import ghost, problem
from gdjax._trees import compiled_alone, over, scaled, wide
from gdjax.gradients._weights import (
    Estimate,
    Gradient,
    like,
    mean_loss,
    over_pieces,
    split,
    sums,
    weigh,
    weigh_cotangent,
)
from gdjax.problem import Batch, Loss, Params, Trainable, Weight


class PerExample(NamedTuple):
    """Losses [B] and gradients [B, ...] of the examples of a batch, not weighted; zero for an example of weight 0."""

    losses: jax.Array
    grads: Params


class SquaredNorms(NamedTuple):
    """Losses and squared gradient norms of the examples of a batch, not weighted; zero for an example of weight 0.

    Attributes:
        losses: [B].
        sq_norms: a pytree like the gradient, each leaf [B]; NaN for an example whose weight is less than 1e-19 of the
            largest, or vanishes beside it in the dtype of the losses: its gradient is measured times that.
        weights: [B], or None where there is no `weight`.
    """

    losses: jax.Array
    sq_norms: Params
    weights: jax.Array | None = None


def mean(loss: Loss, *, weight: Weight | None = None, trainable: Trainable = None) -> Gradient:
    """Return `(params, batch) -> Estimate`, the gradient of the mean of the examples' losses, by one backward pass."""
    if weight is not None:
        return microbatched(loss, microbatch_size=None, weight=weight, trainable=trainable)

    @compiled_alone
    def gradient(params: Params, batch: Batch) -> Estimate:
        of_train, train = split(loss, params, trainable)
        problem.num_examples(batch, "batch")

        def of_batch(train):
            losses = jax.vmap(of_train, (None, 0))(train, batch)
            return wide(losses).mean().astype(losses.dtype)

        return Estimate(*jax.value_and_grad(of_batch)(train))

    return gradient


def microbatched(
    loss: Loss, *, microbatch_size: int | None, weight: Weight | None = None, trainable: Trainable = None
) -> Gradient:
    """Return `(params, batch) -> Estimate`, equal to `mean` but with the activations of `microbatch_size` examples.

    Sums of w l, of w g and of w are added up over the pieces in float32 at least, and divided once. Where examples
    weigh about as much as their activations it can take more memory than `mean`: 142 % for a dense network at B = 1024,
    6 % for a convolutional one (experiments/memory.py).

    Args:
        loss: (params, example) -> scalar.
        microbatch_size: the most examples whose activations are held at a time. The batch is read in K = ceil(B /
            microbatch_size) pieces of ceil(B / K) examples, so that no example is dropped; where K does not divide B,
            the last pieces are filled up by an example of weight zero. A piece holds every K-th example, so that a
            sharded batch axis stays sharded. None: all examples at once.
        weight, trainable: as in all estimators.
    """
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size={microbatch_size} must be at least 1")

    @compiled_alone
    def gradient(params: Params, batch: Batch) -> Estimate:
        of_train, train = split(loss, params, trainable)
        batch, weights = weigh(weight, batch)
        held = min(microbatch_size or len(weights), len(weights))
        weights = scaled(weights, num_examples=held)
        (value, grad, total), losses = over_pieces(partial(sums, of_train, train), batch, weights, size=held)
        value, grad = jax.tree.map(lambda x: over(x, total), (value, grad))
        return Estimate(value.astype(losses.dtype), like(grad, train))

    return gradient


def per_example(loss: Loss, *, weight: Weight | None = None, trainable: Trainable = None) -> Gradient:
    """Return `(params, batch) -> Estimate` whose `aux` is `PerExample(losses [B], grads [B, ...])`.

    Every gradient of the batch is held in memory: B times the parameters.
    """

    @compiled_alone
    def gradient(params: Params, batch: Batch) -> Estimate:
        of_train, train = split(loss, params, trainable)
        batch, weights = weigh(weight, batch)
        losses, grads = jax.vmap(jax.value_and_grad(of_train), (None, 0))(train, batch)
        if weight is not None:
            losses, grads = jax.tree.map(lambda x: jnp.where(_beside(weights > 0, x), x, 0), (losses, grads))
        scale = scaled(weights)

        def average(g):
            g = wide(g)
            total = jnp.tensordot(scale.astype(g.dtype), g, 1, precision=lax.Precision.HIGHEST)
            return over(total, scale.sum())

        grad = like(jax.tree.map(average, grads), train)
        return Estimate(mean_loss(losses, weights), grad, PerExample(losses, grads))

    return gradient


def with_sq_norms(loss: Loss, *, weight: Weight | None = None, trainable: Trainable = None) -> Gradient:
    """Return `(params, batch) -> Estimate` whose `aux` is `SquaredNorms`, for the price of a gradient (see `ghost`)."""

    @compiled_alone
    def gradient(params: Params, batch: Batch) -> Estimate:
        of_train, train = split(loss, params, trainable)
        if weight is None:
            losses, grad, sq_norms = ghost.sq_norms(of_train)(train, batch)
            return Estimate(mean_loss(losses, jnp.ones(len(losses))), grad, SquaredNorms(losses, sq_norms))
        batch, weights = weigh(weight, batch)
        scale = scaled(weights)

        def weighted(train, example):
            return weigh_cotangent(of_train(train, example[0]), example[1])

        losses, grad, sq_norms = ghost.sq_norms(weighted)(train, (batch, scale))
        # The weights as the dtype of the losses rounds them: those that the backward pass has seen.
        scale = wide(scale.astype(losses.dtype))
        grad = jax.tree.map(lambda g: over(wide(g) * len(losses), scale.sum()), grad)
        lost = (weights > 0) & (scale**2 < jnp.finfo(scale.dtype).tiny)
        sq_norms = jax.tree.map(lambda x: jnp.where(lost, jnp.nan, over(x, (scale**2).astype(x.dtype))), sq_norms)
        aux = SquaredNorms(jnp.where(weights > 0, losses, 0), sq_norms, weights)
        return Estimate(mean_loss(losses, weights), like(grad, train), aux)

    return gradient


def _beside(flags: jax.Array, x: jax.Array) -> jax.Array:
    """Return flags [B] with axes of length 1 for those of x [B, ...]."""
    return jnp.expand_dims(flags, range(1, x.ndim))
