"""The end of the search for a target: batch sizes that may be the fastest are tuned, and what would win is confirmed.

Three seeds are enough to say which rates are worth more: `_candidates` says which of them the fastest is.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gdjax import tuning
from gdjax.advise._candidates import ADDED, DOUBTING, Candidate, leader, leaders, settled
from gdjax.advise._choices import Choice
from gdjax.tuning import Tuning

TUNING = 2**0.5  # factor between the rates that are tried in the end
NO_BETTER = 1.5  # such a rate is not waited for longer than this, in times of the best one's updates
NEAR = 1.5  # times the least time to target, at which a batch size may still be the fastest once it is tuned
LEVEL = 1.15  # times the least time to target, at which the batch sizes beyond a tuned one may still be faster
MAX_TUNED = 5  # batch sizes
ROUNDS = 3  # of timing, all in turn


class Race(NamedTuple):
    """What won.

    Attributes:
        batch_size, learning_rate: of the winner.
        costs: updates to the target of all its seeds.
        seconds_per_update: of its updates, timed in turn with the others.
        others: the best candidate of every other batch size that was tuned.
        tunings: {batch size: Tuning}.
        unknown: what could not be established.
    """

    batch_size: int
    learning_rate: float
    costs: np.ndarray
    seconds_per_update: float
    others: tuple[Candidate, ...]
    tunings: Mapping[int, Tuning]
    unknown: tuple[str, ...]


def race(
    choices: Sequence[Choice],
    pick: Choice,
    runs: Mapping[int, Tuning],
    run: Callable[..., Tuning],
    late: Callable[[float], bool],
    show: Callable[[str], None],
) -> Race | None:
    """Tune the pick and its neighbours as long as one may be faster, and confirm what leads.

    Args:
        choices: all, ascending.
        pick: the fastest as it is known.
        runs: of what was verified, at one rate each.
        run: `(choice, learning_rates, *, num_seeds, draw, **limits) -> Tuning`; draw 0 are the seeds of `runs`.
        late: whether so many seconds are no longer there.
        show: is told what is being done.

    Returns:
        The winner, or None where the pick was never run.
    """
    if pick.batch_size not in runs:
        return None
    began = time.perf_counter()
    usable = [choice for choice in choices if choice.fits and choice.speed.time_again]
    tunings, unknown = _tuned(usable, pick, runs, run, late, show)
    speeds = _timed_in_turn([choice for choice in usable if choice.batch_size in tunings], late)
    entries = [
        Candidate(size, float(rate), costs, speeds[size])
        for size, tuned in tunings.items()
        for rate, costs in zip(tuned.learning_rates, tuned.costs, strict=True)
    ]
    by_size = {choice.batch_size: choice for choice in usable}

    def lower(failed: Candidate) -> Candidate:
        """Return a candidate at a lower rate."""
        rate, num_seeds = failed.learning_rate / TUNING, len(runs[pick.batch_size].costs[0])
        found = run(by_size[failed.batch_size], np.asarray([rate]), num_seeds=num_seeds)
        return failed._replace(learning_rate=rate, costs=found.costs[0])

    def more(entry: Candidate, total: int) -> Candidate | None:
        """Return a candidate with so many seeds in all, fewer where one does not arrive, None for want of time."""
        if late(total * entry.seconds):
            return None
        show(f"confirming batch size {entry.batch_size}")
        found = _with_more(entry, by_size[entry.batch_size], run, total)
        return None if late(0.0) and not found.reliable else found  # of a seed that the budget ended nothing is known

    doubting = max(time.perf_counter() - began, DOUBTING)
    entries, unsure = settled(entries, pick.batch_size, more, lower, late, doubting)
    winner = leader(entries)
    if tunings[winner.batch_size].at_edge:
        unknown += [f"the best learning rate at batch size {winner.batch_size}: it is at the edge of those tried"]
    others = tuple(leader for leader in leaders(entries) if leader.batch_size != winner.batch_size)
    return Race(*winner, others, tunings, (*unknown, *unsure))


def _tuned(usable, pick, runs, run, late, show) -> tuple[dict[int, Tuning], list[str]]:
    """Return tunings of the pick, and of a neighbour of those that are about as fast as any, as long as one may be."""
    sizes = [choice.batch_size for choice in usable]
    tunings: dict[int, Tuning] = {}
    size, unknown = pick.batch_size, []
    while size is not None:
        choice = usable[sizes.index(size)]
        if tunings and late(4 * len(runs[pick.batch_size].costs[0]) * choice.seconds[1]):
            unknown.append(f"the best learning rate at batch size {size}: the budget did not allow it")
            break
        show(f"tuning batch size {size}")

        def at(rates, choice=choice, **limits):
            return run(choice, rates, num_seeds=len(runs[pick.batch_size].costs[0]), **limits)

        begun = runs[size] if size in runs else at(np.asarray([choice.learning_rate]))
        tunings[size] = tuning.widen(at, begun, TUNING, late=NO_BETTER)
        times = {b: tunings[b].losses.min() * usable[sizes.index(b)].speed.seconds_per_update for b in tunings}
        least = min(times.values())
        level = [sizes.index(b) for b in times if times[b] <= LEVEL * least]
        beside = {j for i in level for j in (i - 1, i + 1) if 0 <= j < len(usable) and sizes[j] not in tunings}
        near = [usable[j] for j in sorted(beside) if _hoped(usable[j]) <= NEAR * least]
        size = min(near, key=_hoped).batch_size if near and len(tunings) < MAX_TUNED else None
    return tunings, unknown


def _hoped(choice: Choice) -> float:
    """Return what tuning a batch size may bring its time to: the prediction, or less where its run took less.

    A run that took longer than predicted says as much of the rate that it was given as of the batch size.
    """
    measured = choice.measured_seconds
    return min(measured, choice.seconds[1]) if math.isfinite(measured) else choice.seconds[1]


def _timed_in_turn(choices: Sequence[Choice], late: Callable[[float], bool]) -> dict[int, float]:
    """Return seconds per update, the least of all rounds: whatever else the machine does only adds to a time."""
    rounds = [[choice.speed.seconds_per_update for choice in choices]]
    while len(rounds) <= ROUNDS and not (len(rounds) > 1 and late(0.0)):
        rounds.append([choice.speed.time_again() for choice in choices if choice.speed.time_again])
    least = np.min(rounds, axis=0).tolist()
    return {choice.batch_size: seconds for choice, seconds in zip(choices, least, strict=True)}


def _with_more(entry: Candidate, choice: Choice, run: Callable[..., Tuning], total: int) -> Candidate:
    """Return the candidate with so many seeds in all, or fewer where one does not arrive."""
    costs = entry.costs
    most = math.ceil(2 * tuning.Target.ASTRAY * float(np.median(costs))) * entry.batch_size
    while len(costs) < total and np.isfinite(costs).all():
        num_seeds = min(ADDED, total - len(costs))
        rates = np.asarray([entry.learning_rate])
        found = run(choice, rates, num_seeds=num_seeds, draw=len(costs), max_examples=most)
        costs = np.append(costs, found.costs[0])
    return entry._replace(costs=costs)
