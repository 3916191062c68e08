"""The twin that runs show: the quadratic whose loss curves are those of a few short runs, for what comes after them.

The twin about given parameters (`theory.twin`) holds for a few updates; a plan needs one for a whole run. Along
eigenvectors of curvature h_i, s_i = E theta_i^2 and the loss L = level + sum_i h_i s_i / 2 obey

    s_i' = (1 - eta h_i)^2 s_i + eta^2 / B (kappa_i + mu_i 2 (L - level)),

noise that stays and noise that shrinks with the loss, each a mixture of h^0 and h^1 over the spectrum. With the
measured L in the noise, all that is not known is linear in the loss of a run: s_i, the level, kappa and mu are the
non-negative least squares of relative errors, on a grid of curvatures as wide as the runs can tell apart.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import optimize

NUM_NODES = 16
NORMAL = 1.4826  # standard deviation over the median magnitude, of normal errors
USUAL, USUAL_WORTH = 0.3, 4  # error of log updates on other problems, and how many curves of one's own that is worth
MOST = 0.7  # of an error that a median is taken for
PATIENCE = 4  # times the updates of a run in which its prediction is to arrive
LOW = 0.1  # relative error of one loss that a level as high as the start is worth
LEVELS = 4  # solves, each with the noise above the level of the one before


class Curve(NamedTuple):
    """A run that was measured, at a constant rate and batch size.

    Attributes:
        learning_rate, batch_size: of all updates.
        updates: after which it was evaluated, ascending [E].
        losses: then [E], finite.
    """

    learning_rate: float
    batch_size: int
    updates: np.ndarray
    losses: np.ndarray


class Fitted(NamedTuple):
    """A quadratic in the place of a problem, for whole runs.

    Attributes:
        nodes: curvatures h [D].
        start: s [D] before any update.
        steady, shrinking: kappa and mu [D].
        level: the loss at its minimum.
        error: half-width, 90 %, of the logarithm of the updates to a loss that are predicted.
        num_updates: of the longest curve.
        ratio_error: the same as `error` for the ratio of the updates of two runs, whose errors have a part in common.
    """

    nodes: np.ndarray
    start: np.ndarray
    steady: np.ndarray
    shrinking: np.ndarray
    level: float
    error: float
    num_updates: int
    ratio_error: float

    def update(self, second: jax.Array, rate: jax.Array, batch_size: jax.Array) -> jax.Array:
        """Return s [D] after an update."""
        h, steady, shrinking = (jnp.asarray(x, float) for x in (self.nodes, self.steady, self.shrinking))
        return (1 - rate * h) ** 2 * second + rate**2 / batch_size * (steady + shrinking * (h @ second))

    def losses(self, learning_rates, batch_sizes) -> np.ndarray:
        """Return the mean loss [T] after each update, for any rates and batch sizes [T]."""
        rates, sizes = (np.asarray(x, float) for x in (learning_rates, batch_sizes))
        pad = (0, padded(len(rates)) - len(rates))
        bare = self._replace(error=0.0, ratio_error=0.0)
        excess = _run(bare, np.pad(rates, pad), np.pad(sizes, pad, constant_values=1.0))
        return self.level + np.asarray(excess, float)[: len(rates)]


def padded(num_updates: int) -> int:
    """Return the next of 64, 128, 256, ..., so that few lengths are compiled."""
    return 64 * 2 ** max(0, math.ceil(math.log2(num_updates / 64)))


@jax.jit
def _run(twin: Fitted, rates, sizes):
    def update(second, now):
        second = twin.update(second, *now)
        return second, twin.nodes @ second / 2

    columns = jnp.asarray(rates, float), jnp.asarray(sizes, float)
    return lax.scan(update, jnp.asarray(twin.start, float), columns)[1]


def fitted(curves: Sequence[Curve], *, start: float, target: float) -> Fitted:
    """Return the quadratic that fits the curves, which begin at a loss of `start`.

    Its error is that of the updates of each curve to the target, or to the least loss that it came to, by the fit to
    all others.

    Raises:
        ValueError: for no curve.
    """
    if not curves:
        raise ValueError("no run of the pilot came far enough to be described: lower the learning rate")
    highest = 1.9 / max(curve.learning_rate for curve in curves)
    longest = max(curve.learning_rate * curve.updates[-1] for curve in curves)
    nodes = np.geomspace(min(0.3 / longest, highest / 10), highest, NUM_NODES)
    result = _fit(nodes, curves, start)
    errors = []
    for i, curve in enumerate(curves):
        if len(curves) < 2:
            break
        others = _fit(nodes, [*curves[:i], *curves[i + 1 :]], start)
        first = int(np.argmax(curve.losses <= max(target, curve.losses.min())))
        longer = PATIENCE * int(curve.updates[first])
        predicted = others.losses(np.full(longer, curve.learning_rate), np.full(longer, curve.batch_size))
        arrived = predicted <= curve.losses[first]
        updates = 1 + int(np.argmax(arrived)) if arrived.any() else longer
        errors.append(math.log(updates / curve.updates[first]))
    ratios = [one - other for one, other in itertools.combinations(errors, 2)]
    return result._replace(error=_width(errors, len(errors)), ratio_error=_width(ratios, len(errors)))


def _width(errors: Sequence[float], num_curves: int) -> float:
    """Return the half-width, 90 %, that errors by this many curves let expect of others.

    At the edge of what converges nothing else tells of a curve: the median is not of those. Few curves tell little.
    """
    own = NORMAL * min(float(np.median(np.abs(errors))), MOST) if errors else 0.0
    return 1.645 * math.sqrt((USUAL_WORTH * USUAL**2 + num_curves * own**2) / (USUAL_WORTH + num_curves))


def _fit(nodes: np.ndarray, curves: Sequence[Curve], start: float) -> Fitted:
    shapes = np.stack([np.full(NUM_NODES, nodes[-1]), nodes])  # of noise
    # The parts add up before any update; that is known best. Where nothing tells a level from what is slow, it is low.
    first = 5 * np.concatenate([nodes / 2, [1.0, 0.0, 0.0, 0.0, 0.0]])[None] / start
    low = LOW * np.eye(len(nodes) + 5)[NUM_NODES][None] / start
    level, before, found = 0.0, 0.0, np.zeros(len(nodes) + 5)
    for _ in range(LEVELS):
        columns = [_columns(nodes, shapes, curve, start, level) / curve.losses[:, None] for curve in curves]
        rows = np.concatenate([*columns, first, low])
        found, _ = optimize.nnls(rows, np.append(np.ones(len(rows) - 2), [5.0, 0.0]))
        before, level = level, float(found[NUM_NODES])
    steady, shrinking = found[-4:-2] @ shapes, found[-2:] @ shapes
    steady = steady + shrinking * max(0.0, 2 * (level - before))  # so far the noise was that above the level before
    longest = max(int(curve.updates[-1]) for curve in curves)
    return Fitted(nodes, found[:NUM_NODES], steady, shrinking, level, 0.0, longest, 0.0)


def at(twin: Fitted, curve: Curve) -> np.ndarray:
    """Return what a twin says of a curve, where that was measured [E]."""
    length = int(curve.updates[-1])
    rates, sizes = np.full(length, curve.learning_rate), np.full(length, curve.batch_size)
    return twin.losses(rates, sizes)[curve.updates - 1]


def _columns(nodes: np.ndarray, shapes: np.ndarray, curve: Curve, start: float, level: float) -> np.ndarray:
    """Return what s_i, the level, and kappa and mu of each shape [K, D] add to the losses of a curve, [E, D + 1 + 2 K].

    The noise that mu stands for is that of the measured loss above `level`.
    """
    logs = np.interp(np.arange(curve.updates[-1]), [0, *curve.updates], np.log([start, *curve.losses]))
    above = 2 * np.maximum(np.exp(logs) - level, 0.0)
    keep = (1 - curve.learning_rate * nodes) ** 2
    drive = curve.learning_rate**2 / curve.batch_size * shapes
    pad = (0, padded(len(above)) - len(above))
    noise = _noise(*(jnp.asarray(x, float) for x in (nodes, keep, drive, np.pad(above, pad))))
    noise = np.asarray(noise, float)[curve.updates - 1]
    signal = nodes / 2 * keep ** curve.updates[:, None]
    return np.concatenate([signal, np.ones((len(noise), 1)), noise], 1)


@jax.jit
def _noise(nodes, keep, drive, above):
    """Return what the noise of each shape, first as it is and then times `above` [T], adds to the loss, [T, 2 K]."""

    def advance(second, size):  # [2, K, D]
        second = keep[None, None] * second + drive[None] * jnp.stack([jnp.ones_like(size), size])[:, None, None]
        return second, (second @ nodes / 2).reshape(-1)

    return lax.scan(advance, jnp.zeros((2, *drive.shape)), above)[1]
