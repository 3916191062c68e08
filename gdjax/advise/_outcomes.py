"""What rules did: their regrets with intervals, and the verdict."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gdjax import noise
from gdjax.theory.rules import Hyperparameters
from gdjax.tuning import Tuning

CONFIDENCE = 0.9


class Interval(NamedTuple):
    """A mean over seeds and its two-sided 90 % interval."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a rule did.

    Attributes:
        rule: its name; others that carry to the same numbers follow it in `same`.
        same: their names.
        hyperparameters: carried; None where the rule does not apply.
        why_not: why it does not, in words.
        flag: how far the factor leaves the range where it was derived, in words.
        predicted: progress of an update at the carried rate over that at the best one; NaN where no noise scale is.
        losses: [S, E], at `Rules.examples`.
        loss_regret: of the last loss, over that of the tuned rate with the same seed.
        examples_regret: how many times the examples of the better of the two the worse one takes to its loss, less 1;
            negative where that is the rule.
    """

    rule: str
    same: tuple[str, ...] = ()
    hyperparameters: Hyperparameters | None = None
    why_not: str | None = None
    flag: str | None = None
    predicted: float = math.nan
    losses: np.ndarray | None = None
    loss_regret: Interval | None = None
    examples_regret: Interval | None = None

    @property
    def last(self) -> float:
        """The mean loss at the end, infinite where a seed diverged or nothing was run."""
        if self.losses is None:
            return math.inf
        return float(_ends(self.losses).mean())


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which rule to use, and what that rests on.

    Attributes:
        optimizer: its name.
        base, batch_size: from where to where.
        num_examples: E, of every run.
        hyperparameters: at `base`, tuned or given.
        tunings: {batch size: Tuning} of the rate.
        scale: the noise scale half way through the tuned run at `base`, in the optimiser's geometry.
        geometry: its name.
        outcomes: of every rule, those that were run from the least loss, then those that do not apply.
        tuned: of the rate tuned at `batch_size`, with the same fresh seeds.
        examples: [E] seen where losses were evaluated.
        seconds: wall time.
    """

    optimizer: str
    base: int
    batch_size: int
    num_examples: int
    hyperparameters: Hyperparameters
    tunings: dict[int, Tuning]
    scale: Any
    geometry: str
    outcomes: tuple[Outcome, ...]
    tuned: Outcome
    examples: np.ndarray
    seconds: float

    @property
    def run(self) -> list[Outcome]:
        """The rules that were run, from the least loss."""
        return [outcome for outcome in self.outcomes if outcome.losses is not None]

    @property
    def best(self) -> str:
        """The rule of the least loss."""
        return self.run[0].rule

    @property
    def level(self) -> list[str]:
        """The rules that cannot be told from the best: the interval of their difference to it holds 0."""
        first = self.run[0].losses
        assert first is not None
        others = [outcome for outcome in self.run[1:] if np.isfinite(outcome.last) and outcome.losses is not None]
        return [o.rule for o in others if interval(o.losses[:, -1] - first[:, -1]).low <= 0]  # pyright: ignore

    @property
    def predicted(self) -> list[str]:
        """The rules that were run in the order of the prediction; empty where there was none."""
        order = sorted(self.run, key=lambda outcome: -outcome.predicted)
        return [outcome.rule for outcome in order] if not math.isnan(order[0].predicted) else []

    def __str__(self) -> str:
        return self.sentence()

    def __repr__(self) -> str:
        return f"Rules({self.sentence()})"

    def sentence(self) -> str:
        """Return the verdict."""
        best = self.run[0]
        if not math.isfinite(best.last):
            return f"Use none of the rules: all diverge at B = {self.batch_size}. Tune the rate there."
        if not math.isfinite(self.tuned.last):
            return (
                f"No rule can be judged: with one of {len(best.losses)} fresh seeds the rate tuned at "  # pyright: ignore
                f"B = {self.batch_size} does not lower the loss. Longer runs tell more, or other data or units."
            )
        assert best.loss_regret is not None
        assert best.examples_regret is not None
        named = " = ".join((best.rule, *best.same))
        loss = "{:+.3g} [{:+.3g}, {:+.3g}]".format(*best.loss_regret)
        examples = "{:+.0%} [{:+.0%}, {:+.0%}]".format(*best.examples_regret)
        said = (
            f"Use {named} to carry {self.optimizer} from B = {self.base} to {self.batch_size} "
            f"({self.batch_size / self.base:g} times): loss {loss}, examples {examples} over tuning there "
            "(90 % intervals)."
        )
        level = f" Not told from it with {len(best.losses)} seeds: {', '.join(self.level)}." if self.level else ""  # pyright: ignore
        foreseen = "" if not self.predicted else (
            " The noise scale foresaw it." if _ties(self.run, self.predicted[0]) & {self.best, *self.level}
            else f" The noise scale had let expect {self.predicted[0]}."
        )  # fmt: skip
        return said + level + foreseen

    def summary(self) -> dict[str, Any]:
        """Return everything, for a JSON file."""

        def row(outcome: Outcome) -> dict[str, Any]:
            found = dataclasses.asdict(outcome) | {"final_loss": outcome.last}
            carried = outcome.hyperparameters
            return found | {"hyperparameters": carried and _numbers(carried)}

        names = ("optimizer", "base", "batch_size", "num_examples", "geometry", "examples", "seconds")
        return {
            **{name: getattr(self, name) for name in names},
            "verdict": self.sentence(),
            "best": self.best,
            "level": self.level,
            "predicted_order": self.predicted,
            "hyperparameters": _numbers(self.hyperparameters),
            "noise_scale": {"b_simple": self.scale.b_simple, "interval": [self.scale.low, self.scale.high]},
            "tunings": {size: tuned.summary() for size, tuned in self.tunings.items()},
            "tuned": row(self.tuned),
            "rules": [row(outcome) for outcome in self.outcomes],
        }


