"""The advice: which batch size, what it rests on, in plain language and for a JSON file."""

import dataclasses
from typing import Any

import numpy as np

from gdjax import noise
from gdjax.advise._choices import Choice
from gdjax.theory import scaling
from gdjax.tuning._pilots import Pilot
from gdjax.tuning._targets import Budget, Goal


@dataclasses.dataclass
class Advice:
    """Which batch size to use, and what it rests on.

    Attributes:
        goal: what was to be reached or spent.
        choices: every batch size that was considered.
        pilots: {batch size: Pilot}.
        law, rates: the laws fitted to the pilots, and to what verified where `refitted`.
        noise_scales: [(updates made, NoiseScale)] along a run of the first pilot.
        refitted: whether a prediction had been wrong by more than its interval.
        batch_size: the advice, by time: the `fastest` of what was verified, of what was predicted where nothing was.
        tuned: its runs at the predicted learning rate and at others about it; None where it was not verified.
        fewest_examples, least_memory: the advice by examples (energy, money) and by memory.
        pareto: the batch sizes that no other beats in both time and examples, as they are known in the end; with a
            budget, in time and loss.
        unknown: what the budget did not allow to establish.
        seconds: wall time of it all.
    """

    goal: Goal
    choices: list[Choice]
    pilots: dict[int, Pilot]
    law: scaling.UpdatesLaw | scaling.LossLaw
    rates: scaling.RateLaw
    noise_scales: list[tuple[int, noise.NoiseScale]]
    refitted: bool
    batch_size: int
    tuned: Pilot | None
    fewest_examples: int
    least_memory: int
    pareto: list[int]
    unknown: list[str]
    seconds: float

    def __getitem__(self, batch_size: int) -> Choice:
        return next(choice for choice in self.choices if choice.batch_size == batch_size)

    @property
    def learning_rate(self) -> float:
        """The advised one: the best of `tuned`, as it was predicted where that is None."""
        if self.tuned is None:
            return self[self.batch_size].learning_rate
        return float(self.tuned.learning_rates[self.tuned.best])

    def summary(self) -> dict[str, Any]:
        """Return everything, for a JSON file."""
        fields = (
            "batch_size",
            "learning_rate",
            "fewest_examples",
            "least_memory",
            "pareto",
            "refitted",
            "unknown",
            "seconds",
        )
        scales = [
            {"updates": updates, "b_simple": scale.b_simple, "interval": [scale.low, scale.high], "is": scale.verdict}
            for updates, scale in self.noise_scales
        ]
        return {
            "goal": str(self.goal),
            "advice": self.sentence(),
            **{name: getattr(self, name) for name in fields},
            **{name: number for name, number in self.law._asdict().items() if isinstance(number, float)},
            "rate_law": self.rates._asdict(),
            "noise_scales": scales,
            "choices": [choice.summary() for choice in self.choices],
            "tuned": self.tuned and self.tuned.summary(),
            "pilots": {size: pilot.summary() for size, pilot in self.pilots.items()},
        }

    def sentence(self) -> str:
        """Return the advice in plain language."""
        choice = self[self.batch_size]
        predicted = f"{choice.learning_rate:.2g}"
        rate = f"{self.learning_rate:.2g}"
        start = f"Use batch size {choice.batch_size} (learning rate {rate}"
        start += f", tuned from {predicted}): " if rate != predicted else "): "
        if isinstance(self.goal, Budget):
            return start + self._after_budget(choice)
        start += f"{self.goal} "
        low, middle, high = choice.seconds
        predicted = f"predicted {middle:.3g} s, {low:.3g} to {high:.3g}"
        if self.tuned is None:
            return start + f"after {choice.updates[1]:.0f} updates, {predicted}; not verified."
        updates = self.tuned.costs.mean(1).min()
        seconds = updates * choice.measured_seconds_per_update
        start += f"after {updates:.0f} updates in {seconds:.3g} s ({predicted})"
        others = [
            f"{other.measured_seconds / choice.measured_seconds:.3g} x at B = {other.batch_size}"
            for other in self.choices
            if other is not choice and np.isfinite(other.measured_seconds)
        ]
        return start + (f"; at predicted rates it takes {', '.join(others)}." if others else ".")

    def _after_budget(self, choice: Choice) -> str:
        low, middle, high = choice.loss
        predicted = f"predicted {middle:.3g}, {low:.3g} to {high:.3g}"
        after = f"after {self.goal.num_examples} examples in"  # pyright: ignore[reportAttributeAccessIssue]
        if self.tuned is None:
            return f"train_loss {predicted}, {after} {choice.seconds[1]:.3g} s; not verified."
        others = [
            f"{other.expected_loss:.3g} in {other.measured_seconds:.3g} s at B = {other.batch_size}"
            for other in self.choices
            if other is not choice and np.isfinite(other.measured_seconds)
        ]
        start = f"train_loss {self.tuned.costs.mean(1).min():.3g} ({predicted}) {after} {choice.measured_seconds:.3g} s"
        return start + (f"; at predicted rates it is {', '.join(others)}." if others else ".")
