"""What a comparison will do, in a time that is known before anything long begins."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gdjax import tuning
from gdjax.problem import Problem

NUM_EPOCHS = 64
# Learning rates and seeds, the best first; what is left of the time goes into epochs.
DESIGNS = ((8, 3), (5, 3), (5, 2), (4, 1), (3, 1))
ENOUGH_EPOCHS = 8  # fewer are worth a poorer design
MARGIN = 1.5  # rates beyond the grid, and evaluations
COMPILING = 8.0  # seconds for each batch size
EVALUATION = 1 / 3  # of the time of training on an example
TRAINING = 0.25  # of the budget, that runs may take though compilation leaves them less: it takes what it takes
LONGEST_MEASURED = 0.25  # of the budget, that timing may take


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a comparison will do.

    Attributes:
        optimizer: learning_rate, or (learning_rate, num_updates), -> optax transformation.
        average: half-life in examples of the average that is evaluated beside the last parameters, or None.
        speeds: of the batch sizes that are run, as `tuning.speeds` measured them.
        skipped: {batch size: why it is not run}.
        microbatches: {batch size: examples that its gradient holds at a time, None for all}.
        num_examples: E, that every batch size sees, less a last incomplete batch.
        num_epochs: E / N.
        num_seeds: S, runs of each rate.
        learning_rates: the first grid [R].
        learning_rate: the one rate for all batch sizes that was asked for, or None.
        seconds: the estimate for all of it.
        default_seconds: the same for NUM_EPOCHS epochs of the best design.
        shortened: whether less is done than by default, to fit the budget.
    """

    optimizer: tuning.Optimizer
    average: float | None
    speeds: tuple[tuning.Speed, ...]
    skipped: dict[int, str]
    microbatches: dict[int, int | None]
    num_examples: int
    num_epochs: float
    num_seeds: int
    learning_rates: tuple[float, ...]
    learning_rate: float | None
    seconds: float
    default_seconds: float
    shortened: bool

    def fields(self) -> dict[str, Any]:
        """Return what a JSON file can hold of the plan: all but the optimiser."""
        speeds = [speed._replace(time_again=None)._asdict() for speed in self.speeds]
        named = {
            name: {f"{size}": x for size, x in getattr(self, name).items()} for name in ("skipped", "microbatches")
        }
        rest = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return rest | named | {"speeds": speeds, "optimizer": None}

    @classmethod
    def of(cls, fields: Mapping[str, Any], optimizer: tuning.Optimizer) -> "Plan":
        """Return the plan of which a JSON file gave `fields` back."""
        speeds = tuple(tuning.Speed(**speed) for speed in fields["speeds"])
        named = {name: {int(size): x for size, x in fields[name].items()} for name in ("skipped", "microbatches")}
        rates = tuple(fields["learning_rates"])
        return cls(**{**fields, **named, "speeds": speeds, "learning_rates": rates, "optimizer": optimizer})

    def __str__(self) -> str:
        """Say in one sentence what will be done and how long that takes."""
        rates = "one learning rate" if self.learning_rate is not None else f"{len(self.learning_rates)} learning rates"
        seeds = f"{self.num_seeds} seed" + "s" * (self.num_seeds > 1)
        epochs = f"{self.num_epochs:.3g} epoch" + "s" * (self.num_epochs != 1)
        what = f"{epochs} of {rates} with {seeds}, about {duration(self.seconds)}"
        if self.shortened:
            what = f"{NUM_EPOCHS} epochs would take {duration(self.default_seconds)}; this fits: {what}"
        return what + "".join(f"; B = {size} is left out: {why}" for size, why in self.skipped.items())


