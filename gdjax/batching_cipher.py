"""A random order of N that is looked up and not stored: entry i in time and memory that do not depend on N.

The order is a cipher of indices. i becomes a row and a column of a table of R rows and C columns, R = floor(sqrt N),
C = floor(N / R); then rows are shifted by a random function of the column, and columns by a random function of the
row, in turn: rounds of a Feistel network on Z_R x Z_C (Black and Rogaway 2002, 'Ciphers with arbitrary finite domains',
section 4). A round is undone by shifting back, so the whole is a permutation, whatever the functions are.

The N - R C <= R indices that the table leaves over keep their places. Before each of three times four rounds all
indices are moved on by a random number modulo N, so that others are left over each time. This too permutes N indices
exactly, and takes the place of enciphering again until an index is in range, a loop of a length that nobody knows.

All N! orders cannot be reached, and need not be: an order is made of 18 random words. With random functions, known
attacks tell r rounds on a table of sqrt(N) x sqrt(N) from a uniform order after about N^(r/2 - 2) entries (Patarin 2001,
'Generic attacks on Feistel schemes'): N^4 for the 12 rounds here, N^2 for the 8 of an index that is once left over.
For N = 2^13 that is 5e15 and 7e7 entries. The functions here are a fixed hash of (word xor index), no ciphers: the
orders are for statistics, not for secrets.

>>> order = draw(jax.random.key(0), 10**6)[None]
>>> look_up(order, jnp.uint32(0), jnp.arange(5, dtype=jnp.uint32), 10**6)
Array([210130, 494621,  85226, 298841, 588117], dtype=uint32)
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from gdjax import batching_count

NUM_PASSES = 3
NUM_ROUNDS = 4  # of a pass


def draw(key: jax.Array, num_examples: int) -> jax.Array:
    """Draw what makes an order of N: uint32[NUM_PASSES, 1 + NUM_ROUNDS], of every pass the shift, then its rounds."""
    bits = jax.random.bits(key, (NUM_PASSES * (2 + NUM_ROUNDS),), jnp.uint32)  # in two axes it compiles twice as long
    bits = bits.reshape(NUM_PASSES, 2 + NUM_ROUNDS)
    return jnp.concatenate([batching_count.below(bits[:, :2], num_examples)[:, None], bits[:, 2:]], axis=1)


def look_up(orders: jax.Array, which: jax.Array, indices: jax.Array, num_examples: int) -> jax.Array:
    """Return the entries of orders at indices.

    Args:
        orders: uint32[E, NUM_PASSES, 1 + NUM_ROUNDS], E orders from `draw`.
        which: integers in [0, E), the order that is asked, for each index or for all.
        indices: uint32[...] in [0, N).
        num_examples: N, from 1 to 2^31.

    Returns:
        uint32[...] in [0, N), different for different indices of one order.
    """
    num_rows = math.isqrt(num_examples)
    num_columns = num_examples // num_rows
    size, rows, columns, table = (jnp.uint32(n) for n in (num_examples, num_rows, num_columns, num_rows * num_columns))
    for number in range(NUM_PASSES):
        shift, *rounds = (orders[:, number, i].at[which].get(mode="promise_in_bounds") for i in range(1 + NUM_ROUNDS))
        indices = indices + shift  # below 2 N <= 2^32
        indices = jnp.where(indices < size, indices, indices - size)
        row, column = lax.div(indices, columns), lax.rem(indices, columns)
        for of_rows, of_columns in zip(rounds[::2], rounds[1::2], strict=True):
            row = lax.rem(row + _mixed(column ^ of_rows), rows)
            column = lax.rem(column + _mixed(row ^ of_columns), columns)
        indices = jnp.where(indices < table, row * columns + column, indices)
    return indices


def _mixed(x: jax.Array) -> jax.Array:
    """Return 31 bits, each of which depends on every bit of x: C. Wellons' 'lowbias32', less a bit.

    The bit leaves room for a row or a column to be added.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return (x ^ (x >> 16)) >> 1
