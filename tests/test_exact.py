"""The whole training loop against the exact law of constant-rate SGD on finite least squares.

With z = [w - w*; 1] and Z = E[z z'], one update on a fresh batch of B examples takes Z to

    Z - eta (A Z + Z A') + eta^2 [M(Z) / B + (1 - 1/B) X],        A = mean A_i, M(Z) = mean A_i Z A_i',

where A_i z is the gradient of example i, X = A Z A' for batches drawn with replacement, and
(n A Z A' - M(Z)) / (n - 1) for batches of distinct examples. Averaging `descent.run` over every possible sequence of
batches must give the same matrix, to rounding.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gdjax import descent, gradients

NUM_EXAMPLES, DIMENSION, LEARNING_RATE = 3, 2, 0.3


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(NUM_EXAMPLES, DIMENSION)), rng.normal(size=NUM_EXAMPLES)


def linear_loss(weights, example):
    x, y = example
    return 0.5 * (x @ weights - y) ** 2


def exact(data, start, optimum, batch_size, num_updates, *, replace):
    x, y = data
    residuals = y - x @ optimum
    zeros = np.zeros((1, DIMENSION + 1))
    maps = [
        np.vstack([np.outer(xi, [*xi, -1.0]) * [*np.ones(DIMENSION), ri], zeros])
        for xi, ri in zip(x, residuals, strict=True)
    ]
    mean_map = np.mean(maps, axis=0)
    z = np.append(start - optimum, 1.0)
    second = np.outer(z, z)
    for _ in range(num_updates):
        of_one = np.mean([a @ second @ a.T for a in maps], axis=0)
        of_two = mean_map @ second @ mean_map.T
        if not replace:
            of_two = (NUM_EXAMPLES * of_two - of_one) / (NUM_EXAMPLES - 1)
        drift = mean_map @ second
        noise = of_one / batch_size + (1 - 1 / batch_size) * of_two
        second = second - LEARNING_RATE * (drift + drift.T) + LEARNING_RATE**2 * noise
    return second


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize(("batch_size", "num_updates"), [(1, 4), (2, 2), (3, 2)])
def test_run_averaged_over_every_sequence_of_batches_obeys_the_exact_recursion(data, replace, batch_size, num_updates):
    draws = itertools.product(range(NUM_EXAMPLES), repeat=batch_size)
    batches = [draw for draw in draws if replace or len(set(draw)) == batch_size]
    sequences = jnp.asarray(list(itertools.product(batches, repeat=num_updates)), jnp.int32)
    start, optimum = np.array([1.0, -2.0]), np.array([0.3, 0.7])

    @jax.jit
    @jax.vmap
    def train(sequence):
        method = descent.method(gradients.mean(linear_loss), optax.sgd(LEARNING_RATE))
        return descent.run(method, method.init(jnp.asarray(start)), data, sequence)[0].params

    z = np.column_stack([np.asarray(train(sequences)) - optimum, np.ones(len(sequences))])
    expected = exact(data, start, optimum, batch_size, num_updates, replace=replace)
    np.testing.assert_allclose(z.T @ z / len(z), expected, rtol=1e-11)
