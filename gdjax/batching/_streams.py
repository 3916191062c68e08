"""Streams of examples, and where to cut them: the one number by which the kinds of gradient descent differ.

A stream is the order in which examples are visited, an int32[S] array of indices. A batch is B consecutive entries.
Epochs lie end to end, so that any batch size can be used and no example is dropped where an epoch ends.

>>> import jax
>>> stream = reshuffled(jax.random.key(0), 4, num_epochs=3)
>>> stream.reshape(3, 4)
Array([[0, 2, 1, 3],
       [0, 3, 1, 2],
       [3, 1, 0, 2]], dtype=int32)
>>> batches(stream, 1).shape, batches(stream, 3).shape, batches(stream, 4).shape  # stochastic, mini-batch, batch
((12, 1), (4, 3), (3, 4))

Each stream is a pure function of (key, position): epoch e is drawn from `jax.random.fold_in(key, e)`. Any window of
it can be made on its own, and a run that is cut into chunks sees what a run in one piece sees:

>>> reshuffled(jax.random.key(0), 4, start=3, length=5)
Array([3, 0, 3, 1, 2], dtype=int32)

So can one of a thousand million examples, after 2^62 others:

>>> reshuffled(jax.random.key(0), 10**9, start=2**62, length=3)
Array([208008785, 150279059, 192168110], dtype=int32)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from gdjax.batching import _cipher, _count
from gdjax.batching._count import Count, whole

MAX_SORTED = 2**13  # examples; beyond, an order is looked up. Sorting them takes 2.5 ms on a CPU
MAX_EXAMPLES = 2**31  # indices are int32


def reshuffled(key, num_examples: int, *, num_epochs: int | None = None, start: Any = 0, length: int | None = None):
    """Visit every example once an epoch, in an order drawn anew each epoch (random reshuffling).

    Up to N = 2^13, `jax.random.permutation` sorts the examples by random numbers: all N! orders are equally likely, as
    far as the generator can tell, and a window costs a sort of N for every epoch that it touches. Beyond, entries are
    looked up in an order that is never stored, see `_cipher`: a window costs time and memory of its own length,
    whatever N is. Every epoch is exactly a permutation either way.

    Args:
        key: typed PRNG key.
        num_examples: N, examples in the data set, at most 2^31.
        num_epochs: epochs; the stream has S = N * num_epochs entries.
        start, length: instead of `num_epochs`, the window of `length` entries, at most 2^31, that begins at position
            `start` of the endless stream: an int or a `Count`, below 2^63, or a traced integer. A traced int32 ends at
            2^31, and a traced `Count` does not.

    Returns:
        int32[S], indices in [0, N).

    Raises:
        ValueError: for no example or more than 2^31, for no epoch, for both or neither of `num_epochs` and `length`,
            for more than 2^31 entries, and for a position that is negative or beyond 2^63.
    """
    window = _window(num_examples, num_epochs, start, length)
    if window.num_examples <= MAX_SORTED:
        orders = jax.vmap(lambda key: _permutation(key, window.num_examples))(_epoch_keys(key, window))
        return lax.dynamic_slice_in_dim(orders.reshape(-1), window.offset, window.length)
    orders = jax.vmap(lambda key: _cipher.draw(key, window.num_examples))(_epoch_keys(key, window))
    return _looked_up(orders, *_places(window), window)


def shuffled_once(key, num_examples: int, *, num_epochs: int | None = None, start: Any = 0, length: int | None = None):
    """Visit every example once an epoch, in one random order kept for all epochs. All as `reshuffled`."""
    window = _window(num_examples, num_epochs, start, length)
    key = jax.random.fold_in(key, 0)
    _, indices = _places(window)
    if window.num_examples <= MAX_SORTED:
        return _permutation(key, window.num_examples)[indices]
    order = _cipher.draw(key, window.num_examples)
    return _looked_up(order[None], jnp.zeros_like(indices), indices, window)


def cyclic(key, num_examples: int, *, num_epochs: int | None = None, start: Any = 0, length: int | None = None):
    """Visit every example once an epoch, in the order of the data. Arguments as `reshuffled`.

    `key` is taken, and not used, so that streams can stand in for one another.
    """
    del key
    return _places(_window(num_examples, num_epochs, start, length))[1].astype(jnp.int32)


def with_replacement(
    key, num_examples: int, *, num_epochs: int | None = None, start: Any = 0, length: int | None = None
):
    """Draw every entry uniformly and independently, N of them to an 'epoch'. Arguments as `reshuffled`.

    Every position has 64 bits of its own, so that a window costs time of its own length.
    """
    window = _window(num_examples, num_epochs, start, length)
    keys = _count.position_keys(key, window.start, window.length)
    bits = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)
    return _count.below(bits, window.num_examples).astype(jnp.int32)


def batches(stream: jax.Array, batch_size: int, *, drop_remainder: bool = False) -> jax.Array:
    """Cut a stream into consecutive batches.

    Args:
        stream: int32[S].
        batch_size: B, examples per update: 1 is stochastic, N is batch gradient descent.
        drop_remainder: leave out the last S mod B entries.

    Returns:
        int32[T, B] with T = S // B updates.

    Raises:
        ValueError: for B < 1, B > S, or a remainder that `drop_remainder` does not allow.
    """
    if getattr(stream, "ndim", None) != 1:
        raise ValueError(f"stream must be an array [S] of indices, but has shape {jnp.shape(stream)}")
    [length] = stream.shape
    batch_size = whole("batch_size", batch_size)
    if not 1 <= batch_size <= length:
        raise ValueError(f"batch_size={batch_size} must be between 1 and the {length} entries of the stream")
    num_updates, remainder = divmod(length, batch_size)
    if remainder and not drop_remainder:
        raise ValueError(
            f"batch_size={batch_size} leaves {remainder} of the stream's {length} entries over: use a stream of "
            f"{num_updates * batch_size} or {(num_updates + 1) * batch_size} entries, or drop_remainder=True"
        )
    return stream[: num_updates * batch_size].reshape(num_updates, batch_size)


def take(data, indices: jax.Array):
    """Return the examples of `data`, every leaf [N, ...], at `indices`, int[B], which must lie in [0, N).

    They are not checked: under `jit` that would cost every update.
    """
    return jax.tree.map(lambda x: jnp.asarray(x).at[indices].get(mode="promise_in_bounds"), data)


class _Window(NamedTuple):
    """A piece of a stream: `length` entries from position `start` on, which is place `offset` of epoch `epoch`.

    The positions are uint32 where they are known to be below 2^32, and counts otherwise. `num_epochs` are touched.
    """

    num_examples: int
    start: jax.Array | Count
    length: int
    epoch: jax.Array | Count
    offset: jax.Array
    num_epochs: int


def _window(num_examples: int, num_epochs: int | None, start: Any, length: int | None) -> _Window:
    """Check the arguments of a stream and find the window."""
    num_examples = whole("num_examples", num_examples)
    if not 1 <= num_examples <= MAX_EXAMPLES:
        raise ValueError(f"num_examples={num_examples} must be at least 1 and at most 2^31")
    if (num_epochs is None) == (length is None):
        raise ValueError(f"give num_epochs={num_epochs} or length={length}, one of the two")
    traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(start))
    position = None if traced else whole("start", start)  # None: known only when the program runs
    if num_epochs is not None and position != 0:
        raise ValueError(f"start={start} comes with length, not with num_epochs={num_epochs}")
    if num_epochs is not None:
        length = whole("num_epochs", num_epochs) * num_examples
    length = whole("length", length)
    if not 1 <= length <= MAX_EXAMPLES:
        raise ValueError(
            f"the stream must be 1 to 2^31 entries long, and a longer one taken in windows: num_epochs={num_epochs}, "
            f"length={length}"
        )
    if position is not None and not 0 <= position <= 2**63 - length:
        raise ValueError(f"start={start} must be at least 0, and start + length={length} at most 2^63")
    if position is None:
        touched = -(-(num_examples - 1 + length) // num_examples)
        if isinstance(start, Count) or jnp.iinfo(start.dtype).max >= 2**32 - 1:
            start = Count.of(start)
            epoch, offset = divmod(start, num_examples)
            return _Window(num_examples, start, length, epoch, offset, touched)
        start, size = jnp.asarray(start, jnp.uint32), jnp.uint32(num_examples)
        return _Window(num_examples, start, length, lax.div(start, size), lax.rem(start, size), touched)
    epoch, offset = divmod(position, num_examples)
    touched = -(-(offset + length) // num_examples)
    narrow = jnp.uint32 if position + length <= 2**32 else Count.of
    return _Window(num_examples, narrow(position), length, narrow(epoch), jnp.uint32(offset), touched)


def _epoch_keys(key, window: _Window) -> jax.Array:
    return _count.position_keys(key, window.epoch, window.num_epochs)


def _places(window: _Window) -> tuple[jax.Array, jax.Array]:
    """Return, for every entry, how many epochs after the first it lies, and the place in its epoch, uint32[length]."""
    places = window.offset + jnp.arange(window.length, dtype=jnp.uint32)
    size = jnp.uint32(window.num_examples)
    return lax.div(places, size), lax.rem(places, size)


def _looked_up(orders, which, indices, window: _Window) -> jax.Array:
    return _cipher.look_up(orders, which, indices, window.num_examples).astype(jnp.int32)


def _permutation(key, num_examples: int) -> jax.Array:
    return jax.random.permutation(key, jnp.arange(num_examples, dtype=jnp.int32))
