"""Noise scales where something is missing or none: weights, noise, a gradient, what float32 holds, a second batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from test_noise import PARAMS, explicit_gradients, linear_loss, moments, population

from gdjax import batching, descent, gradients, noise
from gdjax.noise import _running as running

pytestmark = pytest.mark.slow  # hundreds of programs are compiled

EXACT = {"rtol": 1e-9}


def square(mean, x):
    return 0.5 * (mean - x) ** 2


def is_scale(x):
    return isinstance(x, noise.NoiseScale | noise.Bracket)


def as_numbers(scale):
    return [np.asarray(getattr(scale, field)) for field in ("b_simple", "low", "high")]


# Weights.
def weighted_square(mean, example):
    return square(mean, example[0])


def weight_of(example):
    return example[1]


@pytest.mark.parametrize("weights", [[1.0, 3.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
def test_norms_and_a_weighted_mean_are_refused_for_what_is_missing(weights):
    """Of sum |w (g - G)|^2 = sum w^2 |g|^2 - 2 G' sum w^2 g + |G|^2 sum w^2 the middle is in neither of them."""
    data = jnp.asarray([0.3, -1.0, 2.0, 0.1]), jnp.asarray(weights)
    estimator = gradients.with_sq_norms(weighted_square, weight=weight_of)
    method = noise.track(descent.method(estimator, optax.sgd(0.0)), half_life=10.0, num_examples=4)
    refused = pytest.raises(ValueError, match=r"weight.*noise\.measure\(weight=\)")
    with refused:
        method.step(method.init(0.5), data)
    with refused:
        noise.parts(sq_norms=estimator(0.5, data).aux, batch_size=4)


def padded_sum(w, example):
    """The mean over the positions that are there: 0/0 where none is."""
    x, mask = example
    return jnp.sum(mask * (w - x) ** 2) / jnp.sum(mask)


@pytest.mark.parametrize(("num_examples", "microbatch_size"), [(40, 7), (33, 1)])
def test_an_example_of_weight_zero_may_be_nan(key, num_examples, microbatch_size):
    """Against the same sample with a finite example there; with groups of one, all of a group may be such."""
    x, mask = jax.random.normal(key, (40, 6)), jnp.ones((40, 6)).at[jnp.asarray([3, 17])].set(0)
    weights = mask.sum(1)

    def measured(mask):
        def loss(w, example):
            return padded_sum(w, example[0])

        options = {"num_examples": num_examples, "microbatch_size": microbatch_size}
        return noise.measure(loss, jnp.full(6, 0.5), ((x, mask), weights), key, weight=weight_of, **options)

    found, expected = measured(mask), measured(jnp.ones((40, 6)))
    assert np.isfinite(expected.b_simple)
    precision.assert_close([found.grad_sq_norm, found.trace_cov], [expected.grad_sq_norm, expected.trace_cov], **EXACT)
    precision.assert_close(as_numbers(found), as_numbers(expected), **EXACT)
    if num_examples == 40:
        grads = np.delete(2 * (0.5 - np.asarray(x)) / 6, [3, 17], 0)
        signal, variance = moments(grads)
        # An example that is none has no noise either, and of all 40 examples 38 have the weight.
        precision.assert_close([found.grad_sq_norm, found.trace_cov], [signal, variance * 40 / 38], **EXACT)


@pytest.mark.parametrize("unit", [1e-20, 1e20])
def test_weights_count_by_their_ratios(key, unit):
    with jax.enable_x64(False):
        data = jax.random.normal(key, (60,), jnp.float32), 1.0 + jnp.arange(60, dtype=jnp.float32) % 3

        def measured(unit):
            weight = lambda example: example[1] * jnp.float32(unit)  # noqa: E731
            return noise.measure(weighted_square, jnp.float32(0.5), data, key, num_examples=40, weight=weight)

        plain, found = measured(1.0), measured(unit)
        assert np.isfinite(as_numbers(plain)).all()
        np.testing.assert_allclose(as_numbers(found), as_numbers(plain), rtol=1e-4)
        assert found.verdict == plain.verdict


