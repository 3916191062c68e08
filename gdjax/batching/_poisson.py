"""Poisson batches: every example is in every batch with the same probability, independently."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from gdjax.batching._count import whole

OVERFLOW = 1e-15
"""The probability that a batch is larger than the largest size that is provided for it by default."""
MAX_EXAMPLES = 2**30  # two positions are added in int32


class Padded(NamedTuple):
    """Batches of different sizes, each filled up to M entries. A pytree whose leaves have T entries on axis 0.

    Attributes:
        indices: int32[T, M], in [0, N); 0 where it is padding.
        mask: bool[T, M], whether the entry is an example; batch t has mask[t].sum() of them, which may be none.
        overflowed: bool[T], whether there were more than M, and the last of them in the order of the data are missing.
    """

    indices: jax.Array
    mask: jax.Array
    overflowed: jax.Array


def poisson(
    key, num_examples: int, *, batch_size: float, num_updates: int, start: Any = 0, max_batch_size: int | None = None
) -> Padded:
    """Draw batches that hold each example with probability q = B / N, independently of all others.

    Sizes are binomial, of mean B: a sum over a batch is divided by the fixed B, never by its size (`gradients.clipped`
    with `expected_batch_size`). This is what accountants of differential privacy assume (`privacy`).

    The gaps between the examples of a batch are geometric, so that a batch costs time of its own size, whatever N is.
    Batch t is drawn from `jax.random.fold_in(key, t)`: like a stream, it can be made on its own.

    Args:
        key: typed PRNG key.
        num_examples: N, examples in the data set, at most 2^30.
        batch_size: B, expected examples per update, 0 < B <= N; it need not be whole.
        num_updates: T.
        start: the number of the first batch, which may be traced.
        max_batch_size: M. By default so large that a batch overflows with a probability below 10^-15.

    Returns:
        Padded, with indices in increasing order. `take_padded` reads the examples.

    Raises:
        ValueError: for numbers out of range; and where a batch has overflowed: with another key, or a larger M, it does
            not. Under `jit` it cannot be raised and is said by `Padded.overflowed` alone.
    """
    num_examples, num_updates = whole("num_examples", num_examples), whole("num_updates", num_updates)
    if not 1 <= num_examples <= MAX_EXAMPLES:
        raise ValueError(f"num_examples={num_examples} must be at least 1 and at most 2^30")
    if not 0 < batch_size <= num_examples:
        raise ValueError(f"batch_size={batch_size} must be positive and at most num_examples={num_examples}")
    if num_updates < 1:
        raise ValueError(f"num_updates={num_updates} must be at least 1")
    rate = batch_size / num_examples
    provided = _provided(num_examples, rate) if max_batch_size is None else whole("max_batch_size", max_batch_size)
    size = min(provided, num_examples)
    if size < 1:
        raise ValueError(f"max_batch_size={max_batch_size} must be at least 1")
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(start)):
        start = whole("start", start)
    if isinstance(start, int) and not 0 <= start <= 2**31 - num_updates:
        raise ValueError(f"start={start} must be at least 0, and start + num_updates={num_updates} at most 2^31")
    scale = math.log1p(-rate) if rate < 1 else -math.inf

    def batch(number):
        # Of 32 bits, as a uniform number of 23 would make probabilities multiples of 2^-23.
        bits = jax.random.bits(jax.random.fold_in(key, number), (size + 1,), jnp.uint32).astype(jnp.float32)
        uniform = jnp.minimum((bits + 0.5) * 2.0**-32, 1 - 2.0**-24)
        skipped = jnp.floor(jnp.log1p(-uniform) / scale)
        # A sum that wraps around at 2^32 follows one that is beyond N, and what follows that one does not count.
        ends = jnp.cumsum(jnp.minimum(skipped, num_examples).astype(jnp.uint32) + 1, dtype=jnp.uint32)
        mask = lax.cummin((ends <= num_examples).astype(jnp.int32)) == 1
        return Padded(jnp.where(mask, ends - 1, 0).astype(jnp.int32)[:-1], mask[:-1], mask[-1])

    batches = jax.vmap(batch)(start + jnp.arange(num_updates, dtype=jnp.int32))
    if not isinstance(batches.overflowed, Tracer) and (count := int(batches.overflowed.sum())):
        raise ValueError(
            f"{count} of {num_updates} batches hold more than max_batch_size={size} examples: make it larger (N always "
            "suffices), or leave it out"
        )
    return batches


def take_padded(data, batch: Padded):
    """Return (the examples of `data` in a batch, whether each is one): the example at index 0 stands for padding.

    It is the `fetch` of `descent.run` for Poisson batches. An example is then a pair, `(example, is_one)`, whose weight
    is the second: `gradients.mean(lambda params, pair: loss(params, pair[0]), weight=lambda pair: pair[1])`.
    """
    return jax.tree.map(lambda x: jnp.asarray(x).at[batch.indices].get(mode="promise_in_bounds"), data), batch.mask


def _provided(num_examples: int, rate: float) -> int:
    """Return the least M for which Chernoff's bound exp(-N KL(M / N || q)) says that more than M are too improbable."""

    def exponent(size):
        share = size / num_examples
        rest = (1 - share) * math.log((1 - share) / (1 - rate)) if share < 1 else 0.0
        return num_examples * (share * math.log(share / rate) + rest)

    low, high = math.ceil(rate * num_examples), num_examples
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if exponent(middle) >= -math.log(OVERFLOW) else (middle + 1, high)
    return low
