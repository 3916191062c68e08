"""Quadratics with gradient noise that does not depend on the parameters: what SGD does on average, exactly.

On the loss sum_i h_i theta_i^2 / 2, with noise of variance c_i / B in coordinate i of the gradient, every linear method
moves a state z_i, whose entry 0 is the parameter that counts, by z' = R z + noise. The second moments obey

    E z z' <- R (E z z') R' + Q,

and T of these maps are one such map, found by doubling in log T products: exact at any rate, stable or not. With
h_i = 1 / i, c = h and theta from N(0, I), as in `problems.noisy_quadratic`, this is the noisy quadratic model of
Zhang et al. 2019 (arXiv 1907.04164, section 3).

>>> import jax.numpy as jnp
>>> h = 1 / jnp.arange(1.0, 101.0)
>>> rates = jnp.logspace(-4, 0.3, 100)
>>> for batch_size in (1, 100, 10000):  # the fewest updates that lower the loss from 2.59 to 0.1, and the best rate
...     def plain(rate):
...         return sgd(h, h, start=jnp.ones(100), learning_rate=rate, batch_size=batch_size)
...     updates, rate = fewest_updates(plain, h, learning_rates=rates, target=0.1, max_updates=10**6)
...     print(batch_size, int(updates), f"{rate:.3f}")
1 1720 0.054
100 43 1.634
10000 29 1.805
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdjax.theory._laws import Number


class System(NamedTuple):
    """A linear method on a quadratic: K numbers a coordinate, of which number 0 is the parameter that counts.

    Attributes:
        transition: R [D, K, K], what an update does to the state.
        noise: Q [D, K, K], the covariance that an update adds.
        start: [D, K, K], the second moments before the first update.
    """

    transition: jax.Array
    noise: jax.Array
    start: jax.Array


def sgd(
    eigenvalues: jax.Array, noise: jax.Array, *, start: jax.Array, learning_rate: Number, batch_size: Number
) -> System:
    """Return SGD as a `System` with K = 1: E theta^2 <- (1 - x)^2 E theta^2 + eta^2 c / B, x = eta h.

    Args:
        eigenvalues: h [D].
        noise: c [D], the variance of the gradient of one example.
        start: [D], E theta^2 before the first update.
        learning_rate: eta.
        batch_size: B, examples per update, drawn independently.
    """
    kick = learning_rate**2 * noise / batch_size
    return System(_blocks([[1 - learning_rate * eigenvalues]]), _blocks([[kick]]), _blocks([[start]]))


def momentum(
    eigenvalues: jax.Array,
    noise: jax.Array,
    *,
    start: jax.Array,
    learning_rate: Number,
    batch_size: Number,
    momentum: Number,
) -> System:
    """Return SGD with heavy-ball momentum beta as a `System` of (theta, velocity), from velocity 0.

    velocity <- beta velocity - eta g, theta <- theta + velocity: `optax.sgd(eta, momentum=beta)`. Arguments as `sgd`.
    """
    x = learning_rate * eigenvalues
    kick = learning_rate**2 * noise / batch_size
    keep, none = momentum * jnp.ones_like(x), jnp.zeros_like(x)
    return System(
        _blocks([[1 - x, keep], [-x, keep]]),
        _blocks([[kick, kick], [kick, kick]]),
        _blocks([[start, none], [none, none]]),
    )


def averaged(
    eigenvalues: jax.Array,
    noise: jax.Array,
    *,
    start: jax.Array,
    learning_rate: Number,
    batch_size: Number,
    decay: Number,
) -> System:
    """Return SGD read through a running average as a `System` of (average, theta), from average = theta.

    average <- gamma average + (1 - gamma) theta after each update. Arguments as `sgd`, and `decay`, gamma.
    """
    rho = 1 - learning_rate * eigenvalues
    kick = learning_rate**2 * noise / batch_size
    old = decay * jnp.ones_like(rho)
    new = 1 - old
    return System(
        _blocks([[old, new * rho], [jnp.zeros_like(rho), rho]]),
        _blocks([[new**2 * kick, new * kick], [new * kick, kick]]),
        _blocks([[start, start], [start, start]]),
    )


def preconditioned(eigenvalues: jax.Array, noise: jax.Array, *, power: Number) -> tuple[jax.Array, jax.Array]:
    """Return (h^(1 - p), c h^(-2p)), curvature and noise as seen by the update theta - eta H^(-p) g.

    Hand both to `sgd`, `momentum` or `averaged`; the loss keeps the eigenvalues h.
    """
    return eigenvalues ** (1 - power), noise * eigenvalues ** (-2 * power)


def step(system: System, moments: jax.Array) -> jax.Array:
    """Return the second moments [D, K, K] after one more update, R M R' + Q."""
    return _apply((system.transition, system.noise), moments)


