"""What is known of each batch size, the speed of its step and the updates predicted and measured, and which is best."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gdjax.noise import _intervals as intervals
from gdjax.theory import scaling
from gdjax.tuning._pilots import Pilot
from gdjax.tuning._targets import Budget

NUM_SEEDS = 3  # runs of a pilot at its best rate, and runs that verify
STEP = 8  # factor between the batch sizes of pilots


@dataclasses.dataclass
class Choice:
    """What is known of one batch size.

    Attributes:
        batch_size: B.
        seconds_per_update, compile_seconds: measured, or, where `extrapolated`, taken in proportion to the examples.
        memory: bytes of one compiled run of updates beside arguments and results, or None.
        fits: whether the step compiled and ran.
        learning_rate: predicted.
        updates: predicted (low, middle, high), the 90 % interval for the mean of NUM_SEEDS runs; with a budget of E
            examples to spend, three times E // B.
        loss: with a budget, predicted as well, and the deviation of its logarithm from seed to seed, `seed_error`.
        measured: updates of the runs that verified, [NUM_SEEDS], infinite where the target, or the end of the budget,
            was not reached; or None.
        measured_loss: with a budget, what these runs ended at, [NUM_SEEDS].
        measured_seconds_per_update: measured anew beside them.
        expected_updates: what is known in the end: measured where it was run, otherwise predicted by the last laws.
        time_again: times the compiled training loop once more, seconds per update.
    """

    batch_size: int
    seconds_per_update: float
    compile_seconds: float = math.nan
    memory: int | None = None
    fits: bool = True
    extrapolated: bool = False
    learning_rate: float = math.nan
    updates: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    loss: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    seed_error: float = math.nan
    measured: np.ndarray | None = None
    measured_loss: np.ndarray | None = None
    measured_seconds_per_update: float = math.nan
    expected_updates: float = math.nan
    time_again: Callable[[], float] | None = dataclasses.field(default=None, repr=False)

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Predicted time to the target (low, middle, high), without compilation and evaluation."""
        low, middle, high = (updates * self.seconds_per_update for updates in self.updates)
        return low, middle, high

    @property
    def costs(self) -> np.ndarray:
        """What the runs that verified took, in the unit of `Pilot.costs`; empty where nothing was run."""
        found = self.measured if self.measured_loss is None else self.measured_loss
        return np.empty(0) if found is None else found

    @property
    def measured_updates(self) -> float:
        """The mean over fresh seeds; NaN where nothing was run."""
        return math.nan if self.measured is None else float(self.measured.mean())

    @property
    def measured_seconds(self) -> float:
        """Measured time to the target, the mean over fresh seeds."""
        return self.measured_updates * self.measured_seconds_per_update

    @property
    def expected_seconds(self) -> float:
        """Time to the target as it is known in the end."""
        return self.measured_seconds if self.measured is not None else self.expected_updates * self.seconds_per_update

    @property
    def expected_loss(self) -> float:
        """With a budget, the loss as it is known in the end."""
        return self.loss[1] if self.measured_loss is None else float(self.measured_loss.mean())

    @property
    def loss_limit(self) -> float:
        """The upper end of the 90 % interval, over seeds, of `expected_loss` as the mean of NUM_SEEDS runs."""
        quantile = intervals.student(NUM_SEEDS - 1, confidence=0.9) / NUM_SEEDS**0.5
        if self.measured_loss is None:
            return self.loss[1] * math.exp(quantile * self.seed_error)
        return float(self.measured_loss.mean() + quantile * self.measured_loss.std(ddof=1))

    @property
    def inside(self) -> bool:
        """Whether the measured updates, or the measured loss, lie in their predicted interval."""
        (low, _, high), value = self.updates, self.measured_updates
        if self.measured_loss is not None:
            (low, _, high), value = self.loss, self.expected_loss
        return low <= value <= high

    def summary(self) -> dict[str, Any]:
        """Return the row for a JSON file."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "time_again"]
        predicted = {"seconds": self.seconds, "examples": tuple(x * self.batch_size for x in self.updates)}
        names += ["measured_updates", "measured_seconds", "expected_seconds", "expected_loss"]
        return {name: getattr(self, name) for name in names} | predicted


def default_batch_sizes(num_examples: int) -> list[int]:
    """Return the powers of two below N, and N."""
    return [2**i for i in range((num_examples - 1).bit_length())] + [num_examples]


def predict(
    choices: Sequence[Choice], law: scaling.UpdatesLaw | scaling.LossLaw, rates: scaling.RateLaw
) -> list[Choice]:
    """Return the choices with the learning rates and the updates, or the loss, that the laws predict."""
    predicted = []
    for choice in choices:
        low, middle, high = map(float, law.interval(choice.batch_size, num_seeds=NUM_SEEDS))
        known: dict[str, Any] = {"learning_rate": float(rates(choice.batch_size)), "updates": (low, middle, high)}
        if isinstance(law, scaling.LossLaw):
            updates = float(law.num_examples // choice.batch_size)
            known |= {"updates": (updates,) * 3, "loss": (low, middle, high), "seed_error": law.seed_error}
        predicted.append(dataclasses.replace(choice, **known))
    return predicted


def settle(choices: Sequence[Choice], law: scaling.UpdatesLaw | scaling.LossLaw) -> None:
    """Set the updates that are expected in the end: measured, or predicted by the last law; a budget's are E // B."""
    for choice in choices:
        if choice.measured is not None:
            choice.expected_updates = choice.measured_updates
        else:
            budget = isinstance(law, scaling.LossLaw)
            choice.expected_updates = choice.updates[1] if budget else float(law(choice.batch_size))


