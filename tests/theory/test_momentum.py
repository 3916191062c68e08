"""Momentum on least squares: the recursions against every run of the real loop, the edges against their maps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest

from gdjax import descent, gradients
from gdjax.theory import least_squares, momentum

RATE, BETA = 0.3, 0.6
EIGENVALUES, LABEL_NOISE, DELTA = np.array([1.0, 0.5]), 0.7, np.array([0.4, -1.1])
SIZES = (1, 4, 16, 64, np.inf)


def linear_loss(weights, example):
    x, y = example
    return 0.5 * (x @ weights - y) ** 2


def ends(data, start, sequences):
    """Return parameters and velocities [S, D] at the ends of runs on the batches of `sequences` [S, T, B]."""

    @jax.jit
    @jax.vmap
    def train(sequence):
        method = descent.method(gradients.mean(linear_loss), optax.sgd(RATE, momentum=BETA))
        state, _ = descent.run(method, method.init(jnp.asarray(start)), data, sequence)
        return state.params, -RATE * state.opt_state[0].trace

    return map(np.asarray, train(jnp.asarray(sequences, jnp.int32)))


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize(("batch_size", "num_updates"), [(1, 5), (2, 3)])
def test_the_finite_recursion_is_the_mean_over_all_runs_of_the_real_loop(replace, batch_size, num_updates):
    rng = np.random.default_rng(0)
    x, y = data = rng.normal(size=(3, 2)), rng.normal(size=3)
    start, optimum = np.array([1.0, -2.0]), np.array([0.3, 0.7])
    draws = itertools.product(range(3), repeat=batch_size)
    batches = [draw for draw in draws if replace or len(set(draw)) == batch_size]
    weights, velocities = ends(data, start, list(itertools.product(batches, repeat=num_updates)))
    z = np.column_stack([weights - optimum, np.ones(len(weights))])
    v = np.column_stack([velocities, np.zeros(len(weights))])
    moments = momentum.at_rest(jnp.asarray(np.outer(*[np.append(start - optimum, 1.0)] * 2)))
    known = x, jnp.asarray(y - x @ optimum)
    options = {"learning_rate": RATE, "batch_size": batch_size, "replace": replace, "momentum": BETA}
    for _ in range(num_updates):
        moments = momentum.finite_step(moments, known, **options)
    for found, pair in zip(moments, ((z, z), (z, v), (v, v)), strict=True):
        precision.assert_close(found, pair[0].T @ pair[1] / len(z), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("batch_size", "num_updates"), [(1, 2), (2, 1)])
def test_the_gaussian_recursion_is_the_mean_over_all_runs_on_gaussian_like_data(batch_size, num_updates):
    points = np.sqrt(3) * np.array([-1, 0, 0, 0, 0, 1])  # 3-point Gauss-Hermite quadrature
    sign = np.sqrt(LABEL_NOISE) * np.array([-1, 1])
    x1, x2, y = (axis.ravel() for axis in np.meshgrid(points, points, sign))
    data = np.column_stack([x1, x2]) * np.sqrt(EIGENVALUES), y
    sequences = np.array(list(itertools.product(range(72), repeat=2))).reshape(-1, num_updates, batch_size)
    weights, velocities = ends(data, DELTA, sequences)
    moments = momentum.at_rest(jnp.asarray(DELTA**2))
    options = {"learning_rate": RATE, "batch_size": batch_size, "label_noise": LABEL_NOISE, "momentum": BETA}
    for _ in range(num_updates):
        moments = momentum.gaussian_step(moments, jnp.asarray(EIGENVALUES), **options)
    for found, seen in zip(moments, (weights**2, weights * velocities, velocities**2), strict=True):
        precision.assert_close(found, seen.mean(0), rtol=1e-12)


def test_without_momentum_it_is_the_recursion_of_sgd():
    options = {"learning_rate": RATE, "batch_size": 3}
    moments = momentum.at_rest(jnp.asarray(DELTA**2))
    second = jnp.diag(moments.params)
    hessian = jnp.diag(jnp.asarray(EIGENVALUES))
    for _ in range(3):
        moments = momentum.gaussian_step(
            moments, jnp.asarray(EIGENVALUES), label_noise=LABEL_NOISE, momentum=0.0, **options
        )
        second = least_squares.gaussian_step(second, hessian, label_noise=LABEL_NOISE, **options)
    precision.assert_close(moments.params, jnp.diagonal(second), rtol=1e-12)


EDGES = {
    "isotropic": (
        np.ones(10),
        [[0.166667, 0.533333, 1.185185, 1.706667, 2], [0.018095, 0.071362, 0.270222, 0.890842, 3.8]],
    ),
    "wide": (
        np.geomspace(1, 0.01, 20),
        [[0.343320, 1.005809, 1.717358, 1.935271, 2], [0.038255, 0.150235, 0.559120, 1.711717, 3.8]],
    ),
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.slow
def test_the_largest_stable_rates_are_those_of_the_map(name):
    h, expected = EDGES[name]

    @jax.jit
    def largest(batch_size, beta):
        return least_squares.max_learning_rate(jnp.asarray(h), batch_size=batch_size, momentum=beta)

    @jax.jit
    def linear_map(rate, batch_size, beta):
        def step(flat):
            options = {"learning_rate": rate, "batch_size": batch_size, "label_noise": 1.0, "momentum": beta}
            return jnp.concatenate(momentum.gaussian_step(momentum.Moments(*jnp.split(flat, 3)), h, **options))

        return jax.jacfwd(step)(jnp.zeros(3 * len(h))), step(jnp.zeros(3 * len(h)))

    for beta, row in zip((0.0, 0.9), expected, strict=True):
        rates = np.asarray([largest(size, beta) for size in SIZES])
        np.testing.assert_allclose(rates, row, rtol=2e-5)
        for size, rate in zip(SIZES, rates, strict=True):
            growth = np.abs(np.linalg.eigvals(linear_map(rate, size, beta)[0])).max() - 1
            assert abs(growth) < (1e-6 if size == np.inf else 1e-11)  # a double root where there is no noise
            grown = [np.abs(np.linalg.eigvals(linear_map(f * rate, size, beta)[0])).max() for f in (0.999, 1.001)]
            assert grown[0] < 1 < grown[1]
        linear, constant = linear_map(rates[1] / 2, 4, beta)
        floor = h @ np.linalg.solve(np.eye(len(linear)) - linear, constant)[: len(h)] / 2
        risk = least_squares.stationary_risk(rates[1] / 2, jnp.asarray(h), batch_size=4, label_noise=1.0, momentum=beta)
        precision.assert_close(risk, floor, rtol=1e-10)
        # the two plateaus: noise, and curvature
        many = least_squares.max_learning_rate(jnp.ones(10_000), batch_size=1, momentum=beta)
        np.testing.assert_allclose(many * 10_000, 2 * (1 - beta), rtol=1e-3)
        precision.assert_close(rates[-1] * h.max(), 2 * (1 + beta), rtol=1e-12)
    closed = [2 * (1 - beta) / (11 / size + (1 - beta) / (1 + beta)) for beta in (0.0, 0.9) for size in SIZES]
    if name == "isotropic":
        np.testing.assert_allclose([largest(size, beta) for beta in (0.0, 0.9) for size in SIZES], closed, rtol=1e-12)


INTERPOLATING = np.array([[1, 0.5], [-0.3, 1], [0.7, -0.8], [0.2, 0.4]])


@pytest.mark.parametrize(
    ("beta", "expected"),
    [(0.0, [1.787194, 2.808094, 3.329169, 3.656269]), (0.9, [0.270991, 0.770682, 1.996088, 6.946912])],
)
def test_the_largest_stable_rates_of_four_examples(beta, expected):
    @jax.jit
    def found(beta):
        return [
            momentum.finite_max_learning_rate(jnp.asarray(INTERPOLATING), batch_size=size, replace=False, momentum=beta)
            for size in (1, 2, 3, 4)
        ]

    precision.assert_close(found(beta), expected, rtol=1e-6)


def test_the_real_loop_blows_up_above_the_largest_stable_rate_and_not_below():
    """In mean square: single runs forget a start even above it, for the mean is carried by rare ones."""
    largest = momentum.finite_max_learning_rate(jnp.asarray(INTERPOLATING), batch_size=4, replace=False, momentum=BETA)
    data = jnp.asarray(INTERPOLATING), jnp.zeros(4)

    def end(rate):
        method = descent.method(gradients.mean(linear_loss), optax.sgd(rate, momentum=BETA))
        batches = jnp.tile(jnp.arange(4, dtype=jnp.int32), (400, 1))
        return jnp.abs(descent.run(method, method.init(jnp.ones(2)), data, batches)[0].params).max()

    below, above = jax.jit(jax.vmap(end))(largest * jnp.asarray([0.97, 1.03]))
    assert below < 1e-2
    assert above > 1e2


def test_directions_that_no_example_has_are_let_be():
    x = np.column_stack([INTERPOLATING, np.zeros(4)])
    options = {"batch_size": 2, "replace": False, "momentum": 0.9}
    padded = jax.jit(lambda: momentum.finite_max_learning_rate(jnp.asarray(x), **options))()
    precision.assert_close(padded, 0.770682, rtol=1e-6)
    with pytest.raises(ValueError, match="batch_size=5 must be at most the 4 examples"):
        momentum.finite_max_learning_rate(jnp.asarray(x), batch_size=5, replace=False)


def growth(x, rate, *, batch_size, replace, beta):
    """Return the spectral radius of the mean over all batches of R x R, R being the map of (delta, v)."""
    batches = itertools.product(x, repeat=batch_size) if replace else itertools.combinations(x, batch_size)
    eye, maps = np.eye(x.shape[1]), []
    for batch in map(np.asarray, batches):
        pull = rate * batch.T @ batch / batch_size
        step = np.block([[eye - pull, beta * eye], [-pull, beta * eye]])
        maps.append(np.kron(step, step))
    return np.abs(np.linalg.eigvals(np.mean(maps, 0))).max()


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("unit", [1e-10, 1e10])
def test_the_largest_stable_rates_in_float32(unit, replace):
    """However small a change of the growth the momentum makes of a change of the rate, and in any unit."""
    for beta, size in ((0.9, 2), (0.999, 1)):
        options = {"batch_size": size, "replace": replace}
        with jax.enable_x64(False):
            x = jnp.asarray(unit * INTERPOLATING, jnp.float32)
            found = momentum.finite_max_learning_rate(x, momentum=beta, **options)
        below, above = (growth(INTERPOLATING, f * float(found) * unit**2, beta=beta, **options) for f in (0.999, 1.001))
        assert below < 1 < above


def test_all_examples_at_once_have_the_rate_of_no_noise_in_float32():
    largest = np.linalg.eigvalsh(INTERPOLATING.T @ INTERPOLATING / 4)[-1]
    for beta in (0.9, 0.99, 0.999):
        with jax.enable_x64(False):
            x = jnp.asarray(INTERPOLATING, jnp.float32)
            found = momentum.finite_max_learning_rate(x, batch_size=4, replace=False, momentum=beta)
        np.testing.assert_allclose(found, 2 * (1 + beta) / largest, rtol=1e-5)
