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

All of them take

    weight     example -> scalar >= 0. The loss of a batch is then sum w l / sum w, and its gradient sum w g / sum w: of
               tokens, padding, or importances. An example of weight 0 contributes nothing, even if its loss or its
               gradient is NaN, and where all weights are 0 so are the loss and the gradient.
    trainable  which of the floating-point leaves are trained, as in `problem.trainable`; the gradient is None at the
               others, and no norm counts them.

>>> weighted = mean(lambda mean, example: loss(mean, example[0]), weight=lambda example: example[1])
>>> float(weighted(params, (jnp.asarray([1.0, jnp.nan, 6.0]), jnp.asarray([3, 0, 1]))).grad)  # -(3 * 1 + 6) / 4
-2.25

Sums over examples are in float32 at least and cast back at the end. 'The gradient of a batch' is that of one backward
pass in `mean`, `microbatched` and `with_sq_norms`, and the sum of those of the examples in `per_example`. They are the
same unless a backward pass of the loss's own (`jax.custom_vjp`) is not linear: gradient clipping inside a model.
"""

from gdjax.gradients._clipping import Clipped, clipped, next_max_norm
from gdjax.gradients._estimators import PerExample, SquaredNorms, mean, microbatched, per_example, with_sq_norms
from gdjax.gradients._weights import Estimate, Gradient

__all__ = [
    "Clipped",
    "Estimate",
    "Gradient",
    "PerExample",
    "SquaredNorms",
    "clipped",
    "mean",
    "microbatched",
    "next_max_norm",
    "per_example",
    "with_sq_norms",
]