def judged(outcome: Outcome, losses: np.ndarray, tuned: np.ndarray, examples: np.ndarray) -> Outcome:
    """Return an outcome with its regrets, from losses [S, E] of itself and of the tuned rate."""
    times = [_times(own, other, examples) for own, other in zip(losses, tuned, strict=True)]
    with np.errstate(invalid="ignore", over="ignore"):
        loss = interval(_ends(losses) - _ends(tuned))
        logs = interval(np.log(times))
        more = Interval(*(float(np.expm1(x)) for x in logs))
    return dataclasses.replace(outcome, losses=losses, loss_regret=loss, examples_regret=more)


def _ends(losses: np.ndarray) -> np.ndarray:
    """Return the last losses [S] of [S, E], infinite where they are not below the first: such a run has diverged."""
    return np.where(losses[:, -1] < losses[:, 0], losses[:, -1], np.inf)


def _times(own: np.ndarray, other: np.ndarray, examples: np.ndarray) -> float:
    """Return how many times the examples one run takes to a loss that both reach; infinite for one that never falls."""
    if not np.isfinite(own[-1]) or own[-1] >= own[0]:
        return math.inf
    if own[-1] >= other[-1]:
        return float(examples[-1] / _when(other, own[-1], examples))
    return float(_when(own, other[-1], examples) / examples[-1])


def _when(losses: np.ndarray, level: float, examples: np.ndarray) -> float:
    """Return the examples after which losses [E] first reach a level, interpolated."""
    i = int(np.argmax(losses <= level))
    share = (losses[i - 1] - level) / (losses[i - 1] - losses[i])
    return float(examples[i - 1] + share * (examples[i] - examples[i - 1]))


def interval(values: Any) -> Interval:
    values = np.asarray(values, float)
    if not np.isfinite(values).all():
        return Interval(math.inf, math.inf, math.inf)
    half = noise.student(len(values) - 1, confidence=CONFIDENCE) * values.std(ddof=1) / len(values) ** 0.5
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def _ties(outcomes: Sequence[Outcome], name: str) -> set[str]:
    """Return the rules whose prediction is as good as that of `name`, to a hundredth."""
    best = next(outcome.predicted for outcome in outcomes if outcome.rule == name)
    return {outcome.rule for outcome in outcomes if outcome.predicted > best - 0.01}


def _numbers(hyperparameters: Hyperparameters) -> dict[str, float]:
    return {name: float(value) for name, value in hyperparameters._asdict().items() if value is not None}
