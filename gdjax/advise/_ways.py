"""Ways to choose batch sizes and rates along a run, and the least time that a twin gives each of them.

`theory.plans` knows the best ramp in closed form; here batch sizes are powers of two between bounds, the time of an
update is measured, and the rate is bounded by the smallest batch, as real runs diverge where the quadratic would not.
So all ramps of up to three phases on a grid are run by the twin, side by side. Ways are judged as real runs are, by
where their loss first meets the target: a rate that falls to 0 is often there long before.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax.advise._fitted import Fitted

SHARES = 0.4, 0.6, 0.75, 0.85, 0.92  # of the updates, after which a batch may grow
FACTORS = 2, 4, 8  # by which it does
FINE = 1.26  # between the rates that a way is tuned over in the end
RATES = np.geomspace(1, 0.1, 8)  # of the highest at the first batch size
HIGHER = 2.0  # than a rate that stays may one begin that falls
STEP = 1.2  # from one number of updates to the next
ENDS = np.concatenate([[0.0], np.geomspace(1e-4, 5e-3, 8), np.linspace(0.01, 1, 100)])
PIECES = np.stack([ENDS[:-1], ENDS[1:]], 1)  # of a run, in shares of its updates, among them all SHARES
EARLY = 0.8  # of its updates after which a rate that falls has fallen: what arrives before is another way, cut short
LATE = 3.0  # times the seconds of the fastest of a kind, beyond which a way is not followed
LANES = 512  # runs of the twin side by side

KINDS = {"constant": (False, False), "decay": (True, False), "ramp": (False, True), "both": (True, True)}
"""{name: (whether the rate falls to 0 in proportion, whether the batch grows)}"""


class Way(NamedTuple):
    """Batch sizes and rate of a run.

    Attributes:
        kind: a name in KINDS.
        schedule: ((num_updates, B), ...).
        learning_rate: at the start.
        updates: to the target, by the twin.
        seconds: (low, predicted, high), an interval of 90 %.
    """

    kind: str
    schedule: tuple[tuple[int, int], ...]
    learning_rate: float
    updates: float
    seconds: tuple[float, float, float]

    @property
    def decays(self) -> bool:
        """Whether the rate falls to 0, in proportion to the updates left."""
        return KINDS[self.kind][0]

    @property
    def num_updates(self) -> int:
        """T."""
        return sum(count for count, _ in self.schedule)

    @property
    def num_examples(self) -> int:
        """E."""
        return sum(count * size for count, size in self.schedule)

    def stretched(self, factor: float) -> "Way":
        """Return the same way over so many times the updates."""
        schedule = tuple((max(1, round(factor * count)), size) for count, size in self.schedule)
        return self._replace(schedule=schedule)


class Bounds(NamedTuple):
    """What a way may do, and what it takes.

    Attributes:
        sizes: batch sizes, ascending.
        highest_rate: batch size -> the highest rate that runs have survived.
        seconds_per_update: batch size -> of an update.
        max_updates: of a run.
    """

    sizes: Sequence[int]
    highest_rate: Callable[[int], float]
    seconds_per_update: Callable[[int], float]
    max_updates: int


def plan(
    twin: Fitted, target: float, bounds: Bounds, *, num_phases: int = 3, deadline: float = math.inf
) -> dict[str, list[Way]]:
    """Return {kind: ways by which the twin reaches the target, the best for every first batch size, the fastest first}.

    Once the deadline (`time.perf_counter`) has passed, nothing longer than what arrived is looked for.

    Raises:
        ValueError: for a target at or below the loss that the twin comes to without noise, which it says.
    """
    candidates = {kind: _candidates(bounds, *KINDS[kind], num_phases) for kind in KINDS}
    found: dict[tuple[str, int], Way] = {}
    width = math.exp(twin.error)
    lowest = math.inf
    previous = num_updates = 1
    losses: dict[str, np.ndarray] = {}
    least: dict[str, float] = {}
    while num_updates <= bounds.max_updates and not (found and time.perf_counter() > deadline):
        for kind, ways in candidates.items():
            if not len(ways["rates"]):
                continue
            ends, updates, seconds = _runs(twin, ways, num_updates, target - twin.level, KINDS[kind][0])
            lowest = min(lowest, twin.level + float(np.nanmin(ends)))
            each = (_lengths(ways["shares"]) * ways["costs"]).sum(1)
            lengths, before, losses[kind] = np.full(len(ends), num_updates), losses.get(kind), twin.level + ends
            before = losses[kind] if before is None else before
            if KINDS[kind][0]:  # of some length between this one and the one before, it arrives at the end
                early = updates < EARLY * num_updates
                between = np.where(early & (before > target), _between(before, losses[kind], target), np.nan)
                between = previous * (num_updates / previous) ** between
                lengths, updates = np.where(early, between, num_updates), np.where(early, between, updates)
                seconds = np.nan_to_num(np.where(early, between * each, seconds), nan=np.inf, posinf=np.inf)
            for first in bounds.sizes:
                here = np.where(ways["sizes"][:, 0] == first, seconds, np.inf)
                at = int(np.argmin(here))
                if here[at] < (found[kind, first].seconds[1] if (kind, first) in found else math.inf):
                    interval = seconds[at] / width, seconds[at], seconds[at] * width
                    chosen = {name: column[at] for name, column in ways.items()}
                    count = math.ceil(lengths[at])
                    if not KINDS[kind][0]:  # what would come after the target changes nothing
                        count = math.ceil(updates[at])
                        chosen["shares"] = np.minimum(1.0, chosen["shares"] * num_updates / count)
                    found[kind, first] = _way(kind, chosen, count, updates[at], interval)
                    least[kind] = min(least.get(kind, math.inf), float(seconds[at]))
            # What diverged, or is long beaten, is not asked again.
            keep = np.isfinite(ends) & (num_updates * each <= LATE * least.get(kind, math.inf))
            candidates[kind] = {name: column[keep] for name, column in ways.items()}
            losses[kind] = losses[kind][keep]
        previous, num_updates = num_updates, max(num_updates + 1, int(STEP * num_updates))
    if not found:
        raise ValueError(
            f"target={target:g} is below {lowest:.3g}, the least that any way of up to {bounds.max_updates} updates "
            f"comes to by the twin, whose floor is {twin.level:.3g}: ask for less"
        )
    kinds = [kind for kind in KINDS if kind in least]
    by_time = sorted(found.items(), key=lambda item: item[1].seconds[1])
    return {kind: [way for (of, _), way in by_time if of == kind] for kind in kinds}


def _way(
    kind: str, chosen: dict[str, Any], num_updates: int, updates: float, seconds: tuple[float, float, float]
) -> Way:
    """Return the way of a candidate, phases of no update left out and those of one size put together."""
    ends = np.rint(num_updates * np.asarray([*chosen["shares"], 1.0])).astype(int)
    merged: list[list[int]] = []
    for count, size in zip(np.diff(ends, prepend=0).tolist(), chosen["sizes"].tolist(), strict=True):
        if merged and size == merged[-1][1]:
            merged[-1][0] += count
        elif count:
            merged.append([count, size])
    schedule = tuple((count, size) for count, size in merged)
    return Way(kind, schedule, float(chosen["rates"]), float(updates), seconds)


def _between(before: np.ndarray, after: np.ndarray, target: float) -> np.ndarray:
    """Return the part of the way, in logarithms, from losses above the target to losses below, where they meet it."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log(before / target) / np.log(before / after)


