"""How updates and learning rates scale with the batch size: laws fitted to pilots, and what they predict.

The law of updates is S(B) = S_min (1 + B_crit / B) (McCandlish et al. 2018, equation 2.11), that of the best learning
rate eta(B) = eta_max / (1 + B_* / B)^p, p = 1 for SGD (equation 2.6), 1/2 or 0 for methods that divide by the size of
the gradient (Malladi et al. 2022): the p that fits best is taken. On a real problem the laws are fits: what they miss
is measured by their residuals and widens every interval. Where log S is off the law by 0.1 to 0.15 (standard
deviation), the 90 % interval from three pilots covers as often as it says; at 0.2 82 %, at 0.3 73 %.

>>> updates = np.asarray([[1030.0, 1010.0], [146.0, 144.0], [28.0, 28.0]])  # 20 (1 + 100 / B)
>>> law = fit([2, 16, 256], updates)
>>> round(law.min_updates), round(law.critical_batch_size)
(20, 98)
>>> low, middle, high = law.interval(64)
>>> bool(low < 51 < high), round(float(middle))
(True, 51)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_DRAWS = 1000
# Standard deviation of log S about the law, known before any pilot as if from so many residuals: rates are tuned to a
# grid, and no real problem obeys the law. Three pilots leave one residual, which is often small by chance.
MODEL_ERROR, MODEL_RESIDUALS = 0.12, 3
BEYOND = 0.2  # further error of log S for each e-fold beyond the outermost pilot: the knee is sharper than the law's
POWERS = (1.0, 0.5, 0.0)
LOSS_POWERS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


class UpdatesLaw(NamedTuple):
    """S(B) = `min_updates` (1 + `critical_batch_size` / B), and draws [D] of what else the pilots allow.

    Attributes:
        min_updates: S_min, updates.
        critical_batch_size: B_crit, examples: where S is twice S_min.
        draws: (S_min [D], B_crit [D]), fits to pilots disturbed by their errors.
        model_error: standard deviation of log S about the law, beside that of the seeds, and the degrees of `freedom`
            of its estimate.
        residuals: log of measured over fitted updates at the pilots.
        seed_error: standard deviation of log S from seed to seed.
        pilots: the smallest and the largest batch size that it was fitted to.
    """

    min_updates: float
    critical_batch_size: float
    draws: tuple[np.ndarray, np.ndarray]
    model_error: float
    freedom: int
    residuals: np.ndarray
    seed_error: float
    pilots: tuple[float, float]

    def __call__(self, batch_size):
        """Return S(B), updates."""
        return self.min_updates * (1 + self.critical_batch_size / np.asarray(batch_size, float))

    def interval(self, batch_size, *, confidence: float = 0.9, num_seeds: int = 3):
        """Return (low, S(B), high) for the mean updates of `num_seeds` runs at B.

        Three errors add up: of the fit, by its draws; of the law at B, which grows beyond the pilots; of the seeds. The
        last two are known from a few pilots only, hence Student's t.
        """
        size = np.asarray(batch_size, float)[..., None]
        min_updates, critical = self.draws
        return _interval(self, batch_size, min_updates * (1 + critical / size), confidence, num_seeds)


class LossLaw(NamedTuple):
    """L(B) = `least_loss` (1 + B / `critical_batch_size`)^`power` after `num_examples` examples, tuned at each B.

    Attributes:
        least_loss: L_0, where B is small.
        critical_batch_size: B_0, examples, from where on too few updates are left.
        power: at which the loss falls with the updates.
        num_examples: E.
        draws: (L_0 [D], B_0 [D], powers [D]), fits to pilots disturbed by their errors.
        model_error, freedom, residuals, seed_error, pilots: as in `UpdatesLaw`, of log L.
    """

    least_loss: float
    critical_batch_size: float
    power: float
    num_examples: int
    draws: tuple[np.ndarray, np.ndarray, np.ndarray]
    model_error: float
    freedom: int
    residuals: np.ndarray
    seed_error: float
    pilots: tuple[float, float]

    def __call__(self, batch_size):
        """Return L(B)."""
        return self.least_loss * (1 + np.asarray(batch_size, float) / self.critical_batch_size) ** self.power

    def interval(self, batch_size, *, confidence: float = 0.9, num_seeds: int = 3):
        """Return (low, L(B), high) for the mean loss of `num_seeds` runs at B, as `UpdatesLaw.interval`."""
        size = np.asarray(batch_size, float)[..., None]
        least, scale, power = self.draws
        return _interval(self, batch_size, least * (1 + size / scale) ** power, confidence, num_seeds)


def _interval(law: UpdatesLaw | LossLaw, batch_size, drawn: np.ndarray, confidence: float, num_seeds: int):
    """Return (low, law, high) from what draws of it predict, [..., D]."""
    size = np.asarray(batch_size, float)[..., None]
    smallest, largest = law.pilots
    beyond = np.log(np.maximum(np.maximum(size / largest, smallest / size), 1))
    spread = np.hypot(np.hypot(law.model_error, BEYOND * beyond), law.seed_error / num_seeds**0.5)
    # Not the seed that the draws were made from: the two errors are independent.
    noise = np.random.default_rng(1).standard_t(law.freedom, size=drawn.shape[-1])
    logs = np.log(drawn) + spread * noise
    low, high = np.exp(np.quantile(logs, [(1 - confidence) / 2, (1 + confidence) / 2], axis=-1))
    middle = law(batch_size)
    return np.minimum(low, middle), middle, np.maximum(high, middle)


class RateLaw(NamedTuple):
    """eta(B) = `max_rate` / (1 + `noise_scale` / B)^`power`, and no more than `highest`.

    `highest` is the best rate of any pilot: a rate that is too high never arrives, one too low arrives later.
    """

    max_rate: float
    noise_scale: float
    power: float
    highest: float

    def __call__(self, batch_size):
        """Return eta(B)."""
        rate = self.max_rate / (1 + self.noise_scale / np.asarray(batch_size, float)) ** self.power
        return np.minimum(rate, self.highest)


def fit(batch_sizes: Sequence[int], updates: np.ndarray) -> UpdatesLaw:
    """Fit S(B) = S_min (1 + B_crit / B) to log updates by least squares.

    Args:
        batch_sizes: [P], at least two different ones.
        updates: [P, S], finite, of every pilot and seed at the best rate.

    Raises:
        ValueError: for fewer than two batch sizes, and for updates that are not [P, S], positive and finite.
    """
    sizes, logs, seed_error, num_seeds = _checked(batch_sizes, updates, "updates")
    scale, critical = _hyperbola(sizes, logs[None])
    residuals = logs - np.log(scale * (1 + critical / sizes))
    model_error, freedom, noise = _errors(residuals, seed_error, num_seeds, num_unknown=2)
    draws = _hyperbola(sizes, logs + noise)
    ends = float(sizes.min()), float(sizes.max())
    return UpdatesLaw(float(scale[0]), float(critical[0]), draws, model_error, freedom, residuals, seed_error, ends)


def fit_losses(batch_sizes: Sequence[int], losses: np.ndarray, *, num_examples: int) -> LossLaw:
    """Fit L(B) = L_0 (1 + B / B_0)^a to log losses after `num_examples` examples by least squares.

    It is the law of updates for a loss that falls as a power of the updates: E examples at batch size B bring as much
    as E / (B + B_crit) updates without noise, B_crit being B_0. The power is one of LOSS_POWERS, 1 for two pilots.

    Args:
        batch_sizes: [P], at least two different ones.
        losses: [P, S], finite, of every pilot and seed at the best rate.
        num_examples: E.

    Raises:
        ValueError: for fewer than two batch sizes, and for losses that are not [P, S], positive and finite.
    """
    sizes, logs, seed_error, num_seeds = _checked(batch_sizes, losses, "losses")
    powers = LOSS_POWERS if len(sizes) > 2 else (1.0,)

    def fitted(logs):
        """Return (L_0 [D], B_0 [D], powers [D]) of log losses [D, P]."""
        laws = [_log_law(1 / sizes, logs, power) for power in powers]
        offsets, slopes, errors = (np.stack(part) for part in zip(*laws, strict=True))
        best = errors.argmin(0), np.arange(len(logs))
        return np.exp(offsets[best]), 1 / slopes[best], np.asarray(powers)[best[0]]

    [least], [scale], [power] = fitted(logs[None])
    residuals = logs - np.log(least * (1 + sizes / scale) ** power)
    model_error, freedom, noise = _errors(residuals, seed_error, num_seeds, num_unknown=3)
    ends, numbers = (float(sizes.min()), float(sizes.max())), (float(least), float(scale), float(power))
    return LossLaw(*numbers, num_examples, fitted(logs + noise), model_error, freedom, residuals, seed_error, ends)


def _checked(batch_sizes: Sequence[int], values: np.ndarray, name: str):
    """Return (sizes [P], logs of the mean over seeds [P], the deviation of logs over seeds, S)."""
    sizes, values = np.asarray(batch_sizes, float), np.asarray(values, float)
    if len(set(sizes)) < 2:
        raise ValueError(f"batch_sizes={list(batch_sizes)} must hold two different ones to fit a law with two unknowns")
    if values.ndim != 2 or len(values) != len(sizes):
        raise ValueError(f"{name} of shape {values.shape} must be [{len(sizes)}, S]: a row for each batch size")
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{name} must be positive and finite: leave censored and diverged pilots out")
    num_seeds = values.shape[1]
    seed_error = float(np.sqrt(np.log(values).var(1, ddof=1).mean())) if num_seeds > 1 else 0.0
    return sizes, np.log(values.mean(1)), seed_error, num_seeds


def _errors(residuals: np.ndarray, seed_error: float, num_seeds: int, *, num_unknown: int):
    """Return (the law's own error, its degrees of freedom, errors of NUM_DRAWS sets of pilots [D, P])."""
    left = max(len(residuals) - num_unknown, 0)
    freedom = MODEL_RESIDUALS + left
    # The seeds' part of the residuals is counted apart, and not below what one would believe without them.
    excess = max((residuals**2).sum() - left * seed_error**2 / num_seeds, 0.0)
    model_error = float(np.sqrt((MODEL_RESIDUALS * MODEL_ERROR**2 + excess) / freedom))
    spread = np.hypot(model_error, seed_error / num_seeds**0.5)
    return model_error, freedom, spread * np.random.default_rng(0).standard_t(freedom, (NUM_DRAWS, len(residuals)))


def fit_rates(batch_sizes: Sequence[int], rates: Sequence[float]) -> RateLaw:
    """Fit eta(B) to log rates [P] by least squares, for the power that fits best; p = 1 for fewer than three.

    Raises:
        ValueError: for rates that are not positive and finite.
    """
    if not all(0 < rate < np.inf for rate in rates):
        raise ValueError(f"rates={list(rates)} must be positive and finite: leave pilots without a best rate out")
    sizes, logs = np.asarray(batch_sizes, float), np.log(np.asarray(rates, float))
    best: tuple[float, RateLaw] | None = None
    for power in POWERS if len(sizes) > 2 else POWERS[:1]:
        top, scale, error = _log_law(sizes, logs[None], -power)
        if best is None or error[0] < best[0] - 1e-9:
            law = RateLaw(float(np.exp(top[0])), float(scale[0]) if power else 0.0, power, float(np.max(rates)))
            best = float(error[0]), law
    assert best is not None
    return best[1]


def pareto(times: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """Return which of the choices [C] no other one beats in both time and examples, bool [C]."""
    better = (times[:, None] >= times) & (examples[:, None] >= examples)
    strictly = (times[:, None] > times) | (examples[:, None] > examples)
    return np.asarray(~(better & strictly).any(1))


def _hyperbola(sizes: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (S_min [D], B_crit [D]) of log updates [D, P]."""
    offset, scale, _ = _log_law(sizes, logs, 1.0)
    return np.exp(offset), scale


def _log_law(sizes: np.ndarray, logs: np.ndarray, power: float):
    """Fit log y = a + power log(1 + b / B) to logs [D, P]; return a [D], b [D], the sum of squares [D].

    One unknown is linear and the other is searched on a grid that reaches far beyond the sizes.
    """
    grid = np.geomspace(sizes.min() / 100, sizes.max() * 100, 600)
    shapes = power * np.log1p(grid[:, None] / sizes)  # [G, P]
    offsets = logs.mean(1)[:, None] - shapes.mean(1)  # [D, G]
    centred, shapes = logs - logs.mean(1, keepdims=True), shapes - shapes.mean(1, keepdims=True)
    errors = (centred**2).sum(1)[:, None] - 2 * centred @ shapes.T + (shapes**2).sum(1)
    best = errors.argmin(1)
    rows = np.arange(len(logs))
    return offsets[rows, best], grid[best], errors[rows, best]
