"""What a plan is made from: short runs at two batch sizes, the time of an update; and how far a local twin is right."""

import dataclasses
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import tuning
from gdjax._trees import kept
from gdjax.advise._fitted import Curve
from gdjax.advise._plan import Local, Times
from gdjax.advise._tunings import Clock
from gdjax.problem import Problem
from gdjax.theory import twin as local_twin
from gdjax.tuning import Optimizer, Search, Target

PILOTS = 16, 128  # batch sizes of the pilot
PILOT_EPOCHS = 30
PILOT_SHARES = 0.22, 0.35  # of the seconds that may be gone when these end
LAST_SHARE = 0.4  # when the first ends, where it saw no run before
TIMING_SHARE = 0.5  # and when updates are timed
LANCZOS = {"num_steps": 8, "num_draws": 2}
PRODUCT = 6.0  # gradients that a Hessian-vector product takes
NUM_RUNS = 9  # side by side in one program
FEWEST, MOST = 64, 512  # examples of the twin about given parameters


def falling(optimizer: Optimizer) -> Optimizer:
    """Return the optimiser of a row: the learning rate, and the part of it by which it falls at every update, to 0."""

    def make(row):
        shares = optax.scale_by_schedule(lambda count: jnp.maximum(0.0, 1 - row[1] * jnp.asarray(count, row.dtype)))
        return optax.chain(optimizer(row[0]), shares)  # pyright: ignore

    return make


def training(problem: Problem, optimizer: Optimizer, goal: Target):
    """Return the trainer of such rows: one program for a batch size serves pilot and all ways."""
    rows = kept(problem, ("falling", optimizer), lambda: falling(optimizer))
    return tuning.training(problem, rows, goal, num_runs=NUM_RUNS)


def searching(problem: Problem, optimizer: Optimizer, goal: Target, fall: float = 0.0) -> Search:
    """Return the search over rates that all fall by this part at every update."""
    search = tuning.search(training(problem, optimizer, goal), goal, lambda values: values)

    def run(learning_rates, **options):
        rates = np.asarray(learning_rates, float)
        found = search(np.stack([rates, np.full_like(rates, fall)], 1), **options)
        return dataclasses.replace(found, learning_rates=rates)

    return run


def pilots(problem: Problem, search: Search, usual: float, key, clock: Clock):
    """Return the tunings {B: Tuning} at two batch sizes, what they show of the loss, and the loss before any update."""
    found, curves, start = {}, [], math.nan
    for size, share in zip(PILOTS, PILOT_SHARES, strict=True):
        if size > problem.num_examples // 4 or (curves and clock.late(share)):
            continue
        clock.show(f"pilot at batch size {size}")
        middle = usual if not found else next(iter(found.values())).rate * 2
        options = {"batch_size": size, "num_seeds": 1, "key": key, "remember": True}
        limits = {"max_examples": PILOT_EPOCHS * problem.num_examples, "deadline": clock.until(share)}
        tuned: Any = tuning.search_grid(partial(search, **options, late=4.0), tuning.grid(middle), **limits)
        new = _curves(tuned)
        if not (new or found) and clock.late(share):  # its programs took all of it to compile: now they are there
            limits["deadline"] = clock.until(LAST_SHARE)
            tuned = tuning.search_grid(partial(search, **options, late=4.0), tuning.grid(middle), **limits)
            new, share = _curves(tuned), LAST_SHARE
        start = float(tuned.history.values[0, 0, 0])
        if not new and found:
            continue
        if not new and clock.late(share):
            raise ValueError(f"budget={clock.seconds:g} s: the pilot's share ended before it saw a run: allow more")
        if not new:
            raise ValueError(
                f"the pilot diverges at all learning rates from {tuned.learning_rates[0]:.2g} to "
                f"{tuned.learning_rates[-1]:.2g}: scale the data, the initial parameters or the loss"
            )
        found[size], curves = tuned, [*curves, *new]
    return found, curves, start


def _curves(tuned: Any) -> list[Curve]:
    """Return the runs that fell, each up to where it arrived or was given up."""
    curves, history = [], tuned.history
    start = float(history.values[0, 0, 0])
    for rate, (values,) in zip(tuned.learning_rates, history.values, strict=True):
        moves = np.flatnonzero(values[1:] != values[:-1])
        end = int(moves[-1]) + 2 if len(moves) else 0
        seen = values[1:end]
        if len(seen) >= 2 and np.isfinite(seen).all() and seen[-1] < start and seen.max() < 2 * start:
            curves.append(Curve(float(rate), tuned.batch_size, history.updates[1:end], seen))
    return curves


