"""Stochastic, mini-batch and batch gradient descent side by side."""

from gdjax.compare._claims import Claim, judge
from gdjax.compare._figure import comparison
from gdjax.compare._rows import Row, best_rate, compare, default_batch_sizes, gradient_noise, tune

__all__ = [
    "Claim",
    "Row",
    "best_rate",
    "compare",
    "comparison",
    "default_batch_sizes",
    "gradient_noise",
    "judge",
    "tune",
]
