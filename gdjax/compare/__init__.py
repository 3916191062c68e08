"""Stochastic, mini-batch and batch gradient descent side by side.

>>> from gdjax import problems
>>> rows = batch_sizes(problems.least_squares(), (1, 32, 1024), num_epochs=4, num_seeds=1)
>>> [(row.name, row.num_updates, f"{row.learning_rate:.3f}") for row in rows]
[('stochastic', 4096, '0.032'), ('mini-batch', 128, '1.000'), ('batch', 4, '1.000')]
"""

from gdjax.compare._claims import Claim, judge
from gdjax.compare._figure import comparison
from gdjax.compare._plan import Plan, default_batch_sizes, plan
from gdjax.compare._rows import Row, batch_sizes, gradient_noise

__all__ = [
    "Claim",
    "Plan",
    "Row",
    "batch_sizes",
    "comparison",
    "default_batch_sizes",
    "gradient_noise",
    "judge",
    "plan",
]