def _lengths(shares: np.ndarray) -> np.ndarray:
    """Return the parts of a run that its phases take, [W, 3]."""
    return np.diff(shares, axis=1, prepend=0.0, append=1.0)


def _candidates(bounds: Bounds, decays: bool, ramps: bool, num_phases: int) -> dict[str, np.ndarray]:
    """Return columns: rates [W], shares [W, 2] where batches grow, sizes [W, 3], mean seconds of an update [W]."""
    rows = []
    for size, rate in itertools.product(bounds.sizes, RATES):
        grown = [(1.0, 1.0, 1, 1)]
        if ramps:
            grown = [(u, 1.0, a, a) for u in SHARES for a in FACTORS]
        if ramps and num_phases > 2:
            grown += [(u, v, a, b * a) for u, v in itertools.combinations(SHARES, 2) for a in FACTORS for b in FACTORS]
        for first, second, a, b in grown:
            sizes = (size, size * a, size * b)
            if sizes[-1] <= bounds.sizes[-1]:
                rows.append((rate * (HIGHER if decays else 1.0) * bounds.highest_rate(size), (first, second), sizes))
    rates, shares, sizes = (np.asarray(column) for column in zip(*rows, strict=True))
    costs = {int(size): bounds.seconds_per_update(int(size)) for size in np.unique(sizes)}
    return {"rates": rates, "shares": shares, "sizes": sizes, "costs": np.vectorize(costs.__getitem__)(sizes)}


