"""How the useful batch size grows with the number of examples, on power-law spectra, and a law to fit to losses.

The noisy quadratic with h_i = i^-a, c = h and h_i E theta_i^2 = i^-(a r + 1) has a capacity a and a source r: the
larger r, the easier. After E examples, as E grows,

    at a fixed rate the best batch size grows as E^(r / (1 + r)),
    at a tuned constant rate no batch is too small, and the one of 20 % more loss grows with the same exponent,
    at a rate tuned and decayed as (1 - u)^2 it grows as E^(1 - a / (a r + 1)) if r > 1 - 1 / a, and not at all if not.

>>> quadratic = power_law(2000, capacity=2.0, source=1.0)
>>> for num_examples in (2**10, 2**12):
...     best = best_batch_size(quadratic, learning_rate=1.0, num_examples=num_examples)
...     critical = critical_batch_size(quadratic, num_examples=num_examples)
...     print(f"{best:.2g} {critical:.2g}")
76 65
1.5e+02 1.3e+02
>>> exponent(capacity=2.0, source=1.0, rate="constant"), round(exponent(capacity=2.0, source=1.0, rate="decayed"), 3)
(0.5, 0.333)
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from gdjax.theory._laws import Number
from gdjax.theory.schedules import Quadratic, noisy_quadratic

GOLDEN = (5**0.5 - 1) / 2


def power_law(num_modes: int, *, capacity: Number, source: Number) -> Quadratic:
    """Return the quadratic with h_i = i^-a, c = h and h_i E theta_i^2 = i^-(a r + 1), i = 1 .. `num_modes`.

    Args:
        num_modes: D; the laws need h_D to be far below 1 / (eta T).
        capacity: a, above 1.
        source: r, above 0.
    """
    i = jnp.arange(1.0, num_modes + 1)
    h = i**-capacity
    return noisy_quadratic(h, h, start=i ** -(capacity * source + 1) / h)


def exponent(*, capacity: float, source: float, rate: Literal["fixed", "constant", "decayed"]) -> float:
    """Return p such that the best (rate 'fixed') or the critical batch size grows as E^p with the examples.

    Args:
        capacity, source: a and r, as in `power_law`.
        rate: 'fixed' whatever E is; 'constant' in a run, but tuned for E and B; 'decayed' as (1 - u)^2, and tuned.
    """
    if rate != "decayed":
        return source / (1 + source)
    return max(0.0, 1 - capacity / (capacity * source + 1)) if source > 1 - 1 / capacity else 0.0


def squared_decay(share: jax.Array) -> jax.Array:
    """Return (1 - u)^2, a shape of the rate."""
    return (1 - share) ** 2


def loss_after(
    quadratic: Quadratic,
    *,
    learning_rate: Number,
    batch_size: Number,
    num_examples: Number,
    shape: Callable[[jax.Array], jax.Array] | None = None,
    num_blocks: int = 256,
) -> jax.Array:
    """Return the loss of E / B updates, any positive number of them, in closed form.

    Args:
        quadratic: of noise that stays, as from `power_law`.
        learning_rate: eta.
        batch_size: B.
        num_examples: E.
        shape: of the rate over the share of the run; it is held constant in each of `num_blocks` equal parts, at its
            value in the middle. Default a constant rate.
        num_blocks: parts of the run.
    """
    h = quadratic.eigenvalues
    num_updates = jnp.asarray(num_examples) / batch_size

    def part(second, rate, length):
        x = rate * h
        log = 2 * length * jnp.where(x < 0.5, jnp.log1p(-x), jnp.log(jnp.abs(1 - x)))
        # sum of (1 - x)^2t over the part; where x is 0, its length
        total = jnp.where(x > 0, -jnp.expm1(log) / jnp.where(x > 0, x * (2 - x), 1), length)
        return jnp.exp(log) * second + rate**2 * quadratic.noise / batch_size * total

    if shape is None:
        return h @ part(quadratic.start, learning_rate, num_updates) / 2
    rates = learning_rate * shape(jnp.arange(0.5, num_blocks) / num_blocks)
    second, _ = lax.scan(lambda s, rate: (part(s, rate, num_updates / num_blocks), None), quadratic.start, rates)
    return h @ second / 2


def best_batch_size(quadratic: Quadratic, *, learning_rate: Number, num_examples: Number) -> jax.Array:
    """Return the B of the least loss after E examples at a fixed constant rate, by golden section of log B.

    It is sought between 1 and E / 4. Arguments as `loss_after`.
    """

    def loss(log):
        return loss_after(quadratic, learning_rate=learning_rate, batch_size=jnp.exp(log), num_examples=num_examples)

    return jnp.exp(_least(loss, jnp.zeros(()), jnp.log(jnp.asarray(num_examples, float) / 4)))


def tuned_loss(
    quadratic: Quadratic,
    *,
    batch_size: Number,
    num_examples: Number,
    shape: Callable[[jax.Array], jax.Array] | None = None,
    num_blocks: int = 256,
) -> jax.Array:
    """Return the least `loss_after` over rates below 1.999 / max h. Arguments as there."""
    highest = jnp.log(1.999 / jnp.max(quadratic.eigenvalues))

    def loss(log):
        return loss_after(
            quadratic,
            learning_rate=jnp.exp(log),
            batch_size=batch_size,
            num_examples=num_examples,
            shape=shape,
            num_blocks=num_blocks,
        )

    return loss(_least(loss, highest - jnp.log(jnp.asarray(num_examples, float)), highest))


def critical_batch_size(
    quadratic: Quadratic,
    *,
    num_examples: Number,
    overhead: Number = 0.2,
    of: Literal["loss", "examples"] = "loss",
    shape: Callable[[jax.Array], jax.Array] | None = None,
    num_blocks: int = 256,
) -> jax.Array:
    """Return the largest B that costs no more than an overhead over B = 1, both tuned, by bisection of log B.

    Of examples, B at overheads 1 and 0.2 is in a ratio of about 5, as by the hyperbola of `theory.examples_to_target`;
    of the loss, after as many examples, it is not: 4.3 for a = 2, r = 1, and 6.7 for r = 0.5.

    Args:
        quadratic, num_examples, shape, num_blocks: as in `tuned_loss`; E is that of B = 1.
        overhead: the share by which B may be worse.
        of: 'loss' after E examples, or 'examples' to the loss of B = 1.
    """
    options = {"shape": shape, "num_blocks": num_blocks}
    limit = tuned_loss(quadratic, batch_size=1.0, num_examples=num_examples, **options)
    if of == "loss":
        limit, spent = (1 + overhead) * limit, num_examples
    else:
        spent = (1 + overhead) * num_examples

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        below = tuned_loss(quadratic, batch_size=jnp.exp(middle), num_examples=spent, **options) < limit
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    ends = jnp.zeros(()), jnp.log(jnp.asarray(num_examples, float))
    return jnp.exp(lax.fori_loop(0, 20, halve, ends)[0])


def _least(fn: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """Return where a function of one minimum between `low` and `high` is least, by golden section."""

    def shrink(_, carry):
        low, high, left, right, at_left, at_right = carry
        lower = at_left < at_right  # the minimum is to the left of `right`
        low, high = jnp.where(lower, low, left), jnp.where(lower, right, high)
        fresh = jnp.where(lower, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
        value = fn(fresh)
        return (
            low,
            high,
            jnp.where(lower, fresh, right),
            jnp.where(lower, left, fresh),
            jnp.where(lower, value, at_right),
            jnp.where(lower, at_left, value),
        )

    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    low, high, *_ = lax.fori_loop(0, 26, shrink, (low, high, left, right, fn(left), fn(right)))
    return (low + high) / 2
