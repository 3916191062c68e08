"""Heavy-ball momentum on least squares, where the noise shrinks with the error: what it does on average, exactly.

v' = beta v - eta g, w' = w + v': `optax.sgd(eta, momentum=beta)`. The second moments of delta = w - w* and of the
velocity v move by a linear map, known for Gaussian features (`gaussian_step`, stable up to
`least_squares.max_learning_rate`) and for any finite data set (`finite_step`, stable up to
`finite_max_learning_rate`). Noise that does not shrink is in `quadratics.momentum`.

>>> import jax.numpy as jnp
>>> from gdjax.theory import least_squares
>>> eigenvalues = jnp.geomspace(1.0, 0.01, 20)
>>> for batch_size in (1, 4, 16, 64, jnp.inf):  # small B: momentum lowers the largest stable rate; large: it raises it
...     rates = [least_squares.max_learning_rate(eigenvalues, batch_size=batch_size, momentum=m) for m in (0.0, 0.9)]
...     print(batch_size, *(f"{rate:.3f}" for rate in rates))
1 0.343 0.038
4 1.006 0.150
16 1.717 0.559
64 1.935 1.712
inf 2.000 3.800
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdjax.theory import least_squares
from gdjax.theory._laws import Number


class Moments(NamedTuple):
    """Second moments of parameters and velocity: [D] along the eigenvectors of H, or matrices for `finite_step`.

    Attributes:
        params: E delta delta'.
        cross: E delta v'.
        velocity: E v v'.
    """

    params: jax.Array
    cross: jax.Array
    velocity: jax.Array


def at_rest(second_moment: jax.Array) -> Moments:
    """Return the moments before the first update, of velocity 0 and given E delta delta'."""
    return Moments(second_moment, jnp.zeros_like(second_moment), jnp.zeros_like(second_moment))


def gaussian_step(
    moments: Moments,
    eigenvalues: jax.Array,
    *,
    learning_rate: Number,
    batch_size: Number,
    label_noise: Number,
    momentum: Number,
) -> Moments:
    """Return the moments along the eigenvectors after one more update on B fresh examples with x ~ N(0, H).

    With A, X, V = E delta^2, E delta v, E v^2 of each mode and N = (1 + 1/B) h^2 A + (h / B) (h.A + sigma^2),

        V' = beta^2 V - 2 eta beta h X + eta^2 N,    Y = beta X - eta h A,    X' = Y + V',    A' = A + 2 Y + V'.

    The excess risk is h.A / 2.

    Args:
        moments: A, X, V [D].
        eigenvalues: h [D] of H, the covariance of the features.
        learning_rate: eta.
        batch_size: B.
        label_noise: sigma^2, the variance of the labels' noise.
        momentum: beta.
    """
    h, (params, cross, velocity) = eigenvalues, moments
    noise = (1 + 1 / batch_size) * h**2 * params + h / batch_size * (h @ params + label_noise)
    velocity = momentum**2 * velocity - 2 * learning_rate * momentum * h * cross + learning_rate**2 * noise
    moved = momentum * cross - learning_rate * h * params
    return Moments(params + 2 * moved + velocity, moved + velocity, velocity)


def finite_step(
    moments: Moments,
    data: tuple[jax.Array, jax.Array],
    *,
    learning_rate: Number,
    batch_size: int,
    replace: bool,
    momentum: Number,
) -> Moments:
    """Return Z = E z z', X = E z u', V = E u u' after one more update, z = [delta; 1] and u = [v; 0].

    With A and N = E g g' of `least_squares.finite_gradient`,

        V' = beta^2 V - eta beta (A X + X'A') + eta^2 N,    Y = beta X - eta Z A',    X' = Y + V',
        Z' = Z + Y + Y' + V'.

    Args:
        moments: Z, X, V [D + 1, D + 1]. A long recursion should symmetrise what rounding leaves of Z and V.
        data, learning_rate, batch_size, replace: as `least_squares.finite_step`.
        momentum: beta.

    Raises:
        ValueError: where a batch has more distinct examples than there are.
    """
    params, cross, velocity = moments
    mean_map, noise = least_squares.finite_gradient(params, data, batch_size=batch_size, replace=replace)
    drift = mean_map @ cross
    velocity = momentum**2 * velocity - learning_rate * momentum * (drift + drift.T) + learning_rate**2 * noise
    moved = momentum * cross - learning_rate * params @ mean_map.T
    return Moments(params + moved + moved.T + velocity, moved + velocity, velocity)


def finite_max_learning_rate(x: jax.Array, *, batch_size: int, replace: bool, momentum: Number = 0.0) -> jax.Array:
    """Return the rate below which `finite_step` is stable, whatever the labels, by bisection.

    Where E delta delta' = S, the gradient of a batch has the covariance C(S) = c (mean x x'S x x' - H S H), c as in
    `least_squares.noise_share`. Noise of that covariance in every update would keep E delta_i delta_j at g_ij C_ij,

        g_ij = (1 - beta^2) / ((1 - beta)^2 ((1 + beta) (h_i + h_j) / eta - h_i h_j) + beta (h_i - h_j)^2),

    along the eigenvectors of H. Stable means eta h < 2 (1 + beta) and all eigenvalues of S -> g C(S), a map of D^2
    numbers, below 1: as `least_squares.kappa`, for D <= 30 or so. Directions that no example has are let be.

    Args:
        x: features [N, D], in any unit.
        batch_size, replace: as `finite_step`.
        momentum: beta.

    Raises:
        ValueError: where a batch has more distinct examples than there are.
    """
    num_examples = len(x)
    share = least_squares.noise_share(batch_size, num_examples, replace=replace)
    scale = jnp.max(jnp.abs(x))
    scale = jnp.where(scale == 0, 1, scale)
    x = x / scale  # the fourth power of a feature must not overflow
    x = x @ jnp.linalg.eigh(x.T @ x)[1]
    h = jnp.mean(x**2, 0)
    pairs = (x[:, :, None] * x[:, None]).reshape(num_examples, -1)
    sums, products, gaps = (op.outer(h, h).reshape(-1) for op in (jnp.add, jnp.multiply, jnp.subtract))
    covariance = share * (pairs.T @ pairs / num_examples - jnp.diag(products))

    def stable(rate):
        left = (1 - momentum) ** 2 * ((1 + momentum) * sums / rate - products) + momentum * gaps**2
        root = jnp.sqrt(jnp.where(left > 0, (1 - momentum**2) / left, 0))
        return jnp.linalg.eigvalsh(root[:, None] * covariance * root[None])[-1] < 1

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        below = stable(middle)
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    highest = 2 * (1 + momentum) / jnp.max(h)
    low, high = lax.fori_loop(0, 60, halve, (jnp.zeros_like(highest), highest))
    return (low + high) / 2 / scale / scale