def next_to_verify(choices: Sequence[Choice], tried: Sequence[int]) -> Choice | None:
    """Return what to run next, None where enough was run; `tried` are batch sizes that were run or could not be.

    The fastest, as it is predicted and then as it is measured, comes first, then its neighbours, until both were run,
    and then the smallest and the largest.
    """
    usable = [choice for choice in choices if choice.time_again]
    sizes = [choice.batch_size for choice in usable]
    run = [choice for choice in usable if np.isfinite(choice.measured_seconds)]
    best = fastest(run or usable)
    i = sizes.index(best.batch_size)
    wanted = [*sizes[i : i + 1], *sizes[max(i - 1, 0) : i], *sizes[i + 1 : i + 2], sizes[0], sizes[-1]]
    return next((usable[sizes.index(size)] for size in wanted if size not in tried), None)


def fastest(choices: Sequence[Choice]) -> Choice:
    """Return the fastest choice among those that fit, as it was measured or else predicted.

    With a budget to spend, among those whose loss is within the interval of the least one: no larger than its
    `loss_limit`.
    """
    usable = [choice for choice in choices if choice.fits]
    if not math.isnan(usable[0].expected_loss):
        limit = min(usable, key=lambda choice: choice.expected_loss).loss_limit
        usable = [choice for choice in usable if choice.expected_loss <= limit]
    return min(usable, key=lambda choice: choice.seconds[1] if choice.measured is None else choice.measured_seconds)


def nearest(sizes: Sequence[int], size: float) -> int:
    """Return the one of `sizes` nearest to `size` in ratio."""
    return min(sizes, key=lambda other: abs(math.log(other / size)))


def fit(found: dict[int, Pilot], verified: Sequence[Choice] = ()):
    """Fit both laws to the pilots and, at equal weight, to batch sizes that were verified."""
    goal = next(iter(found.values())).goal
    optima = {size: pilot.optimum() for size, pilot in found.items()}
    run = [choice for choice in verified if choice.measured is not None]
    sizes = [*optima, *(choice.batch_size for choice in run)]
    costs = [costs for _, costs in optima.values()]
    costs += [choice.costs for choice in run]
    rates = scaling.fit_rates(list(optima), [rate for rate, _ in optima.values()])
    if isinstance(goal, Budget):
        return scaling.fit_losses(sizes, np.asarray(costs), num_examples=goal.num_examples), rates
    return scaling.fit(sizes, np.asarray(costs)), rates


def next_pilot(found: dict[int, Pilot], known: Sequence[Choice]) -> int | None:
    """Return the batch size whose pilot would tell most, or None where the fastest lies among the pilots.

    One pilot on either side of the first comes first. Then, as long as the fastest batch size is predicted beyond the
    outermost pilot, one further out.
    """
    sizes = [choice.batch_size for choice in known if choice.fits]
    first, low, high = next(iter(found)), min(found), max(found)
    below, above = nearest(sizes, low / STEP), nearest(sizes, high * STEP)
    if below < low == first:
        return below
    if above > high == first:
        return above
    if len(found) < 2:
        return None
    best = fastest(predict(known, *fit(found))).batch_size
    return above if best > high and above > high else below if best < low and below < low else None


def least_memory(choices: Sequence[Choice]) -> Choice:
    """Return the choice that needs the least, the smaller batch where that is equal or unknown."""
    return min(choices, key=lambda choice: (math.inf if choice.memory is None else choice.memory, choice.batch_size))
