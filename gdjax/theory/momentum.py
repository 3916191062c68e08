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

    Stable means that no direction of the 3 D^2 moments grows, which is read from high powers of their map: for a few
    features, D <= 10. Directions that no example has are let be.

    Args:
        x: features [N, D].
        batch_size, replace: as `finite_step`.
        momentum: beta.

    Raises:
        ValueError: where a batch has more distinct examples than there are.
    """
    num_examples, dimension = x.shape
    data = x, jnp.zeros(num_examples, x.dtype)
    tolerance = 1e4 * jnp.finfo(x.dtype).eps

    def update(flat, rate):
        params, cross, velocity = flat.reshape(3, dimension, dimension)
        blocks = ((params + params.T) / 2, cross, (velocity + velocity.T) / 2)
        padded = Moments(*(jnp.pad(block, ((0, 1), (0, 1))) for block in blocks))
        options = {"learning_rate": rate, "batch_size": batch_size, "replace": replace, "momentum": momentum}
        return jnp.stack([block[:-1, :-1] for block in finite_step(padded, data, **options)]).reshape(-1)

    def log_growth(rate):
        """Return the log of the spectral radius of the map, from its 2^50th power."""

        def double(k, carry):
            power, log = carry
            norm = jnp.linalg.norm(power)
            power = power / norm
            return power @ power, log + jnp.log(norm) / 2.0**k

        power = jax.jacfwd(update)(jnp.zeros(3 * dimension**2, x.dtype), rate)
        return lax.fori_loop(0, 50, double, (power, jnp.zeros((), x.dtype)))[1]

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        stable = log_growth(middle) < tolerance
        return jnp.where(stable, middle, low), jnp.where(stable, high, middle)

    largest = jnp.linalg.eigvalsh(x.T @ x / num_examples)[-1]
    highest = 2 * (1 + jnp.asarray(momentum)) / largest
    low, high = lax.fori_loop(0, 60, halve, (jnp.zeros_like(highest), highest * (1 + tolerance)))
    return (low + high) / 2
