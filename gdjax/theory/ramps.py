"""The best ramp of batch sizes, exactly.

The loss of `schedules` is bias + sum_t k_t / B_t. At E examples it is least for B_t = E sqrt(k_t) / sum sqrt(k), and a
given loss takes the fewest examples with B_t = sqrt(k_t) sum sqrt(k) / (loss - bias). Where the noise shrinks with the
error, k depends on the B_t and a fixed point is iterated. A ramp does what a decay of the rate does, with fewer
updates; beside a decay it saves little.

>>> import jax.numpy as jnp
>>> h = 1 / jnp.arange(1.0, 11.0)
>>> quadratic, rates = schedules.noisy_quadratic(h, h, start=jnp.ones(10)), jnp.full(20, 0.5)
>>> _, losses = schedules.run(quadratic, rates, jnp.full(20, 20.0))  # 400 examples: one batch size, then the best ramp
>>> ramp = batch_ramp(quadratic, rates, num_examples=400)
>>> print(f"{losses[-1]:.5f} {ramp.loss:.5f}", [round(float(size), 1) for size in ramp.batch_sizes[::10]])
0.04625 0.03655 [5.8, 13.6]
>>> phases(batch_ramp(quadratic, rates, target=ramp.loss, num_phases=3).batch_sizes)  # the same loss, three sizes
[(12, 10), (6, 27), (2, 72)]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from gdjax.theory import schedules
from gdjax.theory._laws import Number
from gdjax.theory.schedules import Quadratic

MAX_PLACES = 256  # at which a phase may end
ITERATIONS = 200  # of the fixed point, which halves its distance each time


class Ramp(NamedTuple):
    """Batch sizes for every update.

    Attributes:
        batch_sizes: B_t [T], not rounded: `phases` rounds them.
        loss: scalar, the loss after the last update.
        num_examples: scalar, sum_t B_t.
    """

    batch_sizes: jax.Array
    loss: jax.Array
    num_examples: jax.Array


def batch_ramp(
    quadratic: Quadratic,
    learning_rates: jax.Array,
    *,
    num_examples: Number | None = None,
    target: Number | None = None,
    min_batch_size: Number = 1.0,
    num_phases: int | None = None,
) -> Ramp:
    """Return the batch sizes of the least loss for E examples, or of the fewest examples for a loss.

    B_t = max(min_batch_size, m sqrt(k_t)) with one number m for all t. In phases, the batch size of one with n updates
    is m sqrt(sum k / n), and they end where the examples are fewest: exactly for up to MAX_PLACES updates where no
    bound holds. Where the noise shrinks, k depends on the batch sizes: B <- sqrt(B m sqrt(k)) is iterated until it
    stays, when k_t / B_t^2 is the same for all t.

    Args:
        quadratic, learning_rates: as in `schedules.run`.
        num_examples: E; give this or `target`.
        target: the loss to be reached.
        min_batch_size: the smallest batch size, for all updates.
        num_phases: how many different batch sizes to use; 1 for a constant, at most and by default T.

    Raises:
        ValueError: where not exactly one of num_examples and target is given, for fewer examples than the smallest
            batches need, for a target that these rates do not reach without noise, and for num_phases below 1. Traced
            numbers are not checked.
    """
    if (num_examples is None) == (target is None):
        raise ValueError("give either num_examples or target, not both or neither")
    if num_phases is not None and num_phases < 1:
        raise ValueError(f"num_phases={num_phases} must be at least 1, or None for one batch size in every update")
    active = jnp.ones(learning_rates.shape, bool)
    goal, reach = (num_examples, False) if num_examples is not None else (target, True)
    assert goal is not None
    ramp = solve(quadratic, learning_rates, active, goal, reach, min_batch_size, num_phases)
    least = len(learning_rates) * jnp.asarray(min_batch_size)
    if num_examples is not None and not isinstance(num_examples + least, Tracer) and num_examples < least:
        raise ValueError(f"num_examples={num_examples} must be at least {least:g}, T min_batch_size")
    if target is not None and not isinstance(ramp.loss, Tracer) and not np.isfinite(ramp.loss):
        bias, _ = schedules.noise_costs(quadratic, learning_rates)
        raise ValueError(
            f"target={target} must be above {bias:.3g}, which these rates reach without noise: make more updates"
        )
    return ramp


def shortcut_ramp(learning_rates: jax.Array, *, num_examples: Number) -> jax.Array:
    """Return B_t [T] ~ eta_t / sqrt(sum_{u >= t} eta_u), close to the best ramp on h = 1 / i (arXiv 2607.01287).

    An update of rate 0 has no examples.
    """
    left = jnp.cumsum(learning_rates[::-1])[::-1]
    shape = learning_rates / jnp.sqrt(jnp.where(left == 0, 1, left))
    return num_examples * shape / jnp.sum(shape)


def phases(batch_sizes: jax.Array) -> list[tuple[int, int]]:
    """Return [(num_updates, B), ...] of B_t [T] rounded to whole examples, at least 1."""
    whole = np.maximum(np.rint(np.asarray(batch_sizes)), 1).astype(int)
    starts = [0, *(np.flatnonzero(np.diff(whole)) + 1)]
    return [(int(end - start), int(whole[start])) for start, end in zip(starts, [*starts[1:], len(whole)], strict=True)]


def solve(
    quadratic: Quadratic,
    learning_rates: jax.Array,
    active: jax.Array,
    goal: Number,
    reach: bool,
    min_batch_size: Number,
    num_phases: int | None,
) -> Ramp:
    """Return `batch_ramp` for the updates that are `active` [T], unchecked; the loss is NaN where it is not possible.

    Args:
        quadratic, learning_rates, min_batch_size, num_phases: as there; the rates of other updates must be 0.
        active: bool [T].
        goal: the loss where `reach`, else the number of examples.
        reach: whether the examples are fewest for a loss, or the loss is least for E examples.
    """

    def allocate(phase, bias, costs):
        """Return max(b, m sqrt(mean k of the phase)) for all updates, and m, by bisection of log m."""
        mean = _means(costs, active, phase)
        # At E examples and without noise all batch sizes are as good.
        mean = mean if reach else jnp.where(jnp.any(mean > 0), mean, 1)

        def enough(m):
            sizes = jnp.maximum(min_batch_size, m * jnp.sqrt(mean))
            if reach:
                return jnp.sum(jnp.where(active, mean / sizes, 0)) <= goal - bias
            return jnp.sum(jnp.where(active, sizes, 0)) >= goal

        def halve(_, bracket):
            low, high = bracket
            middle = (low + high) / 2
            return jnp.where(enough(jnp.exp(middle)), low, middle), jnp.where(enough(jnp.exp(middle)), middle, high)

        root = jnp.sum(jnp.where(active, jnp.sqrt(mean), 0))
        ideal = jnp.log(root / (goal - bias)) if reach else jnp.log(goal / root)
        # Where a bound holds, other batches are smaller at E examples, and more noise is left for the rest of a loss.
        m = jnp.exp(lax.fori_loop(0, 64, halve, (ideal - 40, ideal + 1e-12))[1])
        return jnp.maximum(min_batch_size, m * jnp.sqrt(mean)), m

    def settle(phase, tangent, sizes):
        def proceed(carry):
            _, _, change, step = carry
            return (quadratic.shrinking != 0) & (change > 1e-13) & (step < ITERATIONS)

        def improve(carry):
            _, sizes, _, step = carry
            tangent = schedules.noise_costs(quadratic, learning_rates, sizes)
            wanted = allocate(phase, *tangent)[0]
            return tangent, jnp.sqrt(sizes * wanted), jnp.max(jnp.abs(wanted / sizes - 1)), step + 1

        start = tangent, sizes, jnp.full((), jnp.inf, sizes.dtype), 0
        tangent, _, _, _ = lax.while_loop(proceed, improve, start)
        return tangent, allocate(phase, *tangent)

    tangent = schedules.noise_costs(quadratic, learning_rates)
    phase = jnp.zeros(len(learning_rates), int) if num_phases == 1 else jnp.arange(len(learning_rates))
    tangent, (sizes, m) = settle(phase, tangent, allocate(phase, *tangent)[0])
    if num_phases is not None and num_phases > 1:

        def improve(_, carry):
            tangent, sizes, m = carry
            phase = _partition(tangent[1], active, m, min_batch_size, num_phases)
            tangent, (sizes, m) = settle(phase, tangent, sizes)
            return tangent, sizes, m

        # until neither the phases nor m improve one another
        tangent, sizes, m = lax.fori_loop(0, 4, improve, (tangent, sizes, m))
    loss = schedules.run(quadratic, learning_rates, sizes)[1][-1]
    return Ramp(sizes, loss, jnp.sum(jnp.where(active, sizes, 0)))


def _means(costs: jax.Array, active: jax.Array, phase: jax.Array) -> jax.Array:
    """Return the mean of k over the active updates of the phase that an update belongs to, [T]."""
    count = jax.ops.segment_sum(active.astype(costs.dtype), phase, len(costs))
    total = jax.ops.segment_sum(costs, phase, len(costs))
    return (total / jnp.maximum(count, 1))[phase]


def _partition(costs: jax.Array, active: jax.Array, m: jax.Array, least: Number, num_phases: int) -> jax.Array:
    """Return the phase [T] of every update such that sum_p [n_p B_p + m^2 K_p / B_p] is least, by dynamic programming.

    K_p is the sum of k over n_p updates and B_p = max(least, m sqrt(K_p / n_p)).
    """
    num_updates = len(costs)
    places = np.unique(np.linspace(0, num_updates, min(num_updates, MAX_PLACES) + 1).round().astype(int))
    total, count = (
        jnp.concatenate([jnp.zeros(1, costs.dtype), jnp.cumsum(x)])[places] for x in (costs, active.astype(costs.dtype))
    )
    cost, length = total[None] - total[:, None], count[None] - count[:, None]  # from place i to place j
    size = jnp.maximum(least, m * jnp.sqrt(cost / jnp.maximum(length, 1)))
    price = jnp.where(np.tri(len(places), k=-1), jnp.inf, length * size + m**2 * cost / size)
    price = jnp.where(np.eye(len(places), dtype=bool), 0, price)  # fewer phases are phases of no length
    best, origins = price[0], []
    for _ in range(min(num_phases, num_updates) - 1):
        ways = best[:, None] + price
        best, origin = ways.min(0), ways.argmin(0)
        origins.append(origin)
    at, ends = jnp.asarray(len(places) - 1), []
    for origin in reversed(origins):
        at = origin[at]
        ends.append(jnp.asarray(places)[at])
    return jnp.sum(jnp.arange(num_updates)[:, None] >= jnp.stack(ends)[None], 1)
