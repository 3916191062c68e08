"""Which batch size reaches the target first on this device: predicted, then verified.

Time to a target is updates to the target times seconds per update. The second is measured for every batch size by the
real training step. The first is measured by pilots at a few batch sizes, each at its best learning rate, and predicted
for all others by the laws of `scaling`. Then the advice is put to the test: the batch size advised, the extremes and
some between are run with fresh seeds, and what was predicted is printed beside what was measured. What is advised in
the end is tuned once more.
"""

import math
import time
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from gdjax import noise
from gdjax.advise._answer import Advice
from gdjax.advise._choices import (
    NUM_SEEDS,
    Choice,
    default_batch_sizes,
    fastest,
    fit,
    least_memory,
    next_to_verify,
    predict,
    settle,
)
from gdjax.advise._pilots import MAX_EPOCHS, NUM_COARSE, PILOT_SHARE, Clock, Progress, pilots_at_some
from gdjax.advise._throughput import throughput
from gdjax.problem import Problem
from gdjax.theory import scaling
from gdjax.tuning import _lanes as lanes
from gdjax.tuning import _optimizers as optimizers
from gdjax.tuning import _pilots as pilots
from gdjax.tuning._lanes import Optimizer
from gdjax.tuning._pilots import Pilot
from gdjax.tuning._targets import Budget, Goal

COMPILING = 5.0  # seconds that a program may take to compile before its runs begin
TUNING = 2**0.5  # factor between the rates that are tried in the end
NO_BETTER = 1.25  # such a rate is not waited for longer than this, in times of the best one's updates


def advise(
    problem: Problem,
    goal: Goal,
    *,
    optimizer: str | Optimizer = "sgd",
    batch_sizes: Sequence[int] | None = None,
    budget: float = 120.0,
    seed: int = 0,
    progress: Progress = lambda stage, fraction: None,
) -> Advice:
    """Predict the time to a target, or the loss after a budget, for every batch size, verify, and advise.

    Args:
        problem: what to train.
        goal: a target to reach, from `targets.parse_target`, or `targets.Budget(num_examples)` to spend.
        optimizer: 'sgd', 'momentum', 'adam', or a function learning_rate -> optax transformation.
        batch_sizes: default the powers of two below N, and N; no larger than the budget of examples.
        budget: seconds that all of it may take; what it does not allow is in `Advice.unknown`.
        seed: of parameters and streams.
        progress: called now and then.

    Raises:
        ValueError: for fewer than 8 examples, to train on or to spend, batch sizes outside 1 ... N or larger than what
            is to be spent, a target that is met at the start, one that no pilot reaches, a loss that diverges at every
            rate, and a budget of seconds too short for two pilots.
    """
    sizes = _check(problem, goal, batch_sizes, budget)
    make, first_rate = optimizers.named(optimizer)
    clock = Clock(time.perf_counter(), budget, MAX_EPOCHS * problem.num_examples, progress)
    pilot_key, fresh_key, noise_key = jax.random.split(jax.random.key(seed), 3)
    runs = lanes.runs(problem, make, metric=goal.metric, on=goal.on, num_lanes=NUM_COARSE)
    search = pilots.search(runs, goal)
    unknown: list[str] = []

    found, known = pilots_at_some(search, sizes, first_rate, goal, pilot_key, clock, unknown, partial(
        throughput, problem, make, sizes, progress=clock.show))  # fmt: skip
    scales = _noise_scales(problem, runs, next(iter(found.values())), noise_key, clock, unknown)
    law, rates = fit(found)
    known = predict(known, law, rates)
    runs_at = _verify(known, search, fresh_key, clock, unknown)

    verified = [choice for choice in known if np.isfinite(choice.measured_seconds)]
    refitted = any(choice.measured is not None and not choice.inside for choice in known)
    if refitted:
        law, rates = fit(found, verified)
    settle(known, law)
    usable = [choice for choice in known if choice.fits]
    pick = fastest(verified or usable)
    tuned = _tuned(pick, runs_at, search, fresh_key, clock, unknown)
    times = np.asarray([choice.expected_seconds for choice in usable])
    examples = np.asarray([choice.expected_updates * choice.batch_size for choice in usable])
    losses = np.asarray([choice.expected_loss for choice in usable])
    on_front = scaling.pareto(times, losses if isinstance(goal, Budget) else examples)
    return Advice(
        goal=goal,
        choices=known,
        pilots=found,
        law=law,
        rates=rates,
        noise_scales=scales,
        refitted=refitted,
        batch_size=pick.batch_size,
        tuned=tuned,
        fewest_examples=usable[int(np.argmin(examples))].batch_size,
        least_memory=least_memory(usable).batch_size,
        pareto=[choice.batch_size for choice, on in zip(usable, on_front, strict=True) if on],
        unknown=unknown,
        seconds=time.perf_counter() - clock.began,
    )


