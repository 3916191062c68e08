"""Counts of examples up to 2^64 as two uint32, which every device has: int64 needs JAX's x64 mode, and a TPU has none.

>>> count = Count.of(2**32 - 2)
>>> print(count, count + 5, (count + 5).high, (count + 5).low)
4294967294 4294967299 1 3
>>> int(count + 5) == 2**32 + 3, bool(count + 5 > count), divmod(count, 10)
(True, True, (Count(429496729), Array(4, dtype=uint32)))
"""

import operator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

MAX_DIVISOR = 2**31  # of a count


def whole(name: str, number: Any) -> int:
    """Return a number as Python's int, or raise a `ValueError` that names it."""
    try:
        return operator.index(number)
    except TypeError as error:
        raise ValueError(f"{name}={number!r} must be a whole number") from error


@partial(jax.tree_util.register_dataclass, data_fields=("high", "low"), meta_fields=())
@dataclass(frozen=True, eq=False, repr=False)
class Count:
    """A number of examples, or a position in a stream: high 2^32 + low, modulo 2^64. A pytree of two uint32.

    It is added to and compared with integers, arrays of integers and other counts; `int(count)` and `np.asarray(count)`
    give the number itself where it is known, and `count.astype(dtype)` where it is traced.

    Attributes:
        high, low: uint32, of the same shape: the axes of a history, or of lanes, or none.
    """

    high: jax.Array
    low: jax.Array

    @classmethod
    def of(cls, number: Any) -> "Count":
        """Return an integer, an array of integers or a count as a count."""
        if isinstance(number, Count):
            return number
        if isinstance(number, int):
            if not 0 <= number < 2**64:
                raise ValueError(f"number={number} must be at least 0 and below 2^64")
            return cls(jnp.uint32(number >> 32 & 0xFFFFFFFF), jnp.uint32(number & 0xFFFFFFFF))
        number = jnp.asarray(number)
        if not jnp.issubdtype(number.dtype, jnp.integer):
            raise ValueError(f"number={number} must be an integer, but is {number.dtype}")
        if number.dtype.itemsize > 4:
            return cls((number >> 32).astype(jnp.uint32), number.astype(jnp.uint32))
        sign = number >> 31 if jnp.issubdtype(number.dtype, jnp.signedinteger) else jnp.zeros_like(number)
        return cls(sign.astype(jnp.uint32), number.astype(jnp.uint32))

    def __add__(self, other: Any) -> "Count":
        other = Count.of(other)
        low = self.low + other.low
        return Count(self.high + other.high + (low < other.low).astype(jnp.uint32), low)

    __radd__ = __add__

    def __divmod__(self, divisor: int) -> tuple["Count", jax.Array]:
        """Return (quotient, remainder uint32) for a divisor, a Python integer from 1 to 2^31."""
        if not 1 <= divisor <= MAX_DIVISOR:
            raise ValueError(f"divisor={divisor} must be between 1 and 2^31")
        by = jnp.uint32(divisor)
        # Long division: as many bits of `low` at a time as there is room for beside a remainder.
        room, left = min(16, 32 - (divisor - 1).bit_length()), 32
        high, remainder = self.high // by, self.high % by
        low = jnp.zeros_like(self.low)
        while left:
            bits = min(room, left)
            left -= bits
            part = (remainder << bits) | ((self.low >> left) & ((1 << bits) - 1))
            low, remainder = (low << bits) | part // by, part % by
        return Count(high, low), remainder

    # Without these, `state.num_examples == 12` would be silently false.
    def __eq__(self, other: Any) -> Any:
        other = Count.of(other)
        return (self.high == other.high) & (self.low == other.low)

    def __lt__(self, other: Any) -> jax.Array:
        other = Count.of(other)
        return (self.high < other.high) | ((self.high == other.high) & (self.low < other.low))

    def __gt__(self, other: Any) -> jax.Array:
        return Count.of(other) < self

    def __le__(self, other: Any) -> jax.Array:
        return ~(self > other)

    def __ge__(self, other: Any) -> jax.Array:
        return ~(self < other)

    def __ne__(self, other: Any) -> Any:
        return ~(self == other)

    def astype(self, dtype: Any) -> jax.Array:
        """Return an array of this dtype: rounded for a float, modulo 2^32 for an integer of 32 bits."""
        dtype = jnp.dtype(dtype)
        if jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize <= 4:
            return self.low.astype(dtype)
        return self.high.astype(dtype) * jnp.asarray(2**32, dtype) + self.low.astype(dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        number = np.asarray(self.high).astype(np.int64) << 32 | np.asarray(self.low).astype(np.int64)
        return np.asarray(number, dtype)

    def __index__(self) -> int:
        return int(self.high) << 32 | int(self.low)

    def __repr__(self) -> str:
        if any(isinstance(x, Tracer) or not isinstance(x, jax.Array | np.ndarray) for x in (self.high, self.low)):
            return f"Count(high={self.high}, low={self.low})"
        return f"Count({np.asarray(self)})"

    def __str__(self) -> str:
        return repr(self).removeprefix("Count(").removesuffix(")")


def position_keys(key: jax.Array, start: "Count | jax.Array", length: int) -> jax.Array:
    """Return the keys [length] of the positions start, start + 1, ...: `fold_in(key, position)`.

    `fold_in` takes 32 bits. The high bits of a position from 2^32 on are folded into the key before the low ones.

    Args:
        key: typed PRNG key.
        start: a count, or a uint32 where all positions are below 2^32: half the work.
        length: positions.
    """
    positions = start + jnp.arange(length, dtype=jnp.uint32)
    if not isinstance(positions, Count):
        return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)

    def one(position: Count) -> jax.Array:
        far = jax.random.fold_in(key, position.high)
        near = jax.random.clone(key)  # for JAX's checker of keys, to which a choice between two uses up both
        return jax.random.fold_in(jnp.where(position.high == 0, near, far), position.low)

    return jax.vmap(one)(positions)


def below(bits: jax.Array, limit: int) -> jax.Array:
    """Map 64 random bits, uint32[..., 2], to an integer uint32[...] in [0, limit), limit <= 2^32.

    It is floor(limit x) of the number x in [0, 1) that the bits are: no two integers differ in probability by more than
    2^-64, where a remainder of 32 bits would prefer some by a half for a limit near 2^32.
    """
    limit_ = jnp.uint32(limit)
    carried, _ = _product(bits[..., 1], limit_)
    high, low = _product(bits[..., 0], limit_)
    return high + (low + carried < carried).astype(jnp.uint32)


def _product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the high and the low 32 bits of a product of two uint32, by halves."""
    half = 0xFFFF
    a_high, a_low, b_high, b_low = a >> 16, a & half, b >> 16, b & half
    low = a_low * b_low
    middle = a_high * b_low + (low >> 16)
    other = a_low * b_high + (middle & half)
    return a_high * b_high + (middle >> 16) + (other >> 16), a * b