def _runs(
    twin: Fitted, ways: dict[str, np.ndarray], num_updates: int, excess: float, decays: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each way [W] its excess loss at the end, infinite where it grows without end, and the updates and
    seconds after which its loss is first `excess` above the level: infinite where it is not on the way.
    """
    count = len(ways["rates"])
    pad = -count % LANES
    bare = twin._replace(error=0.0, ratio_error=0.0)
    names = "rates", "shares", "sizes", "costs"
    columns = [np.resize(ways[name], (count + pad, *ways[name].shape[1:])) for name in names]
    pieces = [
        _run(bare, *(jnp.asarray(x[i : i + LANES], float) for x in columns), num_updates, excess, decays)
        for i in range(0, count + pad, LANES)
    ]
    ends, updates, seconds = (
        np.concatenate([np.asarray(x, float) for x in each])[:count] for each in zip(*pieces, strict=True)
    )
    return np.where(np.isfinite(ends), ends, np.inf), updates, seconds


@partial(jax.jit, static_argnames="decays")
def _run(twin: Fitted, rates, shares, sizes, costs, num_updates, excess, decays):
    """Return the excess loss at the end of runs of the twin, and updates and seconds to where it first is so small.

    The rate stays for each of PIECES, whose updates are made at once: s -> a^n s + (1 - a^n) / (1 - a) eta^2 / B
    (kappa + mu 2 L), exactly but for L, whose course is taken to be a line; and exactly where a piece
    is one update.
    """
    h, steady, shrinking = (jnp.asarray(x, float) for x in (twin.nodes, twin.steady, twin.shrinking))

    def one(rate, shares, sizes, costs):
        def advance(second, ends):
            middle, (first, last) = ends.mean(), jnp.round(num_updates * ends)
            n = last - first
            now = rate * (1 - (first + (n - 1) / 2) / num_updates) if decays else rate
            phase = (middle >= shares).sum()
            size, cost = sizes[phase], costs[phase]
            x = now * h
            grown = jnp.expm1(2 * n * jnp.log(jnp.abs(1 - x)))  # a^n - 1
            lost = x * (2 - x)  # 1 - a
            noise = now**2 / size * jnp.where(jnp.abs(lost) < 1e-6, n, -grown / lost)
            bare = (1 + grown) * second + noise * steady
            back = h @ (noise * shrinking)  # of L, what comes back as loss at the end of the piece
            later = (n - 1) / (2 * jnp.maximum(n, 1))  # the part of the end in the mean L that updates begin from
            start = h @ second / 2
            end = (h @ bare / 2 + back * (1 - later) * start) / jnp.maximum(0, 1 - back * later)
            second = jnp.where(n > 0, bare + noise * shrinking * 2 * ((1 - later) * start + later * end), second)
            return second, (h @ second / 2, n, n * cost)

        begun = jnp.asarray(twin.start, float)
        _, (losses, counts, seconds) = lax.scan(advance, begun, jnp.asarray(PIECES, float))
        # Within a piece the logarithm of the loss is taken to fall along a line.
        first = jnp.argmax(losses <= excess)
        before = jnp.where(first > 0, losses[first - 1], h @ begun / 2)
        left = jnp.clip(jnp.log(excess / losses[first]) / jnp.log(before / losses[first]), 0.0, 1.0)
        reached = losses[first] <= excess
        until = [jnp.where(reached, jnp.cumsum(x)[first] - left * x[first], jnp.inf) for x in (counts, seconds)]
        return losses[-1], *until

    return jax.vmap(one)(rates, shares, sizes, costs)
