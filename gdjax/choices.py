"""What is known of each batch size, the speed of its step and the updates predicted and measured, and the advice."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdjax import descent, gradients, noise, scaling, timing
from gdjax.lanes import Optimizer
from gdjax.pilots import Pilot
from gdjax.problem import Problem
from gdjax.targets import Target

NUM_SEEDS, NUM_FRESH = 3, 5  # runs of a pilot at each rate, and runs that verify
STEP = 8  # factor between the batch sizes of pilots
TIMED_EXAMPLES, TIMING_SECONDS = 1024, 0.1  # in one timed run of updates, and for all repeats of it


@dataclasses.dataclass
class Choice:
    """What is known of one batch size.

    Attributes:
        batch_size: B.
        seconds_per_update, compile_seconds: measured, or, where `extrapolated`, taken in proportion to the examples.
        memory: bytes of one compiled run of updates beside arguments and results, or None.
        fits: whether the step compiled and ran.
        learning_rate: predicted.
        updates: predicted (low, middle, high), the 90 % interval for the mean of NUM_FRESH runs.
        measured: updates of the runs that verified, [NUM_FRESH], infinite where the target was not reached; or None.
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
    measured: np.ndarray | None = None
    measured_seconds_per_update: float = math.nan
    expected_updates: float = math.nan
    time_again: Callable[[], float] | None = dataclasses.field(default=None, repr=False)

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Predicted time to the target (low, middle, high), without compilation and evaluation."""
        low, middle, high = (updates * self.seconds_per_update for updates in self.updates)
        return low, middle, high

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
    def inside(self) -> bool:
        """Whether the measured updates lie in their predicted interval."""
        return self.updates[0] <= self.measured_updates <= self.updates[2]

    def summary(self) -> dict[str, Any]:
        """Return the row for a JSON file."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "time_again"]
        predicted = {"seconds": self.seconds, "examples": tuple(x * self.batch_size for x in self.updates)}
        names += ["measured_updates", "measured_seconds", "expected_seconds"]
        return {name: getattr(self, name) for name in names} | predicted


@dataclasses.dataclass
class Advice:
    """Which batch size to use, and what it rests on.

    Attributes:
        target: what was to be reached.
        choices: every batch size that was considered.
        pilots: {batch size: Pilot}.
        law, rates: the laws fitted to the pilots, and to what verified where `refitted`.
        noise_scales: [(updates made, NoiseScale)] along a run of the first pilot.
        refitted: whether a prediction had been wrong by more than its interval.
        batch_size: the advice, by time: the fastest of what was verified, of what was predicted where nothing was.
        fewest_examples, least_memory: the advice by examples (energy, money) and by memory.
        pareto: the batch sizes that no other beats in both time and examples, as they are known in the end.
        unknown: what the budget did not allow to establish.
        seconds: wall time of it all.
    """

    target: Target
    choices: list[Choice]
    pilots: dict[int, Pilot]
    law: scaling.UpdatesLaw
    rates: scaling.RateLaw
    noise_scales: list[tuple[int, noise.NoiseScale]]
    refitted: bool
    batch_size: int
    fewest_examples: int
    least_memory: int
    pareto: list[int]
    unknown: list[str]
    seconds: float

    def __getitem__(self, batch_size: int) -> Choice:
        return next(choice for choice in self.choices if choice.batch_size == batch_size)

    def summary(self) -> dict[str, Any]:
        """Return everything, for a JSON file."""
        fields = ("batch_size", "fewest_examples", "least_memory", "pareto", "refitted", "unknown", "seconds")
        scales = [
            {"updates": updates, "b_simple": scale.b_simple, "interval": [scale.low, scale.high], "is": scale.verdict}
            for updates, scale in self.noise_scales
        ]
        pilots = {
            size: dataclasses.asdict(pilot) | {"target": str(pilot.target), "best_learning_rate": pilot.optimum()[0]}
            for size, pilot in self.pilots.items()
        }
        return {
            "target": str(self.target),
            "advice": self.sentence(),
            **{name: getattr(self, name) for name in fields},
            "min_updates": self.law.min_updates,
            "critical_batch_size": self.law.critical_batch_size,
            "model_error": self.law.model_error,
            "rate_law": self.rates._asdict(),
            "noise_scales": scales,
            "choices": [choice.summary() for choice in self.choices],
            "pilots": pilots,
        }

    def sentence(self) -> str:
        """Return the advice in plain language."""
        choice = self[self.batch_size]
        start = f"Use batch size {choice.batch_size} (learning rate {choice.learning_rate:.2g}): {self.target} "
        low, middle, high = choice.seconds
        predicted = f"predicted {middle:.3g} s, {low:.3g} to {high:.3g}"
        if choice.measured is None:
            return start + f"after {choice.updates[1]:.0f} updates, {predicted}; not verified."
        start += f"after {choice.measured_updates:.0f} updates in {choice.measured_seconds:.3g} s ({predicted})"
        others = [
            f"{other.measured_seconds / choice.measured_seconds:.3g} x at B = {other.batch_size}"
            for other in self.choices
            if other is not choice and np.isfinite(other.measured_seconds)
        ]
        return start + (f"; it takes {', '.join(others)}." if others else ".")


