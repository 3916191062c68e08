"""Gradient descent: one step, the loop over a stream of batches, and the same loop ended by a rule.

>>> import jax, jax.numpy as jnp, optax
>>> from gdjax import batching, gradients
>>> data = jnp.asarray([1.0, 2.0, 6.0, 7.0])
>>> loss = lambda mean, x: 0.5 * (mean - x) ** 2
>>> sgd = method(gradients.mean(loss), optax.sgd(0.5))
>>> stream = batching.cyclic(jax.random.key(0), 4, num_epochs=3)
>>> for batch_size in (1, 2, 4):
...     state, losses = run(sgd, sgd.init(0.0), data, batching.batches(stream, batch_size))
...     print(batch_size, losses.shape, float(state.params), int(state.num_examples))
1 (12,) 5.665283203125 12
2 (6,) 4.7578125 12
4 (3,) 3.5 12
"""

from gdjax.descent._loops import Ending, run, until
from gdjax.descent._method import Fetch, Info, Method, Record, State, Stream, batch_loss, method, with_keys
from gdjax.descent._rules import Rule, diverged, gradient_norm_at_most, loss_at_most, no_improvement
from gdjax.descent._train import count_updates, evaluation, train

__all__ = [
    "Ending",
    "Fetch",
    "Info",
    "Method",
    "Record",
    "Rule",
    "State",
    "Stream",
    "batch_loss",
    "count_updates",
    "diverged",
    "evaluation",
    "gradient_norm_at_most",
    "loss_at_most",
    "method",
    "no_improvement",
    "run",
    "train",
    "until",
    "with_keys",
]
