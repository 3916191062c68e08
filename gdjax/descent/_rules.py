"""When to stop: rules that `until` looks at inside the compiled loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gdjax.descent._method import Info, Record, State, batch_loss
from gdjax.problem import Params


class Rule(NamedTuple):
    """When to stop: `init() -> carry` and `step(carry, state, info) -> (carry, stop: bool scalar)`."""

    init: Callable[[], Any]
    step: Callable[[Any, State, Info], tuple[Any, jax.Array]]


def loss_at_most(target: jax.typing.ArrayLike, evaluate: Record = batch_loss) -> Rule:
    """Stop once `evaluate(state, info)` <= target. The default is the batch's own loss, noisy for small batches."""
    return Rule(lambda: (), lambda carry, state, info: (carry, evaluate(state, info) <= target))


def gradient_norm_at_most(
    target: jax.typing.ArrayLike, gradient: Callable[[State, Info], Params] = lambda state, info: info.grad
) -> Rule:
    """Stop once the Euclidean norm of `gradient(state, info)`, over all leaves, is <= target."""
    return Rule(lambda: (), lambda carry, state, info: (carry, optax.tree.norm(gradient(state, info)) <= target))


def no_improvement(num_evaluations: int, evaluate: Record = batch_loss) -> Rule:
    """Stop once `num_evaluations` values of `evaluate(state, info)` in a row were not below the best so far."""
    if num_evaluations < 1:
        raise ValueError(f"num_evaluations={num_evaluations} must be at least 1")

    def step(carry, state, info):
        best, since = carry
        value = jnp.asarray(evaluate(state, info), best.dtype)
        since = jnp.where(value < best, 0, since + 1)
        return (jnp.fmin(best, value), since), since >= num_evaluations

    return Rule(lambda: (jnp.asarray(jnp.inf), jnp.int32(0)), step)


def diverged(evaluate: Record = batch_loss) -> Rule:
    """Stop once `evaluate(state, info)` is NaN or infinite."""
    return Rule(lambda: (), lambda carry, state, info: (carry, ~jnp.isfinite(evaluate(state, info))))
