"""The whole training loop against the exact law of constant-rate SGD on least squares.

Averaging `descent.run` over every possible sequence of batches of a finite data set must give
`least_squares.finite_step`, to rounding; and a data set whose moments up to the fourth are those of a Gaussian must
give the Gaussian laws.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest

from gdjax import descent, gradients, theory
from gdjax.theory import least_squares

pytestmark = pytest.mark.slow  # hundreds of programs are compiled

LEARNING_RATE = 0.3
HESSIAN = np.array([[1.0, 0.3], [0.3, 0.5]])
EIGENVALUES = np.linalg.eigvalsh(HESSIAN)
LABEL_NOISE, DELTA = 0.7, np.array([0.4, -1.1])


def linear_loss(weights, example):
    x, y = example
    return 0.5 * (x @ weights - y) ** 2


def ends(data, start, sequences):
    """Return the parameters [S, D] at the ends of runs on the batches of `sequences` [S, T, B]."""

    @jax.jit
    @jax.vmap
    def train(sequence):
        method = descent.method(gradients.mean(linear_loss), optax.sgd(LEARNING_RATE))
        return descent.run(method, method.init(jnp.asarray(start)), data, sequence)[0].params

    return np.asarray(train(jnp.asarray(sequences, jnp.int32)))


@pytest.fixture(scope="module")
def gaussian_like():
    """Return 72 examples (x, y), w* = 0: 3-point Gauss-Hermite quadrature, exact for polynomials of degree 5."""
    points = np.sqrt(3) * np.array([-1, 0, 0, 0, 0, 1])
    sign = np.sqrt(LABEL_NOISE) * np.array([-1, 1])
    x1, x2, y = (axis.ravel() for axis in np.meshgrid(points, points, sign))
    return np.column_stack([x1, x2]) @ np.linalg.cholesky(HESSIAN).T, y


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize(("batch_size", "num_updates"), [(1, 4), (2, 2), (3, 2)])
def test_run_averaged_over_every_sequence_of_batches_obeys_the_exact_recursion(replace, batch_size, num_updates):
    rng = np.random.default_rng(0)
    x, y = data = rng.normal(size=(3, 2)), rng.normal(size=3)
    start, optimum = np.array([1.0, -2.0]), np.array([0.3, 0.7])
    draws = itertools.product(range(3), repeat=batch_size)
    batches = [draw for draw in draws if replace or len(set(draw)) == batch_size]
    weights = ends(data, start, list(itertools.product(batches, repeat=num_updates)))
    z = np.column_stack([weights - optimum, np.ones(len(weights))])
    expected = jnp.asarray(np.outer(*[np.append(start - optimum, 1.0)] * 2))
    options = {"learning_rate": LEARNING_RATE, "batch_size": batch_size, "replace": replace}
    for _ in range(num_updates):
        expected = least_squares.finite_step(expected, (x, jnp.asarray(y - x @ optimum)), **options)
    precision.assert_close(z.T @ z / len(z), expected, rtol=1e-11)


def test_one_example_and_too_many_of_them():
    data = jnp.asarray([[2.0]]), jnp.asarray([1.0])
    options = {"learning_rate": 0.1, "replace": False}
    # 1 - 0.1 * 2 (2 * 1 - 1) = 0.8
    z = least_squares.finite_step(jnp.ones((2, 2)), data, batch_size=1, **options)
    precision.assert_close(z, [[0.64, 0.8], [0.8, 1.0]], rtol=1e-12)
    with pytest.raises(ValueError, match="batch_size=2 must be at most the 1 examples"):
        least_squares.finite_step(jnp.ones((2, 2)), data, batch_size=2, **options)


@pytest.mark.parametrize(("batch_size", "num_updates"), [(1, 2), (2, 1)])
def test_the_gaussian_recursion_is_the_mean_over_all_runs_on_gaussian_like_data(gaussian_like, batch_size, num_updates):
    sequences = np.array(list(itertools.product(range(72), repeat=2))).reshape(-1, num_updates, batch_size)
    weights = ends(gaussian_like, DELTA, sequences)
    expected = jnp.asarray(np.outer(DELTA, DELTA))
    options = {"learning_rate": LEARNING_RATE, "batch_size": batch_size, "label_noise": LABEL_NOISE}
    for _ in range(num_updates):
        expected = least_squares.gaussian_step(expected, jnp.asarray(HESSIAN), **options)
    precision.assert_close(weights.T @ weights / len(weights), expected, rtol=1e-12)


def test_noise_scales_of_gaussian_least_squares(gaussian_like):
    grads = np.asarray(gradients.per_example(linear_loss)(jnp.asarray(DELTA), gaussian_like).aux.grads)
    mean, covariance = jnp.asarray(grads.mean(0)), jnp.asarray(np.cov(grads.T, ddof=0))
    known = jnp.asarray(DELTA), jnp.asarray(HESSIAN)
    exact = least_squares.gradient_covariance(*known, label_noise=LABEL_NOISE)
    precision.assert_close(covariance, exact, rtol=1e-12)
    b_simple, b_noise = theory.b_simple(mean, covariance), theory.b_noise(mean, covariance, hessian=known[1])
    precision.assert_close(least_squares.b_simple(*known, label_noise=LABEL_NOISE), b_simple, rtol=1e-12)
    precision.assert_close(least_squares.b_noise(*known, label_noise=LABEL_NOISE), b_noise, rtol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_stability_and_floor_are_those_of_the_recursion(batch_size):
    highest = least_squares.max_learning_rate(jnp.asarray(EIGENVALUES), batch_size=batch_size)

    @jax.jit
    def linear_map(rate):
        """Return the recursion of symmetric C as a matrix [4, 4] and its constant part [4]."""

        def step(moments):
            options = {"learning_rate": rate, "batch_size": batch_size, "label_noise": LABEL_NOISE}
            moments = (moments.reshape(2, 2) + moments.reshape(2, 2).T) / 2
            return least_squares.gaussian_step(moments, jnp.asarray(HESSIAN), **options).reshape(4)

        return jax.jacfwd(step)(jnp.zeros(4)), step(jnp.zeros(4))

    for factor, margin in ((0.999, -1), (1.0, 0), (1.001, 1)):
        growth = np.abs(np.linalg.eigvals(linear_map(factor * highest)[0])).max() - 1
        assert np.sign(growth) == margin if margin else abs(growth) < max(1e-12, 32 * precision.EPS)
    linear, constant = linear_map(0.5 * highest)
    floor = np.linalg.solve(np.eye(4) - linear, constant).reshape(2, 2)
    risk = least_squares.stationary_risk(
        0.5 * highest, jnp.asarray(EIGENVALUES), batch_size=batch_size, label_noise=LABEL_NOISE
    )
    precision.assert_close(risk, np.trace(HESSIAN @ floor) / 2, rtol=1e-11)
    above = {"batch_size": batch_size, "label_noise": LABEL_NOISE}
    assert least_squares.stationary_risk(1.001 * highest, jnp.asarray(EIGENVALUES), **above) == np.inf
    assert least_squares.stationary_risk(2.5, jnp.asarray(EIGENVALUES), **above) == np.inf


@pytest.mark.parametrize("batch_size", [1, 5])
def test_isotropic_features(batch_size):
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(4, 4))
    second = jnp.asarray(factor @ factor.T)
    options = {"learning_rate": LEARNING_RATE, "batch_size": batch_size, "label_noise": LABEL_NOISE}
    after = least_squares.gaussian_step(second, jnp.eye(4), **options)
    grown = least_squares.isotropic_factor(LEARNING_RATE, 4, batch_size=batch_size) * jnp.trace(second)
    precision.assert_close(jnp.trace(after), grown + LEARNING_RATE**2 * LABEL_NOISE * 4 / batch_size, rtol=1e-12)
    highest = least_squares.max_learning_rate(jnp.ones(4), batch_size=batch_size)
    precision.assert_close(highest, 2 * batch_size / (batch_size + 5), rtol=1e-12)
    precision.assert_close(least_squares.isotropic_factor(highest, 4, batch_size=batch_size), 1, rtol=1e-12)


def test_with_batches_without_end_the_largest_rate_is_that_of_gradient_descent():
    precision.assert_close(
        least_squares.max_learning_rate(jnp.asarray(EIGENVALUES), batch_size=np.inf), 2 / EIGENVALUES.max(), rtol=1e-12
    )


@pytest.fixture(scope="module")
def fitted_exactly():
    """Return features [6, 3] of equal norms, the eigenvectors of their second moment, and Ma et al.'s constants."""
    x = np.random.default_rng(0).normal(size=(6, 3)) * [1.0, 0.6, 0.4]
    x *= 1.7 / np.linalg.norm(x, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(x.T @ x / 6)
    return x, vectors, {"max_sq_norm": 1.7**2, "largest": values[-1], "smallest": values[0]}


@pytest.mark.parametrize("batch_size", [1, 2, 40])
def test_interpolation_contracts_as_bounded_and_fastest_at_the_best_rate(fitted_exactly, batch_size):
    x, vectors, constants = fitted_exactly
    rates = jnp.linspace(0.05, 2.5, 50)

    @jax.jit
    @jax.vmap
    def worst(rate):
        """Return the largest factor of E|delta|^2, over the eigenvectors as delta."""
        options = {"learning_rate": rate, "batch_size": batch_size, "replace": True}

        def factor(delta):
            z = jnp.append(delta, 1.0)
            after = least_squares.finite_step(z[:, None] * z[None], (jnp.asarray(x), jnp.zeros(6)), **options)
            return jnp.trace(after) - 1

        return jax.vmap(factor)(jnp.asarray(vectors.T)).max()

    def bound(rate):
        return least_squares.interpolation_contraction(rate, **constants, batch_size=batch_size)

    precision.assert_close(worst(rates), bound(rates), rtol=1e-12)
    best = least_squares.interpolation_learning_rate(batch_size, **constants)
    near = best * np.linspace(0.9, 1.1, 21)
    assert np.argmin(bound(near)) == 10


def test_interpolation_saturates_where_the_two_best_rates_meet(fitted_exactly):
    _, _, constants = fitted_exactly
    critical = least_squares.interpolation_batch_size(
        constants["max_sq_norm"], largest=constants["largest"], smallest=constants["smallest"]
    )
    assert 2 < critical < 40  # so that both branches are tested above
    below, above = (least_squares.interpolation_learning_rate(critical * f, **constants) for f in (1, 1 + 1e-12))
    precision.assert_close(below, above, rtol=1e-10)
