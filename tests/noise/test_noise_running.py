"""The noise scale along a run: sums by hand, coverage by simulation, every unit, and the pair by enumeration."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
import scipy.stats
from test_noise import PARAMS, explicit_gradients, linear_loss, moments, population

from gdjax import batching, descent, gradients, noise
from gdjax.noise import _intervals as intervals
from gdjax.noise._running import push, start

pytestmark = pytest.mark.slow  # hundreds of programs are compiled


def tracked(loss=linear_loss, rate=0.1, num_examples=None, **options):
    method = descent.method(gradients.with_sq_norms(loss), optax.sgd(rate))
    return noise.track(method, num_examples=num_examples, **options)


def scale_of(state, info):
    return info.aux.noise_scale


@pytest.mark.parametrize("replace", [False, True])
def test_tracking_every_batch_gives_the_exact_scale(replace):
    data = population(5)
    stream = batching.with_replacement if replace else batching.shuffled_once
    method = tracked(rate=0.0, half_life=np.inf, num_examples=5, stream=stream)
    draws = itertools.product(range(5), repeat=3) if replace else itertools.combinations(range(5), 3)
    batches = jnp.asarray(list(draws))
    _, scales = jax.jit(lambda: descent.run(method, method.init(PARAMS), data, batches, scale_of))()
    signal, variance = moments(explicit_gradients(data))
    last = [leaf[-1] for leaf in scales[:3]]
    precision.assert_close(last, [signal, variance, variance / signal], rtol=1e-9)


@pytest.mark.parametrize("batch_size", [2, 3, 4, 7])
def test_a_reshuffled_batch_over_the_end_of_an_epoch_is_counted_as_its_pieces(batch_size):
    """Every order of two or three epochs of three examples, at every position of the first."""
    data = population(3)
    orders = list(itertools.permutations(range(3)))
    num_epochs = -(-(2 + batch_size) // 3)
    streams = np.asarray([np.concatenate(epochs) for epochs in itertools.product(orders, repeat=num_epochs)])
    grads = explicit_gradients(data)
    method = tracked(rate=0.0, half_life=np.inf, num_examples=3)
    for position in range(3):
        batches = streams[:, position : position + batch_size]
        norms = np.mean([np.sum(grads[list(batch)].mean(0) ** 2) for batch in batches])
        signal, variance = moments(grads)
        state = method.init(PARAMS)._replace(num_examples=jnp.int32(position))
        _, info = method.step(state, jax.tree.map(lambda x, first=batches[0]: x[first], data))
        # The step's own pair is of its batch; the factor follows from tr(S) and |G|^2 of it.
        of_batch = np.sum(grads[batches[0]].mean(0) ** 2)
        of_one = np.mean(np.sum(grads[batches[0]] ** 2, 1))
        found = info.aux.noise_scale
        factor = (of_batch - float(found.grad_sq_norm)) / float(found.trace_cov)
        precision.assert_close(of_one, float(found.grad_sq_norm + found.trace_cov), rtol=1e-9)
        precision.assert_close(norms, signal + factor * variance, rtol=1e-9)


def test_on_a_reshuffled_stream_the_default_is_right(key):
    """With B_simple above N, where the wrong factor leaves nothing of |G|^2."""
    data = jax.random.normal(key, (100,))
    data = (data - data.mean()) / data.std() + 0.06

    def loss(mean, x):
        return 0.5 * (mean - x) ** 2

    batches = batching.batches(batching.reshuffled(jax.random.key(1), 100, num_epochs=200), 20)
    found = []
    for stream in (batching.reshuffled, batching.with_replacement):
        method = tracked(loss, 0.0, num_examples=100, half_life=1e9, stream=stream)
        state, _ = jax.jit(lambda method=method: descent.run(method, method.init(0.0), data, batches))()
        found.append(noise.reading(state))
    right, wrong = found
    assert right.low < 1 / 0.06**2 < right.high < np.inf
    assert np.isinf(wrong.b_simple)


def test_tracking_forgets_by_half_lives_and_divides_last():
    """Two updates of 4 examples with a half-life of 2: the first counts a quarter of the second."""
    data = population(8)
    method = tracked(half_life=2.0)

    def record(state, info):
        return info.aux.noise_scale, info.grad, info.aux.aux.sq_norms

    batches = jnp.arange(8).reshape(2, 4)
    _, (scales, grads, norms) = descent.run(method, method.init(PARAMS), data, batches, record)
    of_batch = sum(np.sum(np.square(leaf).reshape(2, -1), 1) for leaf in jax.tree.leaves(grads))
    of_one = sum(np.mean(leaf, 1) for leaf in jax.tree.leaves(norms))
    variance = (of_one - of_batch) / (1 - 1 / 4)
    signal = of_one - variance
    precision.assert_close(scales.trace_cov[1], (variance[0] / 4 + variance[1]) / 1.25, rtol=1e-10)
    ratio = (variance[0] / 4 + variance[1]) / (signal[0] / 4 + signal[1])
    precision.assert_close(scales.b_simple[1], ratio if ratio > 0 else np.inf, rtol=1e-10)


def test_the_state_of_a_tracked_run_is_that_of_the_plain_one_and_a_field_more(key):
    data = population(20)
    batches = batching.batches(batching.reshuffled(key, 20, num_epochs=2), 4)
    plain = descent.method(gradients.with_sq_norms(linear_loss), optax.sgd(0.1, momentum=0.9))
    expected, losses = descent.run(plain, plain.init(PARAMS), data, batches)
    method = noise.track(plain, half_life=100.0, num_examples=20)
    found, found_losses = descent.run(method, method.init(PARAMS), data, batches)
    chex.assert_trees_all_equal((tuple(expected), losses), (tuple(found[:3]), found_losses))
    assert found._fields == (*expected._fields, "noise")
    assert float(found.noise.num_examples) == 40


def textbook(pairs, *, half_life, batch_size):
    """Return the weights, the mean, its covariance and n_eff of pairs [T, 2], in float64."""
    weights = 2.0 ** (-batch_size / half_life * np.arange(len(pairs))[::-1])
    steps = np.diff(pairs, axis=0)
    cov = np.einsum("t,ta,tb->ab", weights[1:], steps, steps) / weights[1:].sum() / 2
    effective = weights.sum() ** 2 / (weights**2).sum()
    return weights, weights @ pairs / weights.sum(), cov / effective, effective


def pushed(pairs, *, half_life, batch_size):
    running = start(half_life=half_life)
    for signal, variance in pairs:
        running = push(running, signal, variance, batch_size=batch_size)
    return running


def test_the_interval_is_that_of_successive_differences():
    """By the textbook: weighted sums, Fieller's equation, Student's t by SciPy."""
    rng = np.random.default_rng(0)
    pairs = np.c_[rng.normal(2.0, 1.0, 60), rng.normal(30.0, 3.0, 60)]
    options = {"half_life": 200.0, "batch_size": 8}
    running = pushed(pairs, **options)
    found = noise.reading(running)
    weights, mean, cov, effective = textbook(pairs, **options)
    quantile = scipy.stats.t.ppf(0.95, 2 * effective / 3 - 1)
    precision.assert_close((found.grad_sq_norm, found.trace_cov), mean, rtol=1e-10)
    for end in (float(found.low), float(found.high)):
        error = np.sqrt(cov[1, 1] - 2 * end * cov[0, 1] + end**2 * cov[0, 0])
        precision.assert_close(abs(mean[1] - end * mean[0]), quantile * error, rtol=1e-4, ulps=1e4)
    means = np.asarray([w @ pairs[: len(w)] / w.sum() for w in (weights[-t:] for t in range(1, 61))])
    now = 2 * mean - weights @ means / weights.sum()
    precision.assert_close(found.b_now, now[1] / now[0], rtol=1e-9)


def test_the_sums_do_not_feel_that_their_unit_changes():
    rng = np.random.default_rng(1)
    pairs = np.c_[rng.normal(2.0, 1.0, 60), rng.normal(30.0, 3.0, 60)] * np.logspace(0, -15, 60)[:, None]
    options = {"half_life": 2.0, "batch_size": 1}
    running, unit = pushed(pairs, **options), float(pushed(pairs, **options).unit)
    assert unit < 1e-2  # thirty at first
    weights, mean, cov, effective = textbook(pairs, **options)
    precision.assert_close(running.sums / running.weight * unit, mean, rtol=1e-9)
    found = running.covariance / running.weight_differences / effective * unit**2
    precision.assert_close(found, cov, rtol=1e-9)
    precision.assert_close(running.square * unit**2, weights @ pairs[:, 1] ** 2, rtol=1e-9)


@pytest.mark.parametrize("unit", [1e-30, 1e-15, 1e15, 1e30])
def test_every_unit_gives_the_same_reading_in_float32(unit):
    rng = np.random.default_rng(1)
    pairs = np.c_[rng.normal(2.0, 1.0, 60), rng.normal(30.0, 3.0, 60)]

    def read(unit):
        running = jax.tree.map(lambda x: x.astype(jnp.float32), start(half_life=200.0))
        for pair in (pairs * unit).astype(np.float32):
            running = push(running, *jnp.asarray(pair), batch_size=8)
        chex.assert_tree_all_finite(running)
        return noise.reading(running)

    plain, found = read(1.0), read(unit)
    for field in ("b_simple", "low", "high", "b_now"):
        np.testing.assert_allclose(getattr(found, field), getattr(plain, field), rtol=1e-4)
    assert found.verdict == plain.verdict == "ok"


def test_a_scale_that_falls_by_orders_of_magnitude_stays_readable():
    """As |G|^2 and tr(S) of a run do: the unit follows."""
    running = jax.tree.map(lambda x: x.astype(jnp.float32), start(half_life=40.0))
    for factor in np.geomspace(1e20, 1e-20, 400, dtype=np.float32):
        running = push(running, factor, 10 * factor, batch_size=8)
    chex.assert_tree_all_finite(running)
    np.testing.assert_allclose(noise.reading(running).b_simple, 10, rtol=1e-4)


def test_lag_is_seen_and_a_standstill_is_not():
    rng = np.random.default_rng(2)
    verdicts = []
    for decades in (0.0, 0.3):
        running = start(half_life=1000.0)
        for level in np.logspace(0, -decades, 400):
            pair = level * rng.normal(1.0, 0.3), rng.normal(20.0, 1.0)
            running = push(running, *pair, batch_size=10)
        verdicts.append(noise.reading(running).verdict)
    assert verdicts == ["ok", "lagging"]
    now = noise.reading(running).b_now
    assert abs(now - 20 * 10**0.3) < 0.5 * abs(noise.reading(running).b_simple - 20 * 10**0.3)


def test_a_few_updates_that_make_up_the_noise_are_a_heavy_tail_and_gaussian_ones_never():
    rng = np.random.default_rng(3)
    for scatter, verdict in ((2.0, "heavy tail"), (0.0, "ok")):
        running = start(half_life=2000.0)
        for _ in range(300):
            variance = 20 * np.exp(rng.normal() * scatter - scatter**2 / 2) * rng.chisquare(7) / 7
            running = push(running, rng.normal(1.0, 0.3), variance, batch_size=8)
        assert noise.reading(running).verdict == verdict
    running = start(half_life=2000.0)
    for _ in range(300):  # two parts in one dimension scatter most
        running = push(running, rng.normal(1.0, 0.3), 20 * rng.chisquare(1), batch_size=8, num_parts=2)
    assert not noise.reading(running).heavy_tail


def test_what_is_not_finite_does_not_count_and_nothing_is_never_nan():
    running = start(half_life=100.0)
    assert noise.reading(running).verdict == "not identified"
    for signal in (1.0, np.nan, 2.0, np.inf, 1.5):
        running = push(running, signal, 10.0, batch_size=4)
    found = noise.reading(running)
    weights = 2.0 ** (-4 / 100 * np.array([4, 2, 0]))
    precision.assert_close(found.grad_sq_norm, weights @ [1.0, 2.0, 1.5] / weights.sum(), rtol=1e-9)
    assert not found.not_raw


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_the_series_of_student(confidence):
    for freedom in (3.0, 10.0, 100.0):
        found = intervals.student_series(jnp.asarray(freedom), confidence=confidence)
        np.testing.assert_allclose(found, scipy.stats.t.ppf((1 + confidence) / 2, freedom), rtol=0.02)


def test_tracking_refuses_what_it_cannot_measure():
    data = population(4)
    plain = noise.track(descent.method(gradients.mean(linear_loss), optax.sgd(0.1)), half_life=10.0, num_examples=None)
    with pytest.raises(ValueError, match="with_sq_norms"):
        plain.step(plain.init(PARAMS), data)
    method = tracked(half_life=10.0)
    with pytest.raises(ValueError, match="batch_size=1"):
        method.step(method.init(PARAMS), jax.tree.map(lambda x: x[:1], data))
    with pytest.raises(ValueError, match="half_life=0"):
        tracked(half_life=0)
    with pytest.raises(ValueError, match=r"stream=<lambda> must be one of batching's"):
        tracked(half_life=1.0, num_examples=4, stream=lambda *_: None)
    method = tracked(half_life=1.0, num_examples=3, stream=batching.cyclic)
    with pytest.raises(ValueError, match="batch_size=4 exceeds the num_examples=3"):
        method.step(method.init(PARAMS), data)
    with pytest.raises(ValueError, match="state holds 0 noise scales"):
        noise.reading({"a": jnp.ones(3)})


def simulated(key, *, num_updates, batch_size, b_simple, half_life, dimension=20, num_examples=None):
    """Return the reading after updates on Gaussian gradients of mean 1 (their |G|^2) and trace `b_simple`."""
    if num_examples is not None:
        data_key, key = jax.random.split(key)
        data = jax.random.normal(data_key, (num_examples, dimension))
        data = (data - data.mean(0, keepdims=True)) / data.std(0, keepdims=True)
        stream = batching.reshuffled(key, num_examples, length=num_updates * batch_size)
        drawn = data[stream].reshape(num_updates, batch_size, dimension)
    else:
        drawn = jax.random.normal(key, (num_updates, batch_size, dimension))
    grads = 1 / np.sqrt(dimension) + np.sqrt(b_simple / dimension) * drawn
    small, large = (grads**2).sum(2).mean(1), (grads.mean(1) ** 2).sum(1)
    pairs = noise.unbiased(small, large, batch_sizes=(1, batch_size), num_examples=num_examples)

    def step(running, pair):
        return push(running, *pair, batch_size=batch_size), None

    return noise.reading(jax.lax.scan(step, start(half_life=half_life), pairs)[0])


def coverage(key, num_draws=1000, **options):
    draw = jax.jit(jax.vmap(lambda key: simulated(key, **options)))
    found = draw(jax.random.split(key, num_draws))
    held = np.mean((np.asarray(found.low) <= options["b_simple"]) & (options["b_simple"] <= np.asarray(found.high)))
    return held, found


@pytest.mark.slow
@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("b_simple", [8, pytest.param(64, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("batch_size", [8, pytest.param(32, marks=pytest.mark.nightly)])
def test_nine_running_intervals_in_ten_hold_the_scale(key, b_simple, batch_size):
    held, found = coverage(key, num_updates=200, batch_size=batch_size, b_simple=b_simple, half_life=40.0 * batch_size)
    assert 0.86 <= held <= 0.92
    assert not found.heavy_tail.any()
    assert np.mean(found.lagging) < 0.05


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.usefixtures("replays")
def test_in_reshuffled_epochs_intervals_are_wider_than_they_need_be(key):
    held, _ = coverage(
        key, num_draws=300, num_updates=256, batch_size=64, b_simple=32, half_life=4096.0, num_examples=512
    )
    assert held >= 0.97
