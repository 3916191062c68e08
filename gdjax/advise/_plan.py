"""What `advise.schedule` found: ways, what was predicted and measured of each, and which is best in plain words."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from scipy import optimize

from gdjax.advise._fitted import Curve, Fitted
from gdjax.advise._ways import FINE, KINDS, Way
from gdjax.noise import student
from gdjax.tuning import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EQUAL = 0.03  # slower than the fastest may a simpler way be, where the seeds cannot tell them apart
FEW = 1 / 6  # of the seeds may not arrive
GIVEN_UP = 4  # times its updates, a run that has not arrived is given up, or counted as if it had been
COARSE = 1.645 * math.log(FINE) / 6**0.5  # half-width, 90 %, of a ratio of two times for rates between those tried
LARGE = 0.2  # relative residual of c_0 + c_1 B from which on the table is used in its place


class Times(NamedTuple):
    """Seconds of an update, c_0 + c_1 B, or the table where that does not fit.

    Attributes:
        sizes: ascending, measured.
        seconds: measured.
        per_update: c_0.
        per_example: c_1.
        residual: the largest relative one.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    per_update: float
    per_example: float
    residual: float

    @classmethod
    def of(cls, sizes: Sequence[int], seconds: Sequence[float]) -> "Times":
        """Fit both costs, neither below 0, to relative errors."""
        x, y = np.asarray(sizes, float), np.asarray(seconds, float)
        (c0, c1), _ = optimize.nnls(np.stack([1 / y, x / y], 1), np.ones(len(y)))
        residual = float(np.abs((c0 + c1 * x) / y - 1).max())
        return cls(tuple(sizes), tuple(y.tolist()), float(c0), float(c1), residual)

    @property
    def fits(self) -> bool:
        """Whether c_0 + c_1 B describes the table."""
        return self.residual <= LARGE

    def __call__(self, batch_size: int) -> float:
        """Return the seconds of one update."""
        if self.fits:
            return self.per_update + self.per_example * batch_size
        x, y = np.log(self.sizes), np.log(self.seconds)
        return float(np.exp(np.interp(math.log(batch_size), x, y))) * max(1.0, batch_size / self.sizes[-1])

    def until(self, schedule: Sequence[tuple[int, int]], num_updates: float) -> float:
        """Return the seconds of the first so many updates of a schedule, whose last phase goes on."""
        total, left = 0.0, float(num_updates)
        for i, (count, size) in enumerate(schedule):
            here = left if i == len(schedule) - 1 else min(left, count)
            total, left = total + here * self(size), left - here
        return total


class Run(NamedTuple):
    """A way as it was run in the end.

    Attributes:
        way: with its tuned rate and length.
        updates: to the target [S]; of a seed that did not arrive, GIVEN_UP times those of the way.
        seconds: of these [S].
        missed: seeds that did not arrive.
    """

    way: Way
    updates: np.ndarray
    seconds: np.ndarray
    missed: int = 0

    @property
    def arrives(self) -> bool:
        """Whether all but a few seeds arrive."""
        return self.missed <= FEW * len(self.updates)


def counted(way: Way, updates: np.ndarray, times: Times) -> Run:
    """Return the run of a way that took so many updates, infinite where it did not arrive."""
    all_ = np.where(np.isinf(updates), GIVEN_UP * way.num_updates, updates)
    missed = int((all_ >= GIVEN_UP * way.num_updates).sum())
    return Run(way, all_, np.asarray([times.until(way.schedule, count) for count in all_]), missed)


def ratio(one: Run, other: Run) -> tuple[float, float, float]:
    """Return (low, mean, high), 90 %, of the seconds of one way over those of another, by the seeds of both."""
    count = min(len(one.seconds), len(other.seconds))
    difference = np.log(one.seconds[:count]) - np.log(other.seconds[:count])
    width = float(student(count - 1, confidence=0.9)) * difference.std(ddof=1) / count**0.5
    return tuple(math.exp(difference.mean() + sign * width) for sign in (-1, 0, 1))  # pyright: ignore


def best_of(runs: Mapping[str, Run]) -> str:
    """Return the kind of the least mean seconds, or a simpler one that seeds do not tell from it, not EQUAL slower."""
    some = {kind: run for kind, run in runs.items() if run.arrives} or runs
    means = {kind: float(some[kind].seconds.mean()) for kind in KINDS if kind in some}
    least = min(means, key=means.__getitem__)
    near = {kind for kind in means if ratio(runs[kind], runs[least])[0] <= 1}
    return next(kind for kind, mean in means.items() if kind in near and mean <= (1 + EQUAL) * means[least])


