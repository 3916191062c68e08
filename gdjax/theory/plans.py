"""The cheapest plan to a loss: how many updates, which rate, and which ramp, where updates and examples both cost.

A run costs c_0 for each update and c_1 for each example, in seconds or in money. `plan` finds the number of updates,
the rate and the batch sizes of the least c_0 T + c_1 E for a shape of the rate and a number of phases, on the exact
recursion of `schedules`.

>>> import jax.numpy as jnp
>>> i = jnp.arange(1.0, 101.0)
>>> h = i**-2
>>> quadratic = schedules.noisy_quadratic(h, h, start=i**-3 / h)
>>> costs = {"target": 0.004, "cost_per_update": 100.0, "cost_per_example": 1.0}
>>> for name, shape, num_phases in (("constant", constant, 1), ("decay", linear, 1), ("ramp", constant, None)):
...     best = plan(quadratic, **costs, shape=shape, num_phases=num_phases)
...     print(f"{name:8} {best.num_updates:4} updates, {best.num_examples:6.0f} examples, cost {best.cost:.0f}")
constant   72 updates,  17114 examples, cost 24314
decay      48 updates,   4420 examples, cost 9220
ramp       44 updates,   4442 examples, cost 8842
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax.theory import ramps, schedules
from gdjax.theory.schedules import Quadratic

Shape = Callable[[jax.Array], jax.Array]
"""From the share of the run that is over, in [0, 1), to the share of the rate."""

NUM_RATES, NUM_GRIDS = 16, 4  # on a grid over three decades, then on ones between the neighbours of its best
NUM_NEAR = 8  # numbers of updates on a grid between the neighbours of the best
STEP, FAR = 1.3, 3.0  # from one number of updates to the next, and how far beyond the best so far the search goes
LANES = 8  # rates computed together: where the noise shrinks, T D numbers are kept for each


def constant(share: jax.Array) -> jax.Array:
    """Return 1 throughout."""
    return jnp.ones_like(share)


def linear(share: jax.Array) -> jax.Array:
    """Return 1 - u, a rate that ends at 0."""
    return 1 - share


def cosine(share: jax.Array) -> jax.Array:
    """Return (1 + cos(pi u)) / 2, half a cosine."""
    return (1 + jnp.cos(jnp.pi * share)) / 2


class Plan(NamedTuple):
    """What to do.

    Attributes:
        num_updates: T.
        learning_rate: the rate before its shape is applied.
        learning_rates: eta_t [T].
        batch_sizes: B_t [T], not rounded: `ramps.phases` rounds them.
        loss: the loss at the end, the target or less.
        num_examples: E.
        cost: c_0 T + c_1 E.
    """

    num_updates: int
    learning_rate: float
    learning_rates: jax.Array
    batch_sizes: jax.Array
    loss: float
    num_examples: float
    cost: float


def plan(
    quadratic: Quadratic,
    *,
    target: float,
    cost_per_update: float,
    cost_per_example: float,
    shape: Shape = constant,
    num_phases: int | None = None,
    max_learning_rate: float | None = None,
    min_batch_size: float = 1.0,
    max_updates: int = 10_000,
) -> Plan:
    """Return the plan of the least c_0 T + c_1 E that reaches a loss.

    The number of updates is searched on a geometric grid, until updates alone cost more than the best plan or it is
    three times that of the best plan, and then whole number by whole number around the best; the rate for each of them
    likewise, to 1 % of itself.

    Args:
        quadratic: from `schedules.noisy_quadratic` or `schedules.gaussian_least_squares`.
        target: the loss to be reached.
        cost_per_update: c_0.
        cost_per_example: c_1.
        shape: of the rate, such as `linear`.
        num_phases: how many different batch sizes to use; 1 for a constant, default one for every update.
        max_learning_rate: default 1.95 / max h, just below what is stable without noise.
        min_batch_size: the smallest batch size.
        max_updates: where the search ends.

    Raises:
        ValueError: for costs that are negative or both 0, and for a target that is not reached in max_updates.
    """
    if min(cost_per_update, cost_per_example) < 0 or cost_per_update + cost_per_example == 0:
        raise ValueError(
            f"cost_per_update={cost_per_update} and cost_per_example={cost_per_example} must be >= 0, one of them above"
        )
    highest = 1.95 / float(jnp.max(quadratic.eigenvalues)) if max_learning_rate is None else max_learning_rate
    found: dict[int, tuple[float, float, ramps.Ramp]] = {}

    def cost(num_updates: int) -> float:
        """Return the cost of the best rate for so many updates; note it in `found` with the rate and the ramp."""
        if num_updates not in found:
            active = np.arange(_padded(num_updates)) < num_updates
            shares = np.where(active, _shares(shape, num_updates, len(active)), 0)
            rate, ramp = _best_rate(quadratic, shares, active, target, highest, min_batch_size, num_phases)
            total = cost_per_update * num_updates + cost_per_example * float(ramp.num_examples)
            found[num_updates] = (total if math.isfinite(total) else math.inf), float(rate), ramp
        return found[num_updates][0]

    best = _least(cost, cost_per_update + cost_per_example * min_batch_size, max_updates)
    lowest, rate, ramp = found[best]
    rates = rate * jnp.asarray(_shares(shape, best, best))
    if math.isinf(lowest):
        bias = min(float(schedules.noise_costs(quadratic, share * rates)[0]) for share in np.geomspace(1e-3, 1, 16))
        raise ValueError(
            f"target={target} is not above {bias:.3g}, the loss after {best} updates without noise: "
            f"ask for less or raise max_updates={max_updates}"
        )
    return Plan(best, rate, rates, ramp.batch_sizes[:best], float(ramp.loss), float(ramp.num_examples), lowest)


def _least(cost: Callable[[int], float], cheapest: float, max_updates: int) -> int:
    """Return the number of updates of the least cost, given what an update costs at least; max_updates if all fail."""
    grid, best, num_updates = [], max_updates, 1
    while num_updates < max_updates and (
        math.isinf(cost(best)) or num_updates < min(FAR * best, cost(best) / cheapest)
    ):
        grid.append(num_updates)
        best = min(best, num_updates, key=cost)
        num_updates = max(num_updates + 1, int(STEP * num_updates))
    low, high = max([1, *(n for n in grid if n < best)]), min([max_updates, *(n for n in grid if n > best)])
    while high - low > 2:
        points = sorted({int(n) for n in np.linspace(low, high, NUM_NEAR).round()})
        at = min(range(len(points)), key=lambda i: cost(points[i]))
        low, high = points[max(at - 1, 0)], points[min(at + 1, len(points) - 1)]
        best = min(best, points[at], key=cost)
    return min([best, *range(low, high + 1)], key=cost)


def _shares(shape: Shape, num_updates: int, length: int) -> np.ndarray:
    """Return the shape at t / T for t below `length`, which may be beyond T."""
    return np.asarray(shape(jnp.minimum(jnp.arange(length) / num_updates, 1.0)))


def _padded(num_updates: int) -> int:
    """Return the next of 64, 256, 1024, ..., so that few lengths are compiled."""
    return 64 * 4 ** max(0, math.ceil(math.log(num_updates / 64, 4)))


@partial(jax.jit, static_argnames="num_phases")
def _best_rate(quadratic, shares, active, target, highest, min_batch_size, num_phases):
    """Return the rate of the fewest examples for the `active` updates, and its ramp; of infinity where none arrives."""

    def solved(rate):
        ramp = ramps.solve(quadratic, rate * shares, active, target, True, min_batch_size, num_phases)
        return ramp._replace(num_examples=jnp.where(ramp.loss <= target * (1 + 1e-6), ramp.num_examples, jnp.inf))

    def refine(carry, _):
        low, high, best = carry
        rates = jnp.exp(jnp.linspace(jnp.log(low), jnp.log(high), NUM_RATES))
        found = lax.map(solved, rates, batch_size=LANES)
        at = jnp.argmin(found.num_examples)
        better = found.num_examples[at] < best[1].num_examples
        best = jax.tree.map(lambda new, old: jnp.where(better, new[at], old), (rates, found), best)
        return (rates[jnp.maximum(at - 1, 0)], rates[jnp.minimum(at + 1, NUM_RATES - 1)], best), None

    highest = jnp.asarray(highest, shares.dtype)
    nothing = jnp.full((), jnp.inf, shares.dtype)
    none = highest, ramps.Ramp(jnp.ones_like(shares), nothing, nothing)
    return lax.scan(refine, (highest / 1000, highest, none), length=NUM_GRIDS)[0][2]
