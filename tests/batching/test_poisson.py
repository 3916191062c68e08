"""Poisson batches: their distribution, windows of them, overflow, and a run on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdjax import batching, gradients
from gdjax.batching import _poisson

pytestmark = pytest.mark.slow  # hundreds of programs are compiled


def membership(batches, num_examples):
    """Return whether each example is in each batch, bool[T, N]."""
    found = np.zeros((len(batches.mask), num_examples), int)
    rows = np.broadcast_to(np.arange(len(found))[:, None], batches.mask.shape)
    np.add.at(found, (rows, batches.indices), np.asarray(batches.mask, int))
    assert found.max(initial=0) <= 1  # no example twice
    return found == 1


def test_examples_are_in_batches_independently_with_the_probability(key):
    """Every example, every pair of examples and of batches: frequencies within 4.5 standard errors."""
    num_updates, rate = 20000, 0.3
    inside = membership(batching.poisson(key, 6, batch_size=1.8, num_updates=num_updates), 6)
    error = np.sqrt(rate * (1 - rate) / num_updates)
    np.testing.assert_allclose(inside.mean(0), rate, atol=4.5 * error)
    both = inside.T.astype(float) @ inside / num_updates
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(both[off], rate**2, atol=4.5 * np.sqrt(rate**2 * (1 - rate**2) / num_updates))
    following = inside[1:].T.astype(float) @ inside[:-1] / num_updates
    np.testing.assert_allclose(following, rate**2, atol=4.5 * np.sqrt(rate**2 * (1 - rate**2) / num_updates))


def test_every_set_of_examples_is_as_likely_as_it_should_be(key):
    """Of 4 examples, 16 sets."""
    num_updates = 20000
    inside = membership(batching.poisson(key, 4, batch_size=1.0, num_updates=num_updates), 4)
    counts = np.bincount(inside @ np.array([1, 2, 4, 8]), minlength=16)
    sizes = np.array([bin(i).count("1") for i in range(16)])
    expected = num_updates * 0.25**sizes * 0.75 ** (4 - sizes)
    assert np.sum((counts - expected) ** 2 / expected) < 37.7  # chi squared of 15 degrees, 1 in 1000


@pytest.mark.parametrize(("num_examples", "batch_size"), [(60000, 256), (1000, 999)])
def test_sizes_are_binomial_and_places_uniform(num_examples, batch_size, key):
    batches = batching.poisson(key, num_examples, batch_size=batch_size, num_updates=400)
    sizes, rate = np.asarray(batches.mask).sum(1), batch_size / num_examples
    variance = batch_size * (1 - rate)
    np.testing.assert_allclose(sizes.mean(), batch_size, atol=4.5 * np.sqrt(variance / 400))
    # The fourth moment of a binomial, for the error of its variance.
    fourth = 3 * variance**2 + variance * (1 - 6 * rate * (1 - rate))
    np.testing.assert_allclose(sizes.var(), variance, atol=4.5 * np.sqrt((fourth - variance**2) / 400))
    places = np.asarray(batches.indices)[np.asarray(batches.mask)] / num_examples
    np.testing.assert_allclose(places.mean(), 0.5, atol=4.5 / np.sqrt(12 * sizes.sum()))
    assert not batches.overflowed.any()


def test_positions_that_wrap_around_do_not_count(key):
    """The sum of 30 gaps is far beyond 2^32 here."""
    batches = batching.poisson(key, 2**30, batch_size=1, num_updates=400)
    sizes = np.asarray(batches.mask).sum(1)
    np.testing.assert_allclose(sizes.mean(), 1, atol=4.5 / np.sqrt(400))
    assert all((np.diff(row[:size]) > 0).all() for row, size in zip(batches.indices, sizes, strict=True))


def test_the_whole_data_set_is_a_batch_of_probability_one(key):
    batches = batching.poisson(key, 5, batch_size=5, num_updates=3)
    assert batches.mask.all()
    np.testing.assert_array_equal(batches.indices, np.tile(np.arange(5), (3, 1)))


def test_a_batch_can_be_drawn_on_its_own(key):
    whole = batching.poisson(key, 50, batch_size=7, num_updates=9)
    window = jax.jit(lambda start: batching.poisson(key, 50, batch_size=7, num_updates=4, start=start))(3)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[3:7]), window, whole)


def test_the_default_size_overflows_less_often_than_said():
    """Against the exact binomial tail, which Chernoff's bound is above."""
    from scipy import stats

    for num_examples, rate in ((60000, 256 / 60000), (100, 0.5), (1440, 32 / 1440), (10**9, 1e-7)):
        size = _poisson._provided(num_examples, rate)
        assert stats.binom.sf(size, num_examples, rate) < _poisson.OVERFLOW
        assert stats.binom.sf(0.75 * size, num_examples, rate) > _poisson.OVERFLOW  # it is not idle either


def test_overflow_is_refused_or_flagged(key):
    with pytest.raises(ValueError, match=r"of 50 batches hold more than max_batch_size=5 examples"):
        batching.poisson(key, 100, batch_size=5, num_updates=50, max_batch_size=5)
    small = jax.jit(lambda: batching.poisson(key, 100, batch_size=5, num_updates=50, max_batch_size=5))()
    large = batching.poisson(key, 100, batch_size=5, num_updates=50, max_batch_size=100)
    assert small.indices.shape == (50, 5)
    assert 5 < int(small.overflowed.sum()) < 45
    assert not large.overflowed.any()
    assert membership(large, 100).sum(1).max() > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_examples": 0}, "num_examples=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be positive"),
        ({"batch_size": 11}, "batch_size=11 must be positive and at most num_examples=10"),
        ({"num_updates": 0}, "num_updates=0"),
        ({"max_batch_size": 0}, "max_batch_size=0"),
    ],
)
def test_batches_that_cannot_be_drawn_are_refused(arguments, message, key):
    with pytest.raises(ValueError, match=message):
        batching.poisson(key, **({"num_examples": 10, "batch_size": 2, "num_updates": 3} | arguments))


def test_a_sum_over_poisson_batches_is_unbiased(key):
    """Divided by B, not by the size: the mean over many batches is the mean over the data."""
    data = jnp.asarray([1.0, 2.0, 6.0, 7.0])
    gradient = gradients.clipped(
        lambda w, pair: w * pair[0], float("inf"), weight=lambda pair: pair[1], expected_batch_size=2
    )
    batches = batching.poisson(key, 4, batch_size=2, num_updates=4000)
    grads = jax.jit(jax.vmap(lambda b: gradient(jnp.ones(()), batching.take_padded(data, b)).grad))(batches)
    deviation = np.sqrt(0.25 * np.sum(np.asarray(data) ** 2)) / 2
    np.testing.assert_allclose(grads.mean(), data.mean(), atol=4 * deviation / np.sqrt(4000))
    np.testing.assert_allclose(grads.std(), deviation, rtol=4 / np.sqrt(4000))
