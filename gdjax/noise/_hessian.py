"""B_noise, the noise scale that a step on a loss with Hessian H feels, from pairs of mini-batches.

>>> import jax, jax.numpy as jnp
>>> loss = lambda mean, x: 0.5 * (mean - x) ** 2  # H = 1, so that it is B_simple
>>> data = jax.random.normal(jax.random.key(0), (1000,))
>>> print(measure_hessian(loss, jnp.asarray(0.5), data, jax.random.key(1), batch_size=16, num_pairs=50))
B_noise = 2.27 (90 % interval 1.43 to 3.25): ok
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from gdjax import batching, curvature, gradients, problem
from gdjax._trees import concrete, kept
from gdjax.noise import _intervals as intervals
from gdjax.noise._scale import HessianNoiseScale, check_confidence
from gdjax.problem import Batch, Loss, Params


def measure_hessian(
    loss: Loss,
    params: Params,
    data: Batch,
    key: jax.Array,
    *,
    batch_size: int,
    num_pairs: int,
    confidence: float = 0.9,
) -> HessianNoiseScale:
    """Measure B_noise = tr(HS)/(G'HG) from pairs of mini-batches, at one Hessian-vector product a mini-batch.

    For independent mini-batch gradients a, b and the Hessian H of a third batch, (a - b)'H(a - b) B/2 has the mean
    tr(HS), and a'Hb has the mean G'HG. All batches are drawn with replacement, so that both hold exactly.

    Args:
        loss, params, data, key: as in `noise.measure`.
        batch_size: B, examples in each of the three batches of a pair.
        num_pairs: pairs; the interval comes from the spread between them.
        confidence: of the interval, two-sided.
    """
    check_confidence(confidence)
    if batch_size < 1 or num_pairs < 2:
        raise ValueError(f"batch_size={batch_size} must be at least 1 and num_pairs={num_pairs} at least 2")
    arguments = params, data, key
    if not concrete(arguments):
        return _measure(loss, batch_size, num_pairs, confidence, *arguments)
    options = batch_size, num_pairs, confidence
    return kept(loss, ("Hessian noise", options), lambda: jax.jit(partial(_measure, loss, *options)))(*arguments)


def _measure(loss, batch_size, num_pairs, confidence, params, data, key) -> HessianNoiseScale:
    """Do what `measure_hessian` says."""
    gradient, product = gradients.mean(loss), curvature.hvp(loss)
    stream = batching.with_replacement(key, problem.num_examples(data), length=num_pairs * 3 * batch_size)

    def pair(indices):
        a, b = (gradient(params, batching.take(data, batch)).grad for batch in indices[:2])
        # Three factors of the loss's unit multiply: one is set aside twice, so that none of it can overflow.
        unit = curvature.magnitude((a, b))
        a, b = (curvature.divided(x, unit) for x in (a, b))
        batch = batching.take(data, indices[2])
        image_a, image_b = product(params, batch, a), product(params, batch, b)
        difference = jax.tree.map(jnp.subtract, a, b), jax.tree.map(jnp.subtract, image_a, image_b)
        return jnp.stack([curvature.inner(a, image_b), curvature.inner(*difference) * batch_size / 2]), unit

    values, units = lax.map(pair, stream.reshape(num_pairs, 3, batch_size))  # [pairs, 2], [pairs]
    unit = units.max()
    values = values * (units / unit)[:, None] ** 2
    signal, noise = values.mean(0)
    deviations = (values - values.mean(0, keepdims=True)) / jnp.sqrt(num_pairs * (num_pairs - 1))
    quantile = intervals.student(num_pairs - 1, confidence=confidence)
    interval = intervals.ratio_interval(noise, signal, deviations, quantile=quantile)
    return HessianNoiseScale(signal * unit**2, noise * unit**2, *interval, confidence)
