"""The batch as a schedule: which of constant, decay, ramp and both reaches a target first, predicted and then run.

Short runs at two batch sizes are fitted by a quadratic (`_fitted`); by it the best way of each kind is found (`_ways`),
given the measured time of an update; then all of them are tuned alike and run with fresh seeds (`_verify`).
"""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial

import jax

from gdjax import tuning
from gdjax.advise._fitted import at, fitted
from gdjax.advise._pilot import (
    PILOT_EPOCHS,
    PILOTS,
    batch_sizes,
    highest_rate,
    local_twins,
    pilots,
    searching,
    update_times,
)
from gdjax.advise._plan import GIVEN_UP, Plan, Run, Times
from gdjax.advise._tunings import Clock, Progress
from gdjax.advise._verify import EFFORTS, VERIFY_SHARE, Check, Effort, verified
from gdjax.advise._ways import Bounds, Way, plan
from gdjax.problem import Problem
from gdjax.tuning import Optimizer, Target

PLAN_SHARE = 0.6  # of the seconds that may be gone when the plan is made
LOOKS, NUM_LOOKED_AT = 12, 2048 / 3  # evaluations of a run, and the examples of training that take as long as one
COMPILATIONS = 3  # of a kind


def schedule(
    problem: Problem,
    target: str | Target,
    *,
    optimizer: str | Optimizer = "sgd",
    num_phases: int = 3,
    seconds: float = 300.0,
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
            is below what the plan can reach (saying what it can), an optimiser with a schedule of its own, and a pilot
            that diverges at every rate.
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
    try:
        make(0.1)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "optimizer: its own schedule of the rate is in the way; whether it falls is found out here"
        ) from error
    found, curves, start = pilots(problem, searching(problem, make, goal), usual, pilot_key, clock)
    sizes = batch_sizes(problem, min(found))
    rate = next(iter(found.values())).rate
    times, compiling = update_times(problem, make, sizes, rate, clock)
    twin = fitted(curves, start=start, target=goal.value)
    longest = max(int(curve.updates[-1]) for curve in curves)
    bounds = Bounds(sizes, partial(highest_rate, found), times, max(1000, 4 * longest))
    clock.show("planning")
    # What the pilot came to is not out of reach: where it arrived, the twin may be above the target.
    arrived = [float(at(twin, curve)[-1]) for curve in curves if curve.losses[-1] <= goal.value]
    aim = max(goal.value, min(arrived, default=-math.inf))
    planned = plan(twin, aim, bounds, num_phases=num_phases, deadline=clock.until(PLAN_SHARE))
    kinds, effort, unknown = _affordable(planned, times, compiling, clock.until(VERIFY_SHARE) - time.perf_counter())
    check = Check(problem, make, goal, times, sizes, compiling, effort, fresh_key, clock)
    runs, why_not = verified(check, kinds, planned)
    unknown += [f"{kind}, {why}" for kind, why in why_not.items()]
    for kind, run in runs.items():
        if run.missed:
            count = f"{run.missed} of its {len(run.updates)} seeds"
            unknown.append(f"{kind}, the time of {count}: they did not arrive, and count {GIVEN_UP} times its length")
    if aim > goal.value:
        unknown.append(f"the twin at {goal.value:g}: it is planned to {aim:.3g}, where it puts the pilot's arrival")
    locals_, why = local_twins(problem, make, goal, found, times, twin_key, clock)
    return Plan(
        goal=goal,
        ways={kind: _origin(some, runs.get(kind)) for kind, some in planned.items()},
        runs=runs,
        twin=twin,
        curves=tuple(curves),
        times=times,
        locals=tuple(locals_),
        unknown=(*unknown, *why),
        seconds=time.perf_counter() - clock.began,
    )


def _affordable(
    planned: Mapping[str, Sequence[Way]], times: Times, compiling: float, left: float
) -> tuple[list[str], Effort, list[str]]:
    """Return in which order kinds are run, the fastest first, with what effort, and what is left out for want of time.

    Args:
        planned: ways of each kind.
        times: of an update.
        compiling: seconds of a compilation.
        left: seconds for all of it.
    """
    fastest = min(planned, key=lambda kind: planned[kind][0].seconds[1])
    # The constant is what the others are compared with.
    kinds = sorted(planned, key=lambda kind: (kind not in (fastest, "constant"), planned[kind][0].seconds[1]))
    looks = LOOKS * NUM_LOOKED_AT * times(PILOTS[-1]) / PILOTS[-1]
    each = sum(looks + planned[kind][0].seconds[1] for kind in kinds)
    costs = {effort: len(kinds) * COMPILATIONS * compiling + effort.runs * each for effort in EFFORTS}
    effort = next((effort for effort in EFFORTS if costs[effort] <= left), EFFORTS[-1])
    if effort == EFFORTS[0]:
        return kinds, effort, []
    tuned = f"each was tuned with {effort.seeds} at first" if effort.seeds else "they are those of the plan"
    return kinds, effort, [f"the best rate over seeds: {tuned}, for want of time"]


def _origin(planned: Sequence[Way], run: Run | None) -> Way:
    """Return the plan that a run was made from; the fastest one where there is no run."""
    first = run and run.way.schedule[0][1]
    return next((way for way in planned if way.schedule[0][1] == first), planned[0])
