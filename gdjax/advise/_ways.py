"""Ways to choose batch sizes and rates along a run, and the least time that a twin gives each of them.

`theory.plans` knows the best ramp in closed form; here batch sizes are powers of two between bounds, the time of an
update is measured, and the rate is bounded by the smallest batch, as real runs diverge where the quadratic would not.
So all ramps of up to three phases on a grid are run by the twin, side by side.
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
RATES = np.geomspace(1, 0.1, 8)  # of the highest at the first batch size
HIGHER = 2.0  # than a rate that stays may one begin that falls
STEP = 1.2  # from one number of updates to the next
ENDS = np.concatenate([[0.0], np.geomspace(1e-4, 5e-3, 8), np.linspace(0.01, 1, 100)])
PIECES = np.stack([ENDS[:-1], ENDS[1:]], 1)  # of a run, in shares of its updates, among them all SHARES
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
        loss: at the end, by the twin.
        seconds: (low, predicted, high), an interval of 90 %.
    """

    kind: str
    schedule: tuple[tuple[int, int], ...]
    learning_rate: float
    loss: float
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
    previous = num_updates = 4
    losses: dict[str, np.ndarray] = {}
    least: dict[str, float] = {}
    while num_updates <= bounds.max_updates and not (found and time.perf_counter() > deadline):
        for kind, ways in candidates.items():
            if not len(ways["each"]):
                continue
            before, losses[kind] = losses.get(kind), twin.level + _ends(twin, ways, num_updates, KINDS[kind][0])
            lowest = min(lowest, float(np.nanmin(losses[kind])))
            if before is None:  # nobody arrives after so few
                continue
            with np.errstate(invalid="ignore", divide="ignore"):
                fall = np.log(before / losses[kind])
                part = np.where(before > target, np.log(before / target) / fall, 0.0)  # of the step, in logarithms
                # Beyond the step lie those that do not arrive in it, and are not asked.
                updates = previous * (num_updates / previous) ** np.clip(np.nan_to_num(part), 0.0, 1.0)
            seconds = np.where(losses[kind] <= target, updates * ways["each"], np.inf)
            for first in bounds.sizes:
                here = np.where(ways["sizes"][:, 0] == first, seconds, np.inf)
                at = int(np.argmin(here))
                if here[at] < (found[kind, first].seconds[1] if (kind, first) in found else math.inf):
                    interval = seconds[at] / width, seconds[at], seconds[at] * width
                    chosen = {name: column[at] for name, column in ways.items()}
                    found[kind, first] = _way(kind, chosen, math.ceil(updates[at]), losses[kind][at], interval)
                    least[kind] = min(least.get(kind, math.inf), float(seconds[at]))
            # What diverged, or is long beaten, is not asked again.
            keep = np.isfinite(losses[kind]) & (num_updates * ways["each"] <= LATE * least.get(kind, math.inf))
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


def _way(kind: str, chosen: dict[str, Any], num_updates: int, loss: float, seconds: tuple[float, float, float]) -> Way:
    """Return the way of a candidate, phases of no update left out and those of one size put together."""
    ends = np.rint(num_updates * np.asarray([*chosen["shares"], 1.0])).astype(int)
    merged: list[list[int]] = []
    for count, size in zip(np.diff(ends, prepend=0).tolist(), chosen["sizes"].tolist(), strict=True):
        if merged and size == merged[-1][1]:
            merged[-1][0] += count
        elif count:
            merged.append([count, size])
    schedule = tuple((count, size) for count, size in merged)
    return Way(kind, schedule, float(chosen["rates"]), float(loss), seconds)


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
    each = {int(size): bounds.seconds_per_update(int(size)) for size in np.unique(sizes)}
    lengths = np.diff(shares, axis=1, prepend=0.0, append=1.0)
    seconds = (lengths * np.vectorize(each.__getitem__)(sizes)).sum(1)
    return {"rates": rates, "shares": shares, "sizes": sizes, "each": seconds}


def _ends(twin: Fitted, ways: dict[str, np.ndarray], num_updates: int, decays: bool) -> np.ndarray:
    """Return the excess loss at the end of each way [W], infinite where it grows without end."""
    count = len(ways["rates"])
    pad = -count % LANES
    bare = twin._replace(error=0.0)
    columns = [np.resize(ways[name], (count + pad, *ways[name].shape[1:])) for name in ("rates", "shares", "sizes")]
    pieces = [
        _run(bare, *(jnp.asarray(x[i : i + LANES], float) for x in columns), num_updates, decays)
        for i in range(0, count + pad, LANES)
    ]
    losses = np.concatenate([np.asarray(piece, float) for piece in pieces])[:count]
    return np.where(np.isfinite(losses), losses, np.inf)


@partial(jax.jit, static_argnames="decays")
def _run(twin: Fitted, rates, shares, sizes, num_updates, decays):
    """Return the excess loss at the end of runs of the twin, [LANES].

    The rate stays for each of PIECES, whose updates are made at once: s -> a^n s + (1 - a^n) / (1 - a) eta^2 / B
    (kappa + mu 2 L), exactly but for L, whose course is taken to be a line; and exactly where a piece
    is one update.
    """
    h, steady, shrinking = (jnp.asarray(x, float) for x in (twin.nodes, twin.steady, twin.shrinking))

    def one(rate, shares, sizes):
        def advance(second, ends):
            middle, (first, last) = ends.mean(), jnp.round(num_updates * ends)
            n = last - first
            now = rate * (1 - (first + (n - 1) / 2) / num_updates) if decays else rate
            size = jnp.where(middle < shares[0], sizes[0], jnp.where(middle < shares[1], sizes[1], sizes[2]))
            x = now * h
            grown = jnp.expm1(2 * n * jnp.log(jnp.abs(1 - x)))  # a^n - 1
            lost = x * (2 - x)  # 1 - a
            noise = now**2 / size * jnp.where(jnp.abs(lost) < 1e-6, n, -grown / lost)
            bare = (1 + grown) * second + noise * steady
            back = h @ (noise * shrinking)  # of L, what comes back as loss at the end of the piece
            later = (n - 1) / (2 * jnp.maximum(n, 1))  # the part of the end in the mean L that updates begin from
            start = h @ second / 2
            end = (h @ bare / 2 + back * (1 - later) * start) / jnp.maximum(0, 1 - back * later)
            return jnp.where(n > 0, bare + noise * shrinking * 2 * ((1 - later) * start + later * end), second), None

        return h @ lax.scan(advance, jnp.asarray(twin.start, float), jnp.asarray(PIECES, float))[0] / 2

    return jax.vmap(one)(rates, shares, sizes)
