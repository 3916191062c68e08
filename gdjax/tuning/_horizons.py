"""A target and a schedule: for how many updates the schedule is made is part of what is tuned.

The updates to a target are the fewest after which some horizon reaches it: a run along a schedule made for T updates
counts by where it crosses, at most T. Horizons are doubled until one arrives with every seed and the next is no better;
two more are tried between the last that did not arrive and the crossing, so that the least is known to a fifth or so.
"""

import dataclasses
import math
import time
from typing import Any

import numpy as np

from gdjax import batching
from gdjax.tuning._goals import Target
from gdjax.tuning._runs import Trainer
from gdjax.tuning._search import Search
from gdjax.tuning._tuning import Tuning

NUM_BISECTIONS = 2


def over_horizons(run: Search, trainer: Trainer, goal: Target) -> Search:
    """Return a search like `run` whose costs are the least over horizons; it has no histories."""

    def search(learning_rates: np.ndarray, *, batch_size: Any, max_examples: int = 0, **limits: Any) -> Tuning:
        phases = batching.Phases.of(batch_size)
        most = goal.max_updates(phases, max_examples)
        known = limits.get("late", 2.0) * limits.get("least", math.inf)
        most = max(1, min(most, math.ceil(known) if known < math.inf else most))
        horizon = min(
            most, max(1, trainer.num_evaluated // phases.sizes[-1])
        )  # shorter, evaluations would cost the most
        failed, found = 0, None

        def at(num_updates: int) -> Tuning:
            one = run(learning_rates, batch_size=phases, max_examples=phases.examples(num_updates), **limits)
            return one if found is None else _least(found, one)

        def late() -> bool:
            return time.perf_counter() > limits.get("deadline", math.inf)

        found = at(horizon)
        while horizon < most and not late():
            before, horizon = found.losses.min(), min(most, 2 * horizon)
            failed = horizon // 2 if np.isinf(before) else failed
            found = at(horizon)
            if found.found and found.losses.min() >= before:
                break
        for _ in range(NUM_BISECTIONS):
            least = found.losses.min()
            between = round(math.sqrt(max(failed, least / 4) * least)) if found.found else 0
            if not failed < between < least or late():
                break
            found = at(between)
            if found.losses.min() == least:
                failed = between
        return found

    return search


def _least(first: Tuning, second: Tuning) -> Tuning:
    """Return what is known of the same rates and seeds from two horizons: each rate at the better one of them."""
    better = np.fmin if first.goal.relation == "<=" else np.fmax
    second_wins = (second.losses < first.losses)[:, None]
    return dataclasses.replace(
        first,
        costs=np.where(second_wins, second.costs, first.costs),
        diverged=first.diverged & second.diverged,
        best_metrics=better(first.best_metrics, second.best_metrics),
        seconds=first.seconds + second.seconds,
    )
