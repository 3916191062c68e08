"""Updates to a target, or the loss after a budget, for many learning rates and seeds: what `advise` learns from.

Lanes are evaluated now and then, at intervals that grow with the run; the crossing of the target is interpolated
between two evaluations. A lane that diverges is infeasible; a lane that had not arrived when the search ended is
censored: both are infinite, and told apart by `diverged`.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gdjax.tuning._lanes import Lanes, Runs
from gdjax.tuning._targets import Budget, Goal, best_value

GROWTH = 0.05  # of a run between evaluations: the error of an updates-to-target before interpolation
EVALUATION_SHARE = 0.5  # of the cost of training that evaluations may take, unless they were rarer than
EARLY_GROWTH = 1.0  # of a run between its first evaluations
EARLIEST = 16  # the first one, in parts of the updates that an evaluation is worth
LATE = 2.0  # a rate that needs this many times the updates of the best one is not waited for
MAX_MOVES = 8  # beyond the first grid of rates


@dataclasses.dataclass(frozen=True)
class Pilot:
    """What every run took at one batch size, rates [R] ascending and seeds [S].

    Attributes:
        goal: the target to reach, or the budget to spend.
        batch_size: B.
        learning_rates: [R].
        costs: [R, S], updates to the target or the loss after the budget, infinite where it was not reached or spent,
            or not waited for.
        diverged: bool [R, S], where it cannot be.
        best_metrics: [R], the best value, for this goal, that any seed was seen at; NaN where none was finite.
        seconds: wall time of the search, compilation included.
        tuning: the search that found its one rate, where that was another.
    """

    goal: Goal
    batch_size: int
    learning_rates: np.ndarray
    costs: np.ndarray
    diverged: np.ndarray
    best_metrics: np.ndarray
    seconds: float
    tuning: "Pilot | None" = None

    def summary(self) -> dict[str, Any]:
        """Return what was found, for a JSON file."""
        arrays = ("learning_rates", "costs", "diverged", "best_metrics", "seconds")
        tuning = self.tuning and self.tuning.summary()
        best = {"best_learning_rate": self.optimum()[0], "tuning": tuning}
        return {name: getattr(self, name) for name in arrays} | best

    @property
    def found(self) -> bool:
        """Whether some rate reached the target, or the end of the budget, with every seed."""
        return bool(np.isfinite(self.costs).all(1).any())

    @property
    def best(self) -> int:
        """The rate with the least cost, the mean over seeds; where there is none, the one that came nearest.

        The first, where all diverged.
        """
        if self.found:
            return int(np.argmin(self.costs.mean(1)))
        sign = 1 if self.goal.relation == "<=" else -1
        usable = np.isfinite(self.best_metrics) & ~self.diverged.any(1)
        return int(np.argmin(np.where(usable, sign * self.best_metrics, np.inf)))

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or largest tried."""
        tuned = self.tuning or self
        return tuned.best in (0, len(tuned.learning_rates) - 1)

    def optimum(self) -> tuple[float, np.ndarray]:
        """Return (the best learning rate, costs [S] there), by a parabola through log costs against log rate.

        The parabola goes through the best rate and its neighbours, and is taken for its top only: costs at it are
        those of the best rate, scaled. Where a neighbour is LATE times as bad or worse, as beside the rates that
        diverge, a parabola would promise too much, and the best rate stands.
        """
        i = self.best
        logs = np.log(self.costs.mean(1))
        x = np.log(self.learning_rates)
        if not 0 < i < len(x) - 1 or not (logs[i - 1 : i + 2] < logs[i] + math.log(LATE)).all():
            return float(self.learning_rates[i]), self.costs[i]
        a, b, _ = np.polyfit(x[i - 1 : i + 2] - x[i], logs[i - 1 : i + 2], 2)
        shift = float(np.clip(-b / (2 * a), x[i - 1] - x[i], x[i + 1] - x[i])) if a > 0 else 0.0
        return float(np.exp(x[i] + shift)), self.costs[i] * np.exp(a * shift**2 + b * shift)


