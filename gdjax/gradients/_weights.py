"""What all estimators share: their answer, the weights of examples, and sums over a batch read in pieces.

The loss of a batch is sum w l / sum w. Sums are added up in float32 at least and divided once, at the end: a mean of
the means of pieces would have the bias of a piece, where their sums of weights differ, and a sum in bfloat16 stops
growing.

**Weight zero.** The derivative of a loss that is NaN is NaN, and so is zero times it. An example of weight zero is
therefore replaced, before anything is computed of it, by an example of its batch whose weight is positive: what that
one contributes at weight zero is zero exactly. Where all weights are zero, the loss and the gradient are zero.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdjax import problem
from gdjax._trees import filled, weighted_mean, wide
from gdjax.problem import Batch, Loss, Params, Weight


class Estimate(NamedTuple):
    """What an estimator says of a batch.

    Attributes:
        loss: mean loss over the batch, scalar: sum w l / sum w.
        grad: mean gradient, shaped like the trained leaves of the parameters (None at the others).
        aux: whatever else the estimator measured, or None.
    """

    loss: jax.Array
    grad: Params
    aux: Any = None


Gradient = Callable[[Params, Batch], Estimate]


def split(loss: Loss, params: Params, only: problem.Trainable) -> tuple[Loss, Params]:
    """Return (the loss as a function of the trained leaves alone, those leaves)."""
    train, frozen = problem.trainable(params, only)
    checked = problem.checked(loss)
    return (lambda train, example: checked(problem.merge(train, frozen), example)), train


def weigh(weight: Weight | None, batch: Batch) -> tuple[Batch, jax.Array]:
    """Return (the batch, `filled` where there is a `weight`; the weights [B], ones where there is none)."""
    batch = jax.tree.map(jnp.asarray, batch)
    batch_size = problem.num_examples(batch, "batch")
    if weight is None:
        return batch, jnp.ones(batch_size)
    weights = problem.weights(weight, batch)
    return filled(batch, weights), weights


def mean_loss(losses: jax.Array, weights: jax.Array) -> jax.Array:
    """Return sum w l / sum w of losses [B], in their dtype; a loss of weight zero may be NaN."""
    return weighted_mean(losses, weights).astype(losses.dtype)


def sums(
    loss: Loss, train: Params, batch: Batch, weights: jax.Array
) -> tuple[tuple[jax.Array, Params, jax.Array], jax.Array]:
    """Return ((sum w l, sum w g, sum w), losses [B]) of a filled batch by one backward pass, in float32 at least.

    The weights enter as cotangents in the dtype of the losses: all sums are of the weights as they are rounded there.
    """

    def total(train):
        losses = jax.vmap(loss, (None, 0))(train, batch)
        rounded, values = wide(weights.astype(losses.dtype)), wide(losses)
        return jnp.sum(values * rounded.astype(values.dtype)), (losses, rounded)

    (value, (losses, rounded)), grad = jax.value_and_grad(total, has_aux=True)(train)
    return (value, jax.tree.map(wide, grad), rounded.sum()), losses


def over_pieces(function: Callable, batch: Batch, weights: jax.Array, *, size: int | None) -> tuple[Any, Any]:
    """Return (sums, rest) of `function(examples, weights) -> (sums, rest)`, applied to one piece after the other.

    The sums are added up, and the rest, every leaf [B, ...], comes in the order of the batch. There are K = ceil(B /
    size) pieces of ceil(B / K) examples. A piece holds every K-th example, so that a sharded batch axis stays sharded.
    What fills up the last pieces, fewer than K examples, are copies of the first one, of weight zero.
    """
    batch_size = len(weights)
    if size is None or size >= batch_size:
        return function(batch, weights)
    num_pieces = -(-batch_size // size)
    filling = -batch_size % num_pieces

    def pieces(x):
        return x.reshape(-1, num_pieces, *x.shape[1:]).swapaxes(0, 1)

    def fill(x):
        return jnp.concatenate([x, jnp.broadcast_to(x[:1], (filling, *x.shape[1:]))]) if filling else x

    def add(total, piece):
        sums, rest = function(*piece)
        return jax.tree.map(jnp.add, total, sums), rest

    batch = jax.tree.map(lambda x: pieces(fill(x)), batch)
    weights = pieces(jnp.pad(weights, (0, filling)))
    shapes, _ = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], (batch, weights)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, rest = lax.scan(add, zeros, (batch, weights))
    return total, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:batch_size], rest)


def like(grad: Params, train: Params) -> Params:
    """Cast gradients to the dtypes of the parameters."""
    return jax.tree.map(lambda g, leaf: g.astype(jnp.result_type(leaf)), grad, train)


@jax.custom_jvp
def weigh_cotangent(value: jax.Array, weight: jax.Array) -> jax.Array:
    """Return `value`, whose derivative is multiplied by `weight`."""
    return value


@weigh_cotangent.defjvp
def _weigh_tangent(primals, tangents):
    value, weight = primals
    return value, weight.astype(value.dtype) * tangents[0]
