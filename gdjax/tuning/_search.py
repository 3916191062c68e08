"""The best learning rate at one batch size: every rate is run with every seed until it is known.

Runs are evaluated now and then; the crossing of a target is interpolated between two evaluations. A run that diverges
is infeasible; a run that had not arrived when the search ended is censored: both are infinite, and told apart by
`diverged`.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gdjax import batching
from gdjax.tuning._goals import Budget, Goal
from gdjax.tuning._runs import Runs, Trainer
from gdjax.tuning._tuning import LATE, History, Tuning, merged

MAX_MOVES = 8  # beyond the first grid of rates
HURT = 1.25  # a higher rate must be worse by this before the search ends below it
FLAT = 0.01  # rates that bring all runs within this of one value are too low to tell


Search = Callable[..., Tuning]


def search(trainer: Trainer, goal: Goal, judged: Callable[[Any], Any]) -> Search:
    """Return `(learning_rates [R], *, batch_size, num_seeds, key, ...) -> Tuning`.

    It trains every rate with every seed until the best rate and those beside it are known. The batch size is a number
    or the `batching.Phases` of a schedule. Its further arguments are

        max_examples: how many examples a run may see on the way to a target; a `Budget` says so itself.
        deadline: a time of `time.perf_counter`. Once it has passed, what is known so far is returned, and runs that had
            not arrived count as censored.
        least: updates that another rate, tried before, is known to take.
        late: no rate is waited for longer than this many times the updates of the best one, or `least`.
        every: updates between two looks at the runs, in place of the goal's own; then there is a `history`.
        remember: whether there is one of the goal's own looks too.
        stop_diverged: whether a rate that diverges with one seed is left with the others.
        progress: called with the updates made and the best value.

    Args:
        trainer: from `trainer`; one for all batch sizes.
        goal: what to reach or to spend.
        judged: what the trainer's evaluation returns -> the value that the goal is about.

    Raises:
        ValueError: by what is returned, for a target that is met at the start, and naming the example, where a loss or
            a gradient is not finite before any update.
    """

    def run(
        learning_rates: np.ndarray,
        *,
        batch_size: int | batching.Phases,
        num_seeds: int,
        key: jax.Array,
        max_examples: int = 0,
        deadline: float = math.inf,
        least: float = math.inf,
        late: float = LATE,
        every: int | None = None,
        remember: bool = False,
        stop_diverged: bool = True,
        progress: Callable[[int, float], None] = lambda updates, metric: None,
    ) -> Tuning:
        better = np.fmin if goal.relation == "<=" else np.fmax
        began, shape = time.perf_counter(), (num_seeds, len(learning_rates))
        phases = batching.Phases.of(batch_size)
        max_updates = goal.max_updates(phases, max_examples)

        # Every batch size and grid of rates has the same draws: the key is used again on purpose.
        def begin() -> Runs:
            draws: dict[str, Any] = {"num_seeds": num_seeds, "key": jax.random.clone(key)}
            return trainer.start(learning_rates, horizon=max_updates, **draws)

        runs, fine = begin(), 0
        unused = np.zeros(len(runs.seeds) - math.prod(shape), bool)

        def seen(runs: Runs) -> Any:
            return jax.tree.map(lambda x: np.asarray(x, float)[: math.prod(shape)].reshape(shape), runs.values)

        looks, done = [(0, seen(runs))], 0
        values = judged(looks[-1][1])
        costs, diverged, nearest = np.full(shape, np.inf), ~np.isfinite(values), values
        begun = jax.tree.map(lambda leaf: leaf[0], runs.states.params)
        if diverged.all():
            _check_finite(trainer, begun)
        goal.check_start(values)
        while done < max_updates and time.perf_counter() < deadline:
            active = np.isinf(costs)
            if stop_diverged:
                active &= ~diverged.any(0)
            active &= goal.waiting(costs.mean(0), late * min(least, costs.mean(0).min()), done)
            if not active.any():
                break
            sizes = {"num_examples": trainer.num_examples, "num_evaluated": trainer.num_evaluated}
            count = every or goal.next_look(done, batch_size=phases.at(done)[0], **sizes)
            count = min(max(1, done) if done < fine else count, max_updates - done)
            runs = trainer.advance(runs, count, np.append(active.reshape(-1), unused), batch_size=batch_size)
            before, done = (done, values), runs.num_updates
            look = seen(runs)
            values = judged(look)
            looks = [*looks, (done, look)] if every or remember else looks
            goal.note(costs, active, before, (done, values), ended=done == max_updates)
            if not (every or before[0]) and count > 1 and np.isfinite(costs).any() and done < max_updates:
                # Between the start and the first look a line says little: look after 1, 2, 4, ... updates instead.
                runs, fine, done, values = begin(), done, 0, looks[0][1]
                values, costs[:] = judged(values), np.inf
                continue
            diverged |= ~np.isfinite(values)
            # Where a run begins says nothing of its rate.
            nearest = better(nearest if before[0] else np.nan, np.where(np.isfinite(values), values, np.nan))
            progress(done, goal.best(nearest))
        if diverged.any(0).all():
            _check_finite(trainer, begun)
        return Tuning(
            goal,
            batch_size,
            np.asarray(learning_rates, float),
            costs.T,
            diverged.T,
            np.asarray([goal.best(column) for column in nearest.T]),
            time.perf_counter() - began,
            _history(looks) if every or remember else None,
        )

    return run


def minimise(losses_at: Callable[[np.ndarray], Any], learning_rates: np.ndarray) -> Tuning:
    """Search a logarithmic grid, and beyond it, for the rate of the lowest loss of any training of one's own.

    >>> found = minimise(lambda rates: (np.log10(rates) - 1) ** 2, np.asarray([0.01, 0.1, 1.0]))  # beyond the grid
    >>> round(found.rate, 6), found.learning_rates.round(6)
    (10.0, array([1.e-02, 1.e-01, 1.e+00, 1.e+01, 1.e+02]))

    Args:
        losses_at: rates [R] -> losses [R]; NaN and infinity count as infeasible. Every call is for R rates, so that one
            compiled program serves them all.
        learning_rates: the first rates [R], ascending, a factor apart.
    """
    num_rates = len(learning_rates)

    def run(rates: np.ndarray, **limits: Any) -> Tuning:
        losses = np.asarray(losses_at(np.resize(rates, num_rates)), float)[: len(rates), None]
        costs = np.where(np.isfinite(losses), losses, np.inf)
        return Tuning(Budget(0), 0, np.asarray(rates, float), costs, ~np.isfinite(losses), losses[:, 0], 0.0)

    return search_grid(run, learning_rates)


def search_grid(run: Search, learning_rates: np.ndarray, **limits: Any) -> Tuning:
    """Search a logarithmic grid, and beyond it until the best rate has two neighbours, see `widen`."""
    return widen(run, run(learning_rates, **limits), learning_rates[1] / learning_rates[0], **limits)


def widen(run: Search, found: Tuning, factor: float, **limits: Any) -> Tuning:
    """Search one rate after another beyond those found, a `factor` apart, until the best one has two neighbours.

    On the way to a target it climbs until it hurts: until a rate above the best is HURT times as bad, for neighbours
    may differ by noise alone. Where nothing arrives, it goes on beyond the rate that came nearest, and ends where that
    one has two neighbours; a whole grid below all of them where all diverge, and a whole grid above where none makes a
    difference.
    """
    num_rates = len(found.learning_rates)
    for _ in range(MAX_MOVES):
        too_low, above = _too_low(found), found.losses[found.best + 1 :]
        climbs = found.found and not isinstance(found.goal, Budget) and not (above > HURT * found.losses.min()).any()
        if not (found.at_edge or too_low or climbs) or time.perf_counter() > limits.get("deadline", math.inf):
            break
        up = found.best > 0 or too_low
        beyond = found.learning_rates[-1 if up else 0]
        num_new = num_rates if found.diverged.any(1).all() or too_low else 1
        new = np.sort(beyond * factor ** ((1 if up else -1) * np.arange(1.0, num_new + 1)))
        found = merged(found, run(new, least=found.losses.min(), **limits))
    return found


def _too_low(found: Tuning) -> bool:
    """Return whether no rate makes a difference: a loss that is scaled by 1e-9 asks for rates 1e9 times as high."""
    if found.diverged.any() or len(found.learning_rates) < 2 or (found.found and not isinstance(found.goal, Budget)):
        return False
    return bool(np.ptp(found.best_metrics) <= FLAT * np.abs(found.best_metrics).max())


def _check_finite(trainer: Trainer, params: Any) -> None:
    """Raise ValueError where all runs diverge for an example that is to blame before any update."""
    if found := trainer.fault(params):
        raise ValueError(f"{found} before any update: mend it, leave the example out, or give it weight 0")


def _history(looks: list[tuple[int, Any]]) -> History:
    updates = np.asarray([done for done, _ in looks])
    return History(updates, jax.tree.map(lambda *values: np.stack(values, -1).swapaxes(0, 1), *(v for _, v in looks)))
