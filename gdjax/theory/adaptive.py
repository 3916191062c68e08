"""Updates that do not grow with the gradient (sign, Adam, normalised, Muon): one step on a quadratic, exactly.

An update is -eta u, where the direction u is made from the gradient g of a batch, which is Gaussian of mean G and
covariance Sigma / B. On a quadratic of Hessian H the change of the loss needs two moments of u only,

    E L(w - eta u) - L(w) = -eta G'E u + eta^2 tr(H E uu') / 2,

and this module knows them for three directions: `sign` (Adam and Lion without memory), `frozen` (Adam whose second
moment has averaged over many updates) and `normalized` (also Muon on one column).

>>> import jax.numpy as jnp
>>> grad, covariance = jnp.full(10, 0.1), jnp.eye(10)
>>> for coupling in (0.0, 0.5):  # the best rate rises as sqrt(B) to a plateau; where H couples coordinates it falls
...     hessian = (1 - coupling) * jnp.eye(10) + coupling
...     rates = [best_learning_rate(sign(grad, covariance, batch_size=size), grad, hessian) for size in (1, 40, 10**6)]
...     print(" ".join(f"{rate:.4f}" for rate in rates))
0.0080 0.0473 0.1000
0.0077 0.0236 0.0182
>>> surge = surge_batch_size(grad, covariance, hessian)
>>> print(f"{surge:.1f} {surge_learning_rate(10**6, surge, peak=0.0236):.4f}")  # the law of the surge goes to 0 instead
34.9 0.0003
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import erf, log_ndtr, ndtr

from gdjax.theory._laws import Number

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)
SATURATED = 40.0  # standard deviations from 0, at which a sign is certain in any precision


class Direction(NamedTuple):
    """Two moments of a direction u, of which the update is -eta u.

    Attributes:
        mean: E u [D].
        second_moment: E uu' [D, D].
    """

    mean: jax.Array
    second_moment: jax.Array


def sign(grad: jax.Array, covariance: jax.Array, *, batch_size: Number) -> Direction:
    """Return the moments of the signs of the gradient: `optax.adam(b1=0, b2=0, eps=0)`, `optax.sign_sgd`.

    E u_i = erf(a_i / sqrt 2), a = G sqrt(B) / sigma. E u_i u_j is 4 Phi2(a_i, a_j; rho) - 2 Phi(a_i) - 2 Phi(a_j) + 1,
    computed from Plackett's identity (1954) as

        E u_i E u_j + 2 / pi int_0^arcsin(rho) exp(-(a_i^2 + a_j^2 - 2 a_i a_j sin t) / (2 cos^2 t)) dt.

    Args:
        grad: G [D], the gradient of the mean loss.
        covariance: Sigma [D, D], the covariance of the gradient of one example.
        batch_size: B, examples per update, drawn independently. Infinity is allowed.
    """
    std = jnp.sqrt(jnp.diagonal(covariance))
    a = jnp.where(grad == 0, 0, grad / (std / jnp.sqrt(batch_size)))
    a = jnp.clip(a, -SATURATED, SATURATED)  # so that no infinity is subtracted from another below
    mean = erf(a / 2**0.5)
    scale = jnp.where(std == 0, 1, std)
    half = jnp.arcsin(jnp.clip(covariance / (scale[:, None] * scale[None]), -1, 1)) / 2

    def add(total, node):
        at, weight = node
        angle = half * (1 + at)
        exponent = a[:, None] ** 2 + a[None] ** 2 - 2 * a[:, None] * a[None] * jnp.sin(angle)
        return total + weight * jnp.exp(-exponent / (2 * jnp.cos(angle) ** 2)), None

    nodes = jnp.asarray(NODES, a.dtype), jnp.asarray(WEIGHTS, a.dtype)
    integral = half * lax.scan(add, jnp.zeros_like(covariance), nodes)[0]
    second = mean[:, None] * mean[None] + 2 / jnp.pi * integral
    certain = jnp.where((grad == 0) & (std == 0), 0, 1).astype(second.dtype)  # sign(0) = 0
    return Direction(mean, jnp.fill_diagonal(second, certain, inplace=False))


def frozen(grad: jax.Array, covariance: jax.Array, *, batch_size: Number) -> Direction:
    """Return the moments of g / sqrt(v) at v = E g^2 = G^2 + sigma^2 / B: Adam of b1 = 0 and b2 near 1.

    E u_i = sign(G_i) / sqrt(1 + b_i / B), b_i = sigma_i^2 / G_i^2, and E u_i^2 = 1; exact for any distribution of the
    gradients. Arguments as `sign`.
    """
    moments = grad[:, None] * grad[None] + covariance / batch_size
    std = jnp.sqrt(jnp.diagonal(moments))
    scale = jnp.where(std == 0, 0, 1 / std)  # a coordinate that is always 0 stays, as by `sign`
    return Direction(grad * scale, moments * scale[:, None] * scale[None])


def normalized(grad: jax.Array, variance: Number, *, batch_size: Number) -> Direction:
    """Return the moments of g / |g| where Sigma = `variance` I: also Muon on a matrix of one column.

    E u = E cos(g, G) G / |G|; E uu' is E cos^2 along G and the rest in equal parts across. Arguments as `sign`; where
    G = 0 all directions are alike, and without noise u = 0.
    """
    dimension = len(grad)
    norm, std = jnp.linalg.norm(grad), jnp.sqrt(jnp.asarray(variance) / batch_size)
    cosine, sine_squared = _alignment(jnp.where(norm == 0, 0, norm / std), dimension)
    along = jnp.where(norm == 0, jnp.eye(1, dimension, dtype=grad.dtype)[0], grad / norm)
    across = sine_squared / max(dimension - 1, 1)
    second = across * jnp.eye(dimension, dtype=grad.dtype) + (1 - sine_squared - across) * along[:, None] * along[None]
    return Direction(cosine * along, jnp.where((norm == 0) & (std == 0), 0, second))


def alignment(signal: Number, dimension: int) -> jax.Array:
    """Return E cos(g, G) for isotropic noise in D dimensions: k / sqrt 2 G((D+1)/2) / G(D/2+1) 1F1(1/2; D/2+1; -k^2/2).

    It is erf(k / sqrt 2) for D = 1 and 1 / sqrt(1 + B_simple / B) for many dimensions.

    Args:
        signal: k = |G| sqrt(B) / sigma, sigma^2 being the variance of one coordinate of one example's gradient.
        dimension: D.
    """
    return _alignment(jnp.asarray(signal), dimension)[0]


def expected_change(direction: Direction, grad: jax.Array, hessian: jax.Array, *, learning_rate: Number) -> jax.Array:
    """Return E L(w - eta u) - L(w) = -eta G'E u + eta^2 tr(H E uu') / 2, exact on a quadratic.

    Args:
        direction: from `sign`, `frozen` or `normalized`.
        grad: G [D].
        hessian: H [D, D].
        learning_rate: eta.
    """
    gain, curved = _terms(direction, grad, hessian)
    return -learning_rate * gain + jnp.square(learning_rate) * curved / 2


def best_learning_rate(direction: Direction, grad: jax.Array, hessian: jax.Array) -> jax.Array:
    """Return G'E u / tr(H E uu'), the rate of the least `expected_change`, whose arguments it has."""
    gain, curved = _terms(direction, grad, hessian)
    return gain / curved


def best_change(direction: Direction, grad: jax.Array, hessian: jax.Array) -> jax.Array:
    """Return -(G'E u)^2 / (2 tr(H E uu')), the least `expected_change`. At q times the best rate it is q (2 - q) of it.

    One coordinate: the gain of `frozen` is proportional to 1 / (1 + b / B), so that its critical batch size is b, as
    that of SGD; half of the gain of `sign` is left at B = 1.1063 b.
    """
    gain, curved = _terms(direction, grad, hessian)
    return -(gain**2) / (2 * curved)


def surge_batch_size(grad: jax.Array, covariance: jax.Array, hessian: jax.Array) -> jax.Array:
    """Return B_noise = pi tr H / (2 sum_{i != j} H_ij G_i G_j / (sigma_i sigma_j)), where the law of the surge peaks.

    Li et al. 2024 (arXiv 2405.14578). Infinite for a diagonal H, which has no surge. Arguments as `sign`.
    """
    signal = grad / jnp.sqrt(jnp.diagonal(covariance))
    coupled = signal @ jnp.fill_diagonal(hessian, 0, inplace=False) @ signal
    return jnp.where(coupled == 0, jnp.inf, jnp.pi * jnp.trace(hessian) / (2 * coupled))


def surge_learning_rate(batch_size: Number, surge: Number, *, peak: Number) -> jax.Array:
    """Return eta_peak / ((sqrt(Bn / B) + sqrt(B / Bn)) / 2), the law of the surge (Li et al. 2024, arXiv 2405.14578).

    It puts E sign(g_i) ~ sqrt(B), which holds while noise dominates, into a Hessian that couples the coordinates. Above
    B_noise it is wrong: it falls to 0, where E sign(g) saturates and the best rate settles at |G|_1 / (s'Hs),
    s = sign(G), the `best_learning_rate` of `sign` at an infinite batch.

    Args:
        batch_size: B.
        surge: B_noise, from `surge_batch_size`.
        peak: eta_peak, the rate at B = B_noise.
    """
    ratio = jnp.sqrt(jnp.asarray(batch_size) / surge)
    return 2 * peak / (ratio + 1 / ratio)


def sign_floor(
    learning_rate: Number, eigenvalue: Number, *, noise: Number, batch_size: Number, num_points: int = 1000
) -> jax.Array:
    """Return E theta^2 of sign SGD in one dimension after many updates, exactly.

    From theta_0 = 0 the parameter walks on the lattice k eta: down with probability Phi(h theta sqrt(B / c)), up
    otherwise. Detailed balance gives where it stays, on average over even and odd updates. For small eta it is
    `small_sign_floor`.

    Args:
        learning_rate: eta.
        eigenvalue: h.
        noise: c, the variance of the gradient of one example, which is Gaussian.
        batch_size: B.
        num_points: lattice points on each side of 0. NaN is returned where more than 1e-9 of the walk is beyond them.
    """
    steepness = learning_rate * eigenvalue * jnp.sqrt(batch_size / jnp.asarray(noise))
    points = jnp.arange(num_points + 1, dtype=steepness.dtype)
    # p_(k+1) / p_k = P(up at k) / P(down at k + 1), the same on both sides of 0.
    steps = log_ndtr(-steepness * points[:-1]) - log_ndtr(steepness * points[1:])
    logs = jnp.concatenate([jnp.zeros(1, steps.dtype), jnp.cumsum(steps)])
    mass = jnp.exp(logs) * jnp.where(points == 0, 1, 2)
    mass = mass / jnp.sum(mass)
    # All of it, but for the factor P(down) near 1, lies beyond the last point if the walk could go on.
    leaving = mass[-1] * ndtr(-steepness * points[-1]) / ndtr(steepness * points[-1])
    return jnp.where(leaving < 1e-9, jnp.square(learning_rate) * (mass @ points**2), jnp.nan)


def small_sign_floor(learning_rate: Number, eigenvalue: Number, *, noise: Number, batch_size: Number) -> jax.Array:
    """Return sqrt(pi / 8) eta sqrt(c / B) / h, the limit of `sign_floor` for small eta: eta / sqrt(B) decides it.

    Arguments as there. Adam of frozen v has eta sqrt(c / B) / (2 h).
    """
    return jnp.sqrt(jnp.pi / 8) * learning_rate * jnp.sqrt(noise / jnp.asarray(batch_size)) / eigenvalue


def _terms(direction: Direction, grad: jax.Array, hessian: jax.Array) -> tuple[jax.Array, jax.Array]:
    return grad @ direction.mean, jnp.sum(hessian * direction.second_moment)


def _alignment(signal: jax.Array, dimension: int) -> tuple[jax.Array, jax.Array]:
    """Return E cos and E sin^2 of the angle between g and G.

    From 1 / |g| = 2 / sqrt(pi) int exp(-s^2 |g|^2) ds and 1 / |g|^2 likewise, with sin t = s / sqrt(1/2 + s^2):
    E cos = k sqrt(2 / pi) int_0^(pi/2) cos^D t exp(-k^2 sin^2 t / 2) dt, and E sin^2 = (D - 1) int cos^(D-1) t sin t
    exp(-k^2 sin^2 t / 2) dt.
    """
    signal = jnp.minimum(signal, jnp.finfo(signal.dtype).max ** 0.5)  # which is as good as no noise
    # Beyond this angle both integrands are below e^-39, as sin t >= 2 t / pi.
    end = jnp.minimum(jnp.pi / 2, 14 / jnp.hypot(signal, dimension**0.5))
    nodes, weights = (jnp.asarray(array, end.dtype) for array in (NODES, WEIGHTS))
    angles = jnp.multiply.outer(end, (1 + nodes) / 2)
    density = jnp.multiply.outer(end, weights / 2) * jnp.exp(-((signal[..., None] * jnp.sin(angles)) ** 2) / 2)
    # cos^(D-1), of which a power would multiply the rounding of a cosine near 1
    density = density * jnp.exp((1 - dimension) / 2 * jnp.log1p(jnp.tan(angles) ** 2))
    cosine = signal * jnp.sqrt(2 / jnp.pi) * jnp.sum(density * jnp.cos(angles), -1)
    return cosine, (dimension - 1) * jnp.sum(density * jnp.sin(angles), -1)