# What is not finite.
@pytest.mark.usefixtures("nans")
@pytest.mark.parametrize("geometry", ["euclidean", "sign", "spectral"])
def test_a_gradient_that_is_not_finite_is_said(key, geometry):
    data = jax.random.normal(key, (40,)).at[7].set(jnp.nan)
    scale = noise.measure(square, jnp.asarray(0.5), data, key, num_examples=40, geometry=geometry)
    assert scale.verdict == "not finite"
    assert str(scale).endswith(": not finite")


# All the examples there are.
def test_of_two_examples_all_is_known(key):
    """G = (.5 - 0 + .5 - 3) / 2 = -1 and the deviations are +-1.5."""
    scale = noise.measure(square, jnp.asarray(0.5), jnp.asarray([0.0, 3.0]), key, num_examples=2)
    precision.assert_close(as_numbers(scale), 2.25)
    assert scale.verdict == "ok"


@pytest.mark.parametrize("batch_size", [100, 200])
@pytest.mark.parametrize("single", [True, False])
def test_batches_of_all_examples_are_exact_and_do_not_lag(key, batch_size, single):
    with jax.enable_x64(not single):
        data = jax.random.normal(key, (100,), float)
        method = descent.method(gradients.with_sq_norms(square), optax.sgd(0.0))
        method = noise.track(method, half_life=1e4, num_examples=100)
        batches = batching.batches(batching.reshuffled(key, 100, num_epochs=400), batch_size)
        state, _ = jax.jit(lambda: descent.run(method, method.init(0.5), data, batches))()
        found = noise.reading(state)
    signal, variance = moments(0.5 - np.asarray(data, float)[:, None])
    np.testing.assert_allclose(as_numbers(found), variance / signal, rtol=1e-4)
    assert found.low <= found.high
    assert found.verdict == "ok"


def test_watching_batches_of_all_examples_does_not_lag_either():
    sums = running.start(half_life=1e4)
    for _ in range(50):
        sums = running.push(sums, 3.0, 4.0, batch_size=100)
    for ulps in (-1, 1):
        now = running.push(sums, 3.0 * (1 + ulps * 2.0**-50), 4.0, batch_size=100)
        found = noise.reading(now)
        assert found.verdict == "ok"
        assert found.low <= found.high


# No noise, no gradient, no parameter.
@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("geometry", ["euclidean", "sign", "spectral"])
@pytest.mark.parametrize(
    "at", [0.1, *(pytest.param(x, marks=pytest.mark.nightly) for x in (0.5, 0.7))]
)  # the others are rounded
def test_without_noise_the_scale_is_zero(key, geometry, at, replace):
    data, at = jnp.full(64, 1.1), jnp.asarray(at)
    scale = noise.measure(square, at, data, key, num_examples=30, geometry=geometry, replace=replace)
    assert np.abs(as_numbers(scale)).max() < 1e-12
    assert scale.verdict == "ok"


@pytest.mark.parametrize("geometry", ["sign", "spectral"])
@pytest.mark.parametrize("num_examples", [20, 30])
def test_without_a_gradient_there_is_no_scale(key, geometry, num_examples):
    data = jnp.ones(30)
    scale = noise.measure(square, jnp.asarray(1.0), data, key, num_examples=num_examples, geometry=geometry)
    assert scale.verdict == "not identified"
    assert not np.isnan(as_numbers(scale)).any()
    assert str(scale).startswith("noise scale between inf and inf ")


@pytest.mark.parametrize("geometry", ["euclidean", "sign", "spectral"])
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_a_leaf_without_entries_changes_nothing(key, geometry, shape):
    data = jax.random.normal(key, (30,)) + 2

    def measured(params):
        loss = lambda params, x: square(params["mean"], x) + sum(leaf.sum() for leaf in params.values())  # noqa: E731
        return noise.measure(loss, params, data, key, num_examples=20, geometry=geometry)

    params = {"mean": jnp.asarray(0.5)}
    found, plain = measured(params | {"none": jnp.zeros(shape)}), measured(params)
    precision.assert_close(as_numbers(found), as_numbers(plain), **EXACT)


