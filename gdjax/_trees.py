"""Arrays and pytrees of them: what several modules ask of a leaf."""

from typing import Any

import jax
import jax.numpy as jnp


def is_key(leaf: Any) -> bool:
    """Return whether a leaf is an array of typed PRNG keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def wide(x: jax.Array) -> jax.Array:
    """Return x in float32 at least: squares of bfloat16 do not add up."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)
