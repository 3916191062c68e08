"""A random order of N that is looked up and not stored: entry i in time and memory that do not depend on N.

The order is a cipher of indices. i becomes a row and a column of a table of R rows and C columns, R = floor(sqrt N),
C = floor(N / R); then rows are shifted by a random function of the column, and columns by a random function of the
row, in turn: rounds of a Feistel network on Z_R x Z_C (Black and Rogaway 2002, 'Ciphers with arbitrary finite domains',
section 4). A round is undone by shifting back, so the whole is a permutation, whatever the functions are.

The N - R C <= R indices that the table leaves over keep their places. Before each of three times four rounds all
indices are moved on by a random number modulo N, so that others are left over each time. This too permutes N indices
exactly, and takes the place of enciphering again until an index is in range, a loop of a length that nobody knows.

An order is made of the 64 bits of a key, so most of the N! orders are never drawn. Were the functions truly random, the
attacks known on r rounds over sqrt(N) x sqrt(N) (Patarin 2001, 'Generic attacks on Feistel schemes') would need
about N^(r/2 - 2) entries to tell the order from a uniform one: N^4 for the 12 rounds here, N^2 for the 8 of an index
that is once left over; for N = 2^13, 5e15 and 7e7 entries. Here they are a hash of index and word: good for statistics
(see the tests), and not for secrets.

>>> order = draw(jax.random.key(0), 10**6)[None]
>>> look_up(order, jnp.uint32(0), jnp.arange(5, dtype=jnp.uint32), 10**6)
Array([286627,  78408, 186599, 540585, 491648], dtype=uint32)
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from gdjax.batching import _count

NUM_PASSES = 3
NUM_ROUNDS = 4  # of a pass


def draw(key: jax.Array, num_examples: int) -> jax.Array:
    """Make an order of N from the bits of a key: uint32[NUM_PASSES, 1 + NUM_ROUNDS], a shift and a word for each round.

    The words are hashes of the key's and not `jax.random.bits`, which takes as long to compile as all else here.
    """
    bits = jnp.arange(1, NUM_PASSES * (2 + NUM_ROUNDS) + 1, dtype=jnp.uint32)
    for word in jax.random.key_data(key):
        bits = _hashed(bits ^ word)
    bits = bits.reshape(NUM_PASSES, 2 + NUM_ROUNDS)
    return jnp.concatenate([_count.below(bits[:, :2], num_examples)[:, None], bits[:, 2:]], axis=1)


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
            row = lax.rem(row + (_hashed(column ^ of_rows) >> 1), rows)  # a bit less, so that the sum has room
            column = lax.rem(column + (_hashed(row ^ of_columns) >> 1), columns)
        indices = jnp.where(indices < table, row * columns + column, indices)
    return indices


def _hashed(x: jax.Array) -> jax.Array:
    """Return 32 bits, each of which depends on every bit of x: C. Wellons' 'lowbias32'."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
