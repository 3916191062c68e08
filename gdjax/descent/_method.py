"""One update: a gradient estimator and an optimiser joined into `init` and `step`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gdjax import batching
from gdjax.gradients import Gradient
from gdjax.problem import Batch, Params, Trainable, merge, num_examples
from gdjax.problem import trainable as split_params


class State(NamedTuple):
    """What a method carries from update to update: a pytree, complete for an exact resume.

    Attributes:
        params: the parameters.
        opt_state: the state of the optax transformation.
        num_examples: examples seen so far, a scalar `batching.Count`: they may be more than 2^32.
    """

    params: Params
    opt_state: Any
    num_examples: batching.Count


class Info(NamedTuple):
    """What an update leaves behind to be recorded. Fields that nobody records are not computed under `jit`.

    Attributes:
        loss: mean loss of the batch before the update, scalar.
        grad: mean gradient of the batch, shaped like the trainable parameters.
        update: what was added to the parameters, likewise.
        aux: what else the gradient estimator measured.
    """

    loss: jax.Array
    grad: Params
    update: Params
    aux: Any


class Method(NamedTuple):
    """`init(params) -> State` and `step(state, batch) -> (State, Info)`."""

    init: Callable[[Params], State]
    step: Callable[[State, Batch], tuple[State, Info]]


Record = Callable[[State, Info], Any]
Fetch = Callable[[Batch, Any], Batch]
"""(data, one entry of the batches) -> the batch that a step is given."""
Stream = Callable[..., jax.Array]
"""(key, num_examples, *, start=, length=) -> int32[length], from `batching`."""


def method(gradient: Gradient, optimizer: optax.GradientTransformation, *, trainable: Trainable = None) -> Method:
    """Join a gradient estimator and an optax optimiser into a `Method`.

    Args:
        gradient: (params, batch) -> Estimate, from `gdjax.gradients`.
        optimizer: an optax transformation; it is also given `value` and `grad`, for those that ask for them. Line
            searches (`optax.lbfgs`), which evaluate the loss of the batch again, cannot be used.
        trainable: what the estimator was given: the other leaves have no state in the optimiser, no weight decay, and
            stay as they are.

    Raises:
        ValueError: when called, where the estimator trains other leaves.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> State:
        params = jax.tree.map(jnp.asarray, params)
        train, _ = split_params(params, trainable)
        return State(params, optimizer.init(train), batching.Count.of(0))

    def step(state: State, batch: Batch) -> tuple[State, Info]:
        estimate = gradient(state.params, batch)
        train, frozen = split_params(state.params, trainable)
        if jax.tree.structure(estimate.grad) != jax.tree.structure(train):
            raise ValueError("the estimator and descent.method must be given the same trainable: their leaves differ")
        update, opt_state = optimizer.update(
            estimate.grad, state.opt_state, train, value=estimate.loss, grad=estimate.grad
        )
        # Hyperparameters that are traced are float32: moments of bfloat16 stay what they were.
        if jax.tree.structure(opt_state) == jax.tree.structure(state.opt_state):
            opt_state = jax.tree.map(_as, opt_state, state.opt_state)
        params = merge(optax.apply_updates(train, update), frozen)
        seen = state.num_examples + num_examples(batch, "batch")
        return State(params, opt_state, seen), Info(estimate.loss, estimate.grad, update, estimate.aux)

    return Method(init, step)


def _as(new: Any, old: Any) -> Any:
    dtype = getattr(old, "dtype", None)
    return new if dtype is None or getattr(new, "dtype", dtype) == dtype else new.astype(dtype)


def with_keys(method: Method, key: jax.Array) -> Method:
    """Give every example a PRNG key of its own, for a loss with dropout or augmentation.

    The gradient of `method` must be of a loss `(params, (example, key)) -> scalar`. The key at position p of the stream
    is `fold_in(key, p)`, p being counted by `State.num_examples`: an example that is visited again has a fresh key, a
    replayed or resumed run has the same ones, and so has every batch size. From 2^32 on, the high and the low half of p
    are folded in one after the other. A loss without randomness, of the same parameters, is what a `Problem` evaluates.

    Args:
        method: whose batches become `(batch, keys [B])`.
        key: typed PRNG key, one for each run; not the key of the stream.
    """

    def step(state: State, batch: Batch) -> tuple[State, Info]:
        keys = batching.position_keys(key, state.num_examples, num_examples(batch, "batch"))
        return method.step(state, (batch, keys))

    return Method(method.init, step)


def batch_loss(state: State, info: Info) -> jax.Array:
    """Record the mean loss of the batch before the update."""
    return info.loss
