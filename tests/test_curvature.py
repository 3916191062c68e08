"""Curvature against the dense Hessian of the ravelled parameters, and sampled means against their exact variance."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest
from jax.flatten_util import ravel_pytree

from gdjax import curvature
from gdjax.problems import models

MODEL = models.mlp((3, 4, 2), activation=jnp.tanh)


def net_loss(params, example):
    x, y = example
    return 0.5 * jnp.sum((MODEL.apply(params["net"], x) - y) ** 2) * params["times"].astype(y.dtype)


@jax.jit
def dense(params, batch):
    """Return the Hessian of the mean loss with respect to the ravelled floating-point parameters, [D, D]."""
    flat, unravel = ravel_pytree(params["net"])

    def mean_loss(flat):
        return jax.vmap(net_loss, (None, 0))({**params, "net": unravel(flat)}, batch).mean()

    return jax.hessian(mean_loss)(flat)


@pytest.fixture(scope="module")
def net():
    """Parameters with an integer leaf, six examples, and the dense Hessian of their mean loss, [D, D]."""
    keys = jax.random.split(jax.random.key(1), 3)
    params = {"net": MODEL.init(keys[0]), "times": jnp.int32(2)}
    batch = jax.random.normal(keys[1], (6, 3)), jax.random.normal(keys[2], (6, 2))
    return params, batch, dense(params, batch)


def quadratic(params, curvatures):
    """Return a loss with the Hessian diag(curvatures)."""
    return 0.5 * jnp.sum(curvatures * params**2)


def test_hvp_is_the_dense_hessian_times_the_vector(net):
    params, batch, hessian = net
    vector = curvature.random_vectors(jax.random.key(2), params, num_vectors=1)
    vector = jax.tree.map(lambda leaf: leaf[0], vector)
    flat, _ = ravel_pytree(vector)
    for microbatch_size in (None, 2):
        product = jax.jit(curvature.hvp(net_loss, microbatch_size=microbatch_size))(params, batch, vector)
        assert product["times"] is None
        precision.assert_close(ravel_pytree(product)[0], hessian @ flat, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 26])
def test_eigenpairs_are_those_of_the_dense_hessian(net, k):
    params, batch, hessian = net
    start = curvature.random_vectors(jax.random.key(2), params, num_vectors=k)
    top = jax.jit(curvature.top_eigenpairs(net_loss, num_iterations=30))(params, batch, start)
    expected = np.linalg.eigvalsh(hessian)[::-1]
    assert len(hessian) == 26  # not a multiple of every k
    assert expected[-1] < 0
    precision.assert_close(top.values, expected[:k], rtol=1e-6, atol=1e-12)
    assert top.vectors["times"] is None
    vectors = np.concatenate([leaf.reshape(k, -1) for leaf in jax.tree.leaves(top.vectors)], axis=1)
    precision.assert_close(vectors @ vectors.T, np.eye(k), atol=1e-12)
    precision.assert_close(vectors @ hessian, np.asarray(top.values)[:, None] * vectors, atol=1e-6)
    assert top.residuals.max() < max(1e-6, 32 * precision.EPS * expected[0])


@pytest.mark.slow
def test_residual_bounds_the_error_of_a_call_that_is_too_short(net):
    params, batch, hessian = net
    start = curvature.random_vectors(jax.random.key(2), params, num_vectors=2)
    top = curvature.top_eigenpairs(net_loss, num_iterations=3)(params, batch, start)
    vectors = np.concatenate([leaf.reshape(2, -1) for leaf in jax.tree.leaves(top.vectors)], axis=1)
    residuals = np.linalg.norm(vectors @ hessian - np.asarray(top.values)[:, None] * vectors, axis=1)
    assert residuals.min() > 1e-4
    precision.assert_close(top.residuals, residuals, rtol=1e-8)
    errors = np.abs(np.linalg.eigvalsh(hessian)[:, None] - np.asarray(top.values)).min(0)
    assert (errors <= top.residuals).all()


@pytest.mark.parametrize(
    ("spectrum", "k"),
    [
        ((0.0,) * 40, 3),
        ((3.0, 3.0, 3.0) + (1.0,) * 37, 3),
        ((-1.0,) * 20 + (-2.0,) * 20, 2),  # the largest of a negative Hessian is below the zero of an empty direction
        ((5.0, 2.0, 1.0), 2),
        ((5.0, 2.0, 1.0), 3),
        ((4.0,), 1),
    ],
)
@pytest.mark.slow
def test_spectra_that_break_krylov_methods(spectrum, k):
    curvatures = jnp.asarray(spectrum)
    start = curvature.random_vectors(jax.random.key(3), curvatures, num_vectors=k)
    for vectors in (start, jnp.zeros_like(start)):  # linearly dependent start vectors do not count
        top = jax.jit(curvature.top_eigenpairs(quadratic))(jnp.ones(len(spectrum)), curvatures[None], vectors)
        precision.assert_close(top.values, sorted(spectrum)[::-1][:k], rtol=1e-12, atol=1e-12)
        precision.assert_close(top.vectors @ top.vectors.T, np.eye(k), atol=1e-12)


@pytest.mark.slow
def test_warm_start_follows_eigenvalues_that_cross():
    """The Hessian is diag(12 w^2 / N) throughout, so a converged vector is blind to all others."""

    def loss(params, example):
        return jnp.sum(params**4) * example

    start = jnp.zeros((1, 10)).at[0, 0].set(1.0)
    params = jnp.asarray([1.0, 2.0] + [0.1 * i for i in range(8)])
    top = curvature.top_eigenpairs(loss)(params, jnp.ones(3), start)
    precision.assert_close(top.values, [48.0], rtol=1e-10)


def test_warm_start_is_worth_its_iterations(net):
    params, batch, hessian = net
    expected = np.linalg.eigvalsh(hessian)[-1:-3:-1]
    short = jax.jit(curvature.top_eigenpairs(net_loss, num_iterations=3))
    top = curvature.Eigenpairs(None, curvature.random_vectors(jax.random.key(2), params, num_vectors=2), None)
    errors = []
    for _ in range(10):
        top = short(params, batch, top.vectors)
        errors.append(np.abs(top.values - expected).max())
    assert errors[0] > 0.1
    assert errors[-1] < 0.01 * errors[0]


@pytest.mark.usefixtures("replays")
@pytest.mark.slow
def test_eigenpairs_map_over_lanes_and_are_traced_once(net):
    _, batch, _ = net
    keys = jax.random.split(jax.random.key(4), 3)
    lanes = jax.vmap(lambda key: {"net": MODEL.init(key), "times": jnp.int32(2)})(keys)
    start = jax.vmap(lambda key, lane: curvature.random_vectors(key, lane, num_vectors=2))(keys, lanes)
    call = chex.assert_max_traces(curvature.top_eigenpairs(net_loss, num_iterations=13), 1)
    together = jax.jit(jax.vmap(call, (0, None, 0)))
    together(lanes, batch, start)
    values = together(lanes, batch, start).values
    for params, found in zip((jax.tree.map(lambda leaf, i=i: leaf[i], lanes) for i in range(3)), values, strict=True):
        precision.assert_close(found, np.linalg.eigvalsh(dense(params, batch))[:-3:-1], rtol=1e-9)


@pytest.mark.slow
def test_parameters_of_half_precision_are_iterated_in_float32():
    params = {"a": jnp.ones(6, jnp.bfloat16), "b": jnp.ones(3, jnp.float32)}
    curvatures = jnp.asarray([8.0, 2.0, 1.0, 1.0, 1.0, 1.0], jnp.bfloat16)

    def loss(params, scale):
        of_a = 0.5 * jnp.sum(curvatures * params["a"] ** 2).astype(jnp.float32)
        return scale * (of_a + 2 * jnp.sum(params["b"] ** 2))

    start = curvature.random_vectors(jax.random.key(0), params, num_vectors=2)
    top = curvature.top_eigenpairs(loss)(params, jnp.ones(2, jnp.float32), start)
    assert (top.values.dtype, top.vectors["a"].dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(top.values, [8.0, 4.0], rtol=2e-2)


@pytest.mark.slow
def test_batch_sharpness_of_the_whole_data_is_the_rayleigh_quotient_of_its_gradient(net):
    params, batch, hessian = net
    grad = jax.grad(lambda net: jax.vmap(net_loss, (None, 0))({**params, "net": net}, batch).mean())(params["net"])
    g, _ = ravel_pytree(grad)
    whole = curvature.batch_sharpness(net_loss, microbatch_size=3)(params, batch, jnp.arange(6)[None])
    precision.assert_close(whole.value, g @ hessian @ g / (g @ g), rtol=1e-10)
    assert (whole.standard_error, whole.num_samples) == (np.inf, 1)


def test_batch_sharpness_is_the_mean_of_ratios_not_the_ratio_of_means():
    """Example x: gradient (w'x) x and Hessian x x', so the ratio of one example is |x|^2."""
    data = jax.random.normal(jax.random.key(5), (8, 3)) * jnp.arange(1.0, 9.0)[:, None]
    batches = jnp.asarray(list(itertools.combinations(range(8), 2)))
    weights = jnp.asarray([1.0, -2.0, 0.5])

    def loss(weights, x):
        return 0.5 * (x @ weights) ** 2

    measured = curvature.batch_sharpness(loss)(weights, data, batches)
    ratios = []
    for pair in np.asarray(data)[np.asarray(batches)]:
        hessian = pair.T @ pair / 2
        g = hessian @ weights
        ratios.append(g @ hessian @ g / (g @ g))
    precision.assert_close(measured.value, np.mean(ratios), rtol=1e-10)
    precision.assert_close(measured.standard_error, np.std(ratios, ddof=1) / np.sqrt(len(ratios)), rtol=1e-10)


def test_batches_with_zero_gradient_are_left_out_and_counted():
    data = jnp.asarray([0.0, 1.0, 3.0])
    sharpness = jax.jit(curvature.batch_sharpness(lambda w, x: 0.5 * (w * x) ** 2))
    some = sharpness(jnp.asarray(2.0), data, jnp.asarray([[0], [1], [2]]))
    assert (some.value, some.num_samples) == (5.0, 2)
    precision.assert_close(some.standard_error, 4.0)
    none = sharpness(jnp.asarray(0.0), data, jnp.asarray([[0], [1], [2]]))
    assert np.isnan(none.value)
    assert (none.standard_error, none.num_samples) == (np.inf, 0)


@pytest.mark.usefixtures("replays")  # so JAX thinks, of any scan over the children of mapped keys
def test_trace_and_its_standard_error_over_many_draws(net):
    params, batch, hessian = net
    exact = np.trace(hessian)
    estimate = jax.vmap(curvature.trace(net_loss, num_samples=16), (None, None, 0))
    draws = jax.jit(estimate)(params, batch, jax.random.split(jax.random.key(6), 500))
    variance = 2 * (np.sum(hessian**2) - np.sum(np.diag(hessian) ** 2)) / 16
    assert abs(draws.value.mean() - exact) < 4 * np.sqrt(variance / 500)
    # The squared error is unbiased; its own spread over the draws says how well their mean is known.
    squared = np.asarray(draws.standard_error) ** 2
    assert abs(squared.mean() - variance) < 4 * squared.std() / np.sqrt(500) < 0.1 * variance
    outside = np.abs(draws.value - exact) > 4 * draws.standard_error
    assert outside.mean() < 0.01


def test_trace_of_a_diagonal_hessian_is_exact():
    curvatures = jnp.asarray([3.0, -1.0, 0.5])
    for seed in range(3):
        found = curvature.trace(quadratic, num_samples=2)(jnp.ones(3), curvatures[None], jax.random.key(seed))
        precision.assert_close([found.value, found.standard_error], [2.5, 0.0], atol=1e-12)


def test_what_cannot_be_computed_is_refused():
    params, batch = jnp.ones(3), jnp.ones((2, 3))
    start = curvature.random_vectors(jax.random.key(0), params, num_vectors=4)
    call = curvature.top_eigenpairs(quadratic)
    with pytest.raises(ValueError, match=r"start holds k=4 vectors: it must be between 1 and the number of param.*, 3"):
        call(params, batch, start)
    with pytest.raises(ValueError, match="k=0"):
        call(params, batch, start[:0])
    with pytest.raises(ValueError, match=r"vector must be like the gradient, float\d+\[3\], but is float\d+\[\]"):
        call(params, batch, start[:, 0])
    with pytest.raises(ValueError, match=r"leaves \[k, \.\.\.\]"):
        call(params, batch, jnp.asarray(1.0))
    with pytest.raises(ValueError, match=r"float\d+\[3\], but is float\d+\[2\]"):
        curvature.hvp(quadratic)(params, batch, jnp.ones(2))
    with pytest.raises(ValueError, match="num_iterations=1"):
        curvature.top_eigenpairs(quadratic, num_iterations=1)
    with pytest.raises(ValueError, match="num_samples=1"):
        curvature.trace(quadratic, num_samples=1)
    with pytest.raises(ValueError, match="microbatch_size=0"):
        curvature.hvp(quadratic, microbatch_size=0)(params, batch, params)


@pytest.mark.usefixtures("nans")
@pytest.mark.slow
def test_a_hessian_that_is_not_finite_is_not_given_a_number():
    top = curvature.top_eigenpairs(lambda w, x: jnp.sum(x * w**1.5))(jnp.zeros(3), jnp.ones((2, 3)), jnp.eye(3)[:1])
    assert np.isnan(top.values).all()


@pytest.mark.parametrize("unit", [1e-30, *(pytest.param(u, marks=pytest.mark.nightly) for u in (1e-20, 1e15)), 1e30])
@pytest.mark.slow
def test_every_unit_gives_the_same_curvature_in_float32(unit):
    """H is 1 to 30 times the unit, whose square float32 does not hold; the rows of the start are of another."""
    with jax.enable_x64(False):  # sums too
        curvatures = jnp.arange(1.0, 31.0, dtype=jnp.float32)
        params, batch, unit = jnp.ones(30, jnp.float32), jnp.ones(2, jnp.float32), np.float32(unit)

        def loss(params, example):
            both = params + 0.3 * jnp.roll(params, 1)
            return 0.5 * example * (curvatures * unit) @ both**2

        hessian = jax.hessian(lambda params: loss(params, jnp.float32(1)) / unit)(params)
        expected = np.linalg.eigvalsh(hessian)[::-1]
        start = curvature.random_vectors(jax.random.key(1), params, num_vectors=2) * unit
        top = curvature.top_eigenpairs(loss, num_iterations=15)(params, batch, start)
        np.testing.assert_allclose(top.values / unit, expected[:2], rtol=1e-5)
        residuals = np.linalg.norm(top.vectors @ hessian - (top.values / unit)[:, None] * top.vectors, axis=1)
        np.testing.assert_allclose(top.residuals / unit, residuals, atol=1e-4)
        assert top.residuals.min() > 0

        found = curvature.trace(loss, num_samples=8)(params, batch, jax.random.key(0))
        plain = curvature.trace(lambda w, x: loss(w, x) / unit, num_samples=8)(params, batch, jax.random.key(0))
        np.testing.assert_allclose(np.asarray(found[:2]) / unit, plain[:2], rtol=1e-5)
        assert plain.standard_error > 0

        sharpness = curvature.batch_sharpness(loss)(params, batch, jnp.arange(2)[:, None])
        gradient = hessian @ params
        np.testing.assert_allclose(
            np.asarray(sharpness.value) / unit, gradient @ hessian @ gradient / (gradient @ gradient), rtol=1e-5
        )
        assert sharpness.num_samples == 2