def after(system: System, num_updates: Number) -> jax.Array:
    """Return the second moments [D, K, K] after T updates, an integer below 2^31, from log T products."""

    def digit(carry, bit):
        moments, powers = carry
        taken = (jnp.asarray(num_updates, jnp.int32) >> bit) & 1 == 1
        return (jnp.where(taken, _apply(powers, moments), moments), _twice(powers)), None

    carry = system.start, (system.transition, system.noise)
    (moments, _), _ = lax.scan(digit, carry, jnp.arange(31, dtype=jnp.int32))
    return moments


def excess_loss(moments: jax.Array, eigenvalues: jax.Array) -> jax.Array:
    """Return sum_i h_i E theta_i^2 / 2, the loss above its minimum, from second moments [D, K, K]."""
    return moments[:, 0, 0] @ eigenvalues / 2


def updates_to_target(system: System, eigenvalues: jax.Array, *, target: Number, max_updates: int) -> jax.Array:
    """Return T, the updates after which the loss is first <= target; infinity where that is above `max_updates`.

    The binary digits of T - 1 are found one by one, from 2 log(max_updates) products. Where the loss falls below the
    target more than once (momentum near its edge of stability), one of those times is found, not always the first.
    """

    def double(powers, _):
        return _twice(powers), powers

    def advance(carry, power):
        moments, num_updates = carry
        one, size = power
        further = _apply(one, moments)
        above = ~(excess_loss(further, eigenvalues) <= target)  # so that NaN is above
        return (jnp.where(above, further, moments), num_updates + jnp.where(above, size, 0)), None

    num_digits = max_updates.bit_length()
    _, powers = lax.scan(double, (system.transition, system.noise), length=num_digits)
    sizes = 2 ** jnp.arange(num_digits, dtype=jnp.int32)
    (_, above), _ = lax.scan(advance, (system.start, jnp.int32(0)), (powers, sizes), reverse=True)
    first = jnp.where(excess_loss(system.start, eigenvalues) <= target, 0, above + 1)
    return jnp.where(first <= max_updates, first.astype(eigenvalues.dtype), jnp.inf)


def fewest_updates(
    method: Callable[[jax.Array], System],
    eigenvalues: jax.Array,
    *,
    learning_rates: jax.Array,
    target: Number,
    max_updates: int,
) -> tuple[jax.Array, jax.Array]:
    """Return `updates_to_target` at the best of `learning_rates` [R], and that rate, for `method`, rate -> System.

    Where the rate lies on an edge of the grid, widen the grid. Infinity where no rate reaches the target.
    """
    updates = jax.vmap(
        lambda rate: updates_to_target(method(rate), eigenvalues, target=target, max_updates=max_updates)
    )(learning_rates)
    best = jnp.argmin(updates)
    return updates[best], learning_rates[best]


def stationary_variance(
    eigenvalues: jax.Array,
    noise: jax.Array,
    *,
    learning_rate: Number,
    batch_size: Number,
    momentum: Number = 0.0,
) -> jax.Array:
    """Return E theta^2 [D] after many updates: eta c (1 + beta) / (B h (1 - beta) (2 (1 + beta) - x)), x = eta h.

    Infinite where the method is not stable, x >= 2 (1 + beta). Arguments as `momentum`.
    """
    gap = 2 * (1 + momentum) - learning_rate * eigenvalues
    variance = learning_rate * noise * (1 + momentum) / (batch_size * (1 - momentum) * eigenvalues * gap)
    return jnp.where(gap > 0, variance, jnp.inf)


def averaging_gain(eigenvalues: jax.Array, *, learning_rate: Number, decay: Number) -> jax.Array:
    """Return the stationary variance [D] of the average over that of SGD: (1 - g)(1 + g rho) / ((1 + g)(1 - g rho)).

    rho = 1 - eta h and g = `decay`, as in `averaged`.
    """
    g, rho = decay, 1 - learning_rate * eigenvalues
    return (1 - g) * (1 + g * rho) / ((1 + g) * (1 - g * rho))


def stationary_covariance(
    hessian: jax.Array, covariance: jax.Array, *, learning_rate: Number, batch_size: Number
) -> jax.Array:
    """Solve HC + CH - eta HCH = (eta / B) Sigma for C [D, D], the covariance of the parameters after many updates.

    The discrete form of Mandt et al. 2017 (arXiv 1704.04289), whose continuous-time limit leaves out eta HCH.

    Args:
        hessian: H [D, D], positive definite.
        covariance: Sigma [D, D], the covariance of the gradient of one example, the same everywhere.
        learning_rate: eta, below 2 / lambda_max.
        batch_size: B.
    """
    h, basis = jnp.linalg.eigh(hessian)
    sums = h[:, None] + h[None] - learning_rate * h[:, None] * h[None]
    return basis @ ((basis.T @ covariance @ basis) * (learning_rate / batch_size) / sums) @ basis.T


def _blocks(rows: list[list[jax.Array]]) -> jax.Array:
    """Return [D, K, K] from K rows of K arrays [D]."""
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


def _apply(power: tuple[jax.Array, jax.Array], moments: jax.Array) -> jax.Array:
    transition, noise = power
    return transition @ moments @ transition.mT + noise


def _twice(power: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return the map that applies `power` two times."""
    transition, noise = power
    return transition @ transition, _apply(power, noise)
