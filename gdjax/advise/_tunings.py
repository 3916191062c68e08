"""Tuning at a few batch sizes: which ones, at which learning rates, and when to give up.

A few updates at rates far apart show where rates make a difference: there the first batch size is searched, with one
seed. Every other begins at the rate that the one beside it lets expect. Each is tuned with one seed, and run with
several at the rate that was best.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gdjax import tuning
from gdjax.advise._choices import nearest, next_tuning
from gdjax.advise._goals import NUM_SEEDS, Question, Reaching
from gdjax.tuning import Search, Speed, Tuning

FINE, NUM_FINE = 2.0, 3  # factor between neighbouring rates of the grids but the first, and rates in them
FIRST_BATCH_SIZE = 32  # that is tuned
PILOT = 64  # updates that show where rates make a difference
COARSE = 10.0 ** np.asarray(
    [-1.0, -0.5, 0.0, 0.5]
)  # of the rate that is best after so few: for longer runs most lie below
NUM_LOWER = 2  # learning rates below the best of one seed that are tried with several
MAX_TUNINGS = 5
MAX_EPOCHS = 200
ALLOWANCE = 4.0  # what runs may take over what others let expect
FIRST_SHARE, TIMING_SHARE, TUNING_SHARE = 0.4, 0.55, 0.8  # of the seconds that may be gone when these stages end

Progress = Callable[[str, float], None]
"""(what is being done, fraction of the seconds that are spent)."""


class Clock(NamedTuple):
    """How the seconds are spent.

    Attributes:
        began: when the work began, by `time.perf_counter`.
        seconds: that all of it may take.
        max_examples: that one run may see.
        progress: who is told.
    """

    began: float
    seconds: float
    max_examples: int
    progress: Progress

    def until(self, share: float) -> float:
        """Return the time at which a share of the seconds is spent."""
        return self.began + share * self.seconds

    def late(self, share: float, *, cost: float = 0.0) -> bool:
        """Return whether a share of the seconds is spent, or would be after `cost` more."""
        return time.perf_counter() + cost > self.until(share)

    def show(self, stage: str) -> None:
        """Tell what is being done."""
        self.progress(stage, min(1.0, (time.perf_counter() - self.began) / self.seconds))


class Tunings(NamedTuple):
    """What tuning at a few batch sizes found.

    Attributes:
        found: {batch size: Tuning}, the first one first.
        speeds: of all batch sizes.
        unknown: what could not be established.
    """

    found: dict[int, Tuning]
    speeds: list[Speed]
    unknown: list[str]


def tune_some(
    question: Question,
    search: Search,
    sizes: Sequence[int],
    first_rate: float,
    key,
    clock: Clock,
    time_all: Callable[..., list[Speed]],
) -> Tunings:
    """Tune the first batch size, time all of them, and tune further ones.

    Raises:
        ValueError: where the first batch size does not reach the goal, or no other one does.
    """
    first = nearest(sizes, FIRST_BATCH_SIZE)
    usual, once = tuning.grid(first_rate), partial(search, late=1.0)
    if isinstance(question, Reaching):
        pilot = _tuned(once, first, usual, key, clock, FIRST_SHARE, max_examples=PILOT * first)
        usual = pilot.rate * COARSE
        if pilot.diverged.any(1).all():
            _check_reached(question, pilot, clock)
    coarse = _tuned(once, first, usual, key, clock, FIRST_SHARE)
    _check_reached(question, coarse, clock)
    known = _repeated(search, first, coarse.optimum()[0], key, clock, FIRST_SHARE)
    _check_reached(question, known, clock)
    found, unknown = {first: known}, []
    speeds = time_all(learning_rate=known.optimum()[0], deadline=clock.until(TIMING_SHARE))
    allowed = speeds
    while len(found) < MAX_TUNINGS and (size := next_tuning(question, found, allowed)) is not None:
        if clock.late(TUNING_SHARE):
            unknown.append(f"tuning at batch size {size}: the budget did not allow it")
            break
        # Beyond those tuned there is no law of rates yet: below them, in proportion; above, as the square root.
        near = nearest(list(found), size)
        ratio = size / near
        rate, costs = found[near].optimum()
        rate *= ratio ** (1 if ratio < 1 else 0.5)
        # No more examples than a larger batch takes, and no more updates than a smaller one.
        most = ALLOWANCE * costs.mean() * max(near, size)
        known = _repeated(search, size, rate, key, clock, TUNING_SHARE, max_examples=most)
        if known.found:
            found[size] = known
        else:  # and none beyond it is tried
            unknown.append(f"updates to the target at batch size {size}: no learning rate reached it in time")
            allowed = [speed for speed in allowed if (speed.batch_size - size) * (first - size) > 0]
    if len(found) < 2:
        allowance = f"budget={clock.seconds:g} s" if clock.late(TUNING_SHARE) else f"{ALLOWANCE:g} times what it took"
        raise ValueError(
            f"{question} was reached at batch size {first} and, in {allowance}, at no other, but a prediction "
            "takes two: allow more, or ask for less"
        )
    edges = ", ".join(f"{size}" for size, one in found.items() if one.at_edge)
    if edges:
        unknown.append(f"the best learning rate at batch size {edges}: it is the first or the last of those tried")
    return Tunings(found, speeds, unknown)


def _repeated(search: Search, size: int, rate: float, key, clock: Clock, share: float, *, max_examples=math.inf):
    """Tune the learning rate about `rate` with one seed, and run several at the best one."""
    grid = rate * FINE ** (np.arange(NUM_FINE) - (NUM_FINE - 1) / 2)
    tuned = _tuned(search, size, grid, key, clock, share, max_examples=max_examples)
    if not tuned.found:
        return tuned
    rate, costs = tuned.optimum()
    most = math.ceil(ALLOWANCE * costs.mean()) * size
    run = partial(search, batch_size=size, num_seeds=NUM_SEEDS, key=key, **_limits(size, most, clock, share))
    repeated = run(np.asarray([rate]))
    for _ in range(NUM_LOWER):  # what one seed survives is too high for another now and then
        if repeated.found:
            break
        rate /= FINE**0.5
        repeated = run(np.asarray([rate]))
    return dataclasses.replace(repeated, tuning=tuned)


def _tuned(search: Search, size: int, grid, key, clock: Clock, share: float, *, max_examples=math.inf) -> Tuning:
    run = partial(search, batch_size=size, num_seeds=1, key=key)
    return tuning.search_grid(run, grid, **_limits(size, max_examples, clock, share))


def _limits(size: int, max_examples: float, clock: Clock, share: float) -> dict[str, Any]:
    """Return when a search ends, and whom it tells; a search that spends a budget sees to its examples itself."""

    def watch(updates: int, value: float) -> None:
        clock.show(f"tuning at batch size {size}: {updates} updates, best {value:.3g}")

    watch(0, math.nan)
    most = round(min(clock.max_examples, max_examples))
    return {"max_examples": most, "deadline": clock.until(share), "progress": watch}


def _check_reached(question: Question, found: Tuning, clock: Clock) -> None:
    if found.found:
        return
    rates = f"learning rates from {found.learning_rates[0]:.2g} to {found.learning_rates[-1]:.2g}"
    if found.diverged.any(1).all():
        raise ValueError(f"the loss diverges at all {rates}: scale the data, the initial parameters or the loss")
    ended = f"budget={clock.seconds:g} s: the share of the first tuning ended before {question} was reached"
    if not isinstance(question, Reaching):
        raise ValueError(f"{ended}: allow more seconds, or spend fewer examples")
    goal = question.goal
    best = goal.best(found.best_metrics)
    nearest_one = f"the nearest was {best:.4g}"
    if clock.late(FIRST_SHARE):
        raise ValueError(f"{ended}; {nearest_one}: allow more, or try {goal.easier(best)}")
    raise ValueError(
        f"target={goal} was not reached with every seed, in {MAX_EPOCHS} epochs at most, at {rates}; {nearest_one}: "
        f"try {goal.easier(best)}"
    )
