"""The advice: which batch size, what it rests on, in plain language and for a JSON file."""

import dataclasses
import html
from collections.abc import Mapping
from typing import Any

import numpy as np

from gdjax import noise
from gdjax.advise._choices import Choice, Law
from gdjax.advise._goals import Question
from gdjax.advise._race import Race
from gdjax.theory import scaling
from gdjax.tuning import Goal, Tuning


@dataclasses.dataclass(frozen=True)
class Advice:
    """Which batch size to use, and what it rests on.

    Attributes:
        question: to reach a target, or to spend examples.
        choices: every batch size that was considered.
        tunings: {batch size: Tuning}.
        law, rates: the laws fitted to the tunings, and to what verified where `refitted`.
        noise_scales: (updates made, NoiseScale) along a run of the first tuning.
        refitted: whether a prediction had been wrong by more than its interval.
        batch_size: the advice, by time: the fastest of what was verified, of what was predicted where nothing was.
        tuned: its runs at the predicted learning rate and at others about it; None where it was not verified.
        race: how the advised batch size and rate were found among those that may be the fastest, and confirmed with
            more seeds; None with examples to spend, and where nothing was verified.
        fewest_examples, least_memory: the advice by examples (energy, money) and by memory.
        pareto: the batch sizes that no other beats in both time and examples, as they are known in the end; with
            examples to spend, in time and loss.
        unknown: what the seconds did not allow to establish.
        seconds: wall time of it all.
    """

    question: Question
    choices: tuple[Choice, ...]
    tunings: Mapping[int, Tuning]
    law: Law
    rates: scaling.RateLaw
    noise_scales: tuple[tuple[int, noise.NoiseScale], ...]
    refitted: bool
    batch_size: int
    tuned: Tuning | None
    race: Race | None
    fewest_examples: int
    least_memory: int
    pareto: tuple[int, ...]
    unknown: tuple[str, ...]
    seconds: float

    def __getitem__(self, batch_size: int) -> Choice:
        return next(choice for choice in self.choices if choice.batch_size == batch_size)

    def __str__(self) -> str:
        return self.sentence()

    def __repr__(self) -> str:
        return f"Advice({self.sentence()})"

    def _repr_html_(self) -> str:
        """Return the sentence and a table, for a notebook."""
        rows = "".join(
            f"<tr><td>{choice.batch_size}</td><td>{choice.learning_rate:.2g}</td>"
            f"<td>{choice.expected_updates:.3g}</td><td>{choice.expected_seconds:.3g}</td>"
            f"<td>{f'{choice.measured_seconds:.3g}' if np.isfinite(choice.measured_seconds) else ''}</td></tr>"
            for choice in self.choices
        )
        titles = "".join(f"<th>{title}</th>" for title in ("batch size", "rate", "updates", "seconds: expected", "run"))
        return f"<p>{html.escape(self.sentence())}</p><table><tr>{titles}</tr>{rows}</table>"

    @property
    def goal(self) -> Goal:
        """What was to be reached or spent."""
        return self.question.goal

    @property
    def learning_rate(self) -> float:
        """The advised one: of the `race`, the best of `tuned`, or as it was predicted where there is neither."""
        if self.race is not None:
            return self.race.learning_rate
        return self[self.batch_size].learning_rate if self.tuned is None else self.tuned.rate

    @property
    def verified(self) -> list[Choice]:
        """The choices that were run and arrived."""
        return [choice for choice in self.choices if np.isfinite(choice.measured_seconds)]

    def table(self) -> list[dict[str, Any]]:
        """Return a row for every batch size, of numbers alone, for `csv.DictWriter` or `pandas.DataFrame`."""
        names = ("batch_size", "learning_rate", "measured_updates", "measured_seconds", "expected_seconds")
        rows = []
        for choice in self.choices:
            row: dict[str, Any] = {name: getattr(choice, name) for name in names}
            row |= dict(zip(("updates_low", "updates", "updates_high"), choice.updates, strict=True))
            row |= dict(zip(("seconds_low", "seconds", "seconds_high"), choice.seconds, strict=True))
            speed = choice.speed
            row |= {name: getattr(speed, name) for name in ("seconds_per_update", "memory", "microbatch_size", "fits")}
            rows.append(row | {"advised": choice.batch_size == self.batch_size})
        return rows

    def summary(self) -> dict[str, Any]:
        """Return everything, for a JSON file."""
        names = ("batch_size", "learning_rate", "fewest_examples", "least_memory", "pareto", "refitted", "unknown")
        scales = [
            {"updates": updates, "b_simple": scale.b_simple, "interval": [scale.low, scale.high], "is": scale.verdict}
            for updates, scale in self.noise_scales
        ]
        return {
            "goal": str(self.goal),
            "advice": self.sentence(),
            **{name: getattr(self, name) for name in (*names, "seconds")},
            **{name: number for name, number in self.law._asdict().items() if isinstance(number, float)},
            "rate_law": self.rates._asdict(),
            "noise_scales": scales,
            "choices": [choice.summary() for choice in self.choices],
            "tuned": self.tuned and self.tuned.summary(),
            "updates_of_seeds": self.race and self.race.costs,
            "contenders": self.race and [other._asdict() for other in self.race.others],
            "tunings": {size: tuning.summary() for size, tuning in self.tunings.items()},
        }

    def sentence(self) -> str:
        """Return the advice in plain language."""
        predicted, rate = f"{self[self.batch_size].learning_rate:.2g}", f"{self.learning_rate:.2g}"
        tuned = f", tuned from {predicted}" if rate != predicted else ""
        return f"Use batch size {self.batch_size} (learning rate {rate}{tuned}): {self.question.sentence(self)}"
