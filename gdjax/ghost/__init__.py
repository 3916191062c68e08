"""Norms of the gradient of every example, for any JAX function, from one backward pass.

>>> import jax.numpy as jnp
>>> from gdjax import ghost
>>> loss = lambda params, example: (example[0] @ params["weight"] + params["bias"] - example[1]) ** 2
>>> params = {"weight": jnp.asarray([1.0, 2.0]), "bias": jnp.asarray(0.5)}
>>> batch = jnp.asarray([[1.0, 0.0], [3.0, 4.0]]), jnp.asarray([1.0, 11.0])
>>> found = ghost.sq_norms(loss)(params, batch)
>>> found.losses, found.sq_norms["weight"], found.total
(Array([0.25, 0.25], dtype=float32), Array([ 1., 25.], dtype=float32), Array([ 2., 26.], dtype=float32))
"""

from gdjax.ghost._coverage import Coverage, coverage, nonlinear
from gdjax.ghost._norms import SquaredNorms, add_rule, gram, norms, second_moments, sq_norms
from gdjax.ghost._rules import Entries, Factors

__all__ = [
    "Coverage",
    "Entries",
    "Factors",
    "SquaredNorms",
    "add_rule",
    "coverage",
    "gram",
    "nonlinear",
    "norms",
    "second_moments",
    "sq_norms",
]
