"""Steps of sign SGD, Adam and normalised SGD against scipy, against all batches and against the real loop."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from scipy import optimize, special, stats

from gdjax import descent, gradients, theory
from gdjax.theory import adaptive

D, COUPLING, SIGNAL = 10, 0.5, 0.1
GRAD, UNIT = jnp.full(D, SIGNAL), jnp.eye(D)
DENSE = (1 - COUPLING) * jnp.eye(D) + COUPLING
START = np.array([0.4, -0.3, 0.1])
HESSIAN = np.array([[1.0, 0.4, -0.2], [0.4, 0.8, 0.1], [-0.2, 0.1, 0.5]])
FACTOR = np.array([[0.9, 0.0, 0.0], [0.5, 0.7, 0.0], [-0.3, 0.2, 0.6]])  # of Sigma


def tilted(theta, noise):
    """A quadratic whose gradient is H theta + noise."""
    return 0.5 * theta @ jnp.asarray(HESSIAN) @ theta + noise @ theta


def loss(theta):
    return 0.5 * np.einsum("...i,ij,...j", theta, HESSIAN, theta)


def one_update(optimizer, noises, prepared=lambda opt_state: opt_state):
    """Return parameters [S, D] after one real update on each of `noises` [S, B, D]."""
    method = descent.method(gradients.mean(tilted), optimizer)
    batches = jnp.arange(noises.shape[1], dtype=jnp.int32)[None]

    @jax.jit
    @jax.vmap
    def train(noise):
        state = method.init(jnp.asarray(START))
        return descent.run(method, state._replace(opt_state=prepared(state.opt_state)), noise, batches)[0].params

    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes int32 and float64
        return np.asarray(train(jnp.asarray(noises)))


@jax.jit
def best_rate(batch_size, hessian=DENSE):
    return adaptive.best_learning_rate(adaptive.sign(GRAD, UNIT, batch_size=batch_size), GRAD, hessian)


def test_the_surge_its_peak_and_its_end():
    precision.assert_close(
        [best_rate(b) for b in (1.0, 256.0, np.inf)], [0.00774444, 0.01949358, 0.01818182], rtol=1e-6
    )
    found = optimize.minimize_scalar(
        lambda log: -float(best_rate(math.exp(log))), bounds=(0, 8), method="bounded", options={"xatol": 1e-9}
    )
    peak = SIGNAL / (2 * np.sqrt(COUPLING * (D - 1)))
    closed = 2 * (special.erfinv(1 / np.sqrt(COUPLING * (D - 1))) / SIGNAL) ** 2
    np.testing.assert_allclose([math.exp(found.x), -found.fun], [39.709089, 0.02357023], rtol=1e-5)
    np.testing.assert_allclose([closed, peak], [39.709089, 0.02357023], rtol=1e-6)
    surge = adaptive.surge_batch_size(GRAD, UNIT, DENSE)
    precision.assert_close(surge, 34.906585, rtol=1e-7)
    law = adaptive.surge_learning_rate(jnp.asarray([256.0, 1e9]), surge, peak=peak)
    np.testing.assert_allclose(law[0], 0.0153, rtol=2e-3)
    signs = np.ones(D)
    limit = SIGNAL * D / (signs @ np.asarray(DENSE) @ signs)
    assert law[1] < 1e-3 * limit  # where it is wrong
    precision.assert_close(best_rate(np.inf), limit, rtol=1e-12)
    sizes = np.geomspace(1, 1e6, 50)
    rates = np.asarray(jax.vmap(best_rate, (0, None))(sizes, UNIT))
    assert (np.diff(rates) >= 0).all()  # no surge where H is diagonal
    precision.assert_close(rates[0] * np.sqrt(sizes[1] / sizes[0]), rates[1], rtol=2e-3, ulps=1e5)
    precision.assert_close(rates[-1], SIGNAL, rtol=1e-12)
    assert adaptive.surge_batch_size(GRAD, UNIT, UNIT) == np.inf


def test_one_coordinate_has_the_critical_batch_size_of_sgd():
    grad, variance, hessian = jnp.asarray([0.2]), jnp.asarray([[3.0]]), jnp.asarray([[1.5]])
    scale = theory.b_simple(grad, variance)

    @jax.jit
    @jax.vmap
    def best(size):
        direction = adaptive.frozen(grad, variance, batch_size=size)
        rate = adaptive.best_learning_rate(direction, grad, hessian)
        signs = adaptive.sign(grad, variance, batch_size=size)
        return rate, adaptive.best_change(direction, grad, hessian), adaptive.best_change(signs, grad, hessian)

    half = 2 * special.erfinv(2**-0.5) ** 2
    np.testing.assert_allclose(half, 1.1063, rtol=1e-4)
    sizes = np.array([1.0, 10.0, 1e4, half * scale, np.inf])
    rates, frozen, gains = best(sizes)
    largest = 0.2 / 1.5
    precision.assert_close(rates, largest / np.sqrt(1 + scale / sizes), rtol=1e-12)
    precision.assert_close(frozen, -largest * 0.2 / 2 / (1 + scale / sizes), rtol=1e-12)
    gains = gains[3:]
    precision.assert_close(gains[0] / gains[1], 0.5, rtol=1e-12)


@pytest.mark.slow
def test_the_best_rate_lowers_the_loss_most_and_q_times_it_keeps_q_of_2_minus_q():
    direction = adaptive.sign(GRAD, UNIT, batch_size=16)
    best = adaptive.best_learning_rate(direction, GRAD, DENSE)
    most = adaptive.best_change(direction, GRAD, DENSE)
    factors = np.array([0.5, 0.9, 1.0, 1.1, 2.0])
    changes = adaptive.expected_change(direction, GRAD, DENSE, learning_rate=best * factors)
    precision.assert_close(changes, most * factors * (2 - factors), rtol=1e-12, atol=1e-17)


def test_correlated_signs_are_those_of_scipy():
    grad, covariance = HESSIAN @ START, FACTOR @ FACTOR.T
    signs = jax.jit(adaptive.sign)
    found = signs(jnp.asarray(grad), jnp.asarray(covariance), batch_size=5)
    std = np.sqrt(np.diag(covariance))
    a, rho = grad * np.sqrt(5) / std, covariance / np.outer(std, std)
    precision.assert_close(found.mean, special.erf(a / np.sqrt(2)), rtol=1e-12)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        both = stats.multivariate_normal.cdf([a[i], a[j]], cov=[[1, rho[i, j]], [rho[i, j], 1]])
        expected = 4 * both - 2 * stats.norm.cdf(a[i]) - 2 * stats.norm.cdf(a[j]) + 1
        precision.assert_close(found.second_moment[i, j], expected, rtol=1e-10)
    precision.assert_close(jnp.diagonal(found.second_moment), np.ones(3), rtol=0)
    # one coordinate twice, whose correlation is 1, and one that is always 0
    grad, covariance = jnp.asarray([0.3, 0.3, 0.0]), jnp.asarray([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    found = signs(grad, covariance, batch_size=3)
    precision.assert_close(found.second_moment, [[1, 1, 0], [1, 1, 0], [0, 0, 0]], atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_adam_of_frozen_second_moment_is_the_mean_over_all_batches(batch_size):
    examples = np.random.default_rng(0).normal(size=(4, 3))
    examples -= examples.mean(0)
    grad, covariance = HESSIAN @ START, np.cov(examples.T, ddof=0)
    noises = examples[np.asarray(list(itertools.product(range(4), repeat=batch_size)))]
    second = jnp.asarray(grad**2 + np.diag(covariance) / batch_size)
    adam = optax.chain(optax.scale_by_rms(decay=1.0, eps=0.0), optax.scale(-0.3))
    ends = one_update(adam, noises, lambda state: (state[0]._replace(nu=second), *state[1:]))
    direction = adaptive.frozen(jnp.asarray(grad), jnp.asarray(covariance), batch_size=batch_size)
    moved = (START - ends) / 0.3
    precision.assert_close(direction.mean, moved.mean(0), rtol=1e-12)
    precision.assert_close(direction.second_moment, moved.T @ moved / len(moved), rtol=1e-12, atol=1e-14)
    change = adaptive.expected_change(direction, jnp.asarray(grad), jnp.asarray(HESSIAN), learning_rate=0.3)
    precision.assert_close(change, (loss(ends) - loss(START)).mean(), rtol=1e-12)


OPTIMIZERS = {
    "adam": optax.adam(0.3, b1=0.0, b2=0.0, eps=0.0),
    "sign": optax.chain(optax.scale_by_sign(), optax.scale(-0.3)),
    "normalized": optax.chain(optax.normalize_by_update_norm(eps=0.0), optax.scale(-0.3)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_real_loop_changes_the_loss_as_expected_on_gaussian_gradients(name):
    rng, batch_size, seeds = np.random.default_rng(1), 6, 20_000
    factor = 0.8 * np.eye(3) if name == "normalized" else FACTOR
    ends = one_update(OPTIMIZERS[name], rng.normal(size=(seeds, batch_size, 3)) @ factor.T)
    grad = jnp.asarray(HESSIAN @ START)
    if name == "normalized":
        direction = adaptive.normalized(grad, 0.64, batch_size=batch_size)
    else:
        direction = adaptive.sign(grad, jnp.asarray(factor @ factor.T), batch_size=batch_size)
    changes = loss(ends) - loss(START)
    expected = adaptive.expected_change(direction, grad, jnp.asarray(HESSIAN), learning_rate=0.3)
    assert abs(changes.mean() - expected) < 4 * changes.std() / np.sqrt(seeds)
    moved = (START - ends) / 0.3
    products = np.einsum("si,sj->sij", moved, moved)
    errors = np.concatenate([moved.std(0), products.std(0).ravel()]) / np.sqrt(seeds)
    found = np.concatenate([moved.mean(0), products.mean(0).ravel()])
    known = np.concatenate([direction.mean, np.ravel(direction.second_moment)])
    assert (np.abs(found - known) <= 4 * errors + 1e-12).all()


def test_adam_without_memory_is_sign_sgd():
    noises = np.random.default_rng(2).normal(size=(50, 2, 3))
    ends = one_update(OPTIMIZERS["adam"], noises), one_update(OPTIMIZERS["sign"], noises)
    precision.assert_close(*ends, rtol=0, atol=4 * precision.EPS)


@pytest.mark.slow
def test_the_cosine_of_a_noisy_gradient():
    precision.assert_close(adaptive.alignment(jnp.asarray([0.5, 2.0]), D), [0.1526312, 0.5322507], rtol=1e-6)
    for signal in (1e-3, 0.7, 30.0):
        precision.assert_close(adaptive.alignment(signal, 1), special.erf(signal / np.sqrt(2)), rtol=1e-12)
        for dimension in (2, 7, 300):
            log_ratio = special.gammaln((dimension + 1) / 2) - special.gammaln(dimension / 2 + 1)
            series = special.hyp1f1(0.5, dimension / 2 + 1, -(signal**2) / 2)
            expected = signal / np.sqrt(2) * np.exp(log_ratio) * series
            precision.assert_close(adaptive.alignment(signal, dimension), expected, rtol=1e-11)
        many = 10**6  # k^2 = B D / B_simple
        limit = 1 / np.sqrt(1 + 1 / signal**2)
        np.testing.assert_allclose(adaptive.alignment(signal * np.sqrt(many), many), limit, rtol=1e-5)


@pytest.mark.usefixtures("nans")
def test_directions_where_a_gradient_or_its_noise_is_0():
    frozen, normalized = jax.jit(adaptive.frozen), jax.jit(adaptive.normalized)
    silent, noisy, tilted = jnp.zeros(2), jnp.asarray([2.0, 0.0]), jnp.asarray([0.3, -0.4])
    along = np.outer([0.6, -0.8], [0.6, -0.8])
    for variance, size in ((0.64, np.inf), (0.0, 3)):
        direction = normalized(tilted, variance, batch_size=size)
        precision.assert_close(direction.mean, [0.6, -0.8], rtol=1e-12)
        precision.assert_close(direction.second_moment, along, rtol=1e-12, atol=1e-15)
        assert not np.any(np.concatenate([d.ravel() for d in normalized(silent, variance, batch_size=size)]))
    for dimension in (1, 2):
        direction = normalized(silent[:dimension], 0.64, batch_size=3)
        precision.assert_close(direction.mean, np.zeros(dimension))
        precision.assert_close(direction.second_moment, np.eye(dimension) / dimension, atol=1e-14)
    for covariance, size in ((jnp.diag(noisy), 3), (jnp.eye(2), np.inf)):
        direction = frozen(noisy, covariance, batch_size=size)
        precision.assert_close(direction.mean, [2 / np.sqrt(4 + 2 / size), 0], rtol=1e-12)
        precision.assert_close(direction.second_moment, [[1, 0], [0, 0]], rtol=1e-12)


@pytest.mark.parametrize("dimension", [1, 2, 7, 10**6])
def test_the_cosine_in_float32(dimension):
    for signal in (1e-3, 0.5, 30.0, 1e4):
        with jax.enable_x64(True):
            expected = adaptive.alignment(signal, dimension)
        with jax.enable_x64(False):
            found = adaptive.alignment(signal, dimension)
        np.testing.assert_allclose(found, expected, rtol=2e-6)
    with jax.enable_x64(False):
        np.testing.assert_allclose([adaptive.alignment(k, dimension) for k in (1e20, np.inf)], 1, rtol=1e-6)


def test_no_surge_of_a_diagonal_hessian_in_float32():
    signal, noise, curved = np.random.default_rng(1).uniform(0.1, 3, (3, 50))
    with jax.enable_x64(False):
        assert adaptive.surge_batch_size(jnp.asarray(signal), jnp.diag(noise), jnp.diag(curved)) == np.inf


def test_muon_on_one_column_moves_along_the_gradient():
    muon = optax.contrib.muon(0.1, beta=0.0, nesterov=False, weight_decay=0.0)
    grads = jax.random.normal(jax.random.key(0), (20, 5, 1))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        update = jax.jit(jax.vmap(lambda grad: muon.update(grad, muon.init(grad), grad)[0]))(grads)
    lengths = jnp.linalg.norm(update[..., 0], axis=1)
    cosines = -jnp.sum(update * grads, (1, 2)) / lengths / jnp.linalg.norm(grads[..., 0], axis=1)
    precision.assert_close(cosines, np.ones(20), rtol=1e-6)
    precision.assert_close(lengths, np.full(20, lengths[0]), rtol=1e-5, ulps=256)


@pytest.mark.usefixtures("nans")
@pytest.mark.slow
def test_the_floor_of_sign_sgd_is_that_of_its_chain():
    walked = jax.jit(jax.vmap(lambda rate: adaptive.sign_floor(rate, 1.0, noise=1.0, batch_size=1)))
    floors = walked(jnp.asarray([0.1, 0.01, 1e-6]))
    precision.assert_close(floors, [0.06464824, 0.00628623, np.nan], rtol=1e-6)
    floor = floors[1]
    limit = adaptive.small_sign_floor(0.01, 1.0, noise=1.0, batch_size=1)
    np.testing.assert_allclose(floor, limit, rtol=4e-3)
    other = adaptive.small_sign_floor(0.08, 1.0, noise=1.0, batch_size=64)  # eta / sqrt(B) counts
    precision.assert_close(other, limit, rtol=1e-12)
    # the stationary vector of the matrix of the walk
    rate, h, noise, size, reach = 0.3, 0.8, 2.0, 3, 40
    at = np.arange(-reach, reach + 1)
    down = stats.norm.cdf(h * rate * at * np.sqrt(size / noise))
    walk = np.diag(down[1:], -1) + np.diag(1 - down[:-1], 1)
    walk[0, 1] = walk[-1, -2] = 1.0
    values, vectors = np.linalg.eig(walk.T)
    mass = np.real(vectors[:, np.argmax(values.real)])
    expected = rate**2 * (mass @ at**2) / mass.sum()
    found = adaptive.sign_floor(rate, h, noise=noise, batch_size=size)
    precision.assert_close(found, expected, rtol=1e-9)


@pytest.mark.slow
def test_the_floor_of_sign_sgd_is_that_of_the_real_loop():
    rate, h, size, seeds, num_updates = 0.3, 0.8, 2, 4000, 40
    optimizer = optax.chain(optax.scale_by_sign(), optax.scale(-rate))
    method = descent.method(gradients.mean(lambda theta, noise: 0.5 * h * theta**2 + noise * theta), optimizer)
    batches = jnp.arange(size * num_updates, dtype=jnp.int32).reshape(num_updates, size)

    @jax.jit
    @jax.vmap
    def train(key):
        noise = jax.random.normal(key, (size * num_updates,))
        squares = descent.run(method, method.init(0.0), noise, batches, lambda state, info: state.params**2)[1]
        return squares[-2:].mean()  # over both parities

    squares = np.asarray(train(jax.random.split(jax.random.key(0), seeds)))
    floor = adaptive.sign_floor(rate, h, noise=1.0, batch_size=size)
    assert abs(squares.mean() - floor) < 4 * squares.std() / np.sqrt(seeds)
