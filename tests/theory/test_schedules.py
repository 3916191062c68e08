"""Schedules of rate and batch size: the real loop over every draw, and the best ramp against numpy and brute force."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest

from gdjax import descent, gradients
from gdjax.theory import least_squares, quadratics, ramps, schedules

H10, H100 = 1 / np.arange(1.0, 11.0), 1 / np.arange(1.0, 101.0)
SMALL = schedules.noisy_quadratic(jnp.asarray(H10), jnp.asarray(H10), start=jnp.ones(10))
QUADRATIC = schedules.noisy_quadratic(jnp.asarray(H100), jnp.asarray(H100), start=jnp.ones(100))
LEAST_SQUARES = schedules.gaussian_least_squares(jnp.asarray(H100), label_noise=1.0, start=jnp.ones(100))
MODELS = {"noise stays": QUADRATIC, "noise shrinks": LEAST_SQUARES}
HALVES = jnp.full(20, 0.5)
run = jax.jit(schedules.run, static_argnames="normalized")


def real_runs(loss, data, start, learning_rates, batch_sizes):
    """Return the parameters [S, D] after the real loop on all draws, through phases of different batch sizes."""
    num_draws = sum(batch_sizes)
    draws = np.array(list(itertools.product(range(len(jax.tree.leaves(data)[0])), repeat=num_draws)), np.int32)
    method = descent.method(gradients.mean(loss), optax.sgd(lambda count: jnp.asarray(learning_rates)[count]))

    @jax.jit
    @jax.vmap
    def train(draw):
        state, at = method.init(jnp.asarray(start)), 0
        for batch_size, group in itertools.groupby(batch_sizes):
            num_updates = len(list(group))
            batches = draw[at : at + num_updates * batch_size].reshape(num_updates, batch_size)
            state, _ = descent.run(method, state, data, batches)
            at += num_updates * batch_size
        return state.params

    return np.asarray(train(draws))


@pytest.mark.parametrize("batch_sizes", [(1, 1, 2, 4), (3, 1, 2), (2, 2, 2, 1)])
def test_the_real_loop_through_a_schedule_is_the_recursion_on_average(batch_sizes):
    h, start = np.array([1.0, 0.5, 0.1]), np.array([1.5, -0.7, 0.4])
    targets = np.array([[1.0, -2.0, 3.0], [-1.0, 2.0, -3.0]])
    rates = [0.9, 0.3, 1.2, 0.5][: len(batch_sizes)]
    ends = real_runs(lambda theta, c: 0.5 * (h * (theta - c) ** 2).sum(), targets, start, rates, batch_sizes)
    quadratic = schedules.noisy_quadratic(jnp.asarray(h), jnp.asarray(h**2 * (targets**2).mean(0)), start=start**2)
    second, losses = run(quadratic, jnp.asarray(rates), jnp.asarray(batch_sizes, float))
    precision.assert_close(second, (ends**2).mean(0), rtol=1e-12)
    precision.assert_close(losses[-1], 0.5 * (ends**2 @ h).mean(), rtol=1e-12)


@pytest.mark.parametrize("batch_sizes", [(1, 2), (2, 1)])
def test_the_real_loop_on_gaussian_like_least_squares(batch_sizes):
    points = np.sqrt(3) * np.array([-1, 0, 0, 0, 0, 1])  # 3-point Gauss-Hermite quadrature
    h, label_noise, start = 0.8, 0.7, 1.3
    x, y = (a.ravel() for a in np.meshgrid(np.sqrt(h) * points, np.sqrt(label_noise) * np.array([-1, 1])))
    ends = real_runs(lambda w, xy: 0.5 * (xy[0] * w - xy[1]) ** 2, (x, y), start, [0.6, 0.4], batch_sizes)
    quadratic = schedules.gaussian_least_squares(
        jnp.asarray([h]), label_noise=label_noise, start=jnp.asarray([start**2])
    )
    second, _ = run(quadratic, jnp.asarray([0.6, 0.4]), jnp.asarray(batch_sizes, float))
    precision.assert_close(second, [(ends**2).mean()], rtol=1e-12)


def test_the_real_loop_on_gaussian_features_to_four_standard_errors():
    seeds, h = 4000, np.array([1.0, 0.4])
    rates, sizes = np.repeat([0.5, 0.25], [6, 4]), np.repeat([2, 5], [6, 4])
    method = descent.method(
        gradients.mean(lambda w, xy: 0.5 * (xy[0] @ w - xy[1]) ** 2), optax.sgd(lambda count: jnp.asarray(rates)[count])
    )

    @jax.jit
    @jax.vmap
    def train(key):
        features, labels = jax.random.split(key)
        data = jax.random.normal(features, (32, 2)) * np.sqrt(h)[None], jax.random.normal(labels, (32,))
        order = jnp.arange(32, dtype=jnp.int32)
        state, _ = descent.run(method, method.init(jnp.asarray([1.0, -2.0])), data, order[:12].reshape(6, 2))
        state, _ = descent.run(method, state, data, order[12:].reshape(4, 5))
        return h @ state.params**2 / 2

    losses = np.asarray(train(jax.random.split(jax.random.key(0), seeds)))
    quadratic = schedules.gaussian_least_squares(jnp.asarray(h), label_noise=1.0, start=jnp.asarray([1.0, 4.0]))
    expected = run(quadratic, jnp.asarray(rates), jnp.asarray(sizes, float))[1][-1]
    assert abs(losses.mean() - expected) < 4 * losses.std() / np.sqrt(seeds)


@pytest.mark.slow
def test_constant_schedules_are_the_known_recursions():
    options = {"learning_rate": 0.3, "batch_size": 4}
    second, losses = run(QUADRATIC, jnp.full(30, 0.3), jnp.full(30, 4.0))
    known = quadratics.after(quadratics.sgd(H100, H100, start=jnp.ones(100), **options), 30)
    precision.assert_close(second, known[:, 0, 0], rtol=1e-12)
    precision.assert_close(losses[-1], quadratics.excess_loss(known, jnp.asarray(H100)), rtol=1e-12)
    second, matrix = run(LEAST_SQUARES, jnp.full(3, 0.3), jnp.full(3, 4.0))[0], jnp.eye(100)
    for _ in range(3):
        matrix = least_squares.gaussian_step(matrix, jnp.diag(jnp.asarray(H100)), label_noise=1.0, **options)
    precision.assert_close(second, jnp.diagonal(matrix), rtol=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_the_costs_of_noise_are_the_gradient_of_the_loss(name):
    model, rates = MODELS[name], jnp.linspace(0.9, 0.2, 12)
    inverse = jnp.linspace(0.3, 0.05, 12)
    loss, expected = jax.value_and_grad(lambda u: schedules.run(model, rates, 1 / u)[1][-1])(inverse)
    bias, costs = jax.jit(schedules.noise_costs)(model, rates, 1 / inverse)
    precision.assert_close(costs, expected, rtol=1e-12)
    precision.assert_close(bias + costs @ inverse, loss, rtol=1e-12)
    without, at_infinity = jax.jit(schedules.noise_costs)(model, rates)
    precision.assert_close(without, run(model, rates, jnp.full(12, np.inf))[1][-1], rtol=1e-12)
    moved = np.abs(at_infinity / costs - 1).max()
    assert moved < 1e-12 if name == "noise stays" else moved > 1e-2


def halved(rate, size, num_examples, *, rates, sizes):
    """Return rates and batch sizes of four phases of as many examples, multiplied from phase to phase."""
    steps = [num_examples // round(size * sizes**j) for j in range(4)]
    pairs = [(rate * rates**j, round(size * sizes**j)) for j in range(4) for _ in range(steps[j])]
    return jnp.asarray(pairs, float).T


@pytest.mark.parametrize(
    ("rate", "size", "steady", "shrinking"),
    [(0.1, 1, 0.014, 0.014), (0.5, 16, 0.059, 0.060), (1.0, 16, 0.217, 0.225), (1.8, 64, 1.16, 1.21)],
)
def test_a_growing_batch_is_a_decaying_rate_to_first_order_only(rate, size, steady, shrinking):
    decay = halved(rate, size, 4096, rates=0.5, sizes=1)
    growth = halved(rate, size, 4096, rates=1, sizes=2)
    for model, expected in ((QUADRATIC, steady), (LEAST_SQUARES, shrinking)):
        excess = run(model, *growth)[1][-1] / run(model, *decay)[1][-1] - 1
        np.testing.assert_allclose(excess, expected, atol=0.0006 if expected < 1 else 0.006)
    assert abs(growth.shape[1] / decay.shape[1] - 0.47) < 0.003


def test_two_steps_of_half_the_rate_are_one_of_twice_the_batch_to_first_order():
    h, x = jnp.ones(1), 0.4
    two = run(schedules.noisy_quadratic(h, h, start=h), jnp.full(2, x / 2), jnp.ones(2))[0]
    one = run(schedules.noisy_quadratic(h, h, start=h), jnp.full(1, x), jnp.full(1, 2.0))[0]
    noise = x**2 / 2 * (1 + (1 - x / 2) ** 2) / 2
    precision.assert_close(two, [(1 - x / 2) ** 4 + noise], rtol=1e-12)
    precision.assert_close(one, [(1 - x) ** 2 + x**2 / 2], rtol=1e-12)


SEESAW = [(0.05, 1, 0.0015, 0.997), (0.2, 16, 0.027, 0.94), (0.4, 64, 0.16, 0.73), (0.8, 256, 1.76, 0.12)]


@pytest.mark.parametrize(
    ("rate", "size", "expected", "share"), [pytest.param(*SEESAW[0], marks=pytest.mark.slow), *SEESAW[1:]]
)
def test_the_seesaw_of_normalised_gradients_holds_while_noise_dominates(rate, size, expected, share):
    decay = halved(rate, size, 2**15, rates=0.5, sizes=1)
    seesaw = halved(rate, size, 2**15, rates=0.5**0.5, sizes=2)
    seconds = {}
    for name, model in MODELS.items():
        seconds[name], losses = run(model, *seesaw, normalized=True)
        excess = losses[-1] / run(model, *decay, normalized=True)[1][-1] - 1
        np.testing.assert_allclose(excess, expected, atol=0.012 * (1 + expected) if expected > 0.01 else 0.003)
    noise = H100.sum() / (8 * size)
    signal = float(H100**2 @ seconds["noise stays"])
    np.testing.assert_allclose(noise / (noise + signal), share, atol=0.01)
    no_decay = halved(rate, size, 2**15, rates=1, sizes=2)
    ratio = run(QUADRATIC, *no_decay, normalized=True)[1][-1] / run(QUADRATIC, *decay, normalized=True)[1][-1]
    assert ratio > 2.5  # (eta, 2B) is no decay here


def test_updates_that_growth_saves():
    u = jnp.arange(0.5, 100_000) / 100_000
    shapes = [(1 - 2 / np.pi, jnp.cos(np.pi * u / 2)), (0.5, (1 + jnp.cos(np.pi * u)) / 2), (0.5, 1 - u)]
    for expected, shape in shapes:
        np.testing.assert_allclose(schedules.updates_saved(shape), expected, rtol=1e-6)


@pytest.mark.slow
def test_the_best_ramp_of_ten_modes():
    bias, costs = jax.jit(schedules.noise_costs)(SMALL, HALVES)
    root = jnp.sqrt(costs)
    found = [bias, costs.sum(), costs[0], costs[-1], root.sum() ** 2 / (20 * costs.sum())]
    expected = [0.0252450005, 0.4201667974, 9.561440568e-4, 0.1937209664, 0.5382362648]
    precision.assert_close(found, expected, rtol=2e-9)
    ramp = jax.jit(lambda: ramps.batch_ramp(SMALL, HALVES, num_examples=400.0))()
    precision.assert_close(ramp.batch_sizes[jnp.asarray([0, 10, 19])], [5.815798, 13.577799, 82.782009], rtol=1e-7)
    precision.assert_close(ramp.batch_sizes, 400 * root / root.sum(), rtol=1e-12)
    precision.assert_close(ramp.loss, 0.0365524509, rtol=1e-8)
    precision.assert_close(ramp.loss, bias + root.sum() ** 2 / 400, rtol=1e-12)
    precision.assert_close(run(SMALL, HALVES, jnp.full(20, 20.0))[1][-1], 0.0462533404, rtol=1e-8)


def cheapest(costs, noise, num_phases, least):
    """Return the fewest examples over all places of the switches, by brute force."""
    fewest = np.inf
    for cuts in itertools.combinations(range(1, len(costs)), num_phases - 1):
        parts = np.split(costs, cuts)
        total, length = np.array([part.sum() for part in parts]), np.array([len(part) for part in parts])
        low, high = 1e-3, 1e9
        for _ in range(100):
            m = np.sqrt(low * high)
            sizes = np.maximum(least, m * np.sqrt(total / length))
            low, high = (m, high) if (total / sizes).sum() > noise else (low, m)
        fewest = min(fewest, length @ sizes)
    return fewest


@partial(jax.jit, static_argnums=2)
def ramp_to(loss, least, num_phases):
    return ramps.batch_ramp(SMALL, HALVES, target=loss, min_batch_size=least, num_phases=num_phases)


@pytest.mark.slow
def test_ramps_in_phases_are_the_best_of_all_places():
    loss, (bias, costs) = 0.03655245087663783, schedules.noise_costs(SMALL, HALVES)
    for num_phases, expected in ((1, 743.17), (2, 473.16), (3, 429.14), (4, 416.38)):
        for least in (1.0, 12.0):
            ramp = ramp_to(loss, least, num_phases)
            precision.assert_close(ramp.loss, loss, rtol=1e-12)
            assert len(np.unique(np.asarray(ramp.batch_sizes).round(6))) == num_phases
            fewest = cheapest(np.asarray(costs), loss - float(bias), num_phases, least)
            precision.assert_close(ramp.num_examples, fewest, rtol=1e-9)
            if least == 1:
                np.testing.assert_allclose(ramp.num_examples, expected, rtol=2e-5)
    assert [n for n, _ in ramps.phases(ramp_to(loss, 1.0, 4).batch_sizes)] == [10, 6, 3, 1]


@pytest.mark.slow
def test_the_smallest_batch_size_is_kept_and_the_rest_is_best():
    loss, (bias, costs) = 0.03655245087663783, schedules.noise_costs(SMALL, HALVES)
    for options in ({"target": loss}, {"num_examples": 400.0}):
        ramp = ramps.batch_ramp(SMALL, HALVES, min_batch_size=12.0, **options)
        free = np.asarray(ramp.batch_sizes) > 12
        assert 0 < free.sum() < 20
        assert (np.asarray(ramp.batch_sizes)[~free] == 12).all()
        multiplier = (np.asarray(costs) / np.asarray(ramp.batch_sizes) ** 2)[free]
        precision.assert_close(multiplier, np.full(free.sum(), multiplier[0]), rtol=1e-9)
        assert (costs[~free] / 12**2 < multiplier[0]).all()  # more examples would buy less there
    precision.assert_close(ramp.num_examples, 400, rtol=1e-12)
    precision.assert_close(bias + costs @ (1 / ramp.batch_sizes), ramp.loss, rtol=1e-12)


@pytest.mark.slow
def test_the_best_ramp_where_the_noise_shrinks():
    rates = jnp.full(100, 0.5)
    fixed = run(LEAST_SQUARES, rates, jnp.full(100, 30.0))[1][-1]
    other = ramps.batch_ramp(QUADRATIC, rates, num_examples=3000).batch_sizes
    ramp = jax.jit(lambda: ramps.batch_ramp(LEAST_SQUARES, rates, num_examples=3000.0))()
    losses = [fixed, run(LEAST_SQUARES, rates, other)[1][-1], ramp.loss]
    precision.assert_close(losses, [0.1413097, 0.1282560, 0.1276116], rtol=1e-6)
    _, costs = schedules.noise_costs(LEAST_SQUARES, rates, ramp.batch_sizes)
    multipliers = costs / ramp.batch_sizes**2
    precision.assert_close(multipliers, np.full(100, multipliers[0]), rtol=1e-9)
    back = jax.jit(lambda target: ramps.batch_ramp(LEAST_SQUARES, rates, target=target))(ramp.loss)
    precision.assert_close([back.num_examples, back.loss], [3000, ramp.loss], rtol=1e-9)
    two = jax.jit(lambda target: ramps.batch_ramp(LEAST_SQUARES, rates, target=target, num_phases=2))(ramp.loss)
    precision.assert_close(two.loss, ramp.loss, rtol=1e-9)
    assert 3000 < two.num_examples < 3600


SHAPES = {
    "constant": (np.ones_like, 0.5, 107),
    "linear": (lambda u: 1 - u, 1.6, 1.9),
    "cosine": (lambda u: (1 + np.cos(np.pi * u)) / 2, 1.8, 11),
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_a_shortcut_and_no_ramp_cost(name):
    shape, shortcut, constant = SHAPES[name]
    h = jnp.asarray(1 / np.arange(1.0, 2001.0))
    rates = jnp.asarray(0.5 * shape(np.arange(400) / 400))
    _, costs = jax.jit(schedules.noise_costs)(schedules.noisy_quadratic(h, h, start=h), rates)
    best = jnp.sqrt(costs).sum() ** 2
    sizes = ramps.shortcut_ramp(rates, num_examples=1000.0)
    precision.assert_close(sizes.sum(), 1000, rtol=1e-12)
    more = [100 * (costs @ (1 / b) * b.sum() / best - 1) for b in (sizes, jnp.ones(400))]
    np.testing.assert_allclose(more, [shortcut, constant], atol=0.06 if constant < 2 else 0.4)


@pytest.mark.slow
def test_no_more_phases_than_updates():
    found, most = (ramps.batch_ramp(SMALL, HALVES[:4], target=0.4, num_phases=n) for n in (6, None))
    precision.assert_close(found.batch_sizes, most.batch_sizes, rtol=1e-7)
    precision.assert_close([found.loss, found.num_examples], [0.4, most.num_examples], rtol=1e-8)
    with pytest.raises(ValueError, match="num_phases=0 must be at least 1"):
        ramps.batch_ramp(SMALL, HALVES, target=0.4, num_phases=0)


@pytest.mark.parametrize("num_phases", [None, 2])
def test_without_noise_the_examples_of_a_ramp_are_spread_evenly(num_phases):
    silent = SMALL._replace(noise=jnp.zeros(10))
    ramp = ramps.batch_ramp(silent, HALVES, num_examples=400.0, num_phases=num_phases)
    bias = (H10 * (1 - 0.5 * H10) ** 40).sum() / 2
    precision.assert_close([ramp.loss, *ramp.batch_sizes], [bias, *np.full(20, 20.0)], rtol=1e-10)


def test_an_update_of_rate_0_has_no_examples_by_the_shortcut():
    shape = np.array([0.5 / 0.7**0.5, 0.2 / 0.2**0.5, 0, 0])
    found = ramps.shortcut_ramp(jnp.asarray([0.5, 0.2, 0.0, 0.0]), num_examples=100.0)
    precision.assert_close(found, 100 * shape / shape.sum(), rtol=1e-12)


@pytest.mark.slow
def test_bad_input():
    with pytest.raises(ValueError, match="give either num_examples or target"):
        ramps.batch_ramp(SMALL, HALVES)
    with pytest.raises(ValueError, match="num_examples=10 must be at least 20, T min_batch_size"):
        ramps.batch_ramp(SMALL, HALVES, num_examples=10)
    with pytest.raises(ValueError, match=r"target=0.02 must be above 0.0252, which these rates reach without noise"):
        ramps.batch_ramp(SMALL, HALVES, target=0.02)
    assert ramps.phases(jnp.asarray([0.2, 1.4, 2.5, 2.6, 7.0])) == [(2, 1), (1, 2), (1, 3), (1, 7)]
