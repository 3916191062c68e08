"""The planned ways as they really are: each kind is tuned alike, and run with seeds that no tuning has seen.

A kind has an equal share of what time is left: rates and lengths are tried with few seeds, then the neighbours of the
best with more, and then it is run. What its share cut off has another go; and the time that is left then is spent on
more seeds of all that may be the best, for a few seeds at the edge of what converges are luck.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import numpy as np

from gdjax import batching, tuning
from gdjax.advise._pilot import searching
from gdjax.advise._plan import EQUAL, GIVEN_UP, Run, Times, best_of, counted, ratio
from gdjax.advise._tunings import Clock
from gdjax.advise._ways import EARLY, FINE, Way
from gdjax.problem import Problem
from gdjax.tuning import Optimizer, Search, Target

RUN_SHARE, VERIFY_SHARE = 0.8, 0.92  # of the seconds that may be gone when every kind has been run, and after all of it
STRETCHES = 1.0, 1.5, 2.25, 3.4  # times the planned updates that a way is tried over
SHORTER = 1.15  # times the updates in which a way arrived, where that was long before its end, that are tried then
WORTH = 2.0  # a way of a kind is tried where it is not slower than the fastest by more than this
TUNING_SHARE, CLIMBING_SHARE = 0.5, 0.85  # of the time that a kind has, when these end
FACTOR = 1.6  # between the rates that a way is tuned over at first
BETTER = 0.99  # times the seconds of the best, below which a neighbour is taken for better
NUM_ATTEMPTS, LONGER = 4, 1.3  # to run the best with fresh seeds, and times the updates of the one before
LUCK = 1.1  # of ways that have had one round of seeds, a difference from the best below which they have another
MOST_ROUNDS = 8  # times the fresh seeds of an effort that what may be the best is run with


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


EFFORTS = Effort(3, 3, 9), Effort(1, 1, 3), Effort(0, 1, 3)


class Check(NamedTuple):
    """What all kinds are tuned and run by alike.

    Attributes:
        problem, optimizer, goal: what is run, and to where.
        times: seconds of an update.
        sizes: batch sizes that a way may use.
        compiling: seconds of a compilation.
        effort: seeds and ways.
        key: of the seeds.
        clock: of all of it.
    """

    problem: Problem
    optimizer: Optimizer
    goal: Target
    times: Times
    sizes: Sequence[int]
    compiling: float
    effort: Effort
    key: jax.Array
    clock: Clock

    def over(self, way: Way, num_seeds: int, key: jax.Array, ends: float) -> Search:
        """Return `rates -> Tuning` along a way; one of a rate that stays may go on."""
        phases = batching.Phases.of(way.schedule)
        most = phases.examples(way.num_updates * (1 if way.decays else GIVEN_UP))
        fall = 1 / way.num_updates if way.decays else 0.0
        fixed = {"batch_size": phases, "num_seeds": num_seeds, "key": key, "max_examples": most, "deadline": ends}
        return partial(searching(self.problem, self.optimizer, self.goal, fall), **fixed)


def verified(
    check: Check, kinds: Sequence[str], planned: Mapping[str, Sequence[Way]]
) -> tuple[dict[str, Run], dict[str, str]]:
    """Tune and run the kinds: return {kind: its best way, run}, and {kind: why} of those not run, or not tuned."""
    runs: dict[str, Run] = {}
    why: dict[str, str] = {}
    waiting = list(kinds)
    for share in (RUN_SHARE, VERIFY_SHARE):
        cut = []
        for i, kind in enumerate(waiting):
            now = time.perf_counter()
            # Where there is no time to tune, all of it is there for the first of them.
            ends = now + (check.clock.until(share) - now) / (len(waiting) - i if check.effort.seeds else 1)
            worth = [way for way in planned[kind] if way.seconds[1] < WORTH * planned[kind][0].seconds[1]]
            run, tuned = _run(check, worth[: check.effort.ways], ends) if now < ends else (None, False)
            late = time.perf_counter() >= ends
            if run is not None:
                runs[kind] = run
                why.pop(kind, None)
                if not tuned and check.effort.seeds:
                    why[kind] = "tuned: the budget ended before, it is as it was planned"
            elif late:
                cut.append(kind)
                why[kind] = "run: the budget ended before"
            else:
                why[kind] = "run: too many seeds did not arrive"
        waiting = cut
    return _settled(check, runs), why


def _settled(check: Check, runs: dict[str, Run]) -> dict[str, Run]:
    """Return the runs, those that may be the best with more seeds, as long as there is time and more than one may be.

    Where some of these do not arrive, a slower rate has a try.
    """
    ends = check.clock.until(VERIFY_SHARE)
    while runs and time.perf_counter() < ends:
        best = runs[best_of(runs)]
        once = check.effort.fresh
        apart = {kind: LUCK if len(run.updates) == once else 1 + EQUAL for kind, run in runs.items()}
        near = [kind for kind, run in runs.items() if ratio(run, best)[0] <= apart[kind]]
        kind = min(near, key=lambda kind: len(runs[kind].updates))
        run = runs[kind]
        done = len(run.updates) // check.effort.fresh
        if len(near) < 2 or done >= MOST_ROUNDS:
            break
        check.clock.show(f"running {kind} with more seeds")
        more = _fresh(check, run.way, range(done, done + 1), ends)
        if more is None:
            break
        runs = runs | {kind: counted(run.way, np.append(run.updates, more), check.times)}
        if runs[kind].missed:
            slower = _slower(run.way)
            more = _fresh(check, slower, range(done + 1), ends)
            again = None if more is None else counted(slower, more, check.times)
            if again is not None and again.seconds.mean() < runs[kind].seconds.mean():
                runs = runs | {kind: again}
    return runs


def _run(check: Check, ways: Sequence[Way], ends: float) -> tuple[Run | None, bool]:
    """Tune rate, length and batch size with some seeds, and run the best with others: return that, and whether it was.

    Args:
        check: how.
        ways: of one kind, the fastest first.
        ends: a time of `time.perf_counter`.
    """
    begun = time.perf_counter()
    tuned_by, climbed_by = (begun + share * (ends - begun) for share in (TUNING_SHARE, CLIMBING_SHARE))
    tune_key, climb_key = jax.random.split(jax.random.fold_in(check.key, MOST_ROUNDS))
    best: tuple[float, Way] = math.inf, ways[0]
    for way in ways if check.effort.seeds else ():
        best = min(best, _tuned(check, way, best[0], tune_key, tuned_by), key=itemgetter(0))
    if check.effort.seeds and math.isinf(best[0]) and time.perf_counter() < tuned_by:
        return None, False  # it was not for want of time
    way, tried = best[1], False
    if check.effort.seeds:
        way, tried = _climbed(check, way, climb_key, climbed_by)
    runs = []
    for _ in range(NUM_ATTEMPTS):  # what some seeds survive and reach may be too fast and too short for others
        check.clock.show(f"running {way.kind} with fresh seeds")
        updates = _fresh(check, way, range(1), ends)
        if updates is None:
            break
        run = counted(way, updates, check.times)
        runs = [*runs, run] if run.arrives else runs
        if not run.missed:
            break
        way = _slower(way)
    least = min(runs, key=lambda run: run.seconds.mean(), default=None)
    return least, tried or math.isfinite(best[0])


def _fresh(check: Check, way: Way, rounds: range, ends: float) -> np.ndarray | None:
    """Return the updates of a way with fresh seeds, infinite where it does not arrive; None where time is short."""
    updates = []
    for i in rounds:
        key = jax.random.fold_in(check.key, i)
        found = check.over(way, check.effort.fresh, key, ends)(np.asarray([way.learning_rate]))
        if np.isinf(found.costs).any() and time.perf_counter() > ends:
            return None
        updates.append(found.costs[0])
    return np.concatenate(updates)


def _slower(way: Way) -> Way:
    """Return the way at a lower rate, over more updates; one whose rate stays goes on, but GIVEN_UP times at most."""
    return way.stretched(LONGER if way.decays else LONGER**2)._replace(learning_rate=way.learning_rate / FINE)


def _climbed(check: Check, way: Way, key: jax.Array, late: float) -> tuple[Way, bool]:
    """Return the best of a way, its neighbours, theirs, and so on, with as many seeds as it is run with in the end.

    And whether there was time for any neighbour.
    """

    def seconds(tried: Way) -> float:
        check.clock.show(f"tuning {tried.kind}, {tried.num_updates} updates from batch size {tried.schedule[0][1]}")
        found = check.over(tried, check.effort.fresh, key, late)(np.asarray([tried.learning_rate]))
        run = counted(tried, found.costs[0], check.times)
        return float(run.seconds.mean()) if run.arrives else math.inf

    def spot(way: Way) -> tuple[Any, ...]:
        return way.schedule, round(math.log(way.learning_rate), 3)

    best, used = (seconds(way), way), {size for _, size in way.schedule}
    seen, each, moved = {spot(way)}, 0.0, True
    while moved:
        moved = False
        for near in _neighbours(best[1], check.sizes):
            sizes = {size for _, size in near.schedule}
            if time.perf_counter() + each + len(sizes - used) * check.compiling > late:
                return best[1], len(seen) > 1
            if spot(near) in seen:
                continue
            seen, used = seen | {spot(near)}, used | sizes
            begun = time.perf_counter()
            took = seconds(near)
            each = min(each or math.inf, time.perf_counter() - begun)  # compiled already
            if took < BETTER * best[0]:
                best, moved = (took, near), True
                break
    return best[1], True


def _neighbours(way: Way, sizes: Sequence[int]) -> Iterator[Way]:
    """Yield the way at a rate above and below, over more and fewer updates, and at batches twice and half the size."""
    for factor in (FINE, 1 / FINE):
        yield way._replace(learning_rate=way.learning_rate * factor)
    if way.kind != "constant":
        for factor in (1 / SHORTER, SHORTER):
            yield way.stretched(factor)
    for factor in (2, 1 / 2):
        moved = tuple((count, round(size * factor)) for count, size in way.schedule)
        if all(size in sizes for _, size in moved):
            # Between a rate that is in proportion to B, with as many examples, and one that is not.
            there = way._replace(schedule=moved, learning_rate=way.learning_rate * factor**0.5)
            yield there.stretched(factor**-0.5)


def _tuned(check: Check, way: Way, least: float, key: jax.Array, late: float) -> tuple[float, Way]:
    """Return (seconds to the target, the way with the rate and length of these); infinity where it does not arrive.

    Longer ones are tried as long as they are faster, and as they may be faster than `least` seconds; and shorter ones
    where it arrives well before its end.
    """

    def attempt(tried: Way, rate: float) -> tuple[float, Way, float]:
        check.clock.show(f"tuning {way.kind}, {tried.num_updates} updates from batch size {tried.schedule[0][1]}")
        over = check.over(tried, check.effort.seeds, key, late)
        found = tuning.search_grid(over, rate * FACTOR ** np.arange(-1.0, 2.0), deadline=late)
        updates = float(found.losses.min())
        seconds = check.times.until(tried.schedule, updates) if found.found else math.inf
        return seconds, tried._replace(learning_rate=found.rate), updates

    best, any_length = (math.inf, way, math.inf), way.kind == "constant"
    for factor in STRETCHES[: 1 if any_length else None]:
        tried = way.stretched(factor)
        if time.perf_counter() > late or check.times.until(tried.schedule, 0.5 * tried.num_updates) > least:
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
