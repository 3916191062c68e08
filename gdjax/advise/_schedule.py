"""The batch as a schedule: which of constant, decay, ramp and both reaches a target first, predicted and then run.

Short runs at two batch sizes are fitted by a quadratic (`_fitted`); by it the best way of each kind is found (`_ways`),
given the measured time of an update; then all of them are tuned alike and run with fresh seeds.
"""

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

from gdjax import batching, tuning
from gdjax._trees import kept
from gdjax.advise._fitted import Curve, fitted
from gdjax.advise._goals import NUM_SEEDS
from gdjax.advise._plan import Local, Plan, Run, Times
from gdjax.advise._tunings import Clock, Progress
from gdjax.advise._ways import Bounds, Way, plan
from gdjax.problem import Problem
from gdjax.theory import twin as local_twin
from gdjax.tuning import Optimizer, Search, Target

PILOTS = 16, 128  # batch sizes of the pilot
PILOT_EPOCHS = 30
PILOT_SHARE, VERIFY_SHARE = 0.35, 0.95  # of the seconds that may be gone when these stages end
STRETCHES = 1.0, 1.5, 2.25, 3.4  # times the planned updates that a way is tried over
WORTH, NUM_TRIED = 2.0, 2  # ways of a kind that are tried: not slower by more than this, and so many
TUNING_SHARE = 0.65  # of the time that a kind has
TUNING_SEEDS = 2  # at the edge of what converges one seed is luck
FACTOR = 1.6  # between the rates that a way is tuned over
NUM_RUNS = 6
LANCZOS = {"num_steps": 8, "num_draws": 2, "max_examples": 512}


def schedule(
    problem: Problem,
    target: str | Target,
    *,
    optimizer: str | Optimizer = "sgd",
    num_phases: int = 3,
    seconds: float = 120.0,
    seed: int = 0,
    progress: Progress = lambda stage, fraction: None,
) -> Plan:
    """Predict and measure the time to a target with constant batch and rate, with decay, with a ramp, and with both.

    Args:
        problem: what to train.
        target: to reach, as 'loss<=0.45': of the training loss, which the twin is of.
        optimizer: a name from `tuning.OPTIMIZERS`, or a function learning_rate -> optax transformation.
        num_phases: that a ramp may have, 2 or 3.
        seconds: that all of it may take; what they do not allow is in `Plan.unknown`.
        seed: of parameters and streams.
        progress: called now and then with what is being done and the fraction of the seconds that are spent.

    Raises:
        ValueError: for another number of phases, fewer than 64 examples, a target that is not of the training loss or
            is below what the plan can reach (saying what it can), and a pilot that diverges at every rate.
    """
    goal = tuning.parse_target(target, problem) if isinstance(target, str) else target
    if (goal.metric, goal.on) != ("loss", "train"):
        raise ValueError(f"target={goal} must be of the training loss: the twin predicts no other metric")
    if num_phases not in (2, 3):
        raise ValueError(f"phases={num_phases} must be 2 or 3: more gain next to nothing")
    if problem.num_examples < 64:
        raise ValueError(f"problem={problem.name!r} has {problem.num_examples} examples: a schedule takes at least 64")
    if not 0 < seconds < math.inf:
        raise ValueError(f"budget={seconds} seconds must be positive and finite")
    make, usual = tuning.named(optimizer)
    clock = Clock(time.perf_counter(), seconds, PILOT_EPOCHS * problem.num_examples, progress)
    pilot_key, twin_key, fresh_key = jax.random.split(jax.random.key(seed), 3)
    plain = tuning.searching(problem, make, goal, num_runs=NUM_RUNS)
    found, curves, start = _pilots(problem, plain, goal, usual, pilot_key, clock)
    sizes = _sizes(problem, min(found))
    rate = next(iter(found.values())).rate
    times = _times(problem, make, sizes, rate, clock)
    twin = fitted(curves, start=start)
    longest = max(int(curve.updates[-1]) for curve in curves)
    bounds = Bounds(sizes, partial(_highest, found), times, max(1000, 4 * longest))
    clock.show("planning")
    planned = plan(twin, goal.value, bounds, num_phases=num_phases)
    locals_, unknown = _locals(problem, make, goal, found, twin_key, clock)
    runs: dict[str, Run] = {}
    by_time = sorted(planned.items(), key=lambda item: item[1][0].seconds[1])
    for i, (kind, some) in enumerate(by_time):
        begun = time.perf_counter()
        if clock.late(VERIFY_SHARE):
            unknown.append(f"{kind}, run: the budget ended before")
            continue
        ends = begun + (clock.until(1.0) - begun) / (len(by_time) - i)  # an equal share of what is left
        tried = [way for way in some if way.seconds[1] < WORTH * some[0].seconds[1]][:NUM_TRIED]
        run = verified(problem, make, goal, tried, times, fresh_key, clock, ends)
        if run is None:
            unknown.append(f"{kind}, run: it did not arrive with every seed in the budget")
        else:
            runs[kind] = run
    return Plan(
        goal=goal,
        ways={kind: _origin(some, runs.get(kind)) for kind, some in planned.items()},
        runs=runs,
        twin=twin,
        curves=tuple(curves),
        times=times,
        locals=tuple(locals_),
        unknown=tuple(unknown),
        seconds=time.perf_counter() - clock.began,
    )


