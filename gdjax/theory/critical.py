"""The critical batch size along a run: what larger batches keep of its progress, and where that measures no noise.

At the best rate an update gains in proportion to B / (B + B_noise) (`theory`), an example in proportion to
1 / (B + B_noise). From a checkpoint of a run at batch size B_0, branches of k B_0 are trained on the same examples; the
largest that is no worse is called critical. That depends on the loss that is tolerated, so state the fraction f of the
progress that is to be kept.

>>> for fraction in (0.99, 0.9, 0.5):  # from B_0 = 4 where the noise scale is 100
...     print(fraction, f"{batch_size_keeping(fraction, 4, 100):.2f}")
0.99 5.05
0.9 15.56
0.5 108.00
>>> h = 1 / jnp.arange(1.0, 101.0)  # a run that has settled on its noise: 1 % of loss is allowed
>>> print(f"{batch_size_at_floor(0.01, 4, h, noise=h, learning_rate=0.1):.2f}")
6.34
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax.theory._laws import Number
from gdjax.theory.schedules import Quadratic, gradient_variance


def b_simple(quadratic: Quadratic, second_moment: jax.Array) -> jax.Array:
    """Return tr Sigma / E|G|^2 at s_i = E theta_i^2 [D], in examples (`theory.b_simple`)."""
    h = quadratic.eigenvalues
    return jnp.sum(gradient_variance(quadratic, second_moment)) / (h**2 @ second_moment)


def b_noise(quadratic: Quadratic, second_moment: jax.Array) -> jax.Array:
    """Return tr(H Sigma) / E G'HG at s_i = E theta_i^2 [D], in examples (`theory.b_noise`)."""
    h = quadratic.eigenvalues
    return h @ gradient_variance(quadratic, second_moment) / (h**3 @ second_moment)


def fraction_kept(batch_size: Number, base: Number, noise_scale: Number) -> jax.Array:
    """Return f = (B_0 + B_noise) / (B + B_noise), the progress of an example at B over that at B_0, at best rates."""
    return (jnp.asarray(base) + noise_scale) / (jnp.asarray(batch_size) + noise_scale)


def batch_size_keeping(fraction: Number, base: Number, noise_scale: Number) -> jax.Array:
    """Return the B that keeps a fraction f of the progress of B_0: B_0 + (1 / f - 1) (B_0 + B_noise).

    Args:
        fraction: f, in (0, 1].
        base: B_0.
        noise_scale: B_noise at the checkpoint, in examples.
    """
    return base + (1 / jnp.asarray(fraction) - 1) * (jnp.asarray(base) + noise_scale)


def fraction_of(tolerance: float, progress: float) -> float:
    """Return f = 1 - tolerance / progress, what a branch keeps that may end so much higher in loss.

    Args:
        tolerance: of the loss, such as the error with which it is known.
        progress: the loss at the checkpoint minus that at the end of the branch of B_0.

    Raises:
        ValueError: where the branch made less progress than is tolerated, so that it says nothing of the batch size.
    """
    if not progress > tolerance >= 0:
        raise ValueError(f"progress={progress} must be above tolerance={tolerance}: make the branches longer")
    return 1 - tolerance / progress


def batch_size_at_floor(
    tolerance: Number, base: Number, eigenvalues: jax.Array, *, noise: jax.Array, learning_rate: Number
) -> jax.Array:
    """Return the B whose floor is 1 + tolerance times that of B_0 where eta ~ B: curvature decides it, *not* noise.

    The floor is eta / (2 B) sum_i c_i / (2 - eta h_i), and B = k B_0 has the rate k eta. For small eta,
    B / B_0 - 1 = 2 tolerance sum c / (eta c.h): it says nothing of the noise scale.

    Args:
        tolerance: of the loss, relative to it.
        base: B_0.
        eigenvalues: h [D].
        noise: c [D], the variance of the gradient of one example.
        learning_rate: eta, at B_0.
    """
    x = learning_rate * eigenvalues

    def floor(factor):
        return jnp.sum(noise / (2 - factor * x))

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        below = floor(middle) < (1 + tolerance) * floor(1.0)
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    most = 2 / jnp.max(x)
    low, _ = lax.fori_loop(0, 80, halve, (jnp.ones_like(most), most))
    return base * low


def largest_branch(factors, losses, *, start: float, tolerance: float) -> float:
    """Return the largest k whose branch ends no higher than any smaller one, to a tolerance (arXiv 2505.23971).

    Args:
        factors: k [K], of the batch size.
        losses: [K], at the ends of the branches, smoothed alike; NaN, as infinity, for one that diverged.
        start: the loss at the checkpoint.
        tolerance: of the loss, at least the error with which it is known.

    Raises:
        ValueError: where the smallest branch made less progress than the tolerance.
    """
    order = np.argsort(np.asarray(factors, float))
    sizes, ends = np.asarray(factors, float)[order], np.nan_to_num(np.asarray(losses, float), nan=np.inf)[order]
    fraction_of(tolerance, start - float(ends[0]))
    lowest = np.minimum.accumulate(ends)
    return float(sizes[np.flatnonzero(ends <= lowest + tolerance)[-1]])
