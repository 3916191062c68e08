"""Which batch size reaches the target first on this device: predicted, then verified.

Time to a target is updates to the target times seconds per update. The second is measured for every batch size by the
real training step. The first is measured by pilots at a few batch sizes, each at its best learning rate, and predicted
for all others by the laws of `scaling`. Then the advice is put to the test: the batch size advised, the extremes and
some between are run with fresh seeds, and what was predicted is printed beside what was measured.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import optax

from gdjax import lanes, noise, pilots, scaling
from gdjax.choices import (
    NUM_FRESH,
    NUM_SEEDS,
    Advice,
    Choice,
    default_batch_sizes,
    fit,
    least_memory,
    nearest,
    next_pilot,
    next_to_verify,
    predict,
    throughput,
)
from gdjax.lanes import Optimizer
from gdjax.pilots import Pilot
from gdjax.problem import Problem, imported
from gdjax.targets import Target

# With the learning rate that the first grid has in its middle.
OPTIMIZERS: dict[str, tuple[Optimizer, float]] = {
    "sgd": (optax.sgd, 0.2),
    "momentum": (partial(optax.sgd, momentum=0.9), 0.03),
    "adam": (optax.adam, 0.003),
}
COARSE, FINE = 10**0.5, 2.0  # factors between neighbouring rates of the first pilot's grid and of the others'
NUM_COARSE, NUM_FINE = 8, 5
FIRST_BATCH_SIZE = 32  # of the first pilot
FIRST_LATE = 1.25  # its rates are so far apart that the second best is seldom of use
MAX_PILOTS = 5
MAX_EPOCHS = 200
FIRST_SHARE, TIMING_SHARE, PILOT_SHARE = 0.4, 0.55, 0.8  # of the budget that may be gone when these stages end
COMPILING = 5.0  # seconds that a program may take to compile before its runs begin

Progress = Callable[[str, float], None]
"""(what is being done, fraction of the budget spent)."""


def advise(
    problem: Problem,
    target: Target,
    *,
    optimizer: str | Optimizer = "sgd",
    batch_sizes: Sequence[int] | None = None,
    budget: float = 120.0,
    seed: int = 0,
    progress: Progress = lambda stage, fraction: None,
) -> Advice:
    """Predict the time to `target` for every batch size, verify, and advise.

    Args:
        problem: what to train.
        target: what to reach, from `targets.parse_target`.
        optimizer: 'sgd', 'momentum', 'adam', or a function learning_rate -> optax transformation.
        batch_sizes: default the powers of two below N, and N.
        budget: seconds that all of it may take; what it does not allow is in `Advice.unknown`.
        seed: of parameters and streams.
        progress: called now and then.

    Raises:
        ValueError: for fewer than 8 examples, batch sizes outside 1 ... N, a target that is met at the start, one that
            no pilot reaches, a loss that diverges at every rate, and a budget too short for two pilots.
    """
    sizes = _check(problem, batch_sizes, budget)
    make, first_rate = _optimizer(optimizer)
    clock = _Clock(time.perf_counter(), budget, MAX_EPOCHS * problem.num_examples, progress)
    pilot_key, fresh_key, noise_key = jax.random.split(jax.random.key(seed), 3)
    runs = lanes.runs(problem, make, metric=target.metric, on=target.on, num_lanes=NUM_SEEDS * NUM_COARSE)
    search = pilots.search(runs, target)
    unknown: list[str] = []

    found, known = _pilots(search, sizes, first_rate, target, pilot_key, clock, unknown, partial(
        throughput, problem, make, sizes, progress=clock.show))  # fmt: skip
    scales = _noise_scales(problem, runs, next(iter(found.values())), noise_key, clock, unknown)
    law, rates = fit(found)
    known = predict(known, law, rates)
    _verify(known, search, fresh_key, clock, unknown)

    verified = [choice for choice in known if np.isfinite(choice.measured_seconds)]
    refitted = any(choice.measured is not None and not choice.inside for choice in known)
    if refitted:
        law, rates = fit(found, verified)
    for choice in known:
        choice.expected_updates = float(law(choice.batch_size)) if choice.measured is None else choice.measured_updates
    usable = [choice for choice in known if choice.fits]
    pick = min(verified or usable, key=lambda choice: choice.expected_seconds)
    times = np.asarray([choice.expected_seconds for choice in usable])
    examples = np.asarray([choice.expected_updates * choice.batch_size for choice in usable])
    return Advice(
        target=target,
        choices=known,
        pilots=found,
        law=law,
        rates=rates,
        noise_scales=scales,
        refitted=refitted,
        batch_size=pick.batch_size,
        fewest_examples=usable[int(np.argmin(examples))].batch_size,
        least_memory=least_memory(usable).batch_size,
        pareto=[choice.batch_size for choice, on in zip(usable, scaling.pareto(times, examples), strict=True) if on],
        unknown=unknown,
        seconds=time.perf_counter() - clock.began,
    )


def load_optimizer(spec: str) -> str | Optimizer:
    """Return a name of OPTIMIZERS as it is, and import what is named as 'package.module:factory'.

    Raises:
        ValueError: where it cannot be imported, or does not make an optax transformation of a learning rate.
    """
    if ":" not in spec:
        return spec
    factory = imported(spec, "optimizer")
    try:
        made = factory(0.1)
    except Exception as error:
        raise ValueError(f"optimizer={spec!r}: calling it with a learning rate raised {error!r}") from error
    if not isinstance(made, optax.GradientTransformation):
        raise ValueError(f"optimizer={spec!r} returned a {type(made).__name__}, not an optax.GradientTransformation")
    return factory


class _Clock(NamedTuple):
    """When the work began, the seconds it and the examples a run may take, and who is told."""

    began: float
    budget: float
    max_examples: int
    progress: Progress

    def until(self, share: float) -> float:
        return self.began + share * self.budget

    def late(self, share: float, *, cost: float = 0.0) -> bool:
        return time.perf_counter() + cost > self.until(share)

    def show(self, stage: str) -> None:
        self.progress(stage, min(1.0, (time.perf_counter() - self.began) / self.budget))


def _pilots(search, sizes, first_rate, target, key, clock: _Clock, unknown: list[str], time_all):
    """Return ({batch size: Pilot}, the choices with their times): the first pilot, the clock, and further pilots."""
    first = nearest(sizes, FIRST_BATCH_SIZE)
    grid = first_rate * COARSE ** (np.arange(NUM_COARSE) - (NUM_COARSE - 1) / 2)
    pilot = _pilot(search, first, grid, key, clock, FIRST_SHARE, late=FIRST_LATE)
    _check_reached(pilot, target, clock)
    found = {first: pilot}
    known = time_all(learning_rate=pilot.optimum()[0], deadline=clock.until(TIMING_SHARE))
    allowed = known
    while len(found) < MAX_PILOTS and (size := next_pilot(found, allowed)) is not None:
        if clock.late(PILOT_SHARE):
            unknown.append(f"a pilot at batch size {size}: the budget did not allow it")
            break
        # Beyond the pilots there is no law of rates yet: below them, in proportion; above, as the square root.
        near = nearest(list(found), size)
        ratio = size / near
        rate = found[near].optimum()[0] * ratio ** (1 if ratio < 1 else 0.5)
        grid = rate * FINE ** (np.arange(NUM_FINE) - (NUM_FINE - 1) / 2)
        pilot = _pilot(search, size, grid, key, clock, PILOT_SHARE)
        if pilot.found:
            found[size] = pilot
        else:  # and none beyond it is tried
            unknown.append(f"updates to the target at batch size {size}: no learning rate reached it in time")
            allowed = [choice for choice in allowed if (choice.batch_size - size) * (first - size) > 0]
    if len(found) < 2:
        allowance = f"budget={clock.budget:g} s" if clock.late(PILOT_SHARE) else f"{MAX_EPOCHS} epochs"
        raise ValueError(
            f"target={target} was reached at batch size {first} and, in {allowance}, at no other, but a prediction "
            "takes two: allow more, or ask for less"
        )
    edges = ", ".join(f"{size}" for size, pilot in found.items() if pilot.at_edge)
    if edges:
        unknown.append(f"the best learning rate at batch size {edges}: it is the first or the last of those tried")
    return found, known


def _pilot(search, size: int, grid, key, clock: _Clock, share: float, *, late: float = pilots.LATE) -> Pilot:
    def watch(updates: int, value: float) -> None:
        clock.show(f"pilot at batch size {size}: {updates} updates, best {value:.3g}")

    watch(0, math.nan)
    run = partial(search, batch_size=size, num_seeds=NUM_SEEDS, key=key)
    limits = {"max_examples": clock.max_examples, "deadline": clock.until(share), "progress": watch}
    return pilots.tune(run, grid, late=late, **limits)


def _check(problem: Problem, batch_sizes: Sequence[int] | None, budget: float) -> list[int]:
    num_examples = problem.num_examples
    if num_examples < 8:
        raise ValueError(
            f"problem={problem.name!r} has {num_examples} examples: advice on a batch size takes at least 8"
        )
    if not 0 < budget < math.inf:
        raise ValueError(f"budget={budget} must be positive and finite, in seconds")
    sizes = sorted(set(batch_sizes)) if batch_sizes else default_batch_sizes(num_examples)
    if not 1 <= sizes[0] <= sizes[-1] <= num_examples or len(sizes) < 2:
        raise ValueError(f"batch_sizes={sizes} must be at least two, between 1 and N={num_examples}")
    return sizes


def _optimizer(optimizer: str | Optimizer) -> tuple[Optimizer, float]:
    """Return (the optimiser's factory, a learning rate to begin with)."""
    if not isinstance(optimizer, str):
        return optimizer, 0.03
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is not one of {', '.join(OPTIMIZERS)}, or module:factory")
    return OPTIMIZERS[optimizer]


def _check_reached(pilot: Pilot, target: Target, clock: _Clock) -> None:
    if pilot.found:
        return
    rates = f"learning rates from {pilot.learning_rates[0]:.2g} to {pilot.learning_rates[-1]:.2g}"
    if pilot.diverged.any(1).all():
        raise ValueError(f"the loss diverges at all {rates}: scale the data, the initial parameters or the loss")
    easier = dataclasses.replace(target, value=_easier(pilot.best_metric, target.relation))
    if clock.late(FIRST_SHARE):
        raise ValueError(
            f"budget={clock.budget:g} s: the share of the first pilot ended before target={target} was reached; the "
            f"nearest was {pilot.best_metric:.4g}: allow more, or try {easier}"
        )
    raise ValueError(
        f"target={target} was not reached with every seed in {MAX_EPOCHS} epochs at {rates}; the nearest was "
        f"{pilot.best_metric:.4g}: try {easier}"
    )


def _easier(value: float, relation: str) -> float:
    """Return `value` in two digits, rounded to where more runs arrive."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 1)
    return float(f"{(math.ceil if relation == '<=' else math.floor)(value / unit) * unit:.2g}")


def _noise_scales(
    problem: Problem, runs: lanes.Runs, pilot: Pilot, key, clock: _Clock, unknown: list[str]
) -> list[tuple[int, noise.NoiseScale]]:
    """Measure the noise scale before, half way through and at the end of a run to the target."""
    if clock.late(PILOT_SHARE):
        unknown.append("the noise scale: the budget did not allow it")
        return []
    clock.show("noise scale")
    rate, updates = pilot.optimum()
    every = max(1, round(float(updates.mean()) / 2))
    run_key, measure_key = jax.random.split(key)
    sample = min(problem.num_examples, 512)
    measure = jax.jit(partial(noise.measure, problem.loss, num_examples=sample))
    run, scales = runs.start(np.asarray([rate]), num_seeds=1, key=run_key), []
    for end in (0, every, 2 * every):
        while run.num_updates < end:
            only = np.arange(len(run.values)) == 0
            run = runs.advance(run, end - run.num_updates, only, batch_size=pilot.batch_size)
        scale = measure(jax.tree.map(lambda leaf: leaf[0], run.states.params), problem.train, measure_key)
        scales.append((end, scale._replace(per_leaf=None)))
    return scales


def _verify(known: Sequence[Choice], search, key, clock: _Clock, unknown: list[str]) -> None:
    """Run some choices at their predicted rates with fresh seeds, and time their steps anew; fills them in."""
    tried: list[int] = []
    while choice := next_to_verify(known, tried):
        tried.append(choice.batch_size)
        cost = NUM_FRESH * choice.updates[2] * choice.seconds_per_update
        if clock.late(1.0, cost=2 * cost + COMPILING):
            unknown.append(f"batch size {choice.batch_size}, unverified: its runs did not fit into the budget")
            continue
        clock.show(f"verifying batch size {choice.batch_size}")
        pilot = search(
            np.asarray([choice.learning_rate]),
            batch_size=choice.batch_size,
            num_seeds=NUM_FRESH,
            key=key,
            max_examples=math.ceil(3 * choice.updates[2]) * choice.batch_size,
            deadline=clock.until(1.0),
        )
        if not pilot.found and clock.late(1.0):
            unknown.append(f"batch size {choice.batch_size}, unverified: the budget ended in its runs")
            continue
        choice.measured = pilot.updates[0]
        if choice.time_again:
            choice.measured_seconds_per_update = choice.time_again()
