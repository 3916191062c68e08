"""Pilots at a few batch sizes: which ones, at which learning rates, and when to give up.

The first batch size is searched from far apart, with one seed; from there on every pilot begins at the rate that the
one beside it lets expect, is tuned with one seed, and is run with several at the rate that was best.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gdjax.advise._choices import NUM_SEEDS, nearest, next_pilot
from gdjax.tuning import _pilots as pilots
from gdjax.tuning import _targets as targets
from gdjax.tuning._pilots import Pilot
from gdjax.tuning._targets import Budget, Goal

COARSE, FINE = 10**0.5, 2.0  # factors between neighbouring rates of the first grid and of the others
NUM_COARSE, NUM_FINE = 5, 3
FIRST_BATCH_SIZE = 32  # of the first pilot
NUM_LOWER = 2  # learning rates below the best of one seed that are tried with several
MAX_PILOTS = 5
MAX_EPOCHS = 200
ALLOWANCE = 4.0  # what runs may take over what others let expect
FIRST_SHARE, TIMING_SHARE, PILOT_SHARE = 0.4, 0.55, 0.8  # of the budget that may be gone when these stages end

Progress = Callable[[str, float], None]
"""(what is being done, fraction of the budget spent)."""


class Clock(NamedTuple):
    """When the work began, the seconds it and the examples a run may take, and who is told."""

    began: float
    budget: float
    max_examples: int
    progress: Progress

    def until(self, share: float) -> float:
        return self.began + share * self.budget

    def late(self, share: float, *, cost: float = 0.0) -> bool:
        return time.perf_counter() + cost > self.until(share)

    def show(self, stage: str) -> None:
        self.progress(stage, min(1.0, (time.perf_counter() - self.began) / self.budget))


def pilots_at_some(search, sizes, first_rate, goal: Goal, key, clock: Clock, unknown: list[str], time_all):
    """Return ({batch size: Pilot}, the choices with their times): the first pilot, the clock, and further pilots."""
    first = nearest(sizes, FIRST_BATCH_SIZE)
    # A rate that is too high diverges soon, one that is too low is waited for: more of the grid lies above.
    grid = first_rate * COARSE ** (np.arange(NUM_COARSE) - (NUM_COARSE - 2) / 2)
    coarse = _tuned(partial(search, late=1.0), first, grid, key, clock, FIRST_SHARE)
    _check_reached(coarse, goal, clock)
    pilot = _pilot(search, first, coarse.optimum()[0], key, clock, FIRST_SHARE)
    _check_reached(pilot, goal, clock)
    found = {first: pilot}
    known = time_all(learning_rate=pilot.optimum()[0], deadline=clock.until(TIMING_SHARE))
    allowed = known
    while len(found) < MAX_PILOTS and (size := next_pilot(found, allowed)) is not None:
        if clock.late(PILOT_SHARE):
            unknown.append(f"a pilot at batch size {size}: the budget did not allow it")
            break
        # Beyond the pilots there is no law of rates yet: below them, in proportion; above, as the square root.
        near = nearest(list(found), size)
        ratio = size / near
        rate, costs = found[near].optimum()
        rate *= ratio ** (1 if ratio < 1 else 0.5)
        # No more examples than a larger batch takes, and no more updates than a smaller one.
        most = ALLOWANCE * costs.mean() * max(near, size)
        pilot = _pilot(search, size, rate, key, clock, PILOT_SHARE, max_examples=most)
        if pilot.found:
            found[size] = pilot
        else:  # and none beyond it is tried
            unknown.append(f"updates to the target at batch size {size}: no learning rate reached it in time")
            allowed = [choice for choice in allowed if (choice.batch_size - size) * (first - size) > 0]
    if len(found) < 2:
        allowance = f"budget={clock.budget:g} s" if clock.late(PILOT_SHARE) else f"{ALLOWANCE:g} times what it took"
        raise ValueError(
            f"{_named(goal)} was reached at batch size {first} and, in {allowance}, at no other, but a prediction "
            "takes two: allow more, or ask for less"
        )
    edges = ", ".join(f"{size}" for size, pilot in found.items() if pilot.at_edge)
    if edges:
        unknown.append(f"the best learning rate at batch size {edges}: it is the first or the last of those tried")
    return found, known


def _pilot(search, size: int, rate: float, key, clock: Clock, share: float, *, max_examples=math.inf) -> Pilot:
    """Tune the learning rate about `rate` with one seed, and run several at the best one."""
    grid = rate * FINE ** (np.arange(NUM_FINE) - (NUM_FINE - 1) / 2)
    tuned = _tuned(search, size, grid, key, clock, share, max_examples=max_examples)
    if not tuned.found:
        return tuned
    rate, costs = tuned.optimum()
    most = math.ceil(ALLOWANCE * costs.mean()) * size
    run = partial(search, batch_size=size, num_seeds=NUM_SEEDS, key=key, **_limits(size, most, clock, share))
    pilot = run(np.asarray([rate]))
    for _ in range(NUM_LOWER):  # what one seed survives is too high for another now and then
        if pilot.found:
            break
        rate /= FINE**0.5
        pilot = run(np.asarray([rate]))
    return dataclasses.replace(pilot, tuning=tuned)


def _tuned(search, size: int, grid, key, clock: Clock, share: float, *, max_examples=math.inf) -> Pilot:
    run = partial(search, batch_size=size, num_seeds=1, key=key)
    return pilots.tune(run, grid, **_limits(size, max_examples, clock, share))


def _limits(size: int, max_examples: float, clock: Clock, share: float) -> dict[str, Any]:
    """Return when a search ends, and whom it tells; a search that spends a budget sees to its examples itself."""

    def watch(updates: int, value: float) -> None:
        clock.show(f"pilot at batch size {size}: {updates} updates, best {value:.3g}")

    watch(0, math.nan)
    most = round(min(clock.max_examples, max_examples))
    return {"max_examples": most, "deadline": clock.until(share), "progress": watch}


def _named(goal: Goal) -> str:
    return f"the end of examples={goal.num_examples}" if isinstance(goal, Budget) else f"target={goal}"


def _check_reached(pilot: Pilot, goal: Goal, clock: Clock) -> None:
    if pilot.found:
        return
    rates = f"learning rates from {pilot.learning_rates[0]:.2g} to {pilot.learning_rates[-1]:.2g}"
    if pilot.diverged.any(1).all():
        raise ValueError(f"the loss diverges at all {rates}: scale the data, the initial parameters or the loss")
    ended = f"budget={clock.budget:g} s: the share of the first pilot ended before {_named(goal)} was reached"
    if isinstance(goal, Budget):
        raise ValueError(f"{ended}: allow more seconds, or spend fewer examples")
    best = targets.best_value(pilot.best_metrics, goal)
    nearest = f"the nearest was {best:.4g}"
    if clock.late(FIRST_SHARE):
        raise ValueError(f"{ended}; {nearest}: allow more, or try {goal.easier(best)}")
    raise ValueError(
        f"target={goal} was not reached with every seed, in {MAX_EPOCHS} epochs at most, at {rates}; {nearest}: try "
        f"{goal.easier(best)}"
    )