def default_batch_sizes(num_examples: int) -> list[int]:
    """Return the powers of two below N, and N."""
    return [2**i for i in range((num_examples - 1).bit_length())] + [num_examples]


def throughput(
    problem: Problem,
    optimizer: Optimizer,
    sizes: Sequence[int],
    *,
    learning_rate: float,
    deadline: float = math.inf,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Choice]:
    """Time the real training loop at every batch size, ascending, until `deadline` (`time.perf_counter`).

    After that times are taken in proportion to the examples. Whatever else the machine does only adds to a time: all
    are measured twice, where `deadline` allows it, and the lower one counts. What is larger than a size that does not
    fit does not either.
    """
    choices: list[Choice] = []
    draw = np.random.default_rng(0)
    method = descent.method(gradients.mean(problem.loss), optimizer(learning_rate))
    state = method.init(jax.jit(problem.init)(jax.random.key(0)))
    for size in sizes:
        progress(f"timing batch size {size}")
        if choices and (not choices[-1].fits or time.perf_counter() > deadline):
            scale = size / choices[-1].batch_size
            fits = choices[-1].fits
            choices.append(Choice(size, choices[-1].seconds_per_update * scale, fits=fits, extrapolated=fits))
            continue
        num_updates = int(np.clip(TIMED_EXAMPLES // size, 4, 1024))
        batches = draw.integers(problem.num_examples, size=(num_updates, size), dtype=np.int32)
        arguments = state, problem.train, jnp.asarray(batches)
        try:
            program = timing.compiled(partial(descent.run, method, every=num_updates), *arguments)
            again = partial(_per_update, program, arguments, num_updates)
            choices.append(Choice(size, again(), program.compile_seconds, program.temporary_bytes, time_again=again))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            choices.append(Choice(size, math.inf, fits=False))
    for choice in choices:
        if choice.time_again and time.perf_counter() < deadline:
            choice.seconds_per_update = min(choice.seconds_per_update, choice.time_again())
    return choices


def _per_update(program, arguments, num_updates: int) -> float:
    return timing.seconds(program, *arguments, budget=TIMING_SECONDS, repeats=7) / num_updates


def predict(choices: Sequence[Choice], law: scaling.UpdatesLaw, rates: scaling.RateLaw) -> list[Choice]:
    """Return the choices with the learning rates and the updates that the laws predict."""
    predicted = []
    for choice in choices:
        low, middle, high = law.interval(choice.batch_size, num_seeds=NUM_FRESH)
        updates = float(low), float(middle), float(high)
        predicted.append(dataclasses.replace(choice, updates=updates, learning_rate=float(rates(choice.batch_size))))
    return predicted


def next_to_verify(choices: Sequence[Choice], tried: Sequence[int]) -> Choice | None:
    """Return what to run next, None where enough was run; `tried` are batch sizes that were run or could not be.

    The fastest, as it is predicted and then as it is measured, comes first, then its neighbours, until both were run,
    and then the smallest and the largest.
    """
    usable = [choice for choice in choices if choice.time_again]
    sizes = [choice.batch_size for choice in usable]
    run = [choice for choice in usable if np.isfinite(choice.measured_seconds)]
    best = min(run, key=lambda choice: choice.measured_seconds) if run else fastest(usable)
    i = sizes.index(best.batch_size)
    wanted = [*sizes[i : i + 1], *sizes[max(i - 1, 0) : i], *sizes[i + 1 : i + 2], sizes[0], sizes[-1]]
    return next((usable[sizes.index(size)] for size in wanted if size not in tried), None)


def fastest(choices: Sequence[Choice]) -> Choice:
    """Return the choice with the lowest predicted time among those that fit."""
    return min((choice for choice in choices if choice.fits), key=lambda choice: choice.seconds[1])


def nearest(sizes: Sequence[int], size: float) -> int:
    """Return the one of `sizes` nearest to `size` in ratio."""
    return min(sizes, key=lambda other: abs(math.log(other / size)))


def fit(found: dict[int, Pilot], verified: Sequence[Choice] = ()):
    """Fit both laws to the pilots and, at equal weight, to batch sizes that were verified."""
    optima = {size: pilot.optimum() for size, pilot in found.items()}
    sizes = [*optima, *(choice.batch_size for choice in verified if choice.measured is not None)]
    updates = [updates for _, updates in optima.values()]
    updates += [choice.measured[:NUM_SEEDS] for choice in verified if choice.measured is not None]
    rates = scaling.fit_rates(list(optima), [rate for rate, _ in optima.values()])
    return scaling.fit(sizes, np.asarray(updates)), rates


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
