"""What is known of every learning rate at one batch size, and which is the best."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from gdjax.tuning._goals import Budget, Goal

LATE = 2.0  # a rate that needs this many times the updates of the best one is not waited for


class History(NamedTuple):
    """What was seen of every run: updates made [E], and values, a pytree of [R, S, E]."""

    updates: np.ndarray
    values: Any


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What every run took at one batch size, rates [R] ascending and seeds [S].

    Attributes:
        goal: the target to reach, or the budget to spend.
        batch_size: B, or the `batching.Phases` of a schedule.
        learning_rates: [R].
        costs: [R, S], updates to the target or the loss after the budget, infinite where it was not reached or spent,
            or not waited for.
        diverged: bool [R, S], where it cannot be.
        best_metrics: [R], the best value, for this goal, that any seed was seen at; NaN where none was finite.
        seconds: wall time of the search, compilation included.
        history: of the runs, where one was asked for.
        tuning: the search that found its one rate, where that was another.
    """

    goal: Goal
    batch_size: Any
    learning_rates: np.ndarray
    costs: np.ndarray
    diverged: np.ndarray
    best_metrics: np.ndarray
    seconds: float
    history: History | None = None
    tuning: "Tuning | None" = None

    def summary(self) -> dict[str, Any]:
        """Return what was found, for a JSON file."""
        arrays = ("learning_rates", "costs", "diverged", "best_metrics", "seconds")
        tuning = self.tuning and self.tuning.summary()
        best = {"best_learning_rate": self.optimum()[0], "tuning": tuning}
        return {name: getattr(self, name) for name in arrays} | best

    @property
    def losses(self) -> np.ndarray:
        """The costs, the mean over seeds, [R]: infinite where a seed does not arrive, or much later than the others."""
        means = self.costs.mean(1)
        return means if isinstance(self.goal, Budget) else np.where(self.goal.astray(self.costs).any(-1), np.inf, means)

    @property
    def found(self) -> bool:
        """Whether some rate reached the target, or the end of the budget, with every seed."""
        return bool(np.isfinite(self.losses).any())

    @property
    def best(self) -> int:
        """The index of the rate with the least cost; where there is none, of the one that came nearest.

        The first, where all diverged.
        """
        if self.found:
            return int(np.argmin(self.losses))
        sign = 1 if self.goal.relation == "<=" else -1
        usable = np.isfinite(self.best_metrics) & ~self.diverged.any(1)
        return int(np.argmin(np.where(usable, sign * self.best_metrics, np.inf)))

    @property
    def rate(self) -> float:
        """The best learning rate of those that were tried."""
        return float(self.learning_rates[self.best])

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or largest tried."""
        tuned = self.tuning or self
        return tuned.best in (0, len(tuned.learning_rates) - 1)

    def optimum(self) -> tuple[float, np.ndarray]:
        """Return (the best learning rate, costs [S] there), by a parabola through log costs against log rate.

        The parabola goes through the best rate and its neighbours, and is taken for its top only: costs at it are
        those of the best rate, scaled. Where a neighbour is LATE times as bad or worse, as beside the rates that
        diverge, or where a cost is not positive, a parabola would promise too much, and the best rate stands.
        """
        i, x = self.best, np.log(self.learning_rates)
        with np.errstate(invalid="ignore", divide="ignore"):
            logs = np.log(self.losses)
        near = logs[i - 1 : i + 2]
        if not 0 < i < len(x) - 1 or not (np.isfinite(near) & (near < logs[i] + math.log(LATE))).all():
            return self.rate, self.costs[i]
        a, b, _ = np.polyfit(x[i - 1 : i + 2] - x[i], near, 2)
        shift = float(np.clip(-b / (2 * a), x[i - 1] - x[i], x[i + 1] - x[i])) if a > 0 else 0.0
        return float(np.exp(x[i] + shift)), self.costs[i] * np.exp(a * shift**2 + b * shift)


def merged(first: Tuning, second: Tuning) -> Tuning:
    """Return both as one, rates ascending. Histories of unequal length, where runs diverged, end at the longer's."""
    order = np.argsort(np.concatenate([first.learning_rates, second.learning_rates]))

    def both(name: str) -> np.ndarray:
        return np.concatenate([getattr(first, name), getattr(second, name)])[order]

    history = None
    if first.history and second.history:
        longest = max(first.history, second.history, key=lambda history: len(history.updates))

        def padded(x):
            missing = len(longest.updates) - x.shape[-1]
            return np.concatenate([x, np.repeat(x[..., -1:], missing, axis=-1)], axis=-1)

        history = longest._replace(
            values=jax.tree.map(
                lambda a, b: np.concatenate([padded(a), padded(b)])[order], first.history.values, second.history.values
            )
        )
    names = ("learning_rates", "costs", "diverged", "best_metrics")
    both_rows = {name: both(name) for name in names}
    return dataclasses.replace(second, **both_rows, seconds=first.seconds + second.seconds, history=history)
