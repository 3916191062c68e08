"""Schedules of rate and batch size: what any of them does on average, exactly.

Along the eigenvectors of a quadratic, s_i = E theta_i^2 obeys

    s_i' = (1 - eta h_i)^2 s_i + eta^2 / B (c_i + m [h_i^2 s_i + h_i (h.s)]),

with m = 0 for noise that does not shrink (`noisy_quadratic`) and m = 1, c = sigma^2 h for least squares on Gaussian
features. The loss after T updates is a polynomial of positive coefficients in the 1 / B_t,

    loss = bias + sum_t k_t / B_t    (for m = 0; all k_t from one backward pass),

from which `ramps` finds the best batch sizes and `plans` the cheapest run.

>>> import jax.numpy as jnp
>>> h = 1 / jnp.arange(1.0, 101.0)
>>> quadratic = noisy_quadratic(h, h, start=jnp.ones(100))
>>> def halved(rate, batch_size, *, rates, batch_sizes):  # four phases of 4096 examples, by these factors
...     sizes = [batch_size * batch_sizes**phase for phase in range(4)]
...     steps = [4096 // size for size in sizes]
...     schedule = [(rate * rates**phase, size) for phase, size in enumerate(sizes) for _ in range(steps[phase])]
...     return run(quadratic, *jnp.asarray(schedule, float).T)[1]
>>> for rate, size in ((0.1, 1), (1.0, 16)):  # a growing batch is not quite a decaying rate
...     decay, growth = halved(rate, size, rates=0.5, batch_sizes=1), halved(rate, size, rates=1, batch_sizes=2)
...     print(f"updates {len(decay)} and {len(growth)}, loss {growth[-1] / decay[-1] - 1:+.1%}")
updates 16384 and 7680, loss +1.4%
updates 1024 and 480, loss +21.7%
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdjax.theory._laws import Number


class Quadratic(NamedTuple):
    """A loss sum_i h_i theta_i^2 / 2 and the noise of its gradients.

    Attributes:
        eigenvalues: h [D].
        start: [D], E theta_i^2 before the first update.
        noise: c [D], the variance of the gradient of one example where theta = 0.
        shrinking: m, 1 for the noise that Gaussian features add away from theta = 0, and 0 for none.
    """

    eigenvalues: jax.Array
    start: jax.Array
    noise: jax.Array
    shrinking: Number = 0.0


def noisy_quadratic(eigenvalues: jax.Array, noise: jax.Array, *, start: jax.Array) -> Quadratic:
    """Return the quadratic whose noise c / B does not depend on the parameters, as in `quadratics`."""
    return Quadratic(eigenvalues, start, noise, 0.0)


def gaussian_least_squares(eigenvalues: jax.Array, *, label_noise: Number, start: jax.Array) -> Quadratic:
    """Return least squares on features x ~ N(0, H), along the eigenvectors of H, as in `least_squares`."""
    return Quadratic(eigenvalues, start, label_noise * eigenvalues, 1.0)


def run(
    quadratic: Quadratic, learning_rates: jax.Array, batch_sizes: jax.Array, *, normalized: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return (s [D] after T updates, the losses [T] after each), for any rates and batch sizes.

    Args:
        quadratic: from `noisy_quadratic` or `gaussian_least_squares`.
        learning_rates: eta_t [T].
        batch_sizes: B_t [T], any positive numbers; infinity for no noise.
        normalized: whether gradients are divided by sqrt(E |g|^2), as adaptive methods do on average. Where noise
            dominates, (eta / sqrt(a), a B) then does what (eta / a, B) does (Meterez et al. 2025, arXiv 2510.14717).
    """
    return _run(quadratic, learning_rates, 1 / batch_sizes, normalized)


@jax.jit  # called alone, it compiles once for the same shapes
def noise_costs(
    quadratic: Quadratic, learning_rates: jax.Array, batch_sizes: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return (bias, k [T]) such that the last loss is bias + sum_t k_t / B_t, from one backward pass.

    Exact at every B where the noise does not shrink. Otherwise it is the tangent at `batch_sizes`, by default without
    noise: k_t = d loss / d (1 / B_t).

    Args:
        quadratic, learning_rates: as in `run`.
        batch_sizes: B_t [T].
    """
    h, start, noise, shrinking = quadratic
    inverse = jnp.zeros_like(learning_rates) if batch_sizes is None else 1 / batch_sizes

    def back(slope, now):
        """Return d loss / d s before an update from that after it; the cost, and that of the noise that stays."""
        rate, inverse, second = now
        costs = rate**2 * slope @ noise, rate**2 * slope @ gradient_variance(quadratic, second)
        kick = rate**2 * inverse * shrinking * h * (h * slope + h @ slope)
        return (1 - rate * h) ** 2 * slope + kick, costs

    def steady():  # no s is needed, which would take T D numbers
        return lax.scan(lambda slope, now: back(slope, (*now, start)), h / 2, (learning_rates, inverse), reverse=True)

    def shrinks():
        def forward(second, now):
            return _update(quadratic, second, *now), second

        _, seconds = lax.scan(forward, start, (learning_rates, inverse))
        return lax.scan(back, h / 2, (learning_rates, inverse, seconds), reverse=True)

    slope, (of_steady, costs) = lax.cond(jnp.asarray(shrinking) == 0, steady, shrinks)
    return slope @ start + (of_steady - costs) @ inverse, costs


def updates_saved(shares: jax.Array) -> jax.Array:
    """Return 1 - mean(eta / eta_0), the share of updates saved where B grows as eta_0 / eta and eta stays.

    Smith et al. 2018 (arXiv 1711.00489). The two agree to first order in eta h only; growth ends at the higher loss.

    Args:
        shares: eta / eta_0 at equal steps of examples.
    """
    return 1 - jnp.mean(shares)


@partial(jax.jit, static_argnames="normalized")
def _run(quadratic: Quadratic, learning_rates: jax.Array, inverse: jax.Array, normalized: bool):
    h = quadratic.eigenvalues

    def update(second, now):
        rate, inverse = now
        if normalized:
            rate = rate / jnp.sqrt(h**2 @ second + inverse * jnp.sum(gradient_variance(quadratic, second)))
        second = _update(quadratic, second, rate, inverse)
        return second, h @ second / 2

    return lax.scan(update, quadratic.start, (learning_rates, inverse))


def _update(quadratic: Quadratic, second: jax.Array, rate: jax.Array, inverse: jax.Array) -> jax.Array:
    """Return s [D] after an update on a batch of 1 / `inverse` examples."""
    kick = rate**2 * inverse * gradient_variance(quadratic, second)
    return (1 - rate * quadratic.eigenvalues) ** 2 * second + kick


def gradient_variance(quadratic: Quadratic, second: jax.Array) -> jax.Array:
    """Return the variance [D] of the gradient of one example at s = `second` [D]."""
    h = quadratic.eigenvalues
    return quadratic.noise + quadratic.shrinking * h * (h * second + h @ second)
