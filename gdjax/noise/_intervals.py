"""Confidence intervals for a ratio of two estimates that share a sample.

>>> import numpy as np
>>> cov = np.diag([0.01, 0.04])  # of the denominator and of the numerator
>>> [round(float(x), 2) for x in fieller(6.0, 2.0, cov, quantile=1.645)]
[3.0, 2.72, 3.32]
>>> [round(float(x), 2) for x in fieller(6.0, 0.1, cov, quantile=1.645)]  # the denominator may be zero
[60.0, 22.63, inf]
"""

import jax
import jax.numpy as jnp
from scipy import special


def delete_a_group(whole, left_out, sizes):
    """Return the jackknife's covariance [D, D, ...] of D estimates, from groups of unequal size.

    (Busing, Meijer & van der Leeden 1999, Statistics and Computing 9, eqs. 6 and 9.)

    Args:
        whole: estimates from the whole sample, [D, ...].
        left_out: estimates without group k, [K, D, ...].
        sizes: examples in each group, [K].
    """
    h = sizes.sum() / sizes
    center = len(sizes) * whole - jnp.tensordot(1 - 1 / h, left_out, 1)

    def deviation(h, estimate):
        return (h * whole - (h - 1) * estimate - center) / jnp.sqrt(h - 1)

    deviations = jax.vmap(deviation)(h, left_out)
    return jnp.einsum("ka...,kb...->ab...", deviations, deviations) / len(sizes)


def fieller(numerator, denominator, cov, *, quantile):
    """Return (ratio, low, high): the ratios r >= 0 with |numerator - r denominator| <= quantile standard errors.

    That is a r^2 - 2 b r + c <= 0. Where the denominator is not above zero by `quantile` standard errors, a <= 0, the
    set has no upper end (Fieller 1954, J. R. Stat. Soc. B 16, 175).

    Args:
        numerator, denominator: estimates [...].
        cov: their covariance in the order (denominator, numerator), [2, 2, ...].
        quantile: of Student's t.
    """
    a = denominator**2 - quantile**2 * cov[0, 0]
    b = numerator * denominator - quantile**2 * cov[0, 1]
    c = numerator**2 - quantile**2 * cov[1, 1]
    # b^2 - a c, written so that nothing cancels where the covariance is small.
    variance = denominator**2 * cov[1, 1] - 2 * denominator * numerator * cov[0, 1] + numerator**2 * cov[0, 0]
    determinant = cov[0, 0] * cov[1, 1] - cov[0, 1] ** 2
    root = quantile * jnp.sqrt(jnp.maximum(variance - quantile**2 * determinant, 0))
    identified = (a > 0) & (denominator > 0) & jnp.isfinite(numerator)
    bounded_below = (c > 0) & (numerator > 0) & ((denominator > 0) | (a <= 0))
    low = jnp.where(bounded_below, c / jnp.where(bounded_below, b + root, 1), 0)
    high = jnp.where(identified, jnp.maximum(b + root, 0) / jnp.where(identified, a, 1), jnp.inf)
    return ratio(numerator, denominator), low, high


def ratio(numerator, denominator):
    """Return numerator / denominator where the denominator is positive, and infinity elsewhere: never NaN."""
    valid = (denominator > 0) & jnp.isfinite(numerator)
    return jnp.where(valid, numerator / jnp.where(valid, denominator, 1), jnp.inf)


def student(degrees_of_freedom: int, *, confidence: float) -> float:
    """Return the two-sided quantile of Student's t."""
    return float(special.stdtrit(degrees_of_freedom, (1 + confidence) / 2))