def plan(
    problem: Problem,
    sizes: Sequence[int] | None = None,
    *,
    optimizer: str | tuning.Optimizer = "sgd",
    learning_rate: float | None = None,
    num_epochs: int | None = None,
    num_seeds: int | None = None,
    budget: float = 60.0,
    memory: float | None = None,
    average: float | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Plan:
    """Time a few updates at every batch size, and choose epochs, seeds and rates that fit the budget.

    Args:
        problem: what is to be trained.
        sizes: batch sizes; default (1, 32, N).
        optimizer: as `tuning.tune`: by name, with a schedule by `tuning.named`, or a factory.
        learning_rate: one rate for all batch sizes, instead of tuning.
        num_epochs: passes over the data that every batch size sees, whatever that takes; default to fit, at most 64.
        num_seeds: initial parameters and streams drawn; default to fit, at most 3.
        budget: seconds that all of it should take.
        memory: bytes that one gradient may need; default a quarter of what is free.
        average: half-life, in examples, of an average of the parameters along each run, evaluated beside the last
            ones; infinity is their plain mean.
        progress: called with what is being done.

    Raises:
        ValueError: before anything is compiled, for a batch size outside 1 ... N or given twice, numbers below 1, and a
            memory limit that not even one example fits into.
    """
    sizes = default_batch_sizes(problem.num_examples) if sizes is None else tuple(sizes)
    _check(sizes, problem, learning_rate, num_epochs, num_seeds, budget, memory, average)
    make, usual = tuning.named(optimizer)
    microbatches = tuning.microbatch_sizes(problem, sizes, memory=memory)
    rates = default_learning_rates(usual)
    speeds = tuning.speeds(
        problem,
        make,
        sorted(sizes),
        learning_rate=learning_rate or rates[0],
        gradient=tuning.estimator(problem, microbatches),
        microbatch_size=microbatches.get,
        progress=progress,
    )
    by_size = {speed.batch_size: speed for speed in speeds}
    usable = [by_size[size] for size in sizes if by_size[size].fits]
    skipped = {size: "its update does not fit into memory" for size in sizes if not by_size[size].fits}
    evaluated = len(jax.tree.leaves(tuning.evaluation_examples(problem, "train"))[0])
    evaluated += 0 if problem.test is None else len(jax.tree.leaves(tuning.evaluation_examples(problem, "test"))[0])

    def seconds(epochs: float, num_rates: int, seeds: int, speeds: Sequence[tuning.Speed]) -> float:
        each = max(speeds, key=lambda speed: speed.batch_size)
        look = EVALUATION * evaluated * each.seconds_per_update / each.batch_size
        runs = (MARGIN * num_rates if learning_rate is None else 1) * seeds
        per_epoch = [problem.num_examples / speed.batch_size * speed.seconds_per_update + look for speed in speeds]
        return COMPILING * len(speeds) + runs * epochs * sum(per_epoch)

    fits = _fitting(usable, seconds, budget, num_epochs, num_seeds, problem.num_examples)
    epochs, num_rates, seeds, kept_speeds = fits
    skipped |= {
        speed.batch_size: f"one update takes {duration(speed.seconds_per_update)}, and less than an epoch fits"
        for speed in usable
        if speed not in kept_speeds
    }
    middle = (len(rates) - num_rates) // 2
    full = seconds(NUM_EPOCHS, *DESIGNS[0], usable)
    return Plan(
        optimizer=make,
        average=average,
        speeds=tuple(kept_speeds),
        skipped=skipped,
        microbatches=microbatches,
        num_examples=round(epochs * problem.num_examples),
        num_epochs=epochs,
        num_seeds=seeds,
        learning_rates=rates[middle : middle + num_rates] if learning_rate is None else (learning_rate,),
        learning_rate=learning_rate,
        seconds=seconds(epochs, num_rates, seeds, kept_speeds),
        default_seconds=full,
        shortened=num_epochs is None and epochs < NUM_EPOCHS,
    )


def _fitting(usable, seconds, budget: float, num_epochs: int | None, num_seeds: int | None, num_examples: int):
    """Return (epochs, rates, seeds, speeds) that fit the budget: the best design that leaves ENOUGH_EPOCHS, or most."""

    def epochs_in(num_rates: int, seeds: int, speeds) -> float:
        fixed = seconds(0.0, num_rates, seeds, speeds)
        return max(budget - fixed, TRAINING * budget) / (seconds(1.0, num_rates, seeds, speeds) - fixed)

    designs = [(rates, num_seeds or seeds) for rates, seeds in DESIGNS]
    if num_epochs is not None:
        fitting = [design for design in designs if epochs_in(*design, usable) >= num_epochs]
        return num_epochs, *(fitting or designs[-1:])[0], usable
    for enough in (ENOUGH_EPOCHS, 2, 1):
        for design in designs:
            if (epochs := epochs_in(*design, usable)) >= enough:
                return min(NUM_EPOCHS, int(epochs)), *design, usable
    # Not one epoch fits: a batch of all examples has no update, and the others see a part of the data.
    smaller = [speed for speed in usable if speed.batch_size < num_examples] or usable
    least = max(speed.batch_size for speed in smaller) / num_examples
    if smaller == usable:
        least = max(least, 1.0 if usable[0].batch_size == num_examples else least)
    return max(least, min(1.0, epochs_in(*designs[-1], smaller))), *designs[-1], smaller


def default_batch_sizes(num_examples: int) -> tuple[int, ...]:
    """Return (1, 32, N), without repeats where N <= 32."""
    return tuple(dict.fromkeys((1, min(32, num_examples), num_examples)))


def default_learning_rates(usual: float) -> tuple[float, ...]:
    """Return eight rates, half a decade apart, about an optimiser's usual one; from 0.003 to 10 for SGD."""
    middle = round(2 * math.log10(usual) + 0.5) / 2 - 0.25
    return tuple(np.logspace(middle - 1.75, middle + 1.75, DESIGNS[0][0]).tolist())


def duration(seconds: float) -> str:
    """Return a time in words: '12 s', '3.4 min', '2.1 h'."""
    if not math.isfinite(seconds):
        return "unknown time"
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _check(sizes, problem: Problem, learning_rate, num_epochs, num_seeds, budget: float, memory, average) -> None:
    num_examples = problem.num_examples
    for size in sizes:
        if not 1 <= size <= num_examples:
            raise ValueError(f"batch_size={size} must be between 1 and N={num_examples}, the training examples")
    if len(set(sizes)) < len(sizes) or not sizes:
        raise ValueError(f"batch_sizes={tuple(sizes)} must be different, and at least one")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate={learning_rate} must be positive and finite")
    sizes_of_params = (leaf.size for leaf in jax.tree.leaves(jax.eval_shape(problem.init, jax.random.key(0))))
    held = max(1, sum(sizes_of_params)) * (1 if learning_rate else DESIGNS[-1][0])  # parameters, of all runs at once
    for name, value, entries in (("num_epochs", num_epochs, num_examples), ("num_seeds", num_seeds, held)):
        limit = (2**31 - 1) // entries  # examples seen, and entries of an array, are counted in int32
        if value is not None and not 1 <= value <= limit:
            raise ValueError(f"{name}={value} must be at least 1 and at most {limit}")
    if average is not None and not average > 0:
        raise ValueError(f"average={average}, a half-life in examples, must be positive")
    for name, value in (("budget", budget), ("memory", memory)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be positive and finite")
