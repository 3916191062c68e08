"""A law of the loss over batch size and updates, fitted to runs, and the best batch size of a longer run.

    L(B, T) = L_0 + C_B / B^beta + C_S / T^gamma    (+ A / N^alpha for models of N parameters)

After E examples, T = E / B, it is least at B_opt = (beta C_B / (gamma C_S))^(1 / (beta + gamma)) E^(gamma / (beta +
gamma)). The noisy quadratic at a fixed rate is such a law, with beta = 1 and gamma = r (`horizon.exponent`).

>>> sizes, updates = np.array([1.0, 1, 4, 4, 16, 16]), np.array([10.0, 90, 20, 80, 30, 70])
>>> law = fit(sizes, updates, losses=2 + 0.5 / sizes + 3 / updates**0.5)
>>> print(f"{law.irreducible:.3f} {law.batch_exponent:.3f} {law.updates_exponent:.3f} {law.best_batch_size(1e4):.2f}")
2.000 1.000 0.500 10.36
"""

import itertools
from typing import NamedTuple

import numpy as np

EXPONENTS = 0.02, 3.0  # between which they are sought
GRID, ZOOMS = 12, 14


class Law(NamedTuple):
    """L(B, T) = irreducible + batch / B^batch_exponent + updates / T^updates_exponent + params / N^params_exponent.

    Attributes:
        irreducible, batch, updates, params: L_0, C_B, C_S and A; A is 0 where all models were of one size.
        batch_exponent, updates_exponent, params_exponent: beta, gamma and alpha.
        error: root mean square of the relative residuals of the fit.
    """

    irreducible: float
    batch: float
    batch_exponent: float
    updates: float
    updates_exponent: float
    error: float
    params: float = 0.0
    params_exponent: float = 0.0

    def __call__(self, batch_size, num_updates, num_params=1.0):
        """Return L(B, T)."""
        noise = self.batch / np.asarray(batch_size, float) ** self.batch_exponent
        bias = self.updates / np.asarray(num_updates, float) ** self.updates_exponent
        return self.irreducible + noise + bias + self.params / np.asarray(num_params, float) ** self.params_exponent

    def best_batch_size(self, num_examples):
        """Return B_opt after E examples."""
        ratio = self.batch_exponent * self.batch / (self.updates_exponent * self.updates)
        both = self.batch_exponent + self.updates_exponent
        return ratio ** (1 / both) * np.asarray(num_examples, float) ** (self.updates_exponent / both)

    def relative(self, factor):
        """Return the part of the loss that B moves, at k B_opt over that at B_opt: (g k^-b + b k^g) / (g + b)."""
        b, g = self.batch_exponent, self.updates_exponent
        return (g * np.asarray(factor, float) ** -b + b * np.asarray(factor, float) ** g) / (g + b)


def fit(batch_sizes, num_updates, *, losses, num_params=None) -> Law:
    """Fit the law to losses [P] by least squares of relative errors, with coefficients that are not negative.

    The coefficients are linear; the exponents are searched on a grid that zooms in.

    Args:
        batch_sizes: B [P].
        num_updates: T [P].
        losses: [P], positive and finite.
        num_params: N [P], where models differ in size.

    Raises:
        ValueError: for fewer runs than unknowns, for a quantity of fewer than three values, for losses that are not
            positive and finite.
    """
    losses = np.asarray(losses, float)
    given = {"batch_sizes": batch_sizes, "num_updates": num_updates, "num_params": num_params}
    columns = {name: np.asarray(values, float) for name, values in given.items() if values is not None}
    if not (np.isfinite(losses) & (losses > 0)).all():
        raise ValueError("losses must be positive and finite: leave runs that diverged out")
    if len(losses) < 2 * len(columns) + 1:
        raise ValueError(f"losses of {len(losses)} runs do not fix {2 * len(columns) + 1} unknowns: give more runs")
    for name, values in columns.items():
        if len(np.unique(values)) < 3:
            raise ValueError(f"{name} take {len(np.unique(values))} values: a power and a factor need three or more")
    logs = np.log(np.stack(list(columns.values())))
    centre = logs.mean(1)  # so that the columns of the linear fit are of one size
    spans = [EXPONENTS] * len(columns)
    best: tuple[float, tuple[float, ...], np.ndarray] = np.inf, (), np.zeros(0)
    for _ in range(ZOOMS):
        axes = [np.geomspace(*span, GRID) for span in spans]
        for powers in itertools.product(*axes):
            terms = np.exp(-np.asarray(powers)[:, None] * (logs - centre[:, None]))
            design = np.concatenate([np.ones((1, len(losses))), terms]) / losses
            found = np.linalg.lstsq(design.T, np.ones(len(losses)), rcond=None)[0]
            error = float(((found @ design - 1) ** 2).mean())
            if (found >= -1e-12).all() and error < best[0]:
                best = error, powers, found
        if not best[1]:
            raise ValueError("no law with coefficients >= 0 fits: the loss must fall with B and with T")
        spans = [_near(axis, power) for axis, power in zip(axes, best[1], strict=True)]
    error, powers, found = best
    scales = np.maximum(found[1:], 0) * np.exp(np.asarray(powers) * centre)
    batch, updates, *params = [(float(scale), float(power)) for scale, power in zip(scales, powers, strict=True)]
    return Law(float(found[0]), *batch, *updates, error**0.5, *(params[0] if params else ()))


def _near(axis: np.ndarray, value: float) -> tuple[float, float]:
    """Return the neighbours of a value on a grid, within EXPONENTS."""
    ratio = axis[1] / axis[0]
    return max(EXPONENTS[0], value / ratio**1.5), min(EXPONENTS[1], value * ratio**1.5)
