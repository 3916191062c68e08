"""Tune a learning rate at one batch size."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from gdjax import batching
from gdjax._trees import kept
from gdjax.gradients import Gradient
from gdjax.problem import Problem
from gdjax.tuning import _goals, _search
from gdjax.tuning._goals import Budget, Goal, Target
from gdjax.tuning._horizons import over_horizons
from gdjax.tuning._optimizers import Optimizer, named, needs_num_updates
from gdjax.tuning._runs import Trainer, trainer
from gdjax.tuning._search import Search
from gdjax.tuning._tuning import Tuning

FACTOR = 10**0.5  # between neighbouring rates of the default grid
NUM_RATES = 5
MAX_EPOCHS = 200


def tune(
    problem: Problem,
    optimizer: str | Optimizer = "sgd",
    *,
    batch_size: int | None = None,
    schedule: Sequence[tuple[int, int]] | None = None,
    key: jax.Array,
    num_epochs: float | None = None,
    target: str | Goal | None = None,
    learning_rates: Sequence[float] | None = None,
    num_seeds: int = 3,
    max_epochs: float = MAX_EPOCHS,
    deadline: float = math.inf,
) -> Tuning:
    """Find the learning rate that is best at one batch size, for all seeds, on a grid that grows beyond its edges.

    Args:
        problem: what to train.
        optimizer: a name from `OPTIMIZERS`, what `named` makes of one, or a function learning_rate, or
            (learning_rate, num_updates), -> optax transformation; the rate is traced. With a schedule, the updates to a
            target are the fewest over the numbers of updates that the schedule may be made for.
        batch_size: B, examples per update; or
        schedule: phases [(num_updates, B), ...] in one stream; the last goes on until the runs end.
        key: typed PRNG key of parameters and streams.
        num_epochs: passes over the data, for the least training loss at their end; or
        target: what to reach in the fewest updates, as 'loss<=0.05', a `Target`, or a `Budget`.
        learning_rates: ascending, a factor apart, at least two; default five about the optimiser's usual rate.
        num_seeds: S, runs of each rate.
        max_epochs: that a run may take on the way to a target.
        deadline: a time of `time.perf_counter`; what is known then is returned.

    Returns:
        The rates tried, what every run took, the best rate.

    Raises:
        ValueError: for both or neither of `num_epochs` and `target`, a batch size outside 1 ... N, rates that are not
            positive and ascending, and a target that cannot be read or is met at the start.
    """
    goal = _goal(problem, num_epochs, target)
    cut = _cut(problem, batch_size, schedule)
    if num_seeds < 1:
        raise ValueError(f"num_seeds={num_seeds} must be at least 1")
    make, usual = named(optimizer)
    rates = np.asarray(grid(usual) if learning_rates is None else learning_rates, float)
    if len(rates) < 2 or not (rates > 0).all() or not np.isfinite(rates).all() or not (np.diff(rates) > 0).all():
        raise ValueError(f"learning_rates={rates.tolist()} must be at least two, positive, finite and ascending")
    run = searching(problem, make, goal, num_runs=num_seeds * len(rates))
    limits: dict[str, Any] = {"max_examples": round(max_epochs * problem.num_examples), "deadline": deadline}
    return _search.search_grid(run, rates, batch_size=cut, num_seeds=num_seeds, key=key, **limits)


def _goal(problem: Problem, num_epochs: float | None, target: str | Goal | None) -> Goal:
    if (num_epochs is None) == (target is None):
        raise ValueError(f"give num_epochs={num_epochs} or target={target!r}, one of the two")
    if isinstance(target, str):
        return _goals.parse_target(target, problem)
    if isinstance(target, Target | Budget):
        return target
    if num_epochs is None:
        raise ValueError(f"target={target!r} must be as 'loss<=0.05', a Target, or a Budget")
    if not 0 < num_epochs < math.inf:
        raise ValueError(f"num_epochs={num_epochs} must be positive and finite")
    return Budget(round(num_epochs * problem.num_examples))


def _cut(problem: Problem, batch_size: int | None, schedule: Sequence[tuple[int, int]] | None) -> int | batching.Phases:
    if (batch_size is None) == (schedule is None):
        raise ValueError(f"give batch_size={batch_size} or schedule={schedule!r}, one of the two")
    if batch_size is not None and not hasattr(batch_size, "__index__"):
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of examples")
    cut = batching.Phases.of(schedule or ()) if batch_size is None else batch_size
    for size in [cut] if isinstance(cut, int) else batching.Phases.of(cut).sizes:
        if not 1 <= size <= problem.num_examples:
            raise ValueError(f"batch_size={size} must be between 1 and N={problem.num_examples}")
    return cut


def grid(usual: float) -> np.ndarray:
    """Return the default rates [NUM_RATES] about an optimiser's usual one.

    A rate that is too high diverges soon, one that is too low is waited for: more of the grid lies above.
    """
    return usual * FACTOR ** (np.arange(NUM_RATES) - (NUM_RATES - 2) / 2)


def searching(
    problem: Problem,
    optimizer: Optimizer,
    goal: Goal,
    *,
    num_runs: int = 0,
    gradient: Callable[[int], Gradient] | None = None,
    average: float | None = None,
) -> Search:
    """Return the search for a goal, see `search`: its programs are kept with the problem and used again."""
    runs = training(problem, optimizer, goal, num_runs=num_runs, gradient=gradient, average=average)
    run = _search.search(runs, goal, lambda values: values)
    if isinstance(goal, Target) and needs_num_updates(optimizer):
        return over_horizons(run, runs, goal)
    return run


def training(
    problem: Problem,
    optimizer: Optimizer,
    goal: Goal,
    *,
    num_runs: int = 0,
    gradient: Callable[[int], Gradient] | None = None,
    average: float | None = None,
) -> Trainer:
    """Return the trainer whose runs are evaluated as a goal asks, kept with the problem.

    With an `average`, a half-life in examples, it is the averaged parameters that are evaluated.
    """

    def make():
        examples = _goals.evaluation_examples(problem, goal.on)
        return trainer(
            problem,
            optimizer,
            evaluate=partial(_evaluated, problem, goal.metric, average is not None),
            examples=examples,
            num_evaluated=len(jax.tree.leaves(examples)[0]),
            num_runs=num_runs,
            gradient=gradient,
            average=average,
        )

    return kept(problem, ("trainer", optimizer, goal.metric, goal.on, num_runs, gradient, average), make)


def _evaluated(problem: Problem, metric: str, averaged: bool, params, examples):
    params = params[1] if averaged else params
    return problem.evaluate(params, examples, names=(metric,))[metric]
