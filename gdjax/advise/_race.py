"""The end of the search for a target: batch sizes that may be the fastest are tuned, and what would win is confirmed.

Three seeds are enough to say which rates are worth more seeds. The least of many noisy means is too good to be true, so
whatever leads is run with more seeds, and leads after that or not. Then it and what cannot be told from it, at its own
batch size and at others, have more in turn, until they can: more seeds are spent only where the answer depends on them.
A rate that some seed does not survive is no candidate, however fast the others are.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gdjax import tuning
from gdjax.advise._choices import Choice
from gdjax.tuning import Tuning

TUNING = 2**0.5  # factor between the rates that are tried in the end
NO_BETTER = 1.5  # such a rate is not waited for longer than this, in times of the best one's updates
NEAR = 1.5  # times the least time to target, at which a batch size may still be the fastest once it is tuned
LEVEL = 1.15  # times the least time to target, at which the batch sizes beyond a tuned one may still be faster
MAX_TUNED = 5  # batch sizes
NUM_CONFIRMED = 10  # seeds in all that what is advised is run with
ADDED = 5  # seeds at a time, to those of the tuning; no more than the programs are compiled for
MAX_CONFIRMED = 20  # rates that lead
DOUBT = 2.0  # standard errors of a difference, within which a candidate is not told from the winner
DOUBTING = 3.0  # seconds, or as long as all before it, that this may take
MOST_SEEDS, TOLD = 100, 0.02  # where doubt ends: seeds, and standard error of a difference over the least time
EXACT = 0.03  # standard error of the winner's mean, over it: where seeds differ much, some may go astray
SELDOM = 50  # seeds, one of which may take three times the median: one of 10 to 50, two of up to 100
NUM_TELLING = 40  # seeds that tell how far those behind the median are: half of a normal distribution, of logarithms,
RARE = 2.33  # and how many of its deviations one in a hundred is behind
MAX_LOWER = 4  # further rates below, where none is survived by all seeds
AS_FAST, SLOWER = 0.01, 0.05  # of a run, by which a lower rate may be slower: in any case, and within the noise
ROUNDS = 3  # of timing, all in turn


class Candidate(NamedTuple):
    """A batch size and a rate, with the updates that its seeds took [S] and the seconds of an update."""

    batch_size: int
    learning_rate: float
    costs: np.ndarray
    seconds_per_update: float

    @property
    def reliable(self) -> bool:
        """Whether all seeds arrived, hardly any much later than the others, nor is that to be expected of the next."""
        if not np.isfinite(self.costs).all():
            return False
        behind = np.log(self.costs / np.median(self.costs))
        astray = math.log(tuning.Target.ASTRAY)
        spread = (2 * float((np.maximum(behind, 0) ** 2).mean())) ** 0.5 if len(self.costs) >= NUM_TELLING else 0.0
        forgiven = math.ceil(len(self.costs) / SELDOM) if len(self.costs) >= NUM_CONFIRMED else 0
        return bool((behind > astray).sum() <= forgiven) and RARE * spread <= astray

    @property
    def seconds(self) -> float:
        """Mean time to the target, infinite where it is not reliable."""
        return float(self.costs.mean()) * self.seconds_per_update if self.reliable else math.inf

    @property
    def error(self) -> float:
        """Standard error of that mean, over it; NaN where it is not reliable or there is one seed."""
        if not self.reliable or len(self.costs) < 2:
            return math.nan
        return float(self.costs.std(ddof=1) / self.costs.mean()) / len(self.costs) ** 0.5

    @property
    def score(self) -> float:
        """What rates of one batch size are compared by: the mean time and its deviation from seed to seed, added.

        Beside the rates that diverge a few seeds take much longer than most, and the mean of ten says little of how
        many: where seeds differ, the next ones will.
        """
        deviation = self.costs.std(ddof=1) if self.reliable and len(self.costs) > 1 else 0.0
        return self.seconds + float(deviation) * self.seconds_per_update


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
    entries, unsure = _settled(entries, pick.batch_size, more, lower, late, doubting)
    winner = _leader(entries)
    if tunings[winner.batch_size].at_edge:
        unknown += [f"the best learning rate at batch size {winner.batch_size}: it is at the edge of those tried"]
    others = tuple(leader for leader in _leaders(entries) if leader.batch_size != winner.batch_size)
    return Race(*winner, others, tunings, (*unknown, *unsure))


def _settled(
    entries: list[Candidate], pick: int, more, lower, late, doubting: float
) -> tuple[list[Candidate], list[str]]:
    """Return the candidates, whatever leads with NUM_CONFIRMED seeds and more while that is in doubt; and why if not.

    Where none is left that every seed survives, lower rates are tried, at the picked batch size.
    """
    ends, below, num_lower, num_confirmed = time.perf_counter() + doubting, None, 0, 0
    while True:
        winner = _leader(entries)
        if not winner.reliable:
            if num_lower == MAX_LOWER or late(0.0):
                return entries, ["a learning rate that every seed survives: none was found"]
            below = lower(below or _failed(entries, pick))
            # One that was tried before was perhaps waited for no longer than it was worth then.
            entries = [*(entry for entry in entries if not _same(entry, below)), below]
            num_lower += 1
            continue
        few = len(winner.costs) < NUM_CONFIRMED
        chosen = winner if few else _doubted(entries)
        if chosen is None or (not few and time.perf_counter() > ends):
            return entries, []
        tired = few and num_confirmed == MAX_CONFIRMED
        found = None if tired else more(chosen, max(len(chosen.costs) + ADDED, NUM_CONFIRMED))
        if found is None:
            reason = f"{MAX_CONFIRMED} other rates had them" if tired else "the budget did not allow them"
            unsure = f"more than {len(winner.costs)} seeds at batch size {winner.batch_size}: {reason}"
            return entries, [unsure] if few else []
        num_confirmed += few
        entries = [found if entry is chosen else entry for entry in entries]


def _failed(entries: list[Candidate], size: int) -> Candidate:
    """Return the lowest rate of a batch size that further seeds failed at, or the lowest of all."""
    tried = sorted((entry for entry in entries if entry.batch_size == size), key=lambda entry: entry.learning_rate)
    fewest = min(len(entry.costs) for entry in tried)
    return next((entry for entry in tried if len(entry.costs) > fewest), tried[0])


def _same(entry: Candidate, other: Candidate) -> bool:
    """Return whether two are of one batch size and rate."""
    return entry.batch_size == other.batch_size and math.isclose(entry.learning_rate, other.learning_rate)


def _doubted(entries: Sequence[Candidate]) -> Candidate | None:
    """Return the one with the fewest seeds of the winner and those not told from it; None where all is told."""
    winner, deviation = _leader(entries), _deviation(entries)
    field = [winner]
    for entry in entries:
        error = deviation * (1 / len(entry.costs) + 1 / len(winner.costs)) ** 0.5
        slower = entry.seconds / winner.seconds - 1 if entry.reliable else math.inf
        if entry is not winner and slower < DOUBT * error > DOUBT * TOLD:
            field.append(entry)
    fewest = min(field, key=lambda entry: len(entry.costs))
    doubt = len(field) > 1 or len(winner.costs) < NUM_CONFIRMED or not winner.error <= EXACT
    return fewest if doubt and len(fewest.costs) < MOST_SEEDS else None


def _deviation(entries: Sequence[Candidate]) -> float:
    """Return how much seeds differ, over their mean: by all candidates together, for three seeds alone hardly say."""
    known = [entry.costs / entry.costs.mean() for entry in entries if entry.reliable and len(entry.costs) > 1]
    freedom = sum(len(costs) - 1 for costs in known)
    return (sum(float(((costs - 1) ** 2).sum()) for costs in known) / freedom) ** 0.5 if known else math.inf


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
    """Return seconds per update, the least of several rounds: whatever else the machine does only adds to a time."""
    rounds: list[list[float]] = []
    while len(rounds) < ROUNDS and not (rounds and late(0.0)):
        rounds.append([choice.speed.time_again() for choice in choices if choice.speed.time_again])
    least = np.min(rounds, axis=0).tolist()
    return {choice.batch_size: seconds for choice, seconds in zip(choices, least, strict=True)}


def _leader(entries: Sequence[Candidate]) -> Candidate:
    """Return what is the fastest on average, of the leaders of all batch sizes."""
    return min(_leaders(entries), key=lambda leader: leader.seconds)


def _leaders(entries: Sequence[Candidate]) -> list[Candidate]:
    """Return for each batch size the best rate, or a lower one that is as fast but for the noise over seeds."""
    leaders = []
    for size in sorted({entry.batch_size for entry in entries}):
        rates = [entry for entry in entries if entry.batch_size == size]
        best = min(rates, key=lambda entry: entry.score)
        as_fast = [entry for entry in rates if best.reliable and _within_noise(entry, best)]
        leaders.append(min(as_fast, key=lambda entry: entry.learning_rate, default=best))
    return leaders


def _within_noise(entry: Candidate, best: Candidate) -> bool:
    """Return whether what a candidate takes longer than the best, seed by seed, is no more than noise."""
    if entry is best:
        return True
    if not entry.reliable:
        return False
    shared = min(len(entry.costs), len(best.costs))
    slower = np.log(entry.costs[:shared]) - np.log(best.costs[:shared])
    noise = slower.std(ddof=1) / shared**0.5 if shared > 1 else 0.0
    return bool(slower.mean() <= np.clip(noise, AS_FAST, SLOWER))


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
