"""Noise scales against enumeration of every batch, explicit per-example gradients, and Gaussian least squares."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest
import scipy.stats

from gdjax import batching, noise
from gdjax.noise import _intervals as intervals

NUM_DRAWS = 400


def linear_loss(params, example):
    x, y = example
    return 0.5 * (x @ params["weight"] + params["bias"] - y) ** 2


PARAMS = {"bias": jnp.asarray(0.3), "weight": jnp.asarray([0.5, -1.0, 0.25])}


def population(num_examples, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(num_examples, 3))), jnp.asarray(rng.normal(size=num_examples))


def explicit_gradients(data, params=PARAMS):
    """Gradients [N, D] by hand, columns bias and weight."""
    x, y = map(np.asarray, data)
    residuals = x @ np.asarray(params["weight"]) + float(params["bias"]) - y
    return residuals[:, None] * np.c_[np.ones(len(x)), x]


def moments(grads):
    """|G|^2 and tr(S) of a population, [N, D]."""
    mean = grads.mean(0)
    return mean @ mean, ((grads - mean) ** 2).sum(1).mean()


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("sizes", [(1, 2), (1, 4), (2, 3)])
def test_the_pair_averaged_over_every_batch_is_exact(replace, sizes):
    grads = explicit_gradients(population(5))
    norms = []
    for size in sizes:
        draws = itertools.product(range(5), repeat=size) if replace else itertools.combinations(range(5), size)
        norms.append(np.mean([np.sum(grads[list(draw)].mean(0) ** 2) for draw in draws]))
    found = noise.unbiased(*norms, batch_sizes=sizes, num_examples=None if replace else 5)
    precision.assert_close(found, moments(grads), rtol=1e-12)


@pytest.mark.parametrize("num_examples", [24, 23])  # 23: the last group is filled up
@pytest.mark.slow
def test_all_examples_give_the_exact_scale_without_doubt(key, num_examples):
    data = population(num_examples)
    scale = noise.measure(linear_loss, PARAMS, data, key, num_examples=num_examples, microbatch_size=4)
    grads = explicit_gradients(data)
    for found, columns in ((scale, slice(None)), (scale.per_leaf["bias"], [0]), (scale.per_leaf["weight"], [1, 2, 3])):
        signal, variance = moments(grads[:, columns])
        precision.assert_close((found.grad_sq_norm, found.trace_cov), (signal, variance), rtol=1e-10)
        precision.assert_close((found.b_simple, found.low, found.high), variance / signal, rtol=1e-10)
    assert scale.verdict == "ok"


def delete_a_group(grads, sizes, num_examples):
    """Estimates [2] and their covariance from explicit gradients, group by group, by the textbook's formulas."""

    def estimate(grads):
        n = len(grads)
        f = 1 / n if num_examples is None else (num_examples - n) / (n * (num_examples - 1))
        square, of_mean = (grads**2).sum(1).mean(), np.sum(grads.mean(0) ** 2)
        variance = (square - of_mean) / (1 - f)
        return np.array([square - variance, variance])

    whole, n = estimate(grads), len(grads)
    ends = np.cumsum(sizes)
    left_out = [estimate(np.delete(grads, range(end - m, end), 0)) for m, end in zip(sizes, ends, strict=True)]
    jackknifed = len(sizes) * whole - sum((1 - m / n) * e for m, e in zip(sizes, left_out, strict=True))
    cov = 0
    for m, e in zip(sizes, left_out, strict=True):
        pseudovalue = n / m * whole - (n / m - 1) * e
        cov = cov + np.outer(pseudovalue - jackknifed, pseudovalue - jackknifed) / (n / m - 1)
    return whole, cov / len(sizes)


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.slow
def test_the_interval_is_the_jackknife_of_explicit_gradients(key, replace):
    data = population(200, seed=1)
    scale = noise.measure(linear_loss, PARAMS, data, key, num_examples=62, replace=replace, microbatch_size=8)
    draw = batching.with_replacement if replace else batching.reshuffled
    grads = explicit_gradients(data)[np.asarray(draw(key, 200, length=62))]
    (signal, variance), cov = delete_a_group(grads, [8] * 7 + [6], None if replace else 200)
    cov = cov if replace else cov * (1 - 62 / 200)
    precision.assert_close((scale.grad_sq_norm, scale.trace_cov), (signal, variance), rtol=1e-10)
    quantile = scipy.stats.t.ppf(0.95, df=7)
    for end in (scale.low, scale.high):  # Fieller: where variance - end * signal is `quantile` of its errors from zero
        error = np.sqrt(cov[1, 1] - 2 * end * cov[0, 1] + end**2 * cov[0, 0])
        precision.assert_close(abs(variance - end * signal), quantile * error, rtol=1e-8)
    assert scale.low < scale.b_simple < scale.high < np.inf


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=(12, 2))
    left_out = jnp.asarray([np.delete(values, i, 0).mean(0) for i in range(12)])
    deviations = np.asarray(intervals.delete_a_group(jnp.asarray(values.mean(0)), left_out, jnp.ones(12)))
    precision.assert_close(deviations.T @ deviations, np.cov(values.T) / 12, rtol=1e-10)


