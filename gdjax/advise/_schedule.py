"""The batch as a schedule: which of constant, decay, ramp and both reaches a target first, predicted and then run.

Short runs at two batch sizes are fitted by a quadratic (`_fitted`); by it the best way of each kind is found (`_ways`),
given the measured time of an update; then all of them are tuned alike and run with fresh seeds.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from gdjax import batching, tuning
from gdjax._trees import kept
from gdjax.advise._fitted import at, fitted
from gdjax.advise._pilot import (
    NUM_RUNS,
    PILOT_EPOCHS,
    PILOTS,
    batch_sizes,
    highest_rate,
    local_twins,
    pilots,
    update_times,
)
from gdjax.advise._plan import Plan, Run, Times
from gdjax.advise._tunings import Clock, Progress
from gdjax.advise._ways import Bounds, Way, plan
from gdjax.problem import Problem
from gdjax.tuning import Optimizer, Search, Target

PLAN_SHARE, VERIFY_SHARE = 0.6, 0.9  # of the seconds that may be gone when the plan is made, and when all of it is run
STRETCHES = 1.0, 1.5, 2.25, 3.4  # times the planned updates that a way is tried over
EARLY, SHORTER = 0.8, 1.15  # part of its updates in which a way arrives, and times these that are tried then
WORTH = 2.0  # a way of a kind is tried where it is not slower than the fastest by more than this
TUNING_SHARE = 0.65  # of the time that a kind has
FACTOR = 1.6  # between the rates that a way is tuned over
NUM_ATTEMPTS, LONGER = 4, 1.3  # to run the best with fresh seeds, and times the updates of the one before
LOOKS, NUM_LOOKED_AT = 12, 2048 / 3  # evaluations of a run, and the examples of training that take as long as one
COMPILATIONS = 3  # of a kind


class Effort(NamedTuple):
    """What is done for each kind: seeds of the tuning, ways that are tried, and fresh seeds that the best is run with.

    Without a seed for its tuning, the rate is that of the plan. At the edge of what converges one seed is luck.
    """

    seeds: int
    ways: int
    fresh: int

    @property
    def runs(self) -> float:
        """How many full runs that is, about: some rates diverge, and not every length is tried."""
        return 5 * self.seeds * self.ways + self.fresh


EFFORTS = Effort(3, 2, 9), Effort(1, 1, 3), Effort(0, 1, 3)


def schedule(
    problem: Problem,
    target: str | Target,
    *,
    optimizer: str | Optimizer = "sgd",
    num_phases: int = 3,
    seconds: float = 300.0,
    seed: int = 0,
    progress: Progress = lambda stage, fraction: None,
) -> Plan:
    """Predict and measure the time to a target with constant batch and rate, with decay, with a ramp, and with both.

    Args:
        problem: what to train.
        target: to reach, as 'loss<=0.45': of the training loss, which the twin is of.
        optimizer: a name from `tuning.OPTIMIZERS`, or a function learning_rate -> optax transformation.
        num_phases: that a ramp may have, 2 or 3.
        seconds: that all of it may take; what they do not allow is in `Plan.unknown`.
        seed: of parameters and streams.
        progress: called now and then with what is being done and the fraction of the seconds that are spent.

    Raises:
        ValueError: for another number of phases, fewer than 64 examples, a target that is not of the training loss or
            is below what the plan can reach (saying what it can), and a pilot that diverges at every rate.
    """
    goal = tuning.parse_target(target, problem) if isinstance(target, str) else target
    if (goal.metric, goal.on) != ("loss", "train"):
        raise ValueError(f"target={goal} must be of the training loss: the twin predicts no other metric")
    if num_phases not in (2, 3):
        raise ValueError(f"phases={num_phases} must be 2 or 3: more gain next to nothing")
    if problem.num_examples < 64:
        raise ValueError(f"problem={problem.name!r} has {problem.num_examples} examples: a schedule takes at least 64")
    if not 0 < seconds < math.inf:
        raise ValueError(f"budget={seconds} seconds must be positive and finite")
    make, usual = tuning.named(optimizer)
    clock = Clock(time.perf_counter(), seconds, PILOT_EPOCHS * problem.num_examples, progress)
    pilot_key, twin_key, fresh_key = jax.random.split(jax.random.key(seed), 3)
    plain = tuning.searching(problem, make, goal, num_runs=NUM_RUNS)
    found, curves, start = pilots(problem, plain, usual, pilot_key, clock)
    sizes = batch_sizes(problem, min(found))
    rate = next(iter(found.values())).rate
    times, compiling = update_times(problem, make, sizes, rate, clock)
    twin = fitted(curves, start=start, target=goal.value)
    longest = max(int(curve.updates[-1]) for curve in curves)
    bounds = Bounds(sizes, partial(highest_rate, found), times, max(1000, 4 * longest))
    clock.show("planning")
    # What the pilot came to is not out of reach: where it arrived, the twin may be above the target.
    arrived = [float(at(twin, curve)[-1]) for curve in curves if curve.losses[-1] <= goal.value]
    aim = max(goal.value, min(arrived, default=-math.inf))
    planned = plan(twin, aim, bounds, num_phases=num_phases, deadline=clock.until(PLAN_SHARE))
    kinds, effort, unknown = _affordable(planned, times, compiling, clock.until(VERIFY_SHARE) - time.perf_counter())
    runs: dict[str, Run] = {}
    for i, kind in enumerate(kinds):
        begun = time.perf_counter()
        if clock.late(VERIFY_SHARE):
            unknown.append(f"{kind}, run: the budget ended before")
            continue
        ends = begun + (clock.until(VERIFY_SHARE) - begun) / (len(kinds) - i)  # an equal share of what is left
        tried = [way for way in planned[kind] if way.seconds[1] < WORTH * planned[kind][0].seconds[1]][: effort.ways]
        run = verified(problem, make, goal, tried, times, fresh_key, clock, ends, effort)
        if run is not None:
            runs[kind] = run
        elif time.perf_counter() > ends:
            unknown.append(f"{kind}, run: its share of the budget ended before")
        else:
            unknown.append(f"{kind}, run: it did not arrive with every seed")
    if aim > goal.value:
        unknown.append(f"the twin at {goal.value:g}: it is planned to {aim:.3g}, where it puts the pilot's arrival")
    locals_, why = local_twins(problem, make, goal, found, times, twin_key, clock)
    return Plan(
        goal=goal,
        ways={kind: _origin(some, runs.get(kind)) for kind, some in planned.items()},
        runs=runs,
        twin=twin,
        curves=tuple(curves),
        times=times,
        locals=tuple(locals_),
        unknown=(*unknown, *why),
        seconds=time.perf_counter() - clock.began,
    )


def _affordable(
    planned: Mapping[str, Sequence[Way]], times: Times, compiling: float, left: float
) -> tuple[list[str], Effort, list[str]]:
    """Return which kinds are run, the fastest first, with what effort, and what is left out for want of time.

    Args:
        planned: ways of each kind.
        times: of an update.
        compiling: seconds of a compilation.
        left: seconds for all of it.
    """
    fastest = min(planned, key=lambda kind: planned[kind][0].seconds[1])
    # The constant is what the others are compared with.
    kinds = sorted(planned, key=lambda kind: (kind not in (fastest, "constant"), planned[kind][0].seconds[1]))
    looks = LOOKS * NUM_LOOKED_AT * times(PILOTS[-1]) / PILOTS[-1]
    each = looks + np.asarray([planned[kind][0].seconds[1] for kind in kinds])
    costs = {effort: np.cumsum(COMPILATIONS * compiling + effort.runs * each) for effort in EFFORTS}
    effort = next((effort for effort in EFFORTS if costs[effort][-1] <= left), EFFORTS[-1])
    affordable = max(1, int(np.searchsorted(costs[effort], left)))
    unknown = [f"{kind}, run: the budget does not allow it" for kind in kinds[affordable:]]
    if effort != EFFORTS[0]:
        tuned = f"each was tuned with {effort.seeds}" if effort.seeds else "they are those of the plan"
        unknown.append(f"the best rate over seeds: {tuned}, for want of time")
    return kinds[:affordable], effort, unknown


def _origin(planned: Sequence[Way], run: Run | None) -> Way:
    """Return the plan that a run was made from; the fastest one where there is no run."""
    first = run and run.way.schedule[0][1]
    return next((way for way in planned if way.schedule[0][1] == first), planned[0])


def decaying(optimizer: Any) -> Optimizer:
    """Return the optimiser whose rate falls to 0 in proportion to the updates left: (rate, num_updates) -> optax."""
    if hasattr(optimizer, "schedule"):  # one by name
        return dataclasses.replace(optimizer, schedule="linear")

    def make(rate, num_updates):
        return optax.chain(optimizer(rate), optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, num_updates)))

    return make


def verified(
    problem: Problem,
    optimizer: Optimizer,
    goal: Target,
    ways: Sequence[Way],
    times: Times,
    key: jax.Array,
    clock: Clock,
    ends: float,
    effort: Effort,
) -> Run | None:
    """Tune way, rate and length with some seeds, and run the best with others; None where that does not arrive in time.

    Args:
        ways: of one kind, the fastest first.
        ends: a time of `time.perf_counter`; most of it is for the tuning.
        effort: with how many seeds.
    """
    tune_key, run_key = jax.random.split(jax.random.clone(key))
    make = kept(problem, ("decaying", optimizer), lambda: decaying(optimizer)) if ways[0].decays else optimizer
    search = tuning.search(tuning.training(problem, make, goal, num_runs=NUM_RUNS), goal, lambda values: values)
    late = time.perf_counter() + TUNING_SHARE * (ends - time.perf_counter())
    best: tuple[float, Way] = math.inf if effort.seeds else 0.0, ways[0]
    for way in ways if effort.seeds else ():
        best = min(best, _tuned(search, way, times, best[0], tune_key, clock, late, effort.seeds), key=itemgetter(0))
    if math.isinf(best[0]):
        return None
    way = best[1]
    for _ in range(NUM_ATTEMPTS):
        clock.show(f"running {way.kind} with fresh seeds")
        found = _over(search, way, effort.fresh, run_key, ends)(np.asarray([way.learning_rate]))
        updates = found.costs[0]
        if np.isfinite(updates).all():
            return Run(way, updates, np.asarray([times.until(way.schedule, count) for count in updates]))
        if time.perf_counter() > ends:
            break
        # What some seeds survive and reach may be too fast and too short for others; a rate that stays goes on anyway.
        way = way.stretched(LONGER if way.decays else 1.0)._replace(learning_rate=way.learning_rate / FACTOR**0.5)
    return None


def _tuned(
    search: Search, way: Way, times: Times, least: float, key, clock: Clock, late: float, num_seeds: int
) -> tuple[float, Way]:
    """Return (seconds to the target, the way with the rate and length of these); infinity where it does not arrive.

    Longer ones are tried as long as they are faster, and as they may be faster than `least` seconds; and shorter ones
    where it arrives well before its end.
    """

    def attempt(tried: Way, rate: float) -> tuple[float, Way, float]:
        clock.show(f"tuning {way.kind}, {tried.num_updates} updates from batch size {tried.schedule[0][1]}")
        over = _over(search, tried, num_seeds, key, late)
        found = tuning.search_grid(over, rate * FACTOR ** np.arange(-1.0, 2.0), deadline=late)
        updates = float(found.losses.min())
        seconds = times.until(tried.schedule, updates) if found.found else math.inf
        return seconds, tried._replace(learning_rate=found.rate), updates

    best, any_length = (math.inf, way, math.inf), way.kind == "constant"
    for factor in STRETCHES[: 1 if any_length else None]:
        tried = way.stretched(factor)
        if time.perf_counter() > late or times.until(tried.schedule, 0.5 * tried.num_updates) > least:
            break
        found = attempt(tried, best[1].learning_rate)
        if found[0] >= best[0] < math.inf:
            break
        best = min(best, found, key=itemgetter(0))
    while best[2] < EARLY * best[1].num_updates and not any_length and time.perf_counter() < late:
        found = attempt(best[1].stretched(SHORTER * best[2] / best[1].num_updates), best[1].learning_rate)
        if found[0] >= best[0]:
            break
        best = found
    return best[:2]


def _over(search: Search, way: Way, num_seeds: int, key: jax.Array, ends: float) -> Search:
    """Return `rates -> Tuning` along a way; one of a rate that stays may go on for four times its length."""
    phases = batching.Phases.of(way.schedule)
    most = phases.examples(way.num_updates * (1 if way.decays else 4))
    fixed = {"batch_size": phases, "num_seeds": num_seeds, "key": key, "max_examples": most, "deadline": ends}
    return partial(search, **fixed)
