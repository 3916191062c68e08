"""The twin of least squares is least squares; of anything else it is right to second order, and says how far."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest

from gdjax import descent, gradients, problems, theory
from gdjax.problem import Problem
from gdjax.theory import schedules

X = jax.random.normal(jax.random.key(0), (40, 6)) * jnp.asarray([[3.0, 2.0, 1.0, 1.0, 0.3, 0.1]])
Y = X @ jnp.arange(6.0) + jax.random.normal(jax.random.key(1), (40,))


def squares(weight=None):
    return Problem(lambda key: jnp.ones(6), lambda w, e: 0.5 * (e[0] @ w - e[1]) ** 2, (X, Y), weight=weight)


def eigen(weights, start):
    """Return eigenvalues, E theta^2 and c along the eigenvectors, and the least loss, by numpy."""
    x, y, weights = np.asarray(X), np.asarray(Y), np.asarray(weights) / float(np.sum(weights))
    values, basis = np.linalg.eigh(x.T @ (weights[:, None] * x))
    best = np.linalg.lstsq(np.sqrt(weights)[:, None] * x, np.sqrt(weights) * y, rcond=None)[0]
    grads = (x * (x @ start - y)[:, None]) @ basis
    noise = len(x) * (weights[:, None] ** 2 * (grads - weights @ grads) ** 2).sum(0)
    return values, (basis.T @ (start - best)) ** 2, noise, 0.5 * weights @ (x @ best - y) ** 2


@pytest.mark.parametrize("weight", [None, lambda example: jnp.where(example[1] > 0, 2.0, 1.0)])
@pytest.mark.slow
def test_the_twin_of_least_squares_is_exact_without_noise_and_unbiased_with_it(weight):
    rates, sizes = jnp.linspace(0.15, 0.02, 30), jnp.asarray([4.0] * 20 + [16.0] * 10)
    weights = jnp.ones(40) if weight is None else jax.vmap(weight)((X, Y))
    values, second, noise, level = eigen(weights, np.ones(6))
    true = schedules.noisy_quadratic(*map(jnp.asarray, (values, noise)), start=jnp.asarray(second))
    found = theory.twin(squares(weight), jnp.ones(6), key=jax.random.key(2), num_draws=400, num_steps=6)
    still = jnp.full(30, jnp.inf)
    precision.assert_close(found.losses(rates, still), level + schedules.run(true, rates, still)[1], rtol=1e-9)
    drawn = found.losses(rates, sizes) - found.losses(rates, still)
    exact = schedules.run(true, rates, sizes)[1] - schedules.run(true, rates, still)[1]
    np.testing.assert_allclose(drawn, exact, rtol=4 * np.sqrt(2 / 400))  # a square of a Gaussian: of variance 2


@pytest.mark.slow
def test_chunks_of_examples_and_a_preconditioner_change_no_more_than_they_should(monkeypatch):
    options = {"key": jax.random.key(2), "num_steps": 6}
    whole = theory.twin(squares(), jnp.ones(6), **options)
    monkeypatch.setattr(theory._twin, "CHUNK", 16)
    rates, sizes = jnp.full(10, 0.1), jnp.full(10, 4.0)
    chunked = theory.twin(squares(), jnp.ones(6), **options)
    precision.assert_close(chunked.losses(rates, sizes), whole.losses(rates, sizes), rtol=1e-9)
    scale = jnp.asarray([0.1, 0.2, 0.5, 1.0, 2.0, 3.0])  # the same as descent on scaled parameters
    problem = squares()
    scaled = Problem(problem.init, lambda v, e: problem.loss(v * jnp.sqrt(scale), e), problem.train)
    there = theory.twin(scaled, jnp.ones(6) / jnp.sqrt(scale), **options)
    found = theory.twin(problem, jnp.ones(6), precondition=scale, **options)
    precision.assert_close(found.losses(rates, sizes), there.losses(rates, sizes), rtol=1e-8)


@pytest.mark.slow
def test_a_twin_is_right_to_second_order_and_says_how_far_it_holds():
    problem = problems.digits_mlp((16,))
    params = problem.init(jax.random.key(0))
    found = theory.twin(problem, params, key=jax.random.key(1), max_examples=problem.num_examples)
    method = descent.method(gradients.mean(problem.loss), optax.sgd(0.3))
    batches = jnp.tile(jnp.arange(problem.num_examples), (60, 1))
    _, measured = descent.run(
        method, method.init(params), problem.train, batches, lambda state, info: problem.evaluate(state.params)["loss"]
    )
    rates, sizes = jnp.full(60, 0.3), jnp.full(60, jnp.inf)
    predicted = found.losses(rates, sizes)
    np.testing.assert_allclose(predicted[:2], measured[:2], rtol=0.02)
    holds = found.horizon(rates, sizes, measured)
    off = np.abs(np.asarray(predicted / measured) - 1)
    assert 2 < holds < 60
    assert (off[:holds] <= 0.2).all()
    assert off[holds] > 0.2


@pytest.mark.slow
@pytest.mark.usefixtures("nans")
def test_an_example_of_weight_zero_may_have_no_loss():
    """The mean over the entries that are there, times their number: of example 3 there are none."""
    mask = jnp.ones((40, 6)).at[3].set(0)

    def masked(rows):
        return Problem(
            lambda key: jnp.zeros(6),
            lambda w, e: jnp.sum(e[1] * (w - e[0]) ** 2) / jnp.sum(e[1]),
            jax.tree.map(lambda x: x[rows], (X, mask)),
            weight=lambda e: jnp.sum(e[1]),
        )

    every = np.arange(40)
    found, expected = (
        theory.twin(masked(rows), jnp.ones(6), key=jax.random.key(0), num_draws=1).losses(
            jnp.full(3, 0.1), jnp.full(3, jnp.inf)
        )
        for rows in (every, every[every != 3])
    )
    precision.assert_close(found, expected, rtol=1e-9)


@pytest.mark.usefixtures("nans")
def test_a_twin_that_predicts_no_number_holds_for_no_update():
    twin = theory.twin(squares(), jnp.full(6, 1e200), key=jax.random.key(0), num_steps=2, num_draws=1)
    assert twin.horizon(jnp.full(3, 0.1), jnp.full(3, 8.0), jnp.asarray([3.0, 2.0, 1.0])) == 0


def test_the_twin_of_parameters_in_bfloat16_is_nearly_that_of_float32():
    x = jax.random.normal(jax.random.key(0), (64, 4), jnp.float32)
    y = x @ jnp.arange(4.0, dtype=jnp.float32)

    def loss(w, example):
        return 0.5 * ((example[0].astype(w.dtype) @ w).astype(jnp.float32) - example[1]) ** 2

    with jax.enable_x64(False):
        found = [
            theory.twin(
                Problem(lambda key, dtype=dtype: jnp.zeros(4, dtype), loss, (x, y)),
                jnp.zeros(4, dtype),
                key=jax.random.key(1),
                num_steps=4,
                num_draws=1,
            ).losses(jnp.full(3, 0.1), jnp.full(3, 8.0))
            for dtype in (jnp.bfloat16, jnp.float32)
        ]
    np.testing.assert_allclose(*found, rtol=0.02)
