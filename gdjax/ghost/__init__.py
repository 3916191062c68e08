"""Norms of the gradient of every example, for any JAX function, from one backward pass."""

from gdjax.ghost._measure import Coverage, coverage, gram, second_moments, sq_norms

__all__ = [
    "Coverage",
    "coverage",
    "gram",
    "second_moments",
    "sq_norms",
]