def _origin(planned: Sequence[Way], run: Run | None) -> Way:
    """Return the plan that a run was made from; the fastest one where there is no run."""
    first = run and run.way.schedule[0][1]
    return next((way for way in planned if way.schedule[0][1] == first), planned[0])


def decaying(optimizer: Any) -> Optimizer:
    """Return the optimiser whose rate falls to 0 in proportion to the updates left: (rate, num_updates) -> optax."""
    if hasattr(optimizer, "schedule"):  # one by name
        return dataclasses.replace(optimizer, schedule="linear")

    def make(rate, num_updates):
        return optax.chain(optimizer(rate), optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, num_updates)))

    return make


def verified(
    problem: Problem,
    optimizer: Optimizer,
    goal: Target,
    ways: Sequence[Way],
    times: Times,
    key: jax.Array,
    clock: Clock,
    ends: float,
) -> Run | None:
    """Tune way, rate and length with some seeds, and run the best with others; None where that does not arrive in time.

    Args:
        ways: of one kind, the fastest first.
        ends: a time of `time.perf_counter`; most of it is for the tuning.
    """
    tune_key, run_key = jax.random.split(jax.random.clone(key))
    make = kept(problem, ("decaying", optimizer), lambda: decaying(optimizer)) if ways[0].decays else optimizer
    search = tuning.search(tuning.training(problem, make, goal, num_runs=NUM_RUNS), goal, lambda values: values)
    late = time.perf_counter() + TUNING_SHARE * (ends - time.perf_counter())
    best: tuple[float, Way] = math.inf, ways[0]
    for way in ways:
        best = min(best, _tuned(search, way, times, best[0], tune_key, clock, late), key=lambda found: found[0])
    if math.isinf(best[0]):
        return None
    for factor in (1.0, 1.25, 1.6):  # what some seeds reached in time may be too short for others
        tried = best[1].stretched(factor)
        clock.show(f"running {tried.kind} with fresh seeds")
        found = _over(search, tried, NUM_SEEDS, run_key, ends)(np.asarray([tried.learning_rate]))
        if found.found:
            updates = found.costs[0]
            return Run(tried, updates, np.asarray([times.until(tried.schedule, count) for count in updates]))
    return None


def _tuned(search: Search, way: Way, times: Times, least: float, key, clock: Clock, late: float) -> tuple[float, Way]:
    """Return (seconds to the target, the way with the rate and length of these); infinity where it does not arrive.

    Longer ones are tried as long as they are faster, and as they may be faster than `least` seconds.
    """
    best, rates = (math.inf, way), way.learning_rate * FACTOR ** np.arange(-1.0, 2.0)
    for factor in STRETCHES[: 1 if way.kind == "constant" else None]:  # the length of a constant is no choice
        tried = way.stretched(factor)
        if time.perf_counter() > late or times.until(tried.schedule, 0.5 * tried.num_updates) > least:
            break
        clock.show(f"tuning {way.kind}, {tried.num_updates} updates from batch size {tried.schedule[0][1]}")
        found = tuning.search_grid(_over(search, tried, TUNING_SEEDS, key, late), rates, deadline=late)
        if not found.found:
            continue
        took = times.until(tried.schedule, float(found.losses.min()))
        if took >= best[0]:
            break
        best = took, tried._replace(learning_rate=found.rate)
        rates = found.rate * FACTOR ** np.arange(-1.0, 2.0)
    return best


def _over(search: Search, way: Way, num_seeds: int, key: jax.Array, ends: float) -> Search:
    """Return `rates -> Tuning` along a way; one of a constant rate may go on for four times its length."""
    phases = batching.Phases.of(way.schedule)
    most = phases.examples(way.num_updates * (1 if way.kind != "constant" else 4))
    fixed = {"batch_size": phases, "num_seeds": num_seeds, "key": key, "max_examples": most, "deadline": ends}
    return partial(search, **fixed)