@pytest.mark.slow
def test_the_ratio_has_no_upper_end_where_the_denominator_may_be_zero():
    cov = jnp.asarray([[1.0, 0.2], [0.2, 0.5]])
    ratio, low, high = jax.vmap(lambda d: intervals.fieller(10.0, d, cov, quantile=2.0))(jnp.asarray([8.0, 2.1, 1.9]))
    precision.assert_close(ratio, 10 / np.array([8, 2.1, 1.9]))
    assert (low > 0).all()
    np.testing.assert_array_equal(np.isinf(high), [False, False, True])
    for denominator in (-8.0, 0.0):
        ratio, low, high = intervals.fieller(10.0, denominator, cov, quantile=2.0)
        assert np.isinf(ratio)
        assert np.isinf(high)
    ratio, low, high = intervals.fieller(1.0, 8.0, cov, quantile=2.0)  # the numerator may be zero
    assert low == 0
    assert high > ratio


# Least squares with Gaussian features x ~ N(0, H) and label noise: all in closed form (McCandlish et al. 2018).
SPECTRUM = jnp.asarray([1.0, 0.6, 0.3, 0.2])
DELTA = jnp.asarray([0.6, -0.5, 0.4, 0.9])
LABEL_VARIANCE = 0.25


def gaussian(key, num_examples):
    key_x, key_y = jax.random.split(key)
    x = jax.random.normal(key_x, (num_examples, 4)) @ jnp.diag(jnp.sqrt(SPECTRUM))
    return x, jnp.sqrt(LABEL_VARIANCE) * jax.random.normal(key_y, (num_examples,))


def gaussian_loss(weights, example):
    x, y = example
    return 0.5 * (x @ weights - y) ** 2


def exact_scales():
    """Return B_simple and B_noise: S = H d d'H + (d'Hd + s^2) H, where d is the error and s^2 the label's variance."""
    risk = DELTA @ (SPECTRUM * DELTA) + LABEL_VARIANCE
    return (
        1 + risk * SPECTRUM.sum() / (DELTA @ (SPECTRUM**2 * DELTA)),
        1 + risk * (SPECTRUM**2).sum() / (DELTA @ (SPECTRUM**3 * DELTA)),
    )


def held(low, high, true):
    return float(jnp.mean((low <= true) & (true <= high)))


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.slow
def test_nine_intervals_in_ten_hold_the_scale_of_the_data(key, replace):
    data = gaussian(key, 1000)
    signal, variance = moments(np.asarray(data[0] * (data[0] @ DELTA - data[1])[:, None]))

    def draw(key):
        return noise.measure(gaussian_loss, DELTA, data, key, num_examples=200, replace=replace)

    scales = jax.jit(jax.vmap(draw))(jax.random.split(key, NUM_DRAWS))
    assert 0.85 <= held(scales.low, scales.high, variance / signal) <= 0.95
    for found, exact in ((scales.grad_sq_norm, signal), (scales.trace_cov, variance)):
        assert abs(found.mean() - exact) <= 4 * found.std() / NUM_DRAWS**0.5


@pytest.mark.usefixtures("replays")
@pytest.mark.slow
def test_gaussian_least_squares_has_its_exact_scales_inside_the_intervals(key):
    data = gaussian(key, 100_000)  # so many that their own scale is that of the distribution, to 1 %
    b_simple, b_noise = exact_scales()

    def draw(key):
        simple = noise.measure(gaussian_loss, DELTA, data, key, num_examples=500, replace=True)
        return simple, noise.measure_hessian(gaussian_loss, DELTA, data, key, batch_size=10, num_pairs=100)

    simple, hessian = jax.jit(jax.vmap(draw))(jax.random.split(key, NUM_DRAWS))
    assert 0.85 <= held(simple.low, simple.high, b_simple) <= 0.95
    assert 0.85 <= held(hessian.low, hessian.high, b_noise) <= 0.95
    risk = DELTA @ (SPECTRUM * DELTA) + LABEL_VARIANCE
    curvature = DELTA @ (SPECTRUM**3 * DELTA)
    for found, exact in (
        (hessian.grad_curvature, curvature),
        (hessian.trace_hess_cov, curvature + risk * (SPECTRUM**2).sum()),
    ):
        assert abs(found.mean() - exact) <= 4 * found.std() / NUM_DRAWS**0.5


