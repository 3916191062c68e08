"""Laws of the batch size: the noise of a gradient, the batch size it makes useful, and the rules that follow B.

Exact models to hold them against are in `quadratics` (fixed noise) and `least_squares` (noise that shrinks with the
error). Everything is a pure function of numbers and arrays and works under `jit` and `vmap`.

>>> import jax.numpy as jnp
>>> grad, covariance, hessian = jnp.array([1.0, 2.0]), jnp.diag(jnp.array([3.0, 4.0])), jnp.diag(jnp.array([1.0, 0.5]))
>>> noise_scale = b_noise(grad, covariance, hessian=hessian)  # (3 + 2) / (1 + 2)
>>> print(f"{b_simple(grad, covariance):.2f} {noise_scale:.2f}")
1.40 1.67
>>> largest = full_batch_learning_rate(grad, hessian)
>>> for batch_size in (1, 10, 1000):  # proportional to B, then flat
...     rate = best_learning_rate(batch_size, noise_scale, full_batch=largest)
...     change = expected_change(
...         grad, covariance, hessian=hessian, learning_rate=rate, batch_size=batch_size
...     )
...     print(f"{batch_size:5} {rate:.3f} {change:.3f}")
    1 0.625 -1.562
   10 1.429 -3.571
 1000 1.664 -4.160

An update at ten times the noise scale saves few updates and wastes many examples:

>>> for batch_size in (1, 10, 100):
...     updates = updates_to_target(batch_size, 10, min_updates=500)
...     print(batch_size, updates, updates * batch_size == examples_to_target(batch_size, 10, min_examples=5000))
1 5500.0 True
10 1000.0 True
100 550.0 True
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Number = jax.Array | float
"""A number, or an array of numbers to which a formula is applied one by one; the dtype is that of the other arrays."""


def expected_change(
    grad: jax.Array,
    covariance: jax.Array,
    *,
    hessian: jax.Array,
    learning_rate: Number,
    batch_size: Number,
) -> jax.Array:
    """Return E[L(w - eta g_B)] - L(w) = -eta |G|^2 + eta^2 (G'HG + tr(H Sigma) / B) / 2, exact on a quadratic.

    McCandlish et al. 2018 (arXiv 1812.06162), equation 2.5. The examples of the batch are drawn independently.

    Args:
        grad: G [D], the gradient of the mean loss.
        covariance: Sigma [D, D], the covariance of the gradient of one example.
        hessian: H [D, D].
        learning_rate: eta.
        batch_size: B, examples per update.
    """
    curved = grad @ hessian @ grad + jnp.sum(hessian * covariance) / batch_size
    return -learning_rate * (grad @ grad) + learning_rate**2 * curved / 2


def b_simple(grad: jax.Array, covariance: jax.Array) -> jax.Array:
    """Return the simple noise scale tr(Sigma) / |G|^2, in examples (McCandlish et al. 2018, equation 2.9)."""
    return jnp.trace(covariance) / (grad @ grad)


def b_noise(grad: jax.Array, covariance: jax.Array, *, hessian: jax.Array) -> jax.Array:
    """Return the noise scale tr(H Sigma) / G'HG, in examples (McCandlish et al. 2018, equation 2.8)."""
    return jnp.sum(hessian * covariance) / (grad @ hessian @ grad)


def full_batch_learning_rate(grad: jax.Array, hessian: jax.Array) -> jax.Array:
    """Return eta_max = |G|^2 / G'HG, the best rate of one update without noise (McCandlish et al. 2018, eq. 2.6)."""
    return (grad @ grad) / (grad @ hessian @ grad)


def best_learning_rate(batch_size: Number, noise_scale: Number, *, full_batch: Number) -> jax.Array:
    """Return eta_max / (1 + B_noise / B), the best rate of one update (McCandlish et al. 2018, equation 2.6).

    `noise_scale` is B_noise in examples, and `full_batch` is eta_max. The best update lowers the loss by
    eta_max |G|^2 / (2 (1 + B_noise / B)), equation 2.7.
    """
    return full_batch / (1 + jnp.asarray(noise_scale) / batch_size)


def updates_to_target(batch_size: Number, critical_batch_size: Number, *, min_updates: Number) -> jax.Array:
    """Return S(B) = S_min (1 + B_crit / B) updates (McCandlish et al. 2018, section 2.3)."""
    return min_updates * (1 + jnp.asarray(critical_batch_size) / batch_size)


def examples_to_target(batch_size: Number, critical_batch_size: Number, *, min_examples: Number) -> jax.Array:
    """Return E(B) = E_min (1 + B / B_crit) examples; E = S B where E_min = S_min B_crit (as `updates_to_target`)."""
    return min_examples * (1 + jnp.asarray(batch_size) / critical_batch_size)


def batch_size_at_overhead(critical_batch_size: Number, overhead: Number = 0.2) -> jax.Array:
    """Return the B at which E(B) = (1 + overhead) E_min: overhead * B_crit examples.

    Zhang et al. 2024 (arXiv 2410.21676) call the B of overhead 0.2 critical; B_crit itself, of McCandlish
    et al., has overhead 1. Divide by `overhead` to go the other way.
    """
    return jnp.asarray(critical_batch_size) * overhead


def finite_population(batch_size: Number, num_examples: Number) -> jax.Array:
    """Return (N - B) / (N - 1): the variance of a mean of B of N distinct examples over that of B independent ones.

    Cochran, Sampling Techniques, 1977, theorem 2.2; the variance of the N examples is (1/N) sum (x - mean)^2. It is 0
    for N = B, a single example too.
    """
    return (jnp.asarray(num_examples) - batch_size) / jnp.maximum(jnp.asarray(num_examples) - 1, 1)


def power_minus_one(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """Return (1 - x)^n - 1, which keeps its digits where x is small."""
    small = jnp.minimum(x, 0.5)
    return jnp.where(x < 0.5, jnp.expm1(exponent * jnp.log1p(-small)), (1 - x) ** exponent - 1)


def linear_rule(learning_rate: Number, factor: Number) -> jax.Array:
    """Return the rate kappa eta of SGD after B grew to kappa B (Goyal et al. 2017, arXiv 1706.02677).

    It keeps the movement per example while B is far below the noise scale; see `best_learning_rate` for what follows.
    """
    return jnp.asarray(learning_rate) * factor


class Adam(NamedTuple):
    """Hyperparameters of Adam, named as in optax: `optax.adam(*adam)`."""

    learning_rate: Number
    b1: Number = 0.9
    b2: Number = 0.999
    eps: Number = 1e-8


def sqrt_rule(adam: Adam, factor: Number) -> Adam:
    """Return Adam's hyperparameters after B grew to kappa B (Malladi et al. 2022, arXiv 2205.10287).

    eta sqrt(kappa), 1 - b_i times kappa, eps / sqrt(kappa): the same stochastic differential equation where noise
    dominates the gradient.

    Raises:
        ValueError: where kappa (1 - b_i) is above 1, so that no such b_i exists. Traced numbers are not checked.
    """
    b1, b2 = (1 - factor * (1 - jnp.asarray(b)) for b in (adam.b1, adam.b2))
    for name, before, after in (("b1", adam.b1, b1), ("b2", adam.b2, b2)):
        if not isinstance(after, Tracer) and np.min(after) < 0:
            raise ValueError(f"factor={factor} with {name}={before} asks for 1 - {name} above 1: use a smaller factor")
    root = jnp.sqrt(factor)
    return Adam(adam.learning_rate * root, b1, b2, adam.eps / root)


def same_half_life(decay: Number, factor: Number) -> jax.Array:
    """Return decay^kappa, the decay per update that keeps its half-life in examples when B grows to kappa B.

    For Adam's b2: Marek et al. 2025 (arXiv 2507.07101).
    """
    return jnp.asarray(decay) ** factor


def decay_per_update(half_life: Number, batch_size: Number) -> jax.Array:
    """Return 2^(-B / half_life), the decay per update of a memory that halves every `half_life` examples.

    >>> print(f"{decay_per_update(1000, 10):.6f}")
    0.993092
    """
    return 2.0 ** (-jnp.asarray(batch_size) / half_life)


def temperature(
    learning_rate: Number, batch_size: Number, *, num_examples: Number, momentum: Number = 0.0
) -> jax.Array:
    """Return eta (N / B - 1) / (1 - m), the scale of the noise of SGD with momentum m.

    Smith & Le 2018 (arXiv 1710.06451); momentum as in Smith et al. 2018 (arXiv 1711.00489). At m = 0 the covariance
    of an update on a batch of distinct examples is eta * temperature * Sigma / (N - 1), Sigma that of one example.
    """
    return jnp.asarray(learning_rate) * (num_examples / jnp.asarray(batch_size) - 1) / (1 - jnp.asarray(momentum))