def _pilots(problem: Problem, search: Search, goal: Target, usual: float, key, clock: Clock):
    """Return the tunings {B: Tuning} at two batch sizes, what they show of the loss, and the loss before any update."""
    found, curves, start = {}, [], math.nan
    for size in PILOTS:
        if size > problem.num_examples // 4:
            continue
        clock.show(f"pilot at batch size {size}")
        middle = usual if not found else next(iter(found.values())).rate * 2
        options = {"batch_size": size, "num_seeds": 1, "key": key, "remember": True}
        limits = {"max_examples": PILOT_EPOCHS * problem.num_examples, "deadline": clock.until(PILOT_SHARE)}
        tuned = tuning.search_grid(partial(search, **options, late=4.0), tuning.grid(middle), **limits)
        if tuned.history is None:
            raise ValueError(
                "optimizer: its own schedule of the rate is in the way; whether it falls is found out here"
            )
        start = float(tuned.history.values[0, 0, 0])
        new = _curves(tuned, goal, start)
        if not new and not found:
            raise ValueError(
                f"the pilot diverges at all learning rates from {tuned.learning_rates[0]:.2g} to "
                f"{tuned.learning_rates[-1]:.2g}: scale the data, the initial parameters or the loss"
            )
        found[size], curves = tuned, [*curves, *new]
    return found, curves, start


def _curves(tuned, goal: Target, start: float) -> list[Curve]:
    """Return the runs that fell, each up to where it arrived or was given up."""
    curves = []
    for rate, (values,) in zip(tuned.learning_rates, tuned.history.values, strict=True):
        moves = np.flatnonzero(np.diff(values) != 0)
        end = int(moves[-1]) + 2 if len(moves) else 0
        seen = values[1:end]
        if len(seen) >= 2 and np.isfinite(seen).all() and seen[-1] < start and seen.max() < 2 * start:
            curves.append(Curve(float(rate), tuned.batch_size, tuned.history.updates[1:end], seen))
    return curves


def _highest(found: dict[int, Any], size: int) -> float:
    """Return the best rate of the pilot at a batch size: between two of them in logarithms, below in proportion."""
    sizes = sorted(found)
    rates = [found[size].rate for size in sizes]
    return float(np.exp(np.interp(np.log(size), np.log(sizes), np.log(rates)))) * min(1.0, size / sizes[0])


def _sizes(problem: Problem, first: int) -> list[int]:
    """Return the batch sizes that a plan may use: powers of two, no phase longer than the data."""
    return [2**i for i in range(20) if first // 4 <= 2**i <= min(2048, problem.num_examples)]


def _times(problem: Problem, optimizer: Optimizer, sizes: Sequence[int], rate: float, clock: Clock) -> Times:
    chosen = [size for size in sizes if int(math.log2(size)) % 2 == int(math.log2(sizes[0])) % 2]
    speeds = tuning.speeds(
        problem, optimizer, chosen, learning_rate=rate, deadline=clock.until(0.5), progress=clock.show
    )
    fit = [speed for speed in speeds if speed.fits]
    return Times.of([speed.batch_size for speed in fit], [speed.seconds_per_update for speed in fit])


def _locals(problem: Problem, make: Optimizer, goal: Target, found, key, clock: Clock):
    """Return the twins about parameters of the pilot at its best rate, and for how many updates they held."""
    if getattr(make, "name", "") != "sgd":
        return [], ["the twin about given parameters: for sgd only"]
    clock.show("the twin about given parameters")
    size, tuned = next(iter(found.items()))
    count = float(tuned.losses.min()) if tuned.found else float(tuned.history.updates[-1])
    trainer = tuning.training(problem, make, goal, num_runs=NUM_RUNS)
    run = trainer.start(np.asarray([tuned.rate]), num_seeds=1, key=jax.random.clone(key))
    only, locals_ = np.arange(len(run.seeds)) == 0, []
    build = kept(problem, "local twin", lambda: jax.jit(partial(local_twin, problem, **LANCZOS)))
    for checkpoint in (0, round(count / 2)):
        if checkpoint > run.num_updates:
            run = trainer.advance(run, checkpoint - run.num_updates, only, batch_size=size)
        begun = run.num_updates
        twin = build(jax.tree.map(lambda leaf: leaf[0], run.states.params), key=jax.random.clone(key))
        updates, losses = [], []
        while run.num_updates - begun < count / 2 and len(updates) < 12:
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
    return locals_, []
