"""Noisy quadratics against every run of the real loop on two examples, and against formulas written apart."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest

from gdjax import descent, gradients
from gdjax.theory import quadratics

H = np.array([1.0, 0.5, 0.1])
TARGETS = np.array([[1.0, -2.0, 3.0], [-1.0, 2.0, -3.0]])  # mean 0
NOISE = H**2 * (TARGETS**2).mean(0)
THETA = np.array([1.5, -0.7, 0.4])
RATE, BETA, GAMMA, POWER = 0.9, 0.6, 0.7, 0.4
TARGET = 0.1


def loss(theta, target):
    return 0.5 * (H * (theta - target) ** 2).sum()


def every_run(optimizer, batch_size, num_updates, data=TARGETS, loss=loss, start=THETA):
    """Return parameters [S, T, D] and optimiser states of all len(data)^(B T) runs."""
    draws = itertools.product(range(len(data)), repeat=batch_size * num_updates)
    batches = jnp.asarray(list(draws), jnp.int32).reshape(-1, num_updates, batch_size)
    method = descent.method(gradients.mean(loss), optimizer)

    @jax.jit
    @jax.vmap
    def train(batches):
        return descent.run(
            method, method.init(jnp.asarray(start)), data, batches, lambda state, info: (state.params, state.opt_state)
        )[1]

    return train(batches)


def averages(params):
    average, history = np.broadcast_to(THETA, params[:, 0].shape), []
    for t in range(params.shape[1]):
        average = GAMMA * average + (1 - GAMMA) * params[:, t]
        history.append(average)
    return history[-1]


def preconditioner():
    return optax.stateless(lambda grads, params: grads * H**-POWER)


SYSTEM = partial(quadratics.sgd, H, NOISE, start=THETA**2, learning_rate=RATE)
MOMENTUM = partial(quadratics.momentum, H, NOISE, start=THETA**2, learning_rate=RATE, momentum=BETA)
AVERAGED = partial(quadratics.averaged, H, NOISE, start=THETA**2, learning_rate=RATE, decay=GAMMA)


@pytest.mark.parametrize(("batch_size", "num_updates"), [(1, 8), (2, 4)])
@pytest.mark.slow
def test_the_recursions_are_the_mean_over_all_runs_of_the_real_loop(batch_size, num_updates):
    params, _ = every_run(optax.sgd(RATE), batch_size, num_updates)
    seen, opt_states = every_run(optax.sgd(RATE, momentum=BETA), batch_size, num_updates)
    tamed, _ = every_run(optax.chain(preconditioner(), optax.sgd(RATE)), batch_size, num_updates)
    seen_by_sgd = quadratics.preconditioned(H, NOISE, power=POWER)
    cases = [
        (SYSTEM(batch_size=batch_size), [params[:, -1]]),
        (AVERAGED(batch_size=batch_size), [averages(params), params[:, -1]]),
        (MOMENTUM(batch_size=batch_size), [seen[:, -1], -RATE * opt_states[0].trace[:, -1]]),
        (
            quadratics.sgd(*seen_by_sgd, start=THETA**2, learning_rate=RATE, batch_size=batch_size),
            [tamed[:, -1]],
        ),
    ]
    for system, states in cases:
        states = np.stack(states, -1)
        expected = np.einsum("sdi,sdj->dij", states, states) / len(states)
        moments = system.start
        for _ in range(num_updates):
            moments = quadratics.step(system, moments)
        precision.assert_close(moments, expected, rtol=1e-12)
        precision.assert_close(quadratics.after(system, num_updates), expected, rtol=1e-12)
        losses = 0.5 * (states[:, :, 0] ** 2 @ H)
        precision.assert_close(quadratics.excess_loss(moments, jnp.asarray(H)), losses.mean(), rtol=1e-12)


def test_after_is_the_closed_form_and_the_repeated_step():
    times = np.array([0, 1, 7, 100, 1000])
    after = jax.jit(jax.vmap(quadratics.after, (None, 0)))
    x = RATE * H
    floor = RATE**2 * NOISE / 3 / (1 - (1 - x) ** 2)
    closed = floor + (1 - x) ** (2 * times[:, None]) * (THETA**2 - floor)
    precision.assert_close(after(SYSTEM(batch_size=3), times)[:, :, 0, 0], closed, rtol=1e-12)
    a, v, c, n = THETA**2, 0 * H, 0 * H, RATE**2 * NOISE / 3
    for t in range(101):  # SCIENCE: Zhang et al. 2019
        if t in (0, 1, 7, 100):
            moments = after(MOMENTUM(batch_size=3), times)[times == t][0]
            precision.assert_close(moments, np.stack([a, c, c, v], -1).reshape(-1, 2, 2), rtol=1e-12)
        a, v, c = (
            (1 - x) ** 2 * a + BETA**2 * v + 2 * (1 - x) * BETA * c + n,
            x**2 * a + BETA**2 * v - 2 * x * BETA * c + n,
            -x * (1 - x) * a + BETA**2 * v + (1 - 2 * x) * BETA * c + n,
        )


def test_stationary_variances_are_where_the_recursions_end():
    forever = jax.jit(partial(quadratics.after, num_updates=2**30))
    common = {"learning_rate": RATE, "batch_size": 3}
    plain = quadratics.stationary_variance(H, NOISE, **common)
    precision.assert_close(forever(SYSTEM(batch_size=3))[:, 0, 0], plain, rtol=1e-12)
    heavy = quadratics.stationary_variance(H, NOISE, **common, momentum=BETA)
    precision.assert_close(forever(MOMENTUM(batch_size=3))[:, 0, 0], heavy, rtol=1e-12)
    gain = quadratics.averaging_gain(H, learning_rate=RATE, decay=GAMMA)
    precision.assert_close(forever(AVERAGED(batch_size=3))[:, 0, 0], gain * plain, rtol=1e-12)
    assert (gain < 1).all()


@pytest.mark.usefixtures("nans")
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_the_recursion_blows_up_just_above_the_largest_stable_rate_and_not_below(beta):
    def variance(rate):
        system = quadratics.momentum(
            jnp.ones(1), jnp.ones(1), start=jnp.ones(1), learning_rate=rate, batch_size=1, momentum=beta
        )
        return quadratics.after(system, 10**6)[0, 0, 0]

    edge, margin = 2 * (1 + beta), 1e-4
    below, above = jax.jit(jax.vmap(variance))(edge * np.array([1 - margin, 1 + margin]))
    known = quadratics.stationary_variance(
        jnp.ones(1), jnp.ones(1), learning_rate=edge * (1 - margin), batch_size=1, momentum=beta
    )
    # Rounding moves a rate by a part of itself that is 1 / margin times as large a part of its distance to the edge.
    precision.assert_close(below, known[0], rtol=1e-8, ulps=1 / margin)
    assert not above < 1e30
    options = {"learning_rate": edge * (1 + margin), "batch_size": 1, "momentum": beta}
    assert quadratics.stationary_variance(jnp.ones(1), jnp.ones(1), **options)[0] == np.inf


METHODS = {
    "sgd": quadratics.sgd,
    "momentum": partial(quadratics.momentum, momentum=0.9),
    "averaged": partial(quadratics.averaged, decay=0.95),
}


@pytest.mark.usefixtures("nans")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_updates_to_target_are_found_one_by_one(name):
    h, limit = 1 / np.arange(1.0, 21), 3000
    rates = np.geomspace(1e-3, 2.5, 30)  # from too slow to unstable

    def system(rate):
        return METHODS[name](h, h, start=np.ones(20), learning_rate=rate, batch_size=8)

    @jax.jit
    @jax.vmap
    def losses(rate):
        def one(moments, _):
            moments = quadratics.step(system(rate), moments)
            return moments, quadratics.excess_loss(moments, jnp.asarray(h))

        return jax.lax.scan(one, system(rate).start, length=limit)[1]

    history = np.asarray(losses(rates))

    def first_below(target):
        below = history <= np.broadcast_to(target, 30)[:, None]
        return np.where(below.any(1), below.argmax(1) + 1, np.inf)

    options = {"target": TARGET, "max_updates": limit}
    found = jax.jit(jax.vmap(lambda rate: quadratics.updates_to_target(system(rate), jnp.asarray(h), **options)))(rates)
    assert 3 < np.isfinite(first_below(TARGET)).sum() < 28
    rounding = 0 if precision.X64 else precision.EPS * np.minimum(found, limit)  # of the losses: a part for each update
    assert (found >= first_below(TARGET * (1 + rounding))).all()
    assert (found <= first_below(TARGET * (1 - rounding))).all()
    best = quadratics.fewest_updates(system, jnp.asarray(h), learning_rates=jnp.asarray(rates), **options)
    assert best == (found.min(), jnp.asarray(rates)[found.argmin()])


def test_a_start_below_the_target_needs_no_update_and_a_budget_is_kept():
    system = SYSTEM(batch_size=3)
    at_start = quadratics.excess_loss(system.start, jnp.asarray(H))
    needed = quadratics.updates_to_target(system, jnp.asarray(H), target=at_start, max_updates=10)
    assert needed == 0
    slow = quadratics.sgd(H, NOISE, start=THETA**2, learning_rate=0.01, batch_size=1e6)
    options = {"target": 0.9 * at_start}
    needed = quadratics.updates_to_target(slow, jnp.asarray(H), max_updates=1000, **options)
    for budget, expected in ((int(needed), needed), (int(needed) - 1, np.inf)):
        assert quadratics.updates_to_target(slow, jnp.asarray(H), max_updates=budget, **options) == expected


def test_stationary_covariance_is_that_of_all_runs_of_the_real_loop():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(2, 2)))
    hessian = basis @ np.diag([1.1, 0.93]) @ basis.T  # with eta = 1 a start is forgotten tenfold an update
    noises = rng.normal(size=(3, 2))
    noises -= noises.mean(0)

    def tilted(theta, noise):
        return 0.5 * theta @ hessian @ theta + noise @ theta

    params, _ = every_run(optax.sgd(1.0), 1, 7, noises, tilted, np.zeros(2))
    covariance = noises.T @ noises / 3
    found = quadratics.stationary_covariance(jnp.asarray(hessian), covariance, learning_rate=1.0, batch_size=1)
    precision.assert_close(params[:, -1].T @ params[:, -1] / len(params), found, rtol=1e-12)
    found = quadratics.stationary_covariance(jnp.asarray(hessian), covariance, learning_rate=0.3, batch_size=4)
    both = hessian @ found + found @ hessian - 0.3 * hessian @ found @ hessian
    precision.assert_close(both, 0.3 / 4 * covariance, rtol=1e-12)
