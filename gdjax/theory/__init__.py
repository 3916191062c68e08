"""Laws of the batch size and exact recursions of stochastic gradient descent."""

from gdjax.theory import least_squares, quadratics, scaling, stream_order
from gdjax.theory._laws import (
    Adam,
    Number,
    b_noise,
    b_simple,
    batch_size_at_overhead,
    best_learning_rate,
    decay_per_update,
    examples_to_target,
    expected_change,
    finite_population,
    full_batch_learning_rate,
    linear_rule,
    same_half_life,
    sqrt_rule,
    temperature,
    updates_to_target,
)

__all__ = [
    "Adam",
    "Number",
    "b_noise",
    "b_simple",
    "batch_size_at_overhead",
    "best_learning_rate",
    "decay_per_update",
    "examples_to_target",
    "expected_change",
    "finite_population",
    "full_batch_learning_rate",
    "least_squares",
    "linear_rule",
    "quadratics",
    "same_half_life",
    "scaling",
    "sqrt_rule",
    "stream_order",
    "temperature",
    "updates_to_target",
]
