"""Streams of examples, and where to cut them: the one number by which the kinds of gradient descent differ.

A stream is the order in which examples are visited, an int32[S] array of indices. A batch is B consecutive entries.
Epochs lie end to end, so that any batch size can be used and no example is dropped where an epoch ends.

>>> import jax
>>> stream = reshuffled(jax.random.key(0), 4, num_epochs=3)
>>> stream.reshape(3, 4)
Array([[0, 2, 1, 3],
       [0, 3, 1, 2],
       [3, 1, 0, 2]], dtype=int32)
>>> cut(stream, 1).shape, cut(stream, 3).shape, cut(stream, 4).shape  # stochastic, mini-batch, batch
((12, 1), (4, 3), (3, 4))

Each stream is a pure function of (key, position): epoch e is drawn from `jax.random.fold_in(key, e)`. Any window of
it can be made on its own, and a run that is cut into chunks sees what a run in one piece sees:

>>> reshuffled(jax.random.key(0), 4, start=3, length=5)
Array([3, 0, 3, 1, 2], dtype=int32)
"""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from gdjax.batching_poisson import Padded as Padded
from gdjax.batching_poisson import poisson as poisson
from gdjax.batching_poisson import take_padded as take_padded


def reshuffled(key, num_examples: int, *, num_epochs: int | None = None, start=0, length: int | None = None):
    """Visit every example once an epoch, in an order drawn anew each epoch (random reshuffling).

    Args:
        key: typed PRNG key.
        num_examples: N, examples in the data set.
        num_epochs: epochs; the stream has S = N * num_epochs entries.
        start, length: instead of `num_epochs`, the window of `length` entries that begins at position `start`
            (examples; an int, or a traced int32, below 2^31) of the endless stream.

    Returns:
        int32[S], indices in [0, N).

    Raises:
        ValueError: for no example, no epoch, or both or neither of `num_epochs` and `length`.
    """
    return _window(
        lambda epoch: _permutation(jax.random.fold_in(key, epoch), num_examples),
        num_examples,
        num_epochs,
        start,
        length,
    )


def shuffled_once(key, num_examples: int, *, num_epochs: int | None = None, start=0, length: int | None = None):
    """Visit every example once an epoch, in one random order kept for all epochs. Arguments as `reshuffled`."""
    return _window(
        lambda epoch: _permutation(jax.random.fold_in(key, 0), num_examples), num_examples, num_epochs, start, length
    )


def cyclic(key, num_examples: int, *, num_epochs: int | None = None, start=0, length: int | None = None):
    """Visit every example once an epoch, in the order of the data. Arguments as `reshuffled`.

    `key` is taken, and not used, so that streams can stand in for one another.
    """
    del key
    return _window(lambda epoch: jnp.arange(num_examples, dtype=jnp.int32), num_examples, num_epochs, start, length)


def with_replacement(key, num_examples: int, *, num_epochs: int | None = None, start=0, length: int | None = None):
    """Draw every entry uniformly and independently, N of them to an 'epoch'. Arguments as `reshuffled`."""
    return _window(
        lambda epoch: jax.random.randint(
            jax.random.fold_in(key, epoch), (num_examples,), 0, num_examples, dtype=jnp.int32
        ),
        num_examples,
        num_epochs,
        start,
        length,
    )


def cut(stream: jax.Array, batch_size: int, *, drop_remainder: bool = False) -> jax.Array:
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
    batch_size = operator.index(batch_size)
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


def _permutation(key, num_examples: int) -> jax.Array:
    return jax.random.permutation(key, jnp.arange(num_examples, dtype=jnp.int32))


def _window(order: Callable, num_examples: int, num_epochs: int | None, start, length: int | None) -> jax.Array:
    """Return entries start ... start + length - 1 of the concatenation of order(0), order(1), ..."""
    num_examples = operator.index(num_examples)
    if num_examples < 1:
        raise ValueError(f"num_examples={num_examples} must be at least 1")
    if (num_epochs is None) == (length is None):
        raise ValueError(f"give num_epochs={num_epochs} or length={length}, one of the two")
    position = None if isinstance(start, Tracer) else operator.index(start)  # None: known only when the program runs
    if num_epochs is not None and position != 0:
        raise ValueError(f"start={start} comes with length, not with num_epochs={num_epochs}")
    if position is not None and position < 0:
        raise ValueError(f"start={start} must be at least 0")
    if num_epochs is not None:
        length = num_epochs * num_examples
    if length is None or length < 1:
        raise ValueError(f"the stream must be at least 1 entry long: num_epochs={num_epochs}, length={length}")
    if position is not None:
        first, offset = divmod(position, num_examples)
        touched = -(-(offset + length) // num_examples)
    else:
        first, offset = jnp.divmod(jnp.asarray(start, jnp.int32), jnp.int32(num_examples))
        touched = -(-(num_examples - 1 + length) // num_examples)
    entries = jax.vmap(order)(first + jnp.arange(touched, dtype=jnp.int32)).reshape(-1)
    return lax.dynamic_slice_in_dim(entries, offset, length)
