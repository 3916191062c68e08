"""Laws of the batch size against every batch of a small population and against the real training loop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest

from gdjax import batching, descent, gradients, theory
from gdjax.theory import quadratics

RNG = np.random.default_rng(0)
DATA = RNG.normal(size=(4, 2)), RNG.normal(size=4)
WEIGHTS = np.array([1.0, -0.5])
HESSIAN = DATA[0].T @ DATA[0] / 4


def linear_loss(weights, example):
    x, y = example
    return 0.5 * (x @ weights - y) ** 2


def full_loss(weights):
    return 0.5 * ((DATA[0] @ weights.T - DATA[1][:, None]) ** 2).mean(0)


def population():
    """Return the mean [D] and the covariance [D, D] of the examples' gradients."""
    residuals = DATA[0] @ WEIGHTS - DATA[1]
    grads = DATA[0] * residuals[:, None]
    return jnp.asarray(grads.mean(0)), jnp.asarray(np.cov(grads.T, ddof=0))


def updates(batches, learning_rate):
    """Return the real update [S, D] on each of `batches` [S, B]."""
    method = descent.method(gradients.mean(linear_loss), optax.sgd(learning_rate))

    @jax.jit
    @jax.vmap
    def one(batch):
        return method.step(method.init(jnp.asarray(WEIGHTS)), batching.take(DATA, batch))[1].update

    return np.asarray(one(jnp.asarray(batches, jnp.int32)))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_expected_change_of_an_update_is_the_mean_over_all_batches(batch_size):
    draws = list(itertools.product(range(4), repeat=batch_size))
    mean = (full_loss(WEIGHTS + updates(draws, 0.3)) - full_loss(WEIGHTS[None])).mean()
    known = theory.expected_change(
        *population(), hessian=jnp.asarray(HESSIAN), learning_rate=0.3, batch_size=batch_size
    )
    precision.assert_close(known, mean, rtol=1e-12)


def test_the_best_rate_lowers_the_loss_most_and_linear_scaling_ends_at_the_noise_scale():
    grad, covariance = population()
    hessian = jnp.asarray(HESSIAN)
    noise_scale = theory.b_noise(grad, covariance, hessian=hessian)
    full = theory.full_batch_learning_rate(grad, hessian)

    @jax.jit
    @jax.vmap
    def best_of_grid(batch_size):
        rate = theory.best_learning_rate(batch_size, noise_scale, full_batch=full)
        near = rate * jnp.linspace(0.9, 1.1, 21)
        changes = theory.expected_change(grad, covariance, hessian=hessian, learning_rate=near, batch_size=batch_size)
        return jnp.argmin(changes), changes[10], rate

    sizes = jnp.asarray([1.0, 2.0, 7.0, 1e3, 1e12])
    at, decreases, rates = best_of_grid(sizes)
    assert (at == 10).all()
    assert (np.diff(rates) > 0).all()
    precision.assert_close(rates[-1], full, rtol=1e-9)
    # equation 2.7, and the law of updates for a constant decrease per update
    precision.assert_close(decreases, -full * (grad @ grad) / 2 / (1 + noise_scale / sizes), rtol=1e-12)
    needed = theory.updates_to_target(sizes, noise_scale, min_updates=100.0)
    precision.assert_close(needed / needed[-1], decreases[-1] / decreases, rtol=1e-9)
    examples = theory.examples_to_target(sizes, noise_scale, min_examples=100.0 * noise_scale)
    precision.assert_close(examples, needed * sizes, rtol=1e-12)
    # where needed / 100 - 1 = noise_scale / sizes keeps three digits
    kept = sizes[sizes * precision.EPS < 1e-3 * noise_scale].size
    assert kept == (5 if precision.X64 else 4)
    hyperbola = (needed / 100 - 1) * (examples / 100 / noise_scale - 1)
    np.testing.assert_allclose(hyperbola[:kept], 1, rtol=1e-3)
    critical = theory.batch_size_at_overhead(noise_scale)
    costly = theory.examples_to_target(critical, noise_scale, min_examples=1.0)
    precision.assert_close(costly, 1.2, rtol=1e-12)