def search(runs: Runs, goal: Goal) -> Callable[..., Pilot]:
    """Return `(learning_rates [R], *, batch_size, num_seeds, key, max_examples, deadline, ...) -> Pilot`.

    It trains every rate with every seed until the best rate and those beside it are known, `max_examples` examples are
    seen, or the clock (`time.perf_counter`) passes `deadline`; a search that it ends is reported as it stands. With a
    budget to spend, `max_examples` is that budget. No rate is waited for longer than `late` times the updates of the
    best one, or of `least`, which another is known to take. `progress` is called with the updates made and the best
    value.

    Args:
        runs: from `lanes.runs`, judged by the metric of `goal`; one for all batch sizes.
        goal: what to reach or to spend.

    Raises:
        ValueError: by what is returned, for a target that is met at the start, and a loss that is not positive after
            the budget.
    """

    def run(
        learning_rates: np.ndarray,
        *,
        batch_size: int,
        num_seeds: int,
        key: jax.Array,
        max_examples: int = 0,
        deadline: float = math.inf,
        least: float = math.inf,
        late: float = LATE,
        progress: Callable[[int, float], None] = lambda updates, metric: None,
    ) -> Pilot:
        better = np.fmin if goal.relation == "<=" else np.fmax
        began, shape = time.perf_counter(), (num_seeds, len(learning_rates))
        max_updates = max(1, (goal.num_examples if isinstance(goal, Budget) else max_examples) // batch_size)
        # Every batch size and grid of rates has the same draws: the key is used again on purpose.
        lanes = runs.start(learning_rates, num_seeds=num_seeds, key=jax.random.clone(key))
        unused = np.zeros(len(lanes.values) - math.prod(shape), bool)

        def seen(lanes: Lanes) -> np.ndarray:
            return np.asarray(lanes.values, float)[: math.prod(shape)].reshape(shape)

        values, done = seen(lanes), 0
        costs, diverged, nearest = np.full(shape, np.inf), ~np.isfinite(values), values
        if not isinstance(goal, Budget) and goal.reached(values).all():
            raise ValueError(f"target={goal} is met before any update, at {best_value(values, goal):.4g}: ask for more")
        while done < max_updates and time.perf_counter() < deadline:
            # A rate that diverges with one seed is not waited for with the others.
            active = np.isinf(costs) & ~diverged.any(0)
            if not isinstance(goal, Budget):
                active &= _worth_waiting(costs.mean(0), late * min(least, costs.mean(0).min()), done)
            if not active.any():
                break
            count = min(_until_evaluated(goal, done, runs, batch_size), max_updates - done)
            lanes = runs.advance(lanes, count, np.append(active.reshape(-1), unused), batch_size=batch_size)
            before, done = (done, values), lanes.num_updates
            values = seen(lanes)
            _note_costs(costs, goal, active, before, (done, values), ended=done == max_updates)
            diverged |= ~np.isfinite(values)
            nearest = better(nearest, np.where(np.isfinite(values), values, np.nan))
            progress(done, best_value(nearest, goal))
        rates = np.asarray(learning_rates, float)
        nearest = np.asarray([best_value(column, goal) for column in nearest.T])
        return Pilot(goal, batch_size, rates, costs.T, diverged.T, nearest, time.perf_counter() - began)

    return run


def _worth_waiting(costs: np.ndarray, latest: float, done: int) -> np.ndarray:
    """Return which rates [R] are waited for after `done` updates.

    All, until one arrives with every seed; then those beside it, which its parabola goes through, and not for long.
    """
    waiting = np.ones(len(costs), bool)
    if np.isfinite(costs).any():
        waiting = np.abs(np.arange(len(costs)) - costs.argmin()) <= 1
    return waiting & (done <= latest)


def _until_evaluated(goal: Goal, done: int, runs: Runs, batch_size: int) -> int:
    """Return how many updates to make before lanes are evaluated."""
    early = math.ceil(EARLY_GROWTH * done)
    if isinstance(goal, Budget):  # all that has to be known on the way is which lanes diverge, and the time
        return max(1, min(early, runs.num_examples // batch_size))
    # Evaluating an example costs a third of training on it.
    fewest = runs.num_evaluated / (3 * EVALUATION_SHARE * batch_size)
    return max(1, math.ceil(GROWTH * done), round(min(fewest, max(early, fewest / EARLIEST))))


def _note_costs(costs, goal: Goal, active, before, after, *, ended: bool) -> None:
    """Fill in the costs [S, R] of lanes that arrived between two evaluations, (updates made, values [S, R]) each."""
    (start, previous), (end, values) = before, after
    if isinstance(goal, Budget):
        here = active & np.isfinite(values) & ended
        if (values[here] <= 0).any():
            raise ValueError(
                f"examples={goal.num_examples}: the loss after them is {values[here].min():.3g}, but laws are fitted "
                "to logarithms of positive losses: add a constant to it"
            )
        costs[here] = values[here]
        return
    here = goal.reached(values) & active
    costs[here] = _crossing(start, end, previous[here], values[here], goal.value)


def tune(run: Callable[..., Pilot], learning_rates: np.ndarray, **limits: Any) -> Pilot:
    """Search a logarithmic grid, and beyond it until the best rate has two neighbours, see `widened`."""
    return widened(run, run(learning_rates, **limits), learning_rates[1] / learning_rates[0], **limits)


def widened(run: Callable[..., Pilot], found: Pilot, factor: float, **limits: Any) -> Pilot:
    """Search one rate after another beyond those found, a `factor` apart, until the best one has two neighbours.

    Where nothing arrives, it goes on beyond the rate that came nearest, below all of them where all diverge, and ends
    where that one has two neighbours.
    """
    num_rates = len(found.learning_rates)
    for _ in range(MAX_MOVES):
        if not found.at_edge or time.perf_counter() > limits.get("deadline", math.inf):
            break
        up = found.best > 0
        beyond = found.learning_rates[-1 if up else 0]
        num_new = num_rates if found.diverged.any(1).all() else 1
        new = np.sort(beyond * factor ** ((1 if up else -1) * np.arange(1.0, num_new + 1)))
        found = _merged(found, run(new, least=found.costs.mean(1).min(), **limits))
    return found


def _crossing(start: int, end: int, before: np.ndarray, after: np.ndarray, value: float) -> np.ndarray:
    """Return where between `start` and `end` updates a line from `before` to `after` meets `value`, in (start, end].

    The line is straight over the logarithm of the updates, as learning curves nearly are, but from the first update.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        part = (value - before) / (after - before)
    part = np.where((part > 0) & (part <= 1), part, 1.0)
    return start * (end / start) ** part if start else end * part


def _merged(first: Pilot, second: Pilot) -> Pilot:
    """Return both pilots as one, rates ascending."""
    order = np.argsort(np.concatenate([first.learning_rates, second.learning_rates]))

    def both(name: str) -> np.ndarray:
        return np.concatenate([getattr(first, name), getattr(second, name)])[order]

    names = ("learning_rates", "costs", "diverged", "best_metrics")
    return dataclasses.replace(second, **{name: both(name) for name in names}, seconds=first.seconds + second.seconds)
