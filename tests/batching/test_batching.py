import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdjax import batching
from gdjax.batching import Count, _cipher, _count

STREAMS = (batching.reshuffled, batching.shuffled_once, batching.cyclic, batching.with_replacement)
PERMUTING = STREAMS[:3]
LOOKED_UP = 2**13 + 1  # the least number of examples whose order is not sorted


def chi_square(counts, expected):
    return ((np.asarray(counts) - expected) ** 2 / expected).sum()


def limit(degrees):
    """Four standard deviations above the mean of chi square."""
    return degrees + 4 * math.sqrt(2 * degrees)


def by_definition(key, num_examples, position):
    """Return the entry at a position, a Python integer, of the reshuffled stream of many examples."""
    epoch, index = divmod(position, num_examples)
    key = jax.random.fold_in(key, np.uint32(epoch >> 32)) if epoch >> 32 else key
    order = _cipher.draw(jax.random.fold_in(key, np.uint32(epoch % 2**32)), num_examples)
    return int(_cipher.look_up(order[None], jnp.uint32(0), jnp.uint32(index), num_examples))


@pytest.mark.parametrize("stream", PERMUTING)
@pytest.mark.parametrize("num_examples", [1, 2, 7])
def test_every_epoch_is_a_permutation(stream, num_examples, key):
    epochs = stream(key, num_examples, num_epochs=5).reshape(5, num_examples)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_examples), (5, 1)))


@pytest.mark.slow
def test_reshuffled_epochs_differ_and_shuffled_once_epochs_do_not(key):
    different = batching.reshuffled(key, 100, num_epochs=4).reshape(4, 100)
    assert all((a != b).any() for a, b in itertools.combinations(different, 2))
    same = batching.shuffled_once(key, 100, num_epochs=4).reshape(4, 100)
    np.testing.assert_array_equal(same, np.tile(same[0], (4, 1)))
    assert (np.asarray(same[0]) != np.arange(100)).any()


@pytest.mark.slow
def test_every_order_is_equally_likely():
    keys = jax.random.split(jax.random.key(1), 6000)
    orders = jax.vmap(lambda key: batching.reshuffled(key, 3, start=3, length=3))(keys)
    counts = np.unique(np.asarray(orders) @ np.array([9, 3, 1]), return_counts=True)[1]
    assert len(counts) == 6
    # Multinomial with p = 1/6: each count has standard deviation sqrt(6000 * 5/36) = 28.9.
    assert np.all(np.abs(counts - 1000) < 4 * 28.9)


@pytest.mark.parametrize("num_examples", [2, 3, 4, 5])
@pytest.mark.slow
def test_the_orders_of_few_examples_are_all_reached_and_equally_often(num_examples):
    keys = jax.random.split(jax.random.key(2), 100 * math.factorial(num_examples))
    epoch = {"start": num_examples, "length": num_examples}
    orders = jax.jit(jax.vmap(lambda key: batching.reshuffled(key, num_examples, **epoch)))(keys)
    counts = np.unique(np.asarray(orders), axis=0, return_counts=True)[1]
    assert len(counts) == math.factorial(num_examples)
    assert chi_square(counts, 100) < limit(len(counts) - 1)


@pytest.mark.slow
def test_with_replacement_is_uniform_and_independent_of_position(key):
    entries = np.asarray(batching.with_replacement(key, 4, num_epochs=5000))
    pairs = np.bincount(entries[:-1] * 4 + entries[1:], minlength=16)
    expected = len(entries) / 16
    assert np.all(np.abs(pairs - expected) < 4.5 * np.sqrt(expected))