def test_a_batch_of_the_only_example_has_no_noise():
    assert theory.finite_population(1, 1) == 0


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_the_covariance_of_updates_on_distinct_examples(batch_size):
    of_all = updates(list(itertools.combinations(range(4), batch_size)), 0.3)
    found = np.cov(of_all.T, ddof=0)
    _, covariance = population()
    factor = theory.finite_population(batch_size, 4)
    precision.assert_close(found, 0.3**2 * covariance / batch_size * factor, rtol=1e-12, atol=1e-30)
    temperature = theory.temperature(0.3, batch_size, num_examples=4)
    precision.assert_close(found, 0.3 * temperature * covariance / 3, rtol=1e-12, atol=1e-30)


def test_momentum_raises_the_temperature_as_it_raises_the_noise_floor():
    momenta = jnp.asarray([0.0, 0.5, 0.9])
    floors = quadratics.stationary_variance(
        jnp.ones(3), jnp.ones(3), learning_rate=1e-9, batch_size=4, momentum=momenta
    )
    warm = theory.temperature(1e-9, 4, num_examples=1e9, momentum=momenta)
    precision.assert_close(floors, warm / 1e9 / 2, rtol=1e-7)


def test_linear_rule_keeps_the_movement_per_example(key):
    slopes = jax.random.normal(key, (24,))
    ends = []
    for factor in (1, 4):
        optimizer = optax.sgd(theory.linear_rule(0.1, factor))
        method = descent.method(gradients.mean(lambda w, slope: w * slope), optimizer)
        batches = batching.batches(batching.cyclic(key, 24, num_epochs=1), 2 * factor)
        ends.append(descent.run(method, method.init(0.0), slopes, batches)[0].params)
    precision.assert_close(ends[0], ends[1], rtol=1e-12)


def test_sqrt_rule_keeps_the_spread_of_adam_per_example(key):
    factor, num_examples, seeds = 4, 2048, 800
    adam = theory.Adam(jnp.asarray(0.01), 0.9, 0.99, 0.0)
    spreads = []
    for batch_size, settings in ((8, adam), (8 * factor, theory.sqrt_rule(adam, factor))):
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes int32 and float64
            method = descent.method(gradients.mean(lambda w, slope: w * slope), optax.adam(*settings))
            batches = batching.batches(batching.cyclic(key, num_examples, num_epochs=1), batch_size)

            @jax.jit
            @jax.vmap
            def train(key, method=method, batches=batches):
                slopes = jax.random.normal(key, (num_examples,))
                return descent.run(method, method.init(0.0), slopes, batches)[0].params

            spreads.append(float(jnp.var(train(jax.random.split(jax.random.key(batch_size), seeds)))))
    # The variance of a variance of S normal numbers is 2 / S of its square.
    assert abs(np.log(spreads[1] / spreads[0])) < 4 * np.sqrt(2 * 2 / seeds)
    precision.assert_close(theory.sqrt_rule(adam, 4)[1:3], [0.6, 0.96], rtol=1e-12)
    assert theory.sqrt_rule(adam._replace(eps=1e-8), 4).eps == 5e-9
    with pytest.raises(ValueError, match=r"factor=20 with b1=0.9 asks for 1 - b1 above 1"):
        theory.sqrt_rule(adam, 20)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_memory_halves_once_in_its_half_life(batch_size, key):
    decay = theory.decay_per_update(20.0, batch_size)
    method = descent.method(gradients.mean(lambda w, slope: w * slope), optax.sgd(1.0, momentum=decay))
    slopes = jnp.zeros(25).at[:batch_size].set(1.0)
    batches = batching.batches(batching.cyclic(key, 25, num_epochs=1), batch_size)
    _, moved = descent.run(method, method.init(0.0), slopes, batches, lambda state, info: -info.update)
    precision.assert_close(moved[:: 20 // batch_size], [1.0, 0.5], rtol=1e-12)
    longer = theory.same_half_life(decay, 3)
    precision.assert_close(longer, theory.decay_per_update(20.0, 3 * batch_size), rtol=1e-12)