class Local(NamedTuple):
    """The twin about the parameters of a pilot after `num_updates`: it `held` for so many of the `seen` next ones.

    `curvature` is the largest that it saw.
    """

    num_updates: int
    held: int
    seen: int
    curvature: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which way to choose batch size and rate along a run reaches a target first.

    Attributes:
        goal: the target.
        ways: {kind: the planned way}, of constant, decay, ramp and both.
        runs: {kind: that way tuned and run with fresh seeds}.
        twin: the quadratic that the plan was made by.
        curves: of the pilot, that it was fitted to.
        times: seconds of an update.
        locals: how far the twin about given parameters held.
        unknown: what the seconds did not allow to establish.
        seconds: wall time of it all.
    """

    goal: Target
    ways: Mapping[str, Way]
    runs: Mapping[str, Run]
    twin: Fitted
    curves: tuple[Curve, ...]
    times: Times
    locals: tuple[Local, ...]
    unknown: tuple[str, ...]
    seconds: float

    @property
    def best(self) -> str:
        """The kind of the least seconds, measured where anything was; a simpler one that seeds do not tell from it."""
        if self.runs:
            return best_of(self.runs)
        return min(self.ways, key=lambda kind: self.ways[kind].seconds[1])

    @property
    def way(self) -> Way:
        """The best way, as it was run."""
        return self.runs[self.best].way if self.best in self.runs else self.ways[self.best]

    @property
    def schedule(self) -> list[tuple[int, int]]:
        """[(num_updates, B), ...] of the best way, for `training.run`."""
        return list(self.way.schedule)

    def ramp(self) -> list[tuple[int, int]]:
        """Return [(examples seen, B from there on), ...] of the best way."""
        ends = itertools.accumulate(count * size for count, size in self.schedule)
        return [(start, size) for start, (_, size) in zip([0, *ends], self.schedule, strict=False)]

    def learning_rate(self, count: jax.typing.ArrayLike) -> jax.Array:
        """Return the rate of the best way after `count` updates: a schedule for optax."""
        share = jax.numpy.asarray(count, float) / self.way.num_updates
        return self.way.learning_rate * (jax.numpy.maximum(0.0, 1 - share) if self.way.decays else share**0)

    def compared(self, kind: str) -> tuple[float, float, float]:
        """Return (low, mean, high), 90 %, of the seconds of a way that was run over those of the best one."""
        return ratio(self.runs[kind], self.runs[self.best])

    def foreseen(self, kind: str) -> tuple[float, float, float]:
        """Return (low, middle, high), 90 %, of the same ratio as the twin had it.

        It is as wide as the twin is wrong about ratios of runs of the pilot, as the rates that were tried are coarse,
        and as the seeds differ.
        """
        one, other = self.ways[kind].seconds[1], self.ways[self.best].seconds[1]
        seeds = 0.0
        if {kind, self.best} <= set(self.runs):
            low, _, high = self.compared(kind)
            seeds = math.log(high / low) / 2
        width = math.hypot(self.twin.ratio_error, COARSE, seeds)
        return tuple(one / other * math.exp(sign * width) for sign in (-1, 0, 1))  # pyright: ignore

    def claims(self) -> dict[str, bool]:
        """Return of which ways the twin foresaw a difference from the best, beyond its noise, and whether rightly."""
        others = [kind for kind in self.runs if kind != self.best]
        seen = {kind: self.foreseen(kind) for kind in others}
        return {
            kind: (middle > 1) == (self.compared(kind)[1] > 1)
            for kind, (low, middle, high) in seen.items()
            if not low <= 1 <= high
        }

    def sentence(self) -> str:
        """Return which way is best and by how much, in plain language."""
        best, way = self.best, self.way
        if not self.runs:
            return f"By the twin {best} is the fastest, {way.seconds[1]:.3g} s to {self.goal}; nothing was run."
        run = self.runs[best]
        start = (
            f"{best.capitalize()} is the fastest to {self.goal}: {run.updates.mean():.0f} updates, "
            f"{run.seconds.mean():.3g} s"
        )
        parts = []
        for kind in self.runs:
            if kind != best:
                low, mean, high = self.compared(kind)
                beyond = "" if low > 1 else ", within the noise of the seeds"
                parts.append(f"{kind} takes {mean:.2f} x ({low:.2f}-{high:.2f}{beyond})")
        kept = [kind for kind, one in self.runs.items() if self.held(kind)]
        end = f"The twin's interval holds what was measured of {len(kept)} of {len(self.runs)}"
        claims = [f"{kind} ({'rightly' if right else 'wrongly'})" for kind, right in self.claims().items()]
        end += f"; beyond its error it had foreseen a difference of {', '.join(claims) or 'none'}."
        return f"{start}; {'; '.join(parts)}. {end}" if parts else f"{start}. {end}"

    def held(self, kind: str) -> bool:
        """Whether what a way took lies in the interval that was predicted."""
        low, _, high = self.ways[kind].seconds
        return bool(low <= self.runs[kind].seconds.mean() <= high)

    def figure(self, title: str) -> "Figure":
        """Draw ways, pilot and times."""
        from gdjax.advise import _plan_figure

        return _plan_figure.plan(self, title)

    def summary(self) -> dict[str, Any]:
        """Return everything, for a JSON file."""
        ways = {
            kind: {
                "schedule": way.schedule,
                "learning_rate": way.learning_rate,
                "decays": way.decays,
                "updates": way.num_updates,
                "examples": way.num_examples,
                "predicted_updates": way.updates,
                "seconds": way.seconds,
                "run": kind in self.runs
                and {
                    "schedule": self.runs[kind].way.schedule,
                    "learning_rate": self.runs[kind].way.learning_rate,
                    "updates": self.runs[kind].updates,
                    "missed": self.runs[kind].missed,
                    "seconds": self.runs[kind].seconds,
                    "inside": self.held(kind),
                    "ratio": self.compared(kind),
                    "foreseen": self.foreseen(kind),
                },
            }
            for kind, way in self.ways.items()
        }
        return {
            "goal": str(self.goal),
            "best": self.best,
            "verdict": self.sentence(),
            "schedule": self.schedule,
            "ramp": self.ramp(),
            "learning_rate": self.way.learning_rate,
            "decays": self.way.decays,
            "ways": ways,
            "twin": self.twin._asdict(),
            "local_twins": [local._asdict() for local in self.locals],
            "times": self.times._asdict(),
            "unknown": self.unknown,
            "seconds": self.seconds,
        }
