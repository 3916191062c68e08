"""Which batch size reaches the target first on this device: predicted, then verified.

Time to a target is updates to the target times seconds per update. The second is measured for every batch size by the
real training step. The first is measured by tuning at a few batch sizes and predicted for all others by the laws of
`theory.scaling`. Then the advice is put to the test: the batch size advised, the extremes and some between are run with
fresh seeds, and what was predicted is printed beside what was measured. In the end batch sizes that may be the fastest
are tuned once more, and what is advised is confirmed with ten seeds, or as many as it takes to tell it from the
others, see `_race`.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from gdjax import noise, tuning
from gdjax._trees import kept
from gdjax.advise._answer import Advice
from gdjax.advise._choices import (
    Choice,
    Verified,
    default_batch_sizes,
    fastest,
    fit,
    least_memory,
    next_to_verify,
    predict,
    settled,
)
from gdjax.advise._goals import NUM_SEEDS, Question, Reaching, question
from gdjax.advise._race import NO_BETTER, TUNING, Race, race
from gdjax.advise._tunings import MAX_EPOCHS, TUNING_SHARE, Clock, Progress, tune_some
from gdjax.problem import Problem
from gdjax.theory import scaling
from gdjax.tuning import Goal, Optimizer, Search, Tuning

COMPILING = 5.0  # seconds that a program may take to compile before its runs begin
NUM_RUNS = 5  # that every program is compiled for: the rates of the first grid, and those that verify, fit in
NUM_MEASURED = 512  # examples that a noise scale is measured on, at most


def batch_size(
    problem: Problem,
    goal: str | Goal,
    *,
    optimizer: str | Optimizer = "sgd",
    sizes: Sequence[int] | None = None,
    seconds: float = 120.0,
    memory: float | None = None,
    average: float | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, fraction: None,
) -> Advice:
    """Predict the time to a target, or the loss after a budget, for every batch size, verify, and advise.

    Args:
        problem: what to train.
        goal: a target to reach, 'loss<=0.05' or 'accuracy>=0.95' or a `tuning.Target`, or `tuning.Budget(num_examples)`
            to spend.
        optimizer: as `tuning.tune`, by name ('adamw', 'muon', ...), with a schedule by `tuning.named`, or a factory.
        sizes: the batch sizes to choose from; default the powers of two below N, and N; no larger than the examples
            that may be spent.
        seconds: that all of it may take; what they do not allow is in `Advice.unknown`.
        memory: bytes that one gradient may need, for larger ones are microbatched; default a quarter of what is free.
        average: half-life, in examples, of an average of the parameters along each run, which is then what must reach
            the target, in place of the last parameters.
        seed: of parameters and streams.
        progress: called now and then with what is being done and the fraction of the seconds that are spent.

    Raises:
        ValueError: for fewer than 8 examples, to train on or to spend, batch sizes outside 1 ... N or larger than what
            is to be spent, a target that cannot be read, is met at the start, or is reached by no tuning, a loss that
            diverges at every rate, and too few seconds for tuning at two batch sizes.
    """
    if isinstance(goal, str):
        goal = tuning.parse_target(goal, problem)
    asked = question(goal)
    sizes = _check(problem, asked, sizes, seconds)
    make, first_rate = tuning.named(optimizer)
    clock = Clock(time.perf_counter(), seconds, MAX_EPOCHS * problem.num_examples, progress)
    keys = _Keys(*jax.random.split(jax.random.key(seed), 3))
    microbatches = tuning.microbatch_sizes(problem, sizes, memory=memory)
    # One gradient a problem and division of batches, so that the programs made of it are found again.
    gradient = kept(problem, ("estimator", *microbatches.items()), lambda: tuning.estimator(problem, microbatches))
    search = tuning.searching(problem, make, goal, num_runs=NUM_RUNS, gradient=gradient, average=average)
    time_all = partial(
        tuning.speeds,
        problem,
        make,
        sizes,
        gradient=gradient,
        microbatch_size=microbatches.get,
        progress=clock.show,
    )
    found, speeds, unknown = tune_some(asked, search, sizes, first_rate, keys.tuning, clock, time_all)
    first = next(iter(found.values()))
    scales, unmeasured = _noise_scales(problem, make, gradient, asked, first, keys.noise, clock)
    law, rates = fit(asked, found)
    predicted = predict(asked, speeds, law, rates)
    verified, runs, unverified = _verify(predicted, law, search, keys.fresh, clock)
    known = settled(predicted, verified, law)
    refitted = any(choice.verified is not None and not choice.inside for choice in known)
    if refitted:
        law, rates = fit(asked, found, verified)
        known = settled(known, verified, law)
    usable = [choice for choice in known if choice.fits]
    pick = fastest([choice for choice in usable if np.isfinite(choice.measured_seconds)] or usable)
    if isinstance(asked, Reaching):
        won = _race(known, pick, runs, search, keys.fresh, clock)
        tuned, untuned = (won.tunings[won.batch_size], won.unknown) if won else (None, ())
    else:
        won, (tuned, untuned) = None, _tuned(pick, runs, search, keys.fresh, clock)
    times = np.asarray([choice.expected_seconds for choice in usable])
    examples = np.asarray([choice.expected_updates * choice.batch_size for choice in usable])
    on_front = scaling.pareto(times, np.asarray([asked.price(choice) for choice in usable]))
    return Advice(
        question=asked,
        choices=tuple(known),
        tunings=found,
        law=law,
        rates=rates,
        noise_scales=tuple(scales),
        refitted=refitted,
        batch_size=won.batch_size if won else pick.batch_size,
        tuned=tuned,
        race=won,
        fewest_examples=usable[int(np.argmin(examples))].batch_size,
        least_memory=least_memory(usable).batch_size,
        pareto=tuple(choice.batch_size for choice, on in zip(usable, on_front, strict=True) if on),
        unknown=(*unknown, *unmeasured, *unverified, *untuned),
        seconds=time.perf_counter() - clock.began,
    )


class _Keys(NamedTuple):
    """One for each stage that draws."""

    tuning: jax.Array
    fresh: jax.Array
    noise: jax.Array


def _check(problem: Problem, asked: Question, sizes: Sequence[int] | None, seconds: float) -> list[int]:
    num_examples = problem.num_examples
    if num_examples < 8:
        raise ValueError(
            f"problem={problem.name!r} has {num_examples} examples: advice on a batch size takes at least 8"
        )
    if not 0 < seconds < math.inf:
        raise ValueError(f"budget={seconds} seconds must be positive and finite")
    most = asked.largest(num_examples)
    if most < 8:
        raise ValueError(f"examples={most} must be at least 8: advice on a batch size takes that many")
    chosen = [size for size in default_batch_sizes(num_examples) if size <= most]
    if sizes:
        chosen = sorted(set(sizes))
        if most < chosen[-1] <= num_examples:
            raise ValueError(
                f"examples={most} are fewer than one batch of {chosen[-1]}: allow more, or smaller batches"
            )
    if not 1 <= chosen[0] <= chosen[-1] <= num_examples or len(chosen) < 2:
        raise ValueError(f"batch_sizes={chosen} must be at least two, between 1 and N={num_examples}")
    return chosen


def _noise_scales(
    problem: Problem, optimizer: Optimizer, gradient, asked: Question, tuned: Tuning, key, clock: Clock
) -> tuple[list[tuple[int, noise.NoiseScale]], list[str]]:
    """Measure the noise scale before, half way through and at the end of a run; say what could not be measured."""
    if clock.late(TUNING_SHARE):
        return [], ["the noise scale: the budget did not allow it"]
    clock.show("noise scale")
    rate, costs = tuned.optimum()
    every = max(1, round(asked.about(float(costs.mean()), tuned.batch_size) / 2))
    run_key, measure_key = jax.random.split(key)
    sample = min(problem.num_examples, NUM_MEASURED)

    def make():
        return jax.jit(partial(noise.measure, problem.loss, num_examples=sample, weight=problem.weight))

    measure = kept(problem, ("noise scale", sample), make)
    trainer = tuning.training(problem, optimizer, asked.goal, num_runs=NUM_RUNS, gradient=gradient)
    run, scales = trainer.start(np.asarray([rate]), num_seeds=1, key=run_key, horizon=2 * every), []
    only = np.arange(len(run.seeds)) == 0
    for end in (0, every, 2 * every):
        if end > run.num_updates:
            run = trainer.advance(run, end - run.num_updates, only, batch_size=tuned.batch_size)
        params = jax.tree.map(lambda leaf: leaf[0], run.states.params)
        scale = measure(params, problem.train, jax.random.clone(measure_key))  # the same sample each time
        scales.append((end, scale._replace(per_leaf=None)))
    return scales, []


def _verify(
    predicted: Sequence[Choice], law, search: Search, key, clock: Clock
) -> tuple[dict[int, Verified], dict[int, Tuning], list[str]]:
    """Run some choices at their predicted rates with fresh seeds, and time their steps anew.

    Returns:
        What that showed and the runs themselves, by batch size, and what could not be verified.
    """
    verified: dict[int, Verified] = {}
    runs: dict[int, Tuning] = {}
    tried: list[int] = []
    unknown: list[str] = []
    while choice := next_to_verify(settled(predicted, verified, law), tried):
        tried.append(choice.batch_size)
        cost = NUM_SEEDS * choice.updates[2] * choice.speed.seconds_per_update
        if clock.late(1.0, cost=2 * cost + COMPILING):
            unknown.append(f"batch size {choice.batch_size}, unverified: its runs did not fit into the budget")
            continue
        clock.show(f"verifying batch size {choice.batch_size}")
        found = _fresh(search, choice, key, clock)(np.asarray([choice.learning_rate]))
        if not found.found and clock.late(1.0):
            unknown.append(f"batch size {choice.batch_size}, unverified: the budget ended in its runs")
            continue
        runs[choice.batch_size] = found
        again = choice.speed.time_again
        seconds = again() if again else choice.speed.seconds_per_update
        verified[choice.batch_size] = Verified(found.costs[0], seconds)
    return verified, runs, unknown


def _tuned(pick: Choice, runs: dict[int, Tuning], search: Search, key, clock: Clock) -> tuple[Tuning | None, list[str]]:
    """Return the runs of what is advised at its predicted rate, and at others about it where they were faster."""
    if pick.batch_size not in runs:
        return None, []
    clock.show(f"tuning batch size {pick.batch_size}")
    found = tuning.widen(_fresh(search, pick, key, clock), runs[pick.batch_size], TUNING, late=NO_BETTER)
    if not found.at_edge:
        return found, []
    return found, [f"the best learning rate at batch size {pick.batch_size}: it is at the edge of those tried"]


def _race(known: Sequence[Choice], pick: Choice, runs, search: Search, key, clock: Clock) -> Race | None:
    def run(choice: Choice, rates: np.ndarray, *, draw: int = 0, **limits) -> Tuning:
        return _fresh(search, choice, jax.random.fold_in(key, draw) if draw else key, clock)(rates, **limits)

    return race(known, pick, runs, run, lambda seconds: clock.late(1.0, cost=seconds), clock.show)


def _fresh(search: Search, choice: Choice, key, clock: Clock) -> Search:
    """Return `learning_rates -> Tuning` with seeds that no tuning had."""
    most = math.ceil(3 * choice.updates[2]) * choice.batch_size
    fixed = {"batch_size": choice.batch_size, "num_seeds": NUM_SEEDS, "key": key, "max_examples": most}
    return partial(search, **fixed, deadline=clock.until(1.0))
