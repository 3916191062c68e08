"""What is known of each batch size, in stages: its speed, what the laws predict of it, what running it showed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gdjax.advise._goals import NUM_SEEDS, Question
from gdjax.theory import scaling
from gdjax.tuning import Speed, Tuning

STEP = 8  # factor between the batch sizes that are tuned

Law = scaling.UpdatesLaw | scaling.LossLaw


class Verified(NamedTuple):
    """What runs with fresh seeds took at the predicted rate.

    Attributes:
        costs: [NUM_SEEDS], updates to the target or the loss after the budget, infinite where a run did not arrive.
        seconds_per_update: measured anew beside them.
    """

    costs: np.ndarray
    seconds_per_update: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is known of one batch size. Costs are updates to the target, or the loss after the examples to be spent.

    Attributes:
        question: what is asked.
        speed: of its updates.
        learning_rate: predicted.
        predicted: the cost (low, middle, high), the 90 % interval for the mean of NUM_SEEDS runs.
        seed_error: the deviation of its logarithm from seed to seed.
        verified: what running it showed, or None.
        expected: the cost that is known in the end: measured where it was run, else predicted by the last laws.
    """

    question: Question
    speed: Speed
    learning_rate: float
    predicted: tuple[float, float, float]
    seed_error: float = math.nan
    verified: Verified | None = None
    expected: float = math.nan

    @property
    def batch_size(self) -> int:
        """B, examples per update."""
        return self.speed.batch_size

    @property
    def fits(self) -> bool:
        """Whether the step compiled and ran."""
        return self.speed.fits

    @property
    def updates(self) -> tuple[float, float, float]:
        """Predicted updates (low, middle, high)."""
        low, middle, high = (float(self.question.updates(cost, self.batch_size)) for cost in self.predicted)
        return low, middle, high

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Predicted time (low, middle, high), without compilation and evaluation."""
        low, middle, high = (updates * self.speed.seconds_per_update for updates in self.updates)
        return low, middle, high

    @property
    def measured_updates(self) -> float:
        """The mean over fresh seeds; NaN where nothing was run."""
        if self.verified is None:
            return math.nan
        return float(np.mean(self.question.updates(self.verified.costs, self.batch_size)))

    @property
    def measured_seconds(self) -> float:
        """Measured time, the mean over fresh seeds; NaN where nothing was run."""
        return math.nan if self.verified is None else self.measured_updates * self.verified.seconds_per_update

    @property
    def expected_updates(self) -> float:
        """Updates as they are known in the end."""
        if self.verified is not None:
            return self.measured_updates
        return float(self.question.updates(self.expected, self.batch_size))

    @property
    def expected_seconds(self) -> float:
        """Time as it is known in the end."""
        if self.verified is not None:
            return self.measured_seconds
        return self.expected_updates * self.speed.seconds_per_update

    @property
    def inside(self) -> bool:
        """Whether the measured cost lies in its predicted interval; not where nothing was run."""
        low, _, high = self.predicted
        return self.verified is not None and bool(low <= self.verified.costs.mean() <= high)

    def summary(self) -> dict[str, Any]:
        """Return the row for a JSON file."""
        speed = {name: value for name, value in self.speed._asdict().items() if name != "time_again"}
        names = ("learning_rate", "updates", "seconds", "predicted", "seed_error", "expected", "inside")
        names += ("measured_updates", "measured_seconds", "expected_updates", "expected_seconds")
        found = {name: getattr(self, name) for name in names}
        verified = self.verified._asdict() if self.verified else None
        return speed | found | {"verified": verified, "examples": tuple(x * self.batch_size for x in self.updates)}


def default_batch_sizes(num_examples: int) -> list[int]:
    """Return the powers of two below N, and N."""
    return [2**i for i in range((num_examples - 1).bit_length())] + [num_examples]


def predict(question: Question, speeds: Sequence[Speed], law: Law, rates: scaling.RateLaw) -> list[Choice]:
    """Return a choice for every speed, with the rate and the cost that the laws predict."""
    choices = []
    for speed in speeds:
        interval = law.interval(speed.batch_size, num_seeds=NUM_SEEDS)
        low, middle, high = (float(question.possible(cost)) for cost in interval)
        rate = float(rates(speed.batch_size))
        choices.append(Choice(question, speed, rate, (low, middle, high), seed_error=law.seed_error, expected=middle))
    return choices


def settled(choices: Sequence[Choice], verified: Mapping[int, Verified], law: Law) -> list[Choice]:
    """Return the choices with what running them showed; where nothing was run, the last law says what is expected."""
    known = []
    for choice in choices:
        found = verified.get(choice.batch_size)
        law_says = choice.question.possible(float(law(choice.batch_size)))
        expected = float(law_says if found is None else found.costs.mean())
        known.append(dataclasses.replace(choice, verified=found, expected=expected))
    return known


def next_to_verify(choices: Sequence[Choice], tried: Sequence[int]) -> Choice | None:
    """Return what to run next, None where enough was run; `tried` are batch sizes that were run or could not be.

    The fastest, as it is predicted and then as it is measured, comes first, then its neighbours, until both were run,
    and then the smallest and the largest.
    """
    usable = [choice for choice in choices if choice.speed.time_again]
    sizes = [choice.batch_size for choice in usable]
    run = [choice for choice in usable if np.isfinite(choice.measured_seconds)]
    best = fastest(run or usable)
    i = sizes.index(best.batch_size)
    wanted = [*sizes[i : i + 1], *sizes[max(i - 1, 0) : i], *sizes[i + 1 : i + 2], sizes[0], sizes[-1]]
    return next((usable[sizes.index(size)] for size in wanted if size not in tried), None)


def fastest(choices: Sequence[Choice]) -> Choice:
    """Return the fastest choice among those that fit and are good enough, as it was measured or else predicted."""
    usable = [choice for choice in choices if choice.fits]
    return min(
        usable[0].question.good_enough(usable),
        key=lambda choice: choice.seconds[1] if choice.verified is None else choice.measured_seconds,
    )


def nearest(sizes: Sequence[int], size: float) -> int:
    """Return the one of `sizes` nearest to `size` in ratio."""
    return min(sizes, key=lambda other: abs(math.log(other / size)))


def fit(question: Question, found: Mapping[int, Tuning], verified: Mapping[int, Verified] | None = None):
    """Fit both laws to the tunings and, at equal weight, to batch sizes that were verified."""
    optima = {size: tuning.optimum() for size, tuning in found.items()}
    run = {size: runs for size, runs in (verified or {}).items() if np.isfinite(runs.costs).all()}
    costs = [costs for _, costs in optima.values()] + [runs.costs for runs in run.values()]
    rates = scaling.fit_rates(list(optima), [rate for rate, _ in optima.values()])
    return question.fit([*optima, *run], np.asarray(costs)), rates


def next_tuning(question: Question, found: Mapping[int, Tuning], speeds: Sequence[Speed]) -> int | None:
    """Return the batch size whose tuning would tell most, or None where the fastest lies among those tuned.

    One on either side of the first comes first. Then, as long as the fastest batch size is predicted beyond the
    outermost one that was tuned, one further out.
    """
    sizes = [speed.batch_size for speed in speeds if speed.fits]
    first, low, high = next(iter(found)), min(found), max(found)
    below, above = nearest(sizes, low / STEP), nearest(sizes, high * STEP)
    if below < low == first:
        return below
    if above > high == first:
        return above
    if len(found) < 2:
        return None
    best = fastest(predict(question, speeds, *fit(question, found))).batch_size
    return above if best > high and above > high else below if best < low and below < low else None


def least_memory(choices: Sequence[Choice]) -> Choice:
    """Return the choice that needs the least, the smaller batch where that is equal or unknown."""

    def need(choice: Choice) -> tuple[float, int]:
        return math.inf if choice.speed.memory is None else choice.speed.memory, choice.batch_size

    return min(choices, key=need)