@pytest.mark.slow
def test_a_preconditioner_measures_the_reparametrised_problem(key):
    data = population(30)
    weights = {"bias": jnp.asarray(4.0), "weight": jnp.asarray([0.25, 1.0, 9.0])}
    scale = noise.measure(linear_loss, PARAMS, data, key, num_examples=30, geometry=weights)
    signal, variance = moments(explicit_gradients(data) * np.sqrt([4.0, 0.25, 1.0, 9.0]))
    precision.assert_close((scale.grad_sq_norm, scale.trace_cov), (signal, variance), rtol=1e-10)
    with pytest.raises(ValueError, match="geometry"):
        noise.measure(linear_loss, PARAMS, data, key, num_examples=30, geometry={"bias": jnp.asarray(1.0)})


@pytest.mark.slow
def test_single_precision_leaves_of_two_kinds(key):
    params = {"bias": jnp.float32(0.3), "weight": PARAMS["weight"]}

    def loss(params, example):
        return linear_loss({"bias": params["bias"].astype(float), "weight": params["weight"]}, example)

    data = population(24)
    scale = noise.measure(loss, params, data, key, num_examples=24)
    np.testing.assert_allclose(scale.b_simple, np.divide(*moments(explicit_gradients(data))[::-1]), rtol=1e-5)


def constant_loss(params, example):
    return 0.0 * params + 0.0 * example


@pytest.mark.parametrize(
    ("loss", "data", "verdict"),
    [
        (constant_loss, jnp.arange(8.0), "not identified"),  # every gradient is zero
        (lambda mean, x: jnp.log(mean * x), jnp.arange(8.0) - 4, "not finite"),
        (lambda mean, x: 0.5 * (mean - x) ** 2, jnp.asarray([-1.0, 1.0] * 4), "not identified"),  # no gradient
        (lambda mean, x: mean * (1 + 0 * x), jnp.arange(8.0), "ok"),  # no noise
        (lambda mean, x: mean * x, jnp.arange(40.0) - 12, "too noisy"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_known_gets_a_verdict_and_never_a_nan(key, loss, data, verdict):
    scale = noise.measure(loss, jnp.asarray(0.0), data, key, num_examples=len(data), replace=True)
    assert scale.verdict == verdict
    assert not np.isnan((scale.b_simple, scale.low, scale.high)).any()
    assert scale.low <= scale.b_simple <= scale.high
    assert str(scale).endswith(f": {verdict}, outliers rarer than 3/{len(data)} not excluded")


@pytest.mark.slow
def test_verdicts_of_mapped_measurements(key):
    data = population(60)
    measured = jax.vmap(lambda key: noise.measure(linear_loss, PARAMS, data, key, num_examples=60))
    scales = jax.jit(measured)(jax.random.split(key, 3))
    assert scales.verdict.tolist() == ["ok"] * 3
    assert "NoiseScale(" in str(scales)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_examples": 9}, "num_examples=9 exceeds the 8"),
        ({"num_examples": 1}, "num_examples=1"),
        ({"num_examples": 8, "microbatch_size": 5}, "microbatch_size=5"),
        ({"num_examples": 8, "microbatch_size": 0}, "microbatch_size=0"),
        ({"num_examples": 8, "confidence": 90}, "confidence=90"),
    ],
)
def test_bad_arguments_are_named(key, arguments, named):
    with pytest.raises(ValueError, match=named):
        noise.measure(linear_loss, PARAMS, population(8), key, **arguments)


def test_one_example_has_no_noise_scale(key):
    with pytest.raises(ValueError, match="at least 2"):
        noise.measure(linear_loss, PARAMS, population(1), key, num_examples=4, replace=True)


def test_bad_arguments_of_the_hessian_scale(key):
    for arguments in ({"batch_size": 0, "num_pairs": 2}, {"batch_size": 4, "num_pairs": 1}):
        with pytest.raises(ValueError, match="num_pairs"):
            noise.measure_hessian(linear_loss, PARAMS, population(8), key, **arguments)


@pytest.mark.slow
def test_no_upward_curvature_no_hessian_scale(key):
    scale = noise.measure_hessian(
        lambda w, x: -(w**2) * x, jnp.asarray(1.0), 1 + population(50)[1] ** 2, key, batch_size=8, num_pairs=20
    )
    assert scale.verdict == "not identified"
    assert np.isinf(scale.b_noise)
