"""Weight decay on the noisy quadratic, decoupled as in AdamW: mean and variance after any number of updates, exactly.

The loss is sum_i h_i (theta_i - theta*_i)^2 / 2, the noise of its gradient has variance c_i / B. With the rate p_i eta
of coordinate i and decay lambda an update is

    theta' = a theta + eta p h theta* + noise,    a = 1 - eta (p h + lambda),

so that mean and variance approach m = p h theta* / (p h + lambda) and v = (eta p)^2 c / (B (1 - a^2)) as a^T and a^2T.
SGD has p = 1 (`sgdw`), and Adam of frozen second moment v_i has p_i = 1 / sqrt(v_i) (`adamw`).

What to do with lambda when B grows to kappa B follows from the invariants: SGD keeps the run where eta / B and lambda
stay; AdamW, where noise dominates, where eta / sqrt(B) *and* lambda / sqrt(B) stay. 'lambda ~ B at fixed eta'
keeps only the time that the weights remember, B / (eta lambda): enough where the loss ignores their scale.

>>> import jax.numpy as jnp
>>> h = 1 / jnp.arange(1.0, 65.0)
>>> for rate, decay, size in ((0.004, 0.2, 4), (0.032, 1.6, 256), (0.004, 12.8, 256)):
...     settings = {"learning_rate": rate, "weight_decay": decay, "batch_size": size, "num_updates": 2**14 // size}
...     moments = adamw(h, h, optimum=jnp.ones(64), start=jnp.full(64, 3.0), **settings)
...     print(size, f"{excess_loss(moments, h, optimum=jnp.ones(64)):.4f}", timescale(rate, decay, batch_size=size))
4 0.1468 Timescale(updates=1250.0, examples=5000.0)
256 0.1476 Timescale(updates=19.53125, examples=5000.0)
256 0.9759 Timescale(updates=19.53125, examples=5000.0)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdjax.theory._laws import Number, power_minus_one


class Moments(NamedTuple):
    """Mean [D] and variance [D] of the parameters, coordinate by coordinate."""

    mean: jax.Array
    variance: jax.Array


def sgdw(
    eigenvalues: jax.Array,
    noise: jax.Array,
    *,
    optimum: jax.Array,
    start: jax.Array,
    learning_rate: Number,
    weight_decay: Number,
    batch_size: Number,
    num_updates: Number,
) -> Moments:
    """Return the moments under theta' = theta - eta (g + lambda theta): SGD, where decay and an L2 loss are one.

    `optax.chain(optax.add_decayed_weights(lambda), optax.sgd(eta))`.

    Args:
        eigenvalues: h [D], such that h + lambda > 0.
        noise: c [D], the variance of the gradient of one example.
        optimum: theta* [D], where the loss is least; weights decay towards 0.
        start: theta_0 [D].
        learning_rate: eta.
        weight_decay: lambda.
        batch_size: B, examples per update, drawn independently.
        num_updates: T, whole; infinity for the floor of a stable run.
    """
    return _after(
        jnp.ones_like(eigenvalues),
        (eigenvalues, noise, optimum, start),
        (learning_rate, weight_decay, batch_size, num_updates),
    )


def adamw(
    eigenvalues: jax.Array,
    noise: jax.Array,
    *,
    optimum: jax.Array,
    start: jax.Array,
    learning_rate: Number,
    weight_decay: Number,
    batch_size: Number,
    num_updates: Number,
    second_moment: jax.Array | None = None,
) -> Moments:
    """Return the moments under theta' = theta - eta (g / sqrt(v) + lambda theta): AdamW of b1 = 0 and b2 near 1.

    Args:
        eigenvalues, noise, optimum, start, learning_rate, weight_decay, batch_size, num_updates: as in `sgdw`.
        second_moment: v [D], default c / B, that of gradients whose noise dominates.
    """
    if second_moment is None:
        second_moment = noise / batch_size
    return _after(
        1 / jnp.sqrt(second_moment),
        (eigenvalues, noise, optimum, start),
        (learning_rate, weight_decay, batch_size, num_updates),
    )


def excess_loss(moments: Moments, eigenvalues: jax.Array, *, optimum: jax.Array) -> jax.Array:
    """Return sum_i h_i [(mean_i - theta*_i)^2 + variance_i] / 2, the loss above its minimum."""
    return eigenvalues @ ((moments.mean - optimum) ** 2 + moments.variance) / 2


def best_weight_decay(
    eigenvalue: Number, noise: Number, *, optimum: Number, learning_rate: Number, batch_size: Number
) -> jax.Array:
    """Return the lambda of the least loss of one coordinate after many updates of `sgdw`, by bisection.

    For small eta it is h r / (1 - r), r = eta c / (4 B h theta*^2): at fixed eta it falls with B. It is 0 where
    eta h >= 1. Do not expect a gain: where eta is tuned for a run that begins at 0, the best lambda is 0.

    Args:
        eigenvalue: h.
        noise: c, the variance of the gradient of one example.
        optimum: theta*.
        learning_rate: eta.
        batch_size: B.
    """
    h, eta = jnp.asarray(eigenvalue), jnp.asarray(learning_rate)
    pull, kick = 2 * h * jnp.square(optimum), eta * noise / batch_size

    def slope(decay):
        """Return the sign of d loss / d lambda at lambda = `decay`, which rises up to 1 / eta - h."""
        stiffness = h + decay
        gap = 2 - eta * stiffness
        return pull * decay * gap**2 - 2 * kick * (1 - eta * stiffness) * stiffness

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        falling = slope(middle) < 0
        return jnp.where(falling, middle, low), jnp.where(falling, high, middle)

    shape = jnp.broadcast_shapes(jnp.shape(pull * eta), jnp.shape(kick))
    high = jnp.broadcast_to(jnp.maximum(1 / eta - h, 0), shape)
    low, high = lax.fori_loop(0, 100, halve, (jnp.zeros_like(high), high))
    return jnp.where(eta * h < 1, (low + high) / 2, 0)


class Timescale(NamedTuple):
    """How long weights are remembered: an update t before the last weighs (1 - eta lambda)^t in them.

    Attributes:
        updates: 1 / (eta lambda).
        examples: B / (eta lambda).
    """

    updates: Number
    examples: Number


def timescale(learning_rate: Number, weight_decay: Number, *, batch_size: Number) -> Timescale:
    """Return 1 / (eta lambda) updates, and the same in examples (Wang & Aitchison 2024, arXiv 2405.13698).

    The last weights are an average of the updates, theta_T = k^T theta_0 - eta sum_t k^(T-1-t) u_t, k = 1 - eta lambda.
    Divided by the examples of a run, the second is the number that Bergsma et al. 2025 (arXiv 2505.13738) hold
    constant.
    """
    updates = 1 / (learning_rate * weight_decay)
    return Timescale(updates, updates * batch_size)


def same_directions(
    learning_rate: Number, weight_decay: Number, params: Any, *, factor: Number
) -> tuple[Number, Number, Any]:
    """Return (c eta, lambda / c, c params): the same run of AdamW (eps = 0) where the loss ignores the scale of params.

    All weights of the other run are c times those of this one, bit for bit where c is a power of 2. Hence only
    eta lambda and |w| / eta count for such a loss.

    Args:
        learning_rate: eta.
        weight_decay: lambda.
        params: the parameters at the start, a pytree.
        factor: c.
    """
    return learning_rate * factor, weight_decay / factor, jax.tree.map(lambda leaf: leaf * factor, params)


def equilibrium_norm(learning_rate: Number, weight_decay: Number) -> jax.Array:
    """Return |w| = eta / sqrt(1 - k^2), k = 1 - eta lambda, where unit updates orthogonal to w settle.

    Each of them turns w by eta / |w| = sqrt(1 - k^2), about sqrt(2 eta lambda).
    """
    x = jnp.asarray(learning_rate) * weight_decay
    return learning_rate / jnp.sqrt(x * (2 - x))


def _after(scale: jax.Array, coordinates: tuple[jax.Array, ...], settings: tuple[Number, ...]) -> Moments:
    """Return the moments for the preconditioner p = `scale` [D]; the arguments are those of `sgdw`."""
    h, noise, optimum, start = coordinates
    rate, decay, batch_size, num_updates = settings
    stiffness = scale * h + decay
    x = rate * stiffness
    fixed = scale * h * optimum / stiffness
    floor = (rate * scale) ** 2 * noise / (batch_size * x * (2 - x))
    gone = -power_minus_one(x, jnp.asarray(num_updates, x.dtype))
    return Moments(start + gone * (fixed - start), floor * gone * (2 - gone))