# Units of the loss that float32 holds, and whose squares it does not.
@pytest.mark.parametrize("geometry", ["euclidean", "sign"])
@pytest.mark.parametrize(
    "unit", [1e-30, 1e19, *(pytest.param(x, marks=pytest.mark.nightly) for x in (1e-20, 1e-18, 1e30))]
)
def test_gradients_without_a_square_have_the_same_scale(key, unit, geometry):
    with jax.enable_x64(False):
        data, params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float32), (population(64), PARAMS))

        def measured(unit):
            loss = lambda params, example: linear_loss(params, example) * jnp.float32(unit)  # noqa: E731
            return noise.measure(loss, params, data, key, num_examples=48, geometry=geometry)

        plain, found = measured(1.0), measured(unit)
        scales = [jax.tree.leaves(scale.per_leaf, is_leaf=is_scale) for scale in (plain, found)]
        for one, other in zip([plain, *scales[0]], [found, *scales[1]], strict=True):
            np.testing.assert_allclose(as_numbers(other), as_numbers(one), rtol=2e-3)
            assert one.verdict == other.verdict
        if geometry == "sign":
            np.testing.assert_allclose(found.grad_norm, plain.grad_norm * jnp.float32(unit), rtol=1e-4)
        signal, variance = moments(explicit_gradients(population(64)))
        assert geometry == "sign" or plain.low <= variance / signal <= plain.high


@pytest.mark.parametrize("unit", [1.0, 2e-19, 7e-20, 1e20])
def test_tracking_never_trusts_squares_that_vanished_or_overflowed(key, unit):
    with jax.enable_x64(False):
        data = jax.random.normal(key, (64,), float)
        loss = lambda mean, x: square(mean, x) * jnp.float32(unit)  # noqa: E731
        method = descent.method(gradients.with_sq_norms(loss), optax.sgd(0.0))
        method = noise.track(method, half_life=1e4, num_examples=64)
        batches = batching.batches(batching.reshuffled(key, 64, num_epochs=50), 16)
        state, _ = jax.jit(lambda: descent.run(method, method.init(jnp.float32(0.3)), data, batches))()
        assert noise.reading(state).verdict == ("ok" if unit == 1 else "not identified")


# The number of examples.
@pytest.mark.parametrize("num_examples", [0, -3, 1])
def test_a_number_of_examples_that_shows_no_noise_is_refused(num_examples):
    refused = pytest.raises(ValueError, match=f"num_examples={num_examples} must be at least 2")
    plain = descent.method(gradients.with_sq_norms(square), optax.sgd(0.1))
    with refused:
        noise.watch(half_life=1.0, num_examples=num_examples)
    with refused:
        noise.probe(square, every=1, sample_size=1, half_life=1.0, num_examples=num_examples)
    with refused:
        noise.track(plain, half_life=1.0, num_examples=num_examples)


def test_more_distinct_examples_than_there_are_are_refused():
    refused = pytest.raises(ValueError, match=r"num_examples=3 .*batch_size=4")
    parts = noise.parts(sq_norms=jnp.ones(4), batch_size=4)
    watch = noise.watch(half_life=1.0, num_examples=3)
    with refused:
        watch.update(jnp.ones(2), watch.init(None), noise=parts)
    probe = noise.probe(square, every=1, sample_size=2, half_life=1.0, num_examples=3)
    with refused:
        probe.update(jnp.asarray(1.0), probe.init(None), jnp.asarray(1.0), batch=jnp.arange(4.0))
    whole = noise.watch(half_life=1.0, num_examples=4)
    chex.assert_tree_all_finite(whole.update(jnp.ones(2) / 2, whole.init(None), noise=parts)[1])
