"""The twin that runs show: the quadratic whose loss curves are those of a few short runs, for what comes after them.

The twin about given parameters (`theory.twin`) holds for a few updates; a plan needs one for a whole run. Along
eigenvectors the loss is linear in what is not known of a quadratic: in s_i, the level, and the noise, which is taken as
h_i (kappa + mu (L_t - level)) with the measured loss L_t. So the non-negative least squares of relative errors is one
solve, on a grid of curvatures h as wide as the runs can tell apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import optimize

from gdjax.theory import schedules
from gdjax.theory.schedules import Quadratic

NUM_NODES = 14


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
        quadratic: nodes of curvature with what the start and the noise have of them.
        level: the loss at its minimum.
        error: standard deviation of log loss about the curves that it was fitted to.
        num_updates: of the longest curve.
    """

    quadratic: Quadratic
    level: float
    error: float
    num_updates: int

    def losses(self, learning_rates, batch_sizes) -> np.ndarray:
        """Return the mean loss [T] after each update, for any rates and batch sizes [T]."""
        rates, sizes = (jnp.asarray(x, float) for x in (learning_rates, batch_sizes))
        length = 64 * 2 ** max(0, int(np.ceil(np.log2(len(rates) / 64))))  # so that few lengths are compiled
        pad = (0, length - len(rates))
        run = _run(self.quadratic, jnp.pad(rates, pad), jnp.pad(sizes, pad, constant_values=1.0))
        return self.level + np.asarray(run, float)[: len(rates)]


_run = jax.jit(lambda quadratic, rates, sizes: schedules.run(quadratic, rates, sizes)[1])


def fitted(curves: Sequence[Curve], *, start: float) -> Fitted:
    """Return the quadratic that fits the curves, which begin at a loss of `start`.

    Raises:
        ValueError: for no curve.
    """
    if not curves:
        raise ValueError("no run of the pilot came far enough to be described: lower the learning rate")
    highest = 1.9 / max(curve.learning_rate for curve in curves)
    longest = max(curve.learning_rate * curve.updates[-1] for curve in curves)
    nodes = np.geomspace(min(0.3 / longest, highest / 10), highest, NUM_NODES)
    rows, aims = [], []
    for curve in curves:
        rows.append(_columns(nodes, curve, start) / curve.losses[:, None])
        aims.append(np.ones(len(curve.losses)))
    # Before any update: that the parts add up.
    rows.append(5 * np.concatenate([nodes / 2, [1.0, 0.0, 0.0]])[None] / start)
    aims.append(np.full(1, 5.0))
    found, _ = optimize.nnls(np.concatenate(rows), np.concatenate(aims))
    *second, level, steady, shrinking = found
    h, s, noise = (jnp.asarray(x, float) for x in (nodes, np.asarray(second), steady * nodes))
    quadratic = Quadratic(h, s, noise, float(shrinking))
    result = Fitted(quadratic, float(level), 0.0, max(int(curve.updates[-1]) for curve in curves))
    errors = [np.log(np.maximum(at(result, curve), 1e-9) / curve.losses) for curve in curves]
    return result._replace(error=float(np.sqrt(np.mean(np.concatenate(errors) ** 2))))


def at(twin: Fitted, curve: Curve) -> np.ndarray:
    """Return what a twin says of a curve, where that was measured [E]."""
    length = int(curve.updates[-1])
    rates, sizes = np.full(length, curve.learning_rate), np.full(length, curve.batch_size)
    return twin.losses(rates, sizes)[curve.updates - 1]


def _columns(nodes: np.ndarray, curve: Curve, start: float) -> np.ndarray:
    """Return what s_i, the level, kappa and mu each add to the losses of a curve, [E, NUM_NODES + 3]."""
    length = int(curve.updates[-1])
    measured = np.interp(np.arange(length), [0, *curve.updates], [start, *curve.losses])
    keep = (1 - curve.learning_rate * nodes) ** 2
    drive = curve.learning_rate**2 / curve.batch_size * nodes

    def advance(noise, loss):
        noise = jnp.asarray(keep)[:, None] * noise + jnp.asarray(drive)[:, None] * jnp.stack([1.0, 2 * loss])[None]
        return noise, nodes @ noise / 2

    _, noise = lax.scan(advance, jnp.zeros((len(nodes), 2)), jnp.asarray(measured, float))
    noise = np.asarray(noise, float)[curve.updates - 1]
    signal = nodes / 2 * keep ** curve.updates[:, None]
    return np.concatenate([signal, np.ones((len(noise), 1)), noise], 1)