def _check(problem: Problem, goal: Goal, batch_sizes: Sequence[int] | None, budget: float) -> list[int]:
    num_examples = problem.num_examples
    if num_examples < 8:
        raise ValueError(
            f"problem={problem.name!r} has {num_examples} examples: advice on a batch size takes at least 8"
        )
    if not 0 < budget < math.inf:
        raise ValueError(f"budget={budget} must be positive and finite, in seconds")
    most = goal.num_examples if isinstance(goal, Budget) else num_examples
    if most < 8:
        raise ValueError(f"examples={most} must be at least 8: advice on a batch size takes that many")
    sizes = [size for size in default_batch_sizes(num_examples) if size <= most]
    if batch_sizes:
        sizes = sorted(set(batch_sizes))
        if most < sizes[-1] <= num_examples:
            raise ValueError(f"examples={most} are fewer than one batch of {sizes[-1]}: allow more, or smaller batches")
    if not 1 <= sizes[0] <= sizes[-1] <= num_examples or len(sizes) < 2:
        raise ValueError(f"batch_sizes={sizes} must be at least two, between 1 and N={num_examples}")
    return sizes


def _noise_scales(
    problem: Problem, runs: lanes.Runs, pilot: Pilot, key, clock: Clock, unknown: list[str]
) -> list[tuple[int, noise.NoiseScale]]:
    """Measure the noise scale before, half way through and at the end of a run to the target."""
    if clock.late(PILOT_SHARE):
        unknown.append("the noise scale: the budget did not allow it")
        return []
    clock.show("noise scale")
    rate, costs = pilot.optimum()
    goal = pilot.goal
    updates = goal.num_examples / pilot.batch_size if isinstance(goal, Budget) else float(costs.mean())
    every = max(1, round(updates / 2))
    run_key, measure_key = jax.random.split(key)
    sample = min(problem.num_examples, 512)
    measure = jax.jit(partial(noise.measure, problem.loss, num_examples=sample))
    run, scales = runs.start(np.asarray([rate]), num_seeds=1, key=run_key), []
    for end in (0, every, 2 * every):
        while run.num_updates < end:
            only = np.arange(len(run.values)) == 0
            run = runs.advance(run, end - run.num_updates, only, batch_size=pilot.batch_size)
        params = jax.tree.map(lambda leaf: leaf[0], run.states.params)
        scale = measure(params, problem.train, jax.random.clone(measure_key))  # the same sample each time
        scales.append((end, scale._replace(per_leaf=None)))
    return scales


def _verify(known: Sequence[Choice], search, key, clock: Clock, unknown: list[str]) -> dict[int, Pilot]:
    """Run some choices at their predicted rates with fresh seeds, and time their steps anew; fills them in."""
    runs: dict[int, Pilot] = {}
    tried: list[int] = []
    while choice := next_to_verify(known, tried):
        tried.append(choice.batch_size)
        cost = NUM_SEEDS * choice.updates[2] * choice.seconds_per_update
        if clock.late(1.0, cost=2 * cost + COMPILING):
            unknown.append(f"batch size {choice.batch_size}, unverified: its runs did not fit into the budget")
            continue
        clock.show(f"verifying batch size {choice.batch_size}")
        pilot = _fresh(search, choice, key, clock)(np.asarray([choice.learning_rate]))
        if not pilot.found and clock.late(1.0):
            unknown.append(f"batch size {choice.batch_size}, unverified: the budget ended in its runs")
            continue
        runs[choice.batch_size] = pilot
        [costs] = pilot.costs
        choice.measured = costs
        if isinstance(pilot.goal, Budget):
            choice.measured, choice.measured_loss = np.where(np.isfinite(costs), choice.updates[1], np.inf), costs
        if choice.time_again:
            choice.measured_seconds_per_update = choice.time_again()
    return runs


def _tuned(pick: Choice, runs: dict[int, Pilot], search, key, clock: Clock, unknown: list[str]) -> Pilot | None:
    """Return the runs of what is advised at its predicted rate, and at others about it where they were faster."""
    if pick.batch_size not in runs:
        return None
    clock.show(f"tuning batch size {pick.batch_size}")
    found = pilots.widened(_fresh(search, pick, key, clock), runs[pick.batch_size], TUNING, late=NO_BETTER)
    if found.at_edge:
        unknown.append(f"the best learning rate at batch size {pick.batch_size}: it is at the edge of those tried")
    return found


def _fresh(search, choice: Choice, key, clock: Clock):
    """Return `learning_rates -> Pilot` with seeds that no pilot had."""
    most = math.ceil(3 * choice.updates[2]) * choice.batch_size
    fixed = {"batch_size": choice.batch_size, "num_seeds": NUM_SEEDS, "key": key, "max_examples": most}
    return partial(search, **fixed, deadline=clock.until(1.0))
