"""The two questions that advice answers, to reach a target and to spend examples, each with its own law and words."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gdjax.noise import student
from gdjax.theory import scaling
from gdjax.tuning import Budget, Goal, Target

if TYPE_CHECKING:
    from gdjax.advise._answer import Advice
    from gdjax.advise._choices import Choice

NUM_SEEDS = 3  # runs of a tuning at its best rate, and runs that verify


class Reaching(NamedTuple):
    """To reach a target in the least time. Costs are updates."""

    goal: Target

    def __str__(self) -> str:
        return f"target={self.goal}"

    def fit(self, sizes: Sequence[int], costs: np.ndarray) -> scaling.UpdatesLaw:
        """Return the law of updates, from costs [P, S] at `sizes` [P]."""
        return scaling.fit(sizes, costs)

    def updates(self, cost: Any, batch_size: int) -> Any:
        """Return the updates that a cost stands for."""
        del batch_size
        return cost

    def possible(self, cost: Any) -> Any:
        """Return a cost that a law predicts, or the least that there is: one update."""
        return np.maximum(cost, 1.0)

    def largest(self, num_examples: int) -> int:
        """Return the largest batch size that makes sense of N examples."""
        return num_examples

    def about(self, updates: float, batch_size: int) -> float:
        """Return how many updates a whole run takes, for one that took so many."""
        del batch_size
        return updates

    def good_enough(self, choices: Sequence["Choice"]) -> list["Choice"]:
        """Return the choices among which the fastest is the advice: all."""
        return list(choices)

    def price(self, choice: "Choice") -> float:
        """Return what the Pareto set trades time for: examples."""
        return choice.expected_updates * choice.batch_size

    def sentence(self, advice: "Advice") -> str:
        """Return what is advised, after 'Use batch size ...: '."""
        choice = advice[advice.batch_size]
        low, middle, high = choice.seconds
        predicted = f"predicted {middle:.3g} s, {low:.3g} to {high:.3g}"
        if advice.race is None:
            return f"{self.goal} after {choice.updates[1]:.0f} updates, {predicted}; not verified."
        costs, num_seeds = advice.race.costs, len(advice.race.costs)
        arrived = costs[np.isfinite(costs)]
        seconds = arrived.mean() * advice.race.seconds_per_update if len(arrived) else math.nan
        reached = f"reached by {len(arrived)} of {num_seeds} seeds"
        start = f"{self.goal} {reached}, after {arrived.mean():.0f} updates in {seconds:.3g} s"
        others = [
            f"{other.seconds / seconds:.3g} x at B = {other.batch_size}"
            for other in advice.race.others
            if np.isfinite(other.seconds)
        ]
        end = f"; at its best rate it takes {', '.join(others)}." if others else "."
        return f"{start} ({predicted}){end}"


class Spending(NamedTuple):
    """To have the least loss after so many examples, and among equals the least time. Costs are losses."""

    goal: Budget

    def __str__(self) -> str:
        return f"the end of examples={self.goal.num_examples}"

    def fit(self, sizes: Sequence[int], costs: np.ndarray) -> scaling.LossLaw:
        """Return the law of losses, from costs [P, S] at `sizes` [P].

        Raises:
            ValueError: for losses that are not positive.
        """
        if (np.asarray(costs) <= 0).any():
            raise ValueError(
                f"examples={self.goal.num_examples}: the loss after them is {np.min(costs):.3g}, but laws are fitted "
                "to logarithms of positive losses: add a constant to it"
            )
        return scaling.fit_losses(sizes, costs, num_examples=self.goal.num_examples)

    def updates(self, cost: Any, batch_size: int) -> Any:
        """Return E // B, or infinity where a run did not come to its end."""
        return np.where(np.isfinite(cost), float(self.goal.num_examples // batch_size), np.inf)[()]

    def possible(self, cost: Any) -> Any:
        """Return a cost that a law predicts: a loss may be any number."""
        return cost

    def largest(self, num_examples: int) -> int:
        """Return the largest batch size that makes sense: one update."""
        del num_examples
        return self.goal.num_examples

    def about(self, updates: float, batch_size: int) -> float:
        """Return how many updates a whole run takes."""
        del updates
        return self.goal.num_examples / batch_size

    def good_enough(self, choices: Sequence["Choice"]) -> list["Choice"]:
        """Return the choices whose loss is within the interval, over seeds, of the least one."""
        limit = _loss_limit(min(choices, key=lambda choice: choice.expected))
        return [choice for choice in choices if choice.expected <= limit]

    def price(self, choice: "Choice") -> float:
        """Return what the Pareto set trades time for: the loss."""
        return choice.expected

    def sentence(self, advice: "Advice") -> str:
        """Return what is advised, after 'Use batch size ...: '."""
        choice = advice[advice.batch_size]
        low, middle, high = choice.predicted
        predicted = f"predicted {middle:.3g}, {low:.3g} to {high:.3g}"
        after = f"after {self.goal.num_examples} examples in"
        if advice.tuned is None:
            return f"train_loss {predicted}, {after} {choice.seconds[1]:.3g} s; not verified."
        others = [
            f"{other.expected:.3g} in {other.measured_seconds:.3g} s at B = {other.batch_size}"
            for other in advice.verified
            if other is not choice
        ]
        start = f"train_loss {advice.tuned.losses.min():.3g} ({predicted}) {after} {choice.measured_seconds:.3g} s"
        return start + (f"; at predicted rates it is {', '.join(others)}." if others else ".")


Question = Reaching | Spending


def question(goal: Goal) -> Question:
    """Return the question that a goal asks."""
    return Spending(goal) if isinstance(goal, Budget) else Reaching(goal)


def _loss_limit(choice: "Choice") -> float:
    """Return the upper end of the 90 % interval, over seeds, of the expected loss as the mean of NUM_SEEDS runs."""
    quantile = float(student(NUM_SEEDS - 1, confidence=0.9)) / NUM_SEEDS**0.5
    if choice.verified is None:
        return choice.predicted[1] * math.exp(quantile * choice.seed_error)
    return float(choice.verified.costs.mean() + quantile * choice.verified.costs.std(ddof=1))