@pytest.mark.parametrize("stream", STREAMS)
@settings(max_examples=6)  # every shape compiles anew
@given(num_examples=st.integers(1, 5), start=st.integers(0, 20), length=st.integers(1, 9), seed=st.integers(0, 99))
@pytest.mark.slow
def test_a_window_is_a_slice_of_the_endless_stream(stream, num_examples, start, length, seed):
    key = jax.random.key(seed)
    whole = np.asarray(stream(key, num_examples, num_epochs=-(-(start + length) // num_examples)))
    np.testing.assert_array_equal(stream(key, num_examples, start=start, length=length), whole[start : start + length])


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.slow
def test_a_window_may_start_at_a_traced_position(stream, key):
    window = jax.jit(lambda start: stream(key, 5, start=start, length=8))
    for start in range(12):
        np.testing.assert_array_equal(window(start), stream(key, 5, start=start, length=8))


def test_streams_of_different_keys_differ():
    a, b = (batching.reshuffled(key, 50, num_epochs=1) for key in jax.random.split(jax.random.key(0)))
    assert (a != b).any()


@given(length=st.integers(1, 50), batch_size=st.integers(1, 50))
@pytest.mark.slow
def test_cut_keeps_order_and_accounts_for_every_entry(length, batch_size):
    stream = jnp.arange(length)
    if batch_size > length:
        with pytest.raises(ValueError, match=f"batch_size={batch_size} must be between 1 and the {length} entries"):
            batching.batches(stream, batch_size)
    elif length % batch_size:
        with pytest.raises(
            ValueError, match=f"batch_size={batch_size} leaves {length % batch_size} of .* drop_remainder"
        ):
            batching.batches(stream, batch_size)
        kept = batching.batches(stream, batch_size, drop_remainder=True)
        assert kept.shape == (length // batch_size, batch_size)
        np.testing.assert_array_equal(kept.reshape(-1), stream[: kept.size])
    else:
        batches = batching.batches(stream, batch_size)
        assert batches.shape == (length // batch_size, batch_size)
        np.testing.assert_array_equal(batches.reshape(-1), stream)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_cut_refuses_a_batch_size_below_one(batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be between 1 and"):
        batching.batches(jnp.arange(4), batch_size)


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


@pytest.mark.slow
def test_an_order_that_is_looked_up_is_a_permutation_of_any_number():
    """Whatever numbers it is made of. One operation at a time and all in one shape: nothing is compiled for each N."""
    rng, places, which = np.random.default_rng(0), np.arange(300), jnp.asarray([[0], [1]])
    words = rng.integers(2**32, size=(2, _cipher.NUM_PASSES, 1 + _cipher.NUM_ROUNDS), dtype=np.uint32)
    for num_examples in range(1, 301):
        orders = words.copy()
        orders[:, :, 0] %= num_examples  # the shifts
        indices = jnp.asarray(np.tile(places % num_examples, (2, 1)), jnp.uint32)
        entries = np.asarray(_cipher.look_up(jnp.asarray(orders), which, indices, num_examples))
        np.testing.assert_array_equal(np.sort(entries[:, :num_examples]), np.tile(places[:num_examples], (2, 1)))


def _nightly(*numbers):
    return [pytest.param(number, marks=pytest.mark.nightly) for number in numbers]


SMALL = [*range(1, 25), *range(25, 301, 25)]
LARGE = [LOOKED_UP - 1, LOOKED_UP, 2**20 - 1, 2**20]
OTHERS = [*sorted(set(range(1, 301)) - set(SMALL)), 10**7]


@pytest.mark.slow
@pytest.mark.parametrize("num_examples", [*SMALL, *LARGE, *_nightly(*OTHERS)])
def test_every_epoch_visits_every_example_once(num_examples, key):
    for stream in (batching.reshuffled, batching.shuffled_once):
        epochs = np.asarray(stream(key, num_examples, num_epochs=2)).reshape(2, num_examples)
        for epoch in epochs:
            np.testing.assert_array_equal(np.bincount(epoch, minlength=num_examples), np.ones(num_examples))


@pytest.mark.parametrize("num_examples", [LOOKED_UP, 10**6 + 3, 2**31])
@pytest.mark.slow
def test_many_examples_are_as_likely_at_every_position(num_examples):
    """Eighths of the epoch against eighths of the data, and neighbours and epochs against one another."""
    starts = np.linspace(0, num_examples - 2, 40).astype(np.uint32)
    keys = jax.random.split(jax.random.key(4), 200)

    def pairs(key, start):
        return batching.reshuffled(key, num_examples, start=start, length=2)

    over_starts = jax.vmap(pairs, (None, 0))
    first = Count(jnp.zeros(40, jnp.uint32), jnp.asarray(starts))
    draw = jax.jit(lambda keys, starts: jax.vmap(over_starts, (0, None))(keys, starts))
    entries, later = (np.asarray(draw(keys, start), np.int64) for start in (first, first + num_examples))
    eighth, place = entries * 8 // num_examples, np.arange(40) // 5
    table = [np.bincount(eighth[:, place == p].ravel(), minlength=8) for p in range(8)]
    assert chi_square(table, entries.size / 64) < limit(64)
    apart = (entries[..., 1] - entries[..., 0]) % num_examples  # uniform on 1 ... N - 1
    assert chi_square(np.bincount((apart * 16 // num_examples).ravel(), minlength=16), apart.size / 16) < limit(15)
    between = (later - entries) % num_examples
    assert chi_square(np.bincount((between * 16 // num_examples).ravel(), minlength=16), between.size / 16) < limit(15)
    for a, b in ((entries[..., 0], entries[..., 1]), (entries, later)):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)


@pytest.mark.slow
def test_an_order_keeps_neither_rows_nor_columns_of_the_table_together(key):
    """Pairs that begin in one row or column end in one as often as any two of N."""
    num_examples = LOOKED_UP
    rows = math.isqrt(num_examples)
    columns = num_examples // rows
    orders = np.asarray(batching.reshuffled(key, num_examples, num_epochs=60)).reshape(60, num_examples)
    for lag in (1, columns, columns + 1):
        a, b = orders[:, lag:], orders[:, :-lag]
        for together, chance in ((a // columns == b // columns, 1 / rows), (a % columns == b % columns, 1 / columns)):
            deviation = math.sqrt(chance / together.size)
            assert abs(together.mean() - chance) < 5 * deviation + 2 / num_examples


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.slow
def test_a_window_of_many_examples_is_a_slice_of_the_endless_stream(stream, key):
    whole = np.asarray(stream(key, LOOKED_UP, num_epochs=3))
    window = jax.jit(lambda start: stream(key, LOOKED_UP, start=start, length=100))
    for start in (0, LOOKED_UP - 50, 2 * LOOKED_UP - 1):
        np.testing.assert_array_equal(window(np.int32(start)), whole[start : start + 100])
        np.testing.assert_array_equal(window(Count.of(start)), whole[start : start + 100])
    np.testing.assert_array_equal(
        stream(key, LOOKED_UP, start=LOOKED_UP - 7, length=2 * LOOKED_UP), whole[-2 * LOOKED_UP - 7 : -7]
    )


@pytest.mark.parametrize("num_examples", [1, 7, LOOKED_UP, 10**7, 2**31 - 1, 2**31])
@pytest.mark.slow
def test_windows_lie_anywhere_below_2_to_the_63(num_examples, key):
    """Across 2^31, 2^32, 2^40 and 2^62, at a start that is known and one that is traced."""
    traced = {
        stream: jax.jit(lambda start, stream=stream: stream(key, num_examples, start=start, length=4))
        for stream in STREAMS
    }
    for start in (2**31 - 2, 2**32 - 2, 2**40 - 2, 2**62 - 2, 2**63 - 4):
        positions = range(start, start + 4)
        for stream, window in traced.items():
            np.testing.assert_array_equal(window(Count.of(start)), stream(key, num_examples, start=start, length=4))
        np.testing.assert_array_equal(traced[batching.cyclic](Count.of(start)), [p % num_examples for p in positions])
        once = [batching.shuffled_once(key, num_examples, start=p % num_examples, length=1)[0] for p in positions]
        np.testing.assert_array_equal(traced[batching.shuffled_once](Count.of(start)), once)
        if num_examples >= LOOKED_UP:
            entries = [by_definition(key, num_examples, p) for p in positions]
            np.testing.assert_array_equal(traced[batching.reshuffled](Count.of(start)), entries)


def test_a_far_epoch_is_a_permutation_like_any_other(key):
    for num_examples in (7, LOOKED_UP):
        epoch = 2**61 // num_examples
        draw = jax.jit(lambda start, n=num_examples: batching.reshuffled(key, n, start=start, length=2 * n))
        orders = np.asarray(draw(Count.of(epoch * num_examples))).reshape(2, num_examples)
        np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(num_examples), (2, 1)))
        assert (orders[0] != orders[1]).any()


@pytest.mark.slow
def test_what_a_stream_draws_does_not_grow_with_the_data(key):
    """The program for 512 of 2^31 holds no array of more entries, where an order would be 8 GiB."""
    for stream in (*STREAMS,):
        window = jax.jit(lambda start, stream=stream: stream(key, 2**31, start=start, length=512))
        assert window.lower(Count.of(5)).compile().memory_analysis().temp_size_in_bytes < 2**18


@pytest.mark.parametrize(
    ("num_examples", "arguments", "message"),
    [
        (2**31 + 1, {"length": 3}, "num_examples=2147483649 must be at least 1 and at most 2.31"),
        (2**20, {"num_epochs": 2**12}, "1 to 2.31 entries long, and a longer one taken in windows: num_epochs=4096"),
        (7, {"start": 2**63 - 2, "length": 3}, "start=9223372036854775806 must be at least 0, and start . length=3 at"),
    ],
)
def test_a_stream_refuses_what_it_cannot_count(num_examples, arguments, message, key):
    with pytest.raises(ValueError, match=message):
        batching.reshuffled(key, num_examples, **arguments)


COUNTS = st.integers(0, 2**63 - 1) | st.sampled_from([0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1])


@given(a=COUNTS, b=COUNTS, small=st.integers(-(2**31), 2**31 - 1), divisor=st.integers(1, 2**31))
@pytest.mark.slow
def test_a_count_is_the_integer_that_it_stands_for(a, b, small, divisor):
    count = Count.of(a)
    assert (int(count), int(np.asarray(count)), f"{count}", repr(count)) == (a, a, str(a), f"Count({a})")
    assert int(count + b) == int(b + count) == int(count + Count.of(b)) == a + b
    assert int(count + np.int32(small)) == (a + small) % 2**64
    for other in (b, Count.of(b)):
        assert [bool(x) for x in (count == other, count != other, count < other, count <= other)] == [
            a == b,
            a != b,
            a < b,
            a <= b,
        ]
        assert [bool(x) for x in (count > other, count >= other)] == [a > b, a >= b]
    quotient, remainder = divmod(count, divisor)
    assert (int(quotient), int(remainder)) == divmod(a, divisor)
    assert int(count.astype(jnp.uint32)) == a % 2**32
    np.testing.assert_allclose(count.astype(jnp.float32), np.float32(a), rtol=2e-7)


@given(high=st.integers(0, 2**32 - 1), low=st.integers(0, 2**32 - 1), bound=st.integers(1, 2**31))
def test_random_bits_are_scaled_exactly(high, low, bound):
    found = _count.below(jnp.asarray([high, low], jnp.uint32), bound)
    assert int(found) == (bound * (high << 32 | low)) >> 64


def test_arrays_of_counts_and_what_is_no_count():
    counts = Count.of(jnp.asarray([3, -1], jnp.int32)) + 2
    np.testing.assert_array_equal(np.asarray(counts), [5, 1])
    assert np.shape(counts) == (2,)
    with pytest.raises(ValueError, match=r"number=1.5 must be an integer"):
        Count.of(1.5)
    with pytest.raises(ValueError, match=r"divisor=0 must be between 1 and 2.31"):
        divmod(counts, 0)


def test_phases_count_examples_as_a_loop_does():
    phases = batching.Phases.of([(3, 2), (1, 7), (2, 4)])
    sizes, seen = [2] * 3 + [7] + [4] * 5, 0  # the last goes on
    assert (phases.num_updates, phases.sizes, phases.parts[0]) == (6, (2, 4, 7), (3, 2))
    for t, size in enumerate(sizes):
        assert phases.examples(t) == seen == float(phases.counted(t))
        assert phases.at(t)[0] == size
        assert [phases.updates(seen + more) for more in range(size + 1)] == [t] * size + [t + 1]
        seen += size
    cut = phases.batches(jnp.arange(21))
    np.testing.assert_array_equal(np.concatenate([part.reshape(-1) for part in cut]), np.arange(21))
    assert [part.shape for part in cut] == [(3, 2), (1, 7), (2, 4)]
    with pytest.raises(ValueError, match=r"stream must have the 21 entries that the phases take, but has shape"):
        phases.batches(jnp.arange(20))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda key: batching.reshuffled(key, 4, length=4.0), "length=4.0 must be a whole number"),
        (lambda key: batching.cyclic(key, 4, num_epochs=1.5), "num_epochs=1.5 must be a whole number"),
        (lambda key: batching.with_replacement(key, 4.5, length=4), "num_examples=4.5 must be a whole number"),
        (lambda key: batching.Count.of(2**70), r"number=1180591620717411303424 must be at least 0 and below 2\^64"),
        (lambda key: batching.Phases.of([(1, 2, 3)]), r"schedule=\[\(1, 2, 3\)\] must be"),
        (lambda key: batching.poisson(key, 9, batch_size=2, num_updates=3, start=2**31), "start=2147483648 must be"),
        (lambda key: batching.poisson(key, 9, batch_size=2, num_updates=3, start=-1), "start=-1 must be at least 0"),
        (lambda key: batching.poisson(key, 9, batch_size=2, num_updates=3.5), "num_updates=3.5 must be a whole"),
        (
            lambda key: batching.poisson(key, 9, batch_size=2, num_updates=3, max_batch_size=2.5),
            "max_batch_size=2.5 must be a whole",
        ),
    ],
)
def test_numbers_that_are_not_whole_or_out_of_range_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(jax.random.key(0))


def test_poisson_batches_may_start_at_a_count():
    draw = functools.partial(batching.poisson, jax.random.key(0), 9, batch_size=2, num_updates=3)
    np.testing.assert_array_equal(draw(start=batching.Count.of(5)).indices, draw(start=5).indices)
