"""Streams of examples, and where a batch is cut: the one number by which the kinds of gradient descent differ.

A stream is the order in which examples are visited, an int32[S] array of indices. A batch is B consecutive entries.
Epochs lie end to end, so that any batch size can be used and no example is dropped where an epoch ends.

>>> import jax
>>> stream = reshuffled(jax.random.key(0), 4, num_epochs=3)
>>> batches(stream, 1).shape, batches(stream, 3).shape, batches(stream, 4).shape  # stochastic, mini-batch, batch
((12, 1), (4, 3), (3, 4))

Each stream is a pure function of (key, position). Any window of it can be made on its own, and a run that is divided
into chunks sees what a run in one piece sees:

>>> stream[3:8]
Array([3, 0, 3, 1, 2], dtype=int32)
>>> reshuffled(jax.random.key(0), 4, start=3, length=5)
Array([3, 0, 3, 1, 2], dtype=int32)
"""

from gdjax.batching._count import Count, position_keys
from gdjax.batching._phases import Phases
from gdjax.batching._poisson import Padded, poisson, take_padded
from gdjax.batching._streams import batches, cyclic, reshuffled, shuffled_once, take, with_replacement

__all__ = [
    "Count",
    "Padded",
    "Phases",
    "batches",
    "cyclic",
    "poisson",
    "position_keys",
    "reshuffled",
    "shuffled_once",
    "take",
    "take_padded",
    "with_replacement",
]
