"""Which example is to blame where a loss is not finite before any update: no learning rate mends that."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax._trees import kept
from gdjax.problem import Example, Params, Problem, merge, trainable

VALUES_AT_ONCE, GRADIENTS_AT_ONCE = 256, 8  # examples


def fault(problem: Problem, params: Params) -> str | None:
    """Return which example has a loss, gradient or metric that is not finite at `params`, in words, or None.

    Examples of weight 0 are not looked at. It is a pass over all examples, for whoever found a NaN before any update.
    """
    looks = [("train", "loss", problem.loss), ("train", "gradient", partial(_steepest, problem.loss))]
    if problem.test is not None:
        looks += [("test", "loss", problem.loss)]
    last = "train" if problem.test is None else "test"
    looks += [(last, name, metric) for name, metric in problem.metrics.items()]
    for part, name, function in looks:
        data, at_once = getattr(problem, part), GRADIENTS_AT_ONCE if name == "gradient" else VALUES_AT_ONCE
        make = partial(_values_of, function, problem.weight, at_once)
        values = np.asarray(kept(problem, ("fault", part, name), make)(params, data))
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            others = f" (and so for {len(bad) - 1} others)" if len(bad) > 1 else ""
            return f"the {name} of {part} example {bad[0]} is {values[bad[0]]:.3g}{others}"
    return None


def _values_of(function: Callable[..., Any], weight: Any, at_once: int) -> Callable[..., jax.Array]:
    @jax.jit
    def values(params, data):
        def one(example):
            value = jnp.asarray(function(params, example), float)
            return value if weight is None else jnp.where(weight(example) > 0, value, 0)

        return lax.map(one, data, batch_size=at_once)

    return values


def _steepest(loss: Callable[..., jax.Array], params: Params, example: Example) -> jax.Array:
    """Return the largest entry of the gradient: not finite where any is not."""
    train, frozen = trainable(params)
    grads = jax.grad(lambda train: loss(merge(train, frozen), example))(train)
    return jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(grads)]).max()
