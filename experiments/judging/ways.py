"""Seven ways to choose batch sizes and rates along a run, each tuned alike, raced to a target on fresh seeds.

Optimisers of rows of numbers, (rate, factor, three updates, slope), let one program for each batch size serve all ways.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, noise, tuning

NUM_PHASES = 4
WAYS = {  # by what the rate shrinks and the batch grows from each quarter of the examples to the next
    "constant": (1.0, 1),
    "decay": (0.5, 1),
    "ramp": (1.0, 2),
    "both": (0.5, 2),
    "Seesaw": (2**-0.5, 2),
    "steep ramp": (1.0, 4),
}
SIZES = 0.25, 0.5, 1.0, 2.0  # first batch sizes, in units of that of the tuned constant
LENGTHS = 0.7, 1.0, 1.4, 2.0  # examples of a schedule, in units of what the tuned constant takes
RATES = 1.6 ** np.arange(-1.0, 3.0)  # in units of its rate
TUNING_SEEDS, FRESH_SEEDS = 2, 8
ROUNDS = 3  # of the fresh seeds
LARGEST = 1024  # batch
NEVER = 1e9  # updates

Schedule = Sequence[tuple[int, int]]


class Raced(NamedTuple):
    """A way with its best schedule and row, and the seconds to the target with fresh seeds.

    Attributes:
        schedule, row: of the best.
        seconds: [S]; of a run that does not arrive, all that it was given; infinite where more than a sixth do not.
        missed: how many do not.
    """

    schedule: Schedule
    row: np.ndarray
    seconds: np.ndarray
    missed: int


def schedule_of(size: int, growth: int, num_examples: int) -> list[tuple[int, int]]:
    """Return phases of a quarter of the examples each."""
    each = num_examples // NUM_PHASES
    return [(max(1, each // (size * growth**i)), size * growth**i) for i in range(NUM_PHASES)]


def shaped(optimizer: tuning.Optimizer) -> tuning.Optimizer:
    """Return the optimiser of a row: its updates shrink by the factor after each of three, and by the slope."""

    def make(row):
        def share(count):
            return row[1] ** (count >= row[2:5]).sum() * jnp.maximum(0.0, 1 - row[5] * count)

        return optax.chain(optimizer(row[0]), optax.scale_by_schedule(share))  # pyright: ignore

    return make


def row_of(schedule: Schedule, rate: float, factor: float = 1.0, slope: float = 0.0) -> np.ndarray:
    """Return the row of a rate that is multiplied by a factor where each phase ends."""
    ends = np.cumsum([count for count, _ in schedule])[:-1]
    return np.asarray([rate, factor, *([*ends] + 3 * [NEVER])[:3], slope])


def fastest(search, times, schedules: Sequence[Schedule], rows, *, key, deadline: float, longer: float = 1.0):
    """Return (seconds, schedule, row) of the schedule and row that arrive first with the seeds of the tuning.

    Args:
        search: of the target.
        times: `Plan.times`.
        schedules: in the order in which they are tried.
        rows: schedule -> rows [R, 6].
        key: of the seeds.
        deadline: of `time.perf_counter`.
        longer: times its examples that the last phase may go on for.
    """
    best: tuple[float, Any, Any] = np.inf, None, None
    for schedule in schedules:
        phases, tried = batching.Phases.of(schedule), np.stack(rows(schedule))
        most = phases.updates(round(longer * num_examples(schedule)))
        if best[0] < np.inf:  # no longer than what arrived
            most = max(1, min(most, int(most * best[0] / times.until(schedule, most))))
        options: dict[str, Any] = {"num_seeds": TUNING_SEEDS, "key": jax.random.clone(key), "deadline": deadline}
        found = search(tried, batch_size=phases, max_examples=phases.examples(most), **options)
        if found.found and (took := times.until(schedule, float(found.losses.min()))) < best[0]:
            best = took, schedule, tried[int(found.losses.argmin())]
    return best


def num_examples(schedule: Schedule) -> int:
    """Return E."""
    return sum(count * size for count, size in schedule)


def fresh(search, times, schedule: Schedule, row: np.ndarray, *, key, longer: float) -> Raced:
    """Return what a way takes with fresh seeds, over `longer` times its examples where not all arrive in these."""
    phases = batching.Phases.of(schedule)
    limits: dict[str, Any] = {"num_seeds": FRESH_SEEDS, "max_examples": round(longer * num_examples(schedule))}
    keys = jax.random.split(jax.random.clone(key), ROUNDS)
    costs = np.concatenate([search(row[None], batch_size=phases, key=key, **limits).costs[0] for key in keys])
    missed = int(np.isinf(costs).sum())
    given = np.where(np.isinf(costs) & (missed <= len(costs) / 6), phases.updates(limits["max_examples"]), costs)
    seconds = np.asarray([times.until(schedule, u) if u < np.inf else u for u in given])
    return Raced(schedule, row, seconds, missed)


def followed(problem, optimizer, size, rate, num_examples, key) -> list[tuple[int, int]]:
    """Return the phases of one run that doubles B whenever the noise scale, measured eight times, has doubled."""
    goal = tuning.Budget(num_examples)
    trainer = tuning.training(problem, optimizer, goal, num_runs=FRESH_SEEDS)
    run_key, measure_key = jax.random.split(key)
    run = trainer.start(np.asarray([rate]), num_seeds=1, key=run_key)
    only = np.arange(len(run.seeds)) == 0
    measure = jax.jit(lambda params, key: noise.measure(problem.loss, params, problem.train, key, num_examples=512))
    schedule, seen, first = [], 0, None
    for _ in range(8):
        count = max(1, num_examples // 8 // size)
        schedule.append((count, size))
        run = trainer.advance(run, count, only, batch_size=batching.Phases.of(schedule))
        seen += count * size
        params = jax.tree.map(lambda leaf: leaf[0], run.states.params)
        scale = float(measure(params, jax.random.clone(measure_key)).b_simple)
        first = scale if first is None and math.isfinite(scale) else first
        if first is not None and scale > 2 * first and 2 * size <= problem.num_examples:
            size, first = 2 * size, scale
    return schedule