def highest_rate(found: dict[int, Any], size: int) -> float:
    """Return the best rate of the pilot at a batch size: between two of them in logarithms, below in proportion."""
    sizes = sorted(found)
    rates = [found[size].rate for size in sizes]
    return float(np.exp(np.interp(np.log(size), np.log(sizes), np.log(rates)))) * min(1.0, size / sizes[0])


def batch_sizes(problem: Problem, first: int) -> list[int]:
    """Return the batch sizes that a plan may use: powers of two, no phase longer than the data."""
    return [2**i for i in range(20) if first // 4 <= 2**i <= min(2048, problem.num_examples)]


def update_times(
    problem: Problem, optimizer: Optimizer, sizes: Sequence[int], rate: float, clock: Clock
) -> tuple[Times, float]:
    """Return the time of an update at every second batch size, in turn, and the median seconds of a compilation."""
    chosen = [size for size in sizes if int(math.log2(size)) % 2 == int(math.log2(sizes[0])) % 2]
    speeds = tuning.speeds(
        problem, optimizer, chosen, learning_rate=rate, deadline=clock.until(TIMING_SHARE), progress=clock.show
    )
    fit = [speed for speed in speeds if speed.fits]
    compiling = float(np.nanmedian([speed.compile_seconds for speed in fit]))
    return Times.of([speed.batch_size for speed in fit], [speed.seconds_per_update for speed in fit]), compiling


def local_twins(
    problem: Problem, make: Optimizer, goal: Target, found, times: Times, key, clock: Clock
) -> tuple[list[Local], list[str]]:
    """Return for how many updates the twins about parameters of the pilot, at its best rate, held; and what is unknown.

    Their loss and curvature are the means of as many examples as the time that is left allows.
    """
    if getattr(make, "name", "") != "sgd":
        return [], ["the twin about given parameters: for sgd only"]
    products = 2 * LANCZOS["num_steps"] * (1 + LANCZOS["num_draws"])
    left = clock.until(1.0) - time.perf_counter()
    num_examples = int(min(MOST, left / 2 / (PRODUCT * products * times(PILOTS[-1]) / PILOTS[-1])))
    if num_examples < FEWEST:
        return [], ["for how long the twin about given parameters holds: the budget does not allow it"]
    clock.show(f"the twin about given parameters, by {num_examples} examples")
    size, tuned = next(iter(found.items()))
    count = float(tuned.losses.min()) if tuned.found else float(tuned.history.updates[-1])
    trainer = training(problem, make, goal)
    run = trainer.start(np.asarray([[tuned.rate, 0.0]]), num_seeds=1, key=jax.random.clone(key))
    only, locals_ = np.arange(len(run.seeds)) == 0, []
    options = LANCZOS | {"max_examples": num_examples}
    build = kept(problem, ("local twin", num_examples), lambda: jax.jit(partial(local_twin, problem, **options)))
    for checkpoint in (0, round(count / 2)):
        if checkpoint > run.num_updates:
            run = trainer.advance(run, checkpoint - run.num_updates, only, batch_size=size)
        begun = run.num_updates
        twin = build(jax.tree.map(lambda leaf: leaf[0], run.states.params), key=jax.random.clone(key))
        updates, losses = [], []
        while run.num_updates - begun < count / 2 and len(updates) < 12 and not (updates and clock.late(1.0)):
            step = max(1, round(0.5 * (run.num_updates - begun)))
            run = trainer.advance(run, step, only, batch_size=size)
            updates.append(run.num_updates - begun)
            losses.append(float(np.asarray(run.values)[0]))
        length = updates[-1]
        measured = np.full(length, np.nan)
        measured[np.asarray(updates) - 1] = losses
        rates, sizes = jnp.full(length, tuned.rate), jnp.full(length, float(size))
        holds = twin.horizon(rates, sizes, jnp.asarray(measured))
        locals_.append(Local(begun, holds, length, float(twin.quadratic.eigenvalues.max())))
        if clock.late(0.97):
            break
    return locals_, []
