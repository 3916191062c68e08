"""The noise floor of each order of the stream against every possible stream, and against the streams of `batching`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest

from gdjax import batching, descent, gradients
from gdjax.theory import stream_order

TARGETS = np.array([1.0, -2.5, 0.7, 0.8])  # mean 0
CURVATURE, RATE = 0.5, 1.2  # q = 0.4
COMMON = {"target_variance": (TARGETS**2).mean(), "num_examples": 4}


def train(stream, batch_size, targets=TARGETS):
    method = descent.method(gradients.mean(lambda theta, c: 0.5 * CURVATURE * (theta - c) ** 2), optax.sgd(RATE))
    batches = batching.batches(stream, batch_size)
    return descent.run(method, method.init(jnp.asarray(0.0)), targets, batches)[0].params


def over(streams, batch_size):
    return np.asarray(jax.jit(jax.vmap(lambda stream: train(stream, batch_size)))(jnp.asarray(streams, jnp.int32)))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_the_floors_are_the_mean_over_every_stream(batch_size):
    orders = list(itertools.permutations(range(4)))
    q, num_updates = 1 - RATE * CURVATURE, 4 // batch_size
    exact = (4 * precision.EPS) ** 2  # of theta^2: all examples at once have no floor
    theta = over([a + b for a in orders for b in orders], batch_size)
    expected = stream_order.reshuffled(RATE, CURVATURE, **COMMON, batch_size=batch_size)
    precision.assert_close((theta**2).mean(), expected * (1 - q ** (4 * num_updates)), rtol=1e-12, atol=exact)
    theta = over([3 * a for a in orders], batch_size)
    expected = stream_order.shuffled_once(RATE, CURVATURE, **COMMON, batch_size=batch_size)
    precision.assert_close((theta**2).mean(), expected * (1 - q ** (3 * num_updates)) ** 2, rtol=1e-12, atol=exact)
    theta = over(list(itertools.product(range(4), repeat=8 if batch_size > 1 else 6)), batch_size)
    num_updates = 8 // batch_size if batch_size > 1 else 6
    expected = stream_order.with_replacement(RATE, CURVATURE, **COMMON, batch_size=batch_size)
    precision.assert_close((theta**2).mean(), expected * (1 - q ** (2 * num_updates)), rtol=1e-12)


@pytest.mark.parametrize("name", ["with_replacement", "shuffled_once", "reshuffled"])
def test_the_streams_of_batching_have_these_floors(name, key):
    @jax.jit
    @jax.vmap
    def squares(key):
        return train(getattr(batching, name)(key, 4, num_epochs=8), 2) ** 2

    sample = np.asarray(squares(jax.random.split(key, 4000)))
    expected = getattr(stream_order, name)(RATE, CURVATURE, **COMMON, batch_size=2)
    assert abs(sample.mean() - expected) < 4 * sample.std() / np.sqrt(len(sample))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_order_of_the_data_ends_where_it_should(batch_size, key):
    theta = train(batching.cyclic(key, 4, num_epochs=20), batch_size)
    expected = stream_order.cyclic(RATE, CURVATURE, targets=jnp.asarray(TARGETS), batch_size=batch_size)
    precision.assert_close(theta, expected, rtol=1e-12)


def test_at_small_rates_reshuffled_is_below_shuffled_once_is_below_with_replacement():
    @jax.jit
    @jax.vmap
    def floors(rate):
        names = "reshuffled", "shuffled_once", "with_replacement"
        return jnp.stack(
            [getattr(stream_order, name)(rate, 1.0, target_variance=1.0, num_examples=64) for name in names]
        )

    rates = np.geomspace(1e-4, 0.5, 30)
    by_order = floors(rates)
    assert (np.diff(by_order[rates < 0.02], axis=1) > 0).all()
    # Reshuffling turns the floor's order in the rate from 1 into 3: Mishchenko et al. 2020.
    orders = np.log(by_order[1] / by_order[0]) / np.log(rates[1] / rates[0])
    np.testing.assert_allclose(orders, [3, 2, 1], atol=0.01)


@pytest.mark.parametrize("rate", [1e-9, 1e-5, 0.3])
def test_the_floors_of_small_rates_in_float32(rate):
    x, num_examples = np.longdouble(rate * 0.5), 20
    weights = (1 - x) ** np.arange(num_examples)
    spread = num_examples / (num_examples - 1) * ((weights - weights.mean()) ** 2).sum()
    reshuffled, once = x * spread / (2 - x) / (weights**2).sum(), spread / weights.sum() ** 2
    with jax.enable_x64(False):
        options = {"target_variance": 1.0, "num_examples": num_examples}
        floors = [floor(rate, 0.5, **options) for floor in (stream_order.reshuffled, stream_order.shuffled_once)]
    np.testing.assert_allclose(floors, np.asarray([reshuffled, once], float), rtol=1e-5)


def test_a_batch_that_does_not_divide_an_epoch_is_refused():
    with pytest.raises(ValueError, match="batch_size=3 must divide num_examples=4"):
        stream_order.reshuffled(RATE, CURVATURE, **COMMON, batch_size=3)
