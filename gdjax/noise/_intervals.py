"""Confidence intervals for a ratio of two estimates that share a sample, the same in every unit.

>>> import numpy as np
>>> cov = np.diag([0.01, 0.04])  # of the denominator and of the numerator
>>> [round(float(x), 2) for x in fieller(6.0, 2.0, cov, quantile=1.645)]
[3.0, 2.72, 3.32]
>>> [round(float(x), 2) for x in fieller(6.0, 0.1, cov, quantile=1.645)]  # the denominator may be zero
[60.0, 22.63, inf]
>>> deviations = np.diag([0.1, 0.2])  # the same covariance, and in a unit whose square is below the least float32
>>> [f"{float(x):.2f}" for x in ratio_interval(6e-30, 2e-30, 1e-30 * deviations, quantile=1.645)]
['3.00', '2.72', '3.32']
"""

import jax
import jax.numpy as jnp
from scipy import special

from gdjax.curvature import unit


def delete_a_group(whole, left_out, sizes):
    """Return the jackknife's deviations of D estimates, [K, D, ...], from groups of unequal size.

    Their products summed over the K groups are the covariance (Busing, Meijer & van der Leeden 1999, Statistics and
    Computing 9, eqs. 6 and 9). They have the unit of the estimates, so that they are representable where those are.

    Args:
        whole: estimates from the whole sample, [D, ...].
        left_out: estimates without group k, [K, D, ...].
        sizes: examples in each group, [K].
    """
    h = sizes.sum() / sizes
    center = len(sizes) * whole - jnp.tensordot(1 - 1 / h, left_out, 1)

    def deviation(h, estimate):
        return (h * whole - (h - 1) * estimate - center) / jnp.sqrt((h - 1) * len(sizes))

    return jax.vmap(deviation)(h, left_out)


def ratio_interval(numerator, denominator, deviations, *, quantile):
    """Return (ratio, low, high) of `fieller`, from deviations [K, 2, ...] whose products sum to the covariance.

    Deviations come in the order (denominator, numerator). Nothing is squared before both estimates are of the order of
    one, so that estimates from 1e-30 to 1e30 do in float32.
    """
    estimates = jnp.stack(jnp.broadcast_arrays(denominator, numerator))
    units = unit(jnp.concatenate([estimates[None], deviations]))  # [2, ...]
    deviations = deviations / units[None]
    cov = jnp.einsum("ka...,kb...->ab...", deviations, deviations)
    below, above = estimates / units
    factor = units[1] / units[0]
    ratio, low, high = fieller(above, below, cov, quantile=quantile)
    return ratio * factor, low * factor, high * factor


def fieller(numerator, denominator, cov, *, quantile):
    """Return (ratio, low, high): the ratios r >= 0 with |numerator - r denominator| <= quantile standard errors.

    That is a r^2 - 2 b r + c <= 0. Where the denominator is not above zero by `quantile` standard errors, a <= 0, the
    set has no upper end (Fieller 1954, J. R. Stat. Soc. B 16, 175).

    Args:
        numerator, denominator: estimates [...], in units in which their squares, and those of their errors, are
            representable; `ratio_interval` finds such units.
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
    return ratio(numerator, denominator), low, jnp.maximum(low, high)  # without a covariance they differ by rounding


def ratio(numerator, denominator):
    """Return numerator / denominator where the denominator is positive, and infinity elsewhere: never NaN."""
    valid = (denominator > 0) & jnp.isfinite(numerator)
    return jnp.where(valid, numerator / jnp.where(valid, denominator, 1), jnp.inf)


def student(degrees_of_freedom: int, *, confidence: float) -> float:
    """Return the two-sided quantile of Student's t."""
    return float(special.stdtrit(degrees_of_freedom, (1 + confidence) / 2))


def student_series(degrees_of_freedom: jax.Array, *, confidence: float) -> jax.Array:
    """Return the same where the degrees of freedom, real and at least 1, are known only when the program runs.

    By the expansion about the normal quantile (Abramowitz & Stegun 1964, 26.7.5): at 90 % too small by 5 % for one
    degree of freedom, by .3 % for two.
    """
    z = float(special.ndtri((1 + confidence) / 2))
    terms = (
        z**3 + z,
        5 * z**5 + 16 * z**3 + 3 * z,
        3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z,
        79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z,
    )
    inverse = 1 / jnp.asarray(degrees_of_freedom)
    orders = (4, 96, 384, 92160)
    quantile = z + 0 * inverse
    for i, (term, order) in enumerate(zip(terms, orders, strict=True)):
        quantile += term / order * inverse ** (i + 1)
    return quantile
