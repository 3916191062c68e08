import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdjax import batching

STREAMS = (batching.reshuffled, batching.shuffled_once, batching.cyclic, batching.with_replacement)
PERMUTING = STREAMS[:3]


@pytest.mark.parametrize("stream", PERMUTING)
@pytest.mark.parametrize("num_examples", [1, 2, 7])
def test_every_epoch_is_a_permutation(stream, num_examples, key):
    epochs = stream(key, num_examples, num_epochs=5).reshape(5, num_examples)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_examples), (5, 1)))


def test_reshuffled_epochs_differ_and_shuffled_once_epochs_do_not(key):
    different = batching.reshuffled(key, 100, num_epochs=4).reshape(4, 100)
    assert all((a != b).any() for a, b in itertools.combinations(different, 2))
    same = batching.shuffled_once(key, 100, num_epochs=4).reshape(4, 100)
    np.testing.assert_array_equal(same, np.tile(same[0], (4, 1)))
    assert (np.asarray(same[0]) != np.arange(100)).any()


def test_every_order_is_equally_likely():
    keys = jax.random.split(jax.random.key(1), 6000)
    orders = jax.vmap(lambda key: batching.reshuffled(key, 3, start=3, length=3))(keys)
    counts = np.unique(np.asarray(orders) @ np.array([9, 3, 1]), return_counts=True)[1]
    assert len(counts) == 6
    # Multinomial with p = 1/6: each count has standard deviation sqrt(6000 * 5/36) = 28.9.
    assert np.all(np.abs(counts - 1000) < 4 * 28.9)


def test_with_replacement_is_uniform_and_independent_of_position(key):
    entries = np.asarray(batching.with_replacement(key, 4, num_epochs=5000))
    pairs = np.bincount(entries[:-1] * 4 + entries[1:], minlength=16)
    expected = len(entries) / 16
    assert np.all(np.abs(pairs - expected) < 4.5 * np.sqrt(expected))


@pytest.mark.parametrize("stream", STREAMS)
@settings(max_examples=12)  # every shape compiles anew
@given(num_examples=st.integers(1, 5), start=st.integers(0, 20), length=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_window_is_a_slice_of_the_endless_stream(stream, num_examples, start, length, seed):
    key = jax.random.key(seed)
    whole = np.asarray(stream(key, num_examples, num_epochs=-(-(start + length) // num_examples)))
    np.testing.assert_array_equal(stream(key, num_examples, start=start, length=length), whole[start : start + length])


@pytest.mark.parametrize("stream", STREAMS)
def test_a_window_may_start_at_a_traced_position(stream, key):
    window = jax.jit(lambda start: stream(key, 5, start=start, length=8))
    for start in range(12):
        np.testing.assert_array_equal(window(start), stream(key, 5, start=start, length=8))


def test_streams_of_different_keys_differ():
    a, b = (batching.reshuffled(key, 50, num_epochs=1) for key in jax.random.split(jax.random.key(0)))
    assert (a != b).any()


@given(length=st.integers(1, 50), batch_size=st.integers(1, 50))
def test_cut_keeps_order_and_accounts_for_every_entry(length, batch_size):
    stream = jnp.arange(length)
    if batch_size > length:
        with pytest.raises(ValueError, match=f"batch_size={batch_size} must be between 1 and the {length} entries"):
            batching.cut(stream, batch_size)
    elif length % batch_size:
        with pytest.raises(
            ValueError, match=f"batch_size={batch_size} leaves {length % batch_size} of .* drop_remainder"
        ):
            batching.cut(stream, batch_size)
        kept = batching.cut(stream, batch_size, drop_remainder=True)
        assert kept.shape == (length // batch_size, batch_size)
        np.testing.assert_array_equal(kept.reshape(-1), stream[: kept.size])
    else:
        batches = batching.cut(stream, batch_size)
        assert batches.shape == (length // batch_size, batch_size)
        np.testing.assert_array_equal(batches.reshape(-1), stream)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_cut_refuses_a_batch_size_below_one(batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be between 1 and"):
        batching.cut(jnp.arange(4), batch_size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_epochs=None or length=None"),
        ({"num_epochs": 1, "length": 3}, "num_epochs=1 or length=3"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"length": 0}, "length=0"),
        ({"start": -1, "length": 3}, "start=-1"),
        ({"start": 1, "num_epochs": 2}, "start=1"),
    ],
)
def test_a_stream_refuses_a_length_it_cannot_have(arguments, message, key):
    with pytest.raises(ValueError, match=message):
        batching.reshuffled(key, 3, **arguments)


def test_a_stream_of_no_examples_is_refused(key):
    with pytest.raises(ValueError, match="num_examples=0 must be at least 1"):
        batching.reshuffled(key, 0, num_epochs=1)
