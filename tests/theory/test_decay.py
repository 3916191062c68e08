"""Weight decay against every run of the real loop on two examples, and its symmetries bit for bit."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from scipy import optimize

from gdjax import descent, gradients
from gdjax.theory import decay

H = np.array([1.0, 0.5, 0.1])
OPTIMUM = np.array([1.0, -0.5, 2.0])
OFFSETS = np.array([[1.0, -2.0, 3.0], [-1.0, 2.0, -3.0]])  # mean 0
NOISE = H**2 * (OFFSETS**2).mean(0)
START = np.array([1.5, -0.7, 0.4])
RATE, DECAY = 0.4, 0.3


def loss(theta, offset):
    return 0.5 * (jnp.asarray(H) * (theta - jnp.asarray(OPTIMUM) - offset) ** 2).sum()


def every_run(optimizer, batch_size, num_updates, prepared=lambda opt_state: opt_state):
    """Return the last parameters [S, D] of all 2^(B T) runs."""
    draws = itertools.product(range(2), repeat=batch_size * num_updates)
    batches = jnp.asarray(list(draws), jnp.int32).reshape(-1, num_updates, batch_size)
    method = descent.method(gradients.mean(loss), optimizer)

    @jax.jit
    @jax.vmap
    def train(batches):
        state = method.init(jnp.asarray(START))
        return descent.run(method, state._replace(opt_state=prepared(state.opt_state)), OFFSETS, batches)[0].params

    return np.asarray(train(batches))


def frozen_adamw(second_moment):
    """Return AdamW as optax chains it, and what freezes its second moment."""
    adamw = optax.chain(
        optax.scale_by_rms(decay=1.0, eps=0.0), optax.add_decayed_weights(DECAY), optax.scale_by_learning_rate(RATE)
    )
    return adamw, lambda state: (state[0]._replace(nu=jnp.asarray(second_moment)), *state[1:])


@pytest.mark.parametrize(("batch_size", "num_updates"), [(1, 8), (2, 4)])
@pytest.mark.slow
def test_mean_and_variance_are_those_of_all_runs_of_the_real_loop(batch_size, num_updates):
    common = {"optimum": OPTIMUM, "start": START, "learning_rate": RATE, "weight_decay": DECAY}
    common |= {"batch_size": batch_size, "num_updates": num_updates}
    sgdw = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE))
    cases = [(every_run(sgdw, batch_size, num_updates), decay.sgdw(H, NOISE, **common))]
    for second in (None, np.array([0.05, 2.0, 0.3])):  # at 0.05 the first coordinate overshoots, a < 0
        adamw = frozen_adamw(NOISE / batch_size if second is None else second)
        ends = every_run(adamw[0], batch_size, num_updates, prepared=adamw[1])
        cases.append((ends, decay.adamw(H, NOISE, **common, second_moment=second)))
    for ends, moments in cases:
        precision.assert_close(moments.mean, ends.mean(0), rtol=1e-12)
        precision.assert_close(moments.variance, ends.var(0), rtol=1e-12)
        excess = 0.5 * ((ends - OPTIMUM) ** 2 @ H).mean()
        precision.assert_close(decay.excess_loss(moments, jnp.asarray(H), optimum=OPTIMUM), excess, rtol=1e-12)


def test_the_reference_run():
    one = {name: jnp.asarray([value]) for name, value in {"optimum": 1.0, "start": 0.0}.items()}
    settings = {"learning_rate": 0.1, "weight_decay": 0.05, "batch_size": 4}
    moments = decay.sgdw(jnp.asarray([0.5]), jnp.asarray([2.0]), **one, **settings, num_updates=40)
    precision.assert_close(moments.mean, [0.8144934099], rtol=1e-9)
    precision.assert_close(moments.variance, [0.0462337971], rtol=1e-9)
    floor = decay.sgdw(jnp.asarray([0.5]), jnp.asarray([2.0]), **one, **settings, num_updates=np.inf)
    precision.assert_close(floor.mean, [0.5 / 0.55], rtol=1e-12)
    precision.assert_close(floor.variance, [0.01 * 2 / 4 / (1 - 0.945**2)], rtol=1e-12)


@pytest.mark.slow
def test_the_best_decay_falls_with_the_batch_size():
    sizes = np.array([1.0, 4.0, 64.0])
    found = decay.best_weight_decay(0.5, 2.0, optimum=1.0, learning_rate=0.1, batch_size=jnp.asarray(sizes))
    precision.assert_close(found, [0.05550519, 0.01281141, 0.00078196], rtol=1e-5)
    ratio = 0.1 * 2 / (4 * sizes * 0.5)
    np.testing.assert_allclose(found, 0.5 * ratio / (1 - ratio), rtol=2e-3)
    np.testing.assert_allclose(0.5 * ratio[0] / (1 - ratio[0]), 0.05555556, rtol=1e-7)

    def floor(h, log):
        moments = decay.sgdw(
            *(jnp.asarray([x]) for x in (h, 2.0)),
            optimum=jnp.ones(1),
            start=jnp.zeros(1),
            learning_rate=0.8,
            weight_decay=math.exp(log),
            batch_size=4,
            num_updates=np.inf,
        )
        return float(decay.excess_loss(moments, jnp.asarray([h]), optimum=jnp.ones(1)))

    for h in (0.5, 1.1):  # far from small rates
        least = optimize.minimize_scalar(lambda log, h=h: floor(h, log), bounds=(-12, 0), method="bounded")
        best = decay.best_weight_decay(h, 2.0, optimum=1.0, learning_rate=0.8, batch_size=4)
        np.testing.assert_allclose(best, math.exp(least.x), rtol=1e-3)
    assert decay.best_weight_decay(1.3, 2.0, optimum=1.0, learning_rate=0.8, batch_size=4) == 0


def test_a_slow_run_and_a_small_decay_in_float32():
    h, rate, num_updates = 1e-4, 1e-5, 10**6
    gone = -np.expm1(num_updates * np.log1p(-rate * h))
    variance = rate**2 * 0.5 * gone * (2 - gone) / (1 - (1 - rate * h) ** 2)
    with jax.enable_x64(False):
        one = {"optimum": jnp.ones(1), "start": jnp.zeros(1), "weight_decay": 0.0}
        settings = {"learning_rate": rate, "batch_size": 2, "num_updates": num_updates}
        moments = decay.sgdw(jnp.asarray([h]), jnp.ones(1), **one, **settings)
        best = decay.best_weight_decay(0.5, 2.0, optimum=1.0, learning_rate=0.1, batch_size=1e6)
    np.testing.assert_allclose(np.ravel(moments), [gone, variance], rtol=1e-5)
    x, ratio = 0.1 * 0.5, 0.1 * 2 / (4 * 1e6 * 0.5)  # the zero of the slope where r is small
    np.testing.assert_allclose(best, 0.5 * ratio * (1 - x) / (1 - x / 2) ** 2, rtol=1e-5)


def test_no_decay_is_best_for_a_run_from_0_whose_rate_is_tuned():
    h = 1 / jnp.arange(1.0, 65.0)
    rates, decays = jnp.geomspace(1e-3, 1.9, 60), jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-4, 1.0, 20)])

    @jax.jit
    def losses(num_updates):
        def one(rate, lam):
            moments = decay.sgdw(
                h,
                h,
                optimum=jnp.ones(64),
                start=jnp.zeros(64),
                learning_rate=rate,
                weight_decay=lam,
                batch_size=4,
                num_updates=num_updates,
            )
            return decay.excess_loss(moments, h, optimum=jnp.ones(64))

        return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(rates, decays)

    for num_updates in (10, 100, 10_000):
        tuned = losses(num_updates).min(1)
        assert tuned.argmin() == 0
        assert tuned[0] < tuned[-1]


def test_adamw_keeps_its_run_where_rate_and_decay_grow_as_the_root_of_the_batch_size():
    h, ones = 1 / jnp.arange(1.0, 65.0), jnp.ones(64)

    def end(rate, lam, batch_size):
        settings = {"learning_rate": rate, "weight_decay": lam, "batch_size": batch_size}
        moments = decay.adamw(h, h, optimum=ones, start=3 * ones, **settings, num_updates=2**14 // batch_size)
        return decay.excess_loss(moments, h, optimum=ones)

    losses = [end(0.004, 0.2, 4), end(8 * 0.004, 8 * 0.2, 256), end(0.004, 64 * 0.2, 256)]
    precision.assert_close(losses, [0.146758, 0.147578, 0.975886], rtol=5e-6, ulps=1e3)


def test_sgd_keeps_its_run_where_the_rate_grows_as_the_batch_size_and_the_decay_stays():
    h, ones = 1 / jnp.arange(1.0, 65.0), jnp.ones(64)

    def end(rate, lam, batch_size):
        settings = {"learning_rate": rate, "weight_decay": lam, "batch_size": batch_size}
        moments = decay.sgdw(h, h, optimum=ones, start=3 * ones, **settings, num_updates=2**14 // batch_size)
        return decay.excess_loss(moments, h, optimum=ones)

    reference = end(1e-3, 0.2, 1)
    np.testing.assert_allclose(end(8e-3, 0.2, 8), reference, rtol=5e-3)
    assert end(8e-3, 1.6, 8) > 1.5 * reference


def scale_free(weights, example):
    """A loss that ignores the length of the weights."""
    x, y = example
    return 0.5 * (x @ weights / jnp.sqrt(weights @ weights) - y) ** 2


def trained(optimizer, start):
    """Return the weights [T, D] after each of 30 updates, and the updates [T, D]."""
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.normal(size=(60, 4))), jnp.asarray(rng.normal(size=60))
    method = descent.method(gradients.mean(scale_free), optimizer)
    batches = jnp.arange(60, dtype=jnp.int32).reshape(30, 2)

    def record(state, info):
        return state.params, info.update

    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes int32 and float64
        return jax.jit(lambda: descent.run(method, method.init(start), data, batches, record)[1])()


@pytest.mark.parametrize("factor", [4.0, 1 / 64])
def test_the_scale_symmetry_of_adamw_bit_for_bit(factor):
    start = jnp.asarray([0.5, -1.0, 0.25, 2.0])

    def weights(rate, lam, start):
        return np.asarray(trained(optax.adamw(rate, eps=0.0, weight_decay=lam), start)[0])

    here, there = weights(0.05, 0.5, start), weights(*decay.same_directions(0.05, 0.5, start, factor=factor))
    np.testing.assert_array_equal(there, factor * here)
    assert np.abs(here[-1] - np.asarray(start)).max() > 0.1
    other = weights(0.05 * factor, 0.5, start * factor)  # lambda must follow
    assert np.abs(other / factor - here).max() > 1e-3


def test_the_last_weights_are_an_average_of_the_updates():
    rate, lam, start = 0.05, 0.5, jnp.asarray([0.5, -1.0, 0.25, 2.0])
    params, updates = map(np.asarray, trained(optax.adamw(rate, weight_decay=lam), start))
    before = np.concatenate([start[None], params[:-1]])
    directions = -updates / rate - lam * before
    keep = 1 - 1 / decay.timescale(rate, lam, batch_size=2).updates
    weights = keep ** np.arange(30)[::-1]
    precision.assert_close(params[-1], keep**30 * np.asarray(start) - rate * weights @ directions, rtol=1e-12)
    assert decay.timescale(rate, lam, batch_size=2).examples == 80


def test_unit_updates_settle_where_decay_balances_them():
    rate, lam = 0.2, 0.6
    unit = optax.chain(
        optax.normalize_by_update_norm(eps=0.0), optax.add_decayed_weights(lam), optax.scale_by_learning_rate(rate)
    )
    params, _ = trained(unit, jnp.asarray([0.5, -1.0, 0.25, 2.0]))
    squares = np.sum(np.asarray(params) ** 2, 1)
    keep, settled = (1 - rate * lam) ** 2, decay.equilibrium_norm(rate, lam) ** 2
    expected = settled + keep ** np.arange(1, 31) * (0.25 + 1 + 0.0625 + 4 - settled)
    precision.assert_close(squares, expected, rtol=1e-12)
    np.testing.assert_allclose(rate / decay.equilibrium_norm(1e-4, lam) * 1e-4 / rate, np.sqrt(2e-4 * lam), rtol=1e-4)
