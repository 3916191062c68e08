"""Which of several batch sizes and rates is the fastest: more seeds, where the answer depends on them.

The least of many noisy means is too good to be true, so whatever leads is run with more seeds, and leads after that or
not. Then it and what cannot be told from it, at its own batch size and at others, have more in turn, until they can. A
rate that some seed does not survive is no candidate, however fast the others are.
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gdjax import tuning

NUM_CONFIRMED = 10  # seeds in all that what is advised is run with
ADDED = 5  # seeds at a time, to those of the tuning; no more than the programs are compiled for
MAX_CONFIRMED = 20  # rates that lead
MAX_LOWER = 4  # further rates below, where none is survived by all seeds
AS_FAST, SLOWER = 0.01, 0.05  # of a run, by which a lower rate may be slower: in any case, and within the noise
DOUBT = 2.0  # standard errors of a difference, within which a candidate is not told from the winner
DOUBTING = 6.0  # seconds, or as long as all before it, that this may take
MOST_SEEDS, TOLD = 100, 0.02  # where doubt ends: seeds, and standard error of a difference over the least time
EXACT = 0.03  # standard error of the winner's mean, over it: where seeds differ much, some may go astray
SELDOM = 50  # seeds, one of which may take three times the median: one of 10 to 50, two of up to 100
NUM_TELLING = 40  # seeds that tell how far those behind the median are: half of a normal distribution, of logarithms,
RARE = 2.33  # and how many of its deviations one in a hundred is behind


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
        spread = (2 * float((np.maximum(behind, 0) ** 2).mean())) ** 0.5 if len(self.costs) >= NUM_TELLING else 0.0
        forgiven = math.ceil(len(self.costs) / SELDOM) if len(self.costs) >= NUM_CONFIRMED else 0
        return self.num_astray <= forgiven and RARE * spread <= math.log(tuning.Target.ASTRAY)

    @property
    def num_astray(self) -> int:
        """How many seeds did not arrive, or took ASTRAY times the median."""
        return int(tuning.Target.astray(self.costs).sum())

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


def settled(
    entries: list[Candidate], pick: int, more, lower, late, doubting: float
) -> tuple[list[Candidate], list[str]]:
    """Return the candidates, whatever leads with NUM_CONFIRMED seeds and more while that is in doubt; and why if not.

    Where none is left that every seed survives, lower rates are tried, at the picked batch size.

    Args:
        entries: with few seeds each.
        pick: the batch size whose rates are lowered.
        more: `(candidate, seeds in all) -> candidate`, or None for want of time.
        lower: `candidate -> candidate`, at a lower rate.
        late: whether so many seconds are no longer there.
        doubting: seconds after which doubt is let be.
    """
    ends, below, num_lower, num_confirmed = time.perf_counter() + doubting, None, 0, 0
    while True:
        winner = leader(entries)
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
    winner, deviation = leader(entries), _deviation(entries)
    field = [winner]
    for entry in entries:
        error = deviation * (1 / len(entry.costs) + 1 / len(winner.costs)) ** 0.5
        slower = entry.seconds / winner.seconds - 1 if entry.reliable else math.inf
        if entry is not winner and slower < DOUBT * error and error > TOLD:
            field.append(entry)
    fewest = min(field, key=lambda entry: len(entry.costs))
    doubt = len(field) > 1 or len(winner.costs) < NUM_CONFIRMED or not winner.error <= EXACT
    return fewest if doubt and len(fewest.costs) < MOST_SEEDS else None


def _deviation(entries: Sequence[Candidate]) -> float:
    """Return how much seeds differ, over their mean: by all candidates together, for three seeds alone hardly say."""
    known = [entry.costs / entry.costs.mean() for entry in entries if entry.reliable and len(entry.costs) > 1]
    freedom = sum(len(costs) - 1 for costs in known)
    return (sum(float(((costs - 1) ** 2).sum()) for costs in known) / freedom) ** 0.5 if known else math.inf


def leader(entries: Sequence[Candidate]) -> Candidate:
    """Return the fastest on average of the leaders of all batch sizes; if none is reliable, where fewest seeds fail."""
    return min(leaders(entries), key=lambda leader: (leader.seconds, leader.num_astray / len(leader.costs)))


def leaders(entries: Sequence[Candidate]) -> list[Candidate]:
    """Return for each batch size the best rate, or a lower one that is as fast but for the noise over seeds."""
    leaders = []
    for size in sorted({entry.batch_size for entry in entries}):
        rates = [entry for entry in entries if entry.batch_size == size]
        best = min(rates, key=lambda entry: (entry.score, entry.num_astray / len(entry.costs)))
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
