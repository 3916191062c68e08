"""Best and critical batch sizes on power-law spectra against known numbers, and the recursion against the sum."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest

from gdjax.theory import forecast, horizon, quadratics, schedules

HORIZONS = 2.0 ** np.arange(10, 17, 2)


def over_horizons(function, horizons=HORIZONS):
    return np.asarray(jax.jit(lambda ends: jax.lax.map(lambda end: function(num_examples=end), ends))(horizons))


@pytest.mark.slow
def test_the_loss_of_any_number_of_updates_is_that_of_the_recursion():
    quadratic = horizon.power_law(50, capacity=1.5, source=0.7)
    h = quadratic.eigenvalues
    precision.assert_close(h * quadratic.start, np.arange(1.0, 51) ** -2.05, rtol=1e-12)
    for rate in (0.3, 1.0, 1.7):  # at 1 the first mode is forgotten in one update, above it overshoots
        system = quadratics.sgd(h, h, start=quadratic.start, learning_rate=rate, batch_size=4)
        expected = quadratics.excess_loss(quadratics.after(system, 30), h)
        found = horizon.loss_after(quadratic, learning_rate=rate, batch_size=4, num_examples=120)
        precision.assert_close(found, expected, rtol=1e-12)
    none = schedules.noisy_quadratic(jnp.zeros(1), jnp.ones(1), start=jnp.ones(1))
    assert horizon.loss_after(none, learning_rate=0.1, batch_size=1, num_examples=10) == 0
    rates = 0.9 * horizon.squared_decay(jnp.arange(0.5, 64) / 64)
    _, losses = jax.jit(schedules.run)(quadratic, rates, jnp.full(64, 4.0))
    options = {"learning_rate": 0.9, "batch_size": 4, "num_examples": 256, "shape": horizon.squared_decay}
    precision.assert_close(horizon.loss_after(quadratic, **options, num_blocks=64), losses[-1], rtol=1e-12)
    coarse = horizon.loss_after(quadratic, **options, num_blocks=32)
    np.testing.assert_allclose(coarse, losses[-1], rtol=1e-2)


@pytest.mark.parametrize(
    ("source", "expected"),
    [(1.0, [75.99, 149.50, 297.26, 593.31]), (0.5, [26.55, 42.10, 66.87, 106.25])],
)
def test_the_best_batch_size_at_a_fixed_rate(source, expected):
    quadratic = horizon.power_law(20_000, capacity=2.0, source=source)
    found = over_horizons(partial(horizon.best_batch_size, quadratic, learning_rate=1.0))
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    slopes = np.diff(np.log(found)) / np.log(4)
    predicted = horizon.exponent(capacity=2.0, source=source, rate="fixed")
    np.testing.assert_allclose(slopes, predicted, atol=0.015)


def test_hard_tasks_have_a_smaller_exponent():
    quadratic = horizon.power_law(20_000, capacity=2.0, source=0.25)
    found = over_horizons(partial(horizon.best_batch_size, quadratic, learning_rate=1.0))
    slope = np.polyfit(np.log(HORIZONS), np.log(found), 1)[0]
    np.testing.assert_allclose(slope, 0.201, atol=0.002)
    assert horizon.exponent(capacity=2.0, source=0.25, rate="fixed") == 0.2


TUNED = [
    (1.0, [65.0, 125.3, 247.5, 493.5]),
    pytest.param(0.5, [36.3, 56.7, 89.4, 141.6], marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("source", "expected"), TUNED)
@pytest.mark.slow
def test_the_critical_batch_size_at_a_tuned_constant_rate(source, expected):
    quadratic = horizon.power_law(20_000, capacity=2.0, source=source)
    found = over_horizons(partial(horizon.critical_batch_size, quadratic))
    np.testing.assert_allclose(found, expected, rtol=1e-3)

    @jax.jit
    def of_examples(overhead):
        return horizon.critical_batch_size(quadratic, num_examples=2.0**12, overhead=overhead, of="examples")

    assert 4.8 < of_examples(1.0) / of_examples(0.2) < 5.1  # 5 is the hyperbola's
    slope = np.log(found[3] / found[2]) / np.log(4)
    np.testing.assert_allclose(slope, horizon.exponent(capacity=2.0, source=source, rate="constant"), atol=0.01)
    tuned = jax.jit(partial(horizon.tuned_loss, quadratic, num_examples=2.0**12))
    losses = [tuned(batch_size=size) for size in (1.0, 2.0, 8.0, 64.0)]
    assert (np.diff(losses) > 0).all()  # no batch is too small
    np.testing.assert_allclose(tuned(batch_size=found[1]), 1.2 * losses[0], rtol=1e-6)


DECAYED = [
    (2.0, 1.0, [0.358, 0.355, 0.350, 0.346], 1 / 3),
    (2.0, 0.75, [0.233, None, None, 0.212], 0.2),
    (1.5, 1.0, [None, None, 0.405, 0.402], 0.4),
]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(("capacity", "source", "slopes", "limit"), DECAYED)
def test_the_critical_batch_size_at_a_decayed_rate(capacity, source, slopes, limit):
    quadratic = horizon.power_law(4000 if capacity < 2 else 2000, capacity=capacity, source=source)
    ends = 2.0 ** np.array([10, 13, 16, 19, 22])
    critical = partial(horizon.critical_batch_size, quadratic, shape=horizon.squared_decay, num_blocks=64)
    found = over_horizons(critical, ends)
    measured = np.diff(np.log(found)) / np.log(8)
    known = [slope is not None for slope in slopes]
    np.testing.assert_allclose(measured[known], [slope for slope in slopes if slope is not None], atol=0.003)
    np.testing.assert_allclose(horizon.exponent(capacity=capacity, source=source, rate="decayed"), limit, rtol=1e-12)
    assert (measured > limit).all()
    assert measured[-1] < measured[0]  # towards it, from above


@pytest.mark.slow
def test_the_critical_batch_size_of_a_hard_task_at_a_decayed_rate_does_not_grow():
    quadratic = horizon.power_law(1000, capacity=2.0, source=0.25)
    critical = partial(horizon.critical_batch_size, quadratic, shape=horizon.squared_decay, num_blocks=32)
    found = over_horizons(critical, 2.0 ** np.array([10, 16]))
    assert 1 < found[1] < found[0] < 4
    assert horizon.exponent(capacity=2.0, source=0.25, rate="decayed") == 0


def law_of_runs(law, sizes, updates, **columns):
    pairs = np.array([(b, t) for b in sizes for t in updates]).T
    return forecast.fit(*pairs, losses=law(*pairs, **columns)), pairs


def test_a_forecast_finds_the_law_that_made_the_losses():
    law = forecast.Law(1.7, 0.8, 0.9, 6.0, 0.4, 0.0)
    found, _ = law_of_runs(law, [1, 8, 64], [50, 400, 3200])
    np.testing.assert_allclose(found[:5], law[:5], rtol=1e-3)
    assert found.error < 1e-6
    best = law.best_batch_size(1e6)
    np.testing.assert_allclose(found.best_batch_size(1e6), best, rtol=2e-3)
    near = best * np.linspace(0.8, 1.25, 46)
    losses = law(near, 1e6 / near)
    assert abs(near[losses.argmin()] / best - 1) < 0.01
    factors = np.array([0.25, 1.0, 4.0])
    moved = (law(factors * best, 1e6 / (factors * best)) - 1.7) / (law(best, 1e6 / best) - 1.7)
    np.testing.assert_allclose(law.relative(factors), moved, rtol=1e-12)


def test_a_forecast_with_the_size_of_models():
    law = forecast.Law(1.2, 0.8, 0.9, 6.0, 0.4, 0.0, 30.0, 0.3)
    grid = np.array([(b, t, n) for b in (1, 8, 64) for t in (50, 400, 3200) for n in (1e4, 1e6, 1e8)]).T
    found = forecast.fit(grid[0], grid[1], losses=law(*grid), num_params=grid[2])
    assert found.error < 1e-4
    np.testing.assert_allclose(found.best_batch_size(1e6), law.best_batch_size(1e6), rtol=0.05)
    np.testing.assert_allclose(found(2, 1e4, 1e5), law(2, 1e4, 1e5), rtol=1e-3)


def test_a_forecast_from_the_exact_recursion():
    quadratic = horizon.power_law(4000, capacity=2.0, source=1.0)
    loss = jax.jit(lambda b, t: horizon.loss_after(quadratic, learning_rate=1.0, batch_size=b, num_examples=b * t))
    pairs = np.array([(b, t) for b in (16.0, 64.0, 256.0) for t in (16.0, 64.0, 256.0)]).T
    law = forecast.fit(*pairs, losses=[loss(b, t) for b, t in pairs.T])
    np.testing.assert_allclose([law.batch_exponent, law.updates_exponent], [1, 1], atol=0.1)
    np.testing.assert_allclose(law.best_batch_size(2.0**16), 593.31, rtol=0.1)  # four times beyond the runs


def test_bad_runs_are_refused():
    sizes, updates = np.array([1.0, 1, 4, 4, 16, 16]), np.array([10.0, 90, 20, 80, 30, 70])
    losses = 2 + 0.5 / sizes + 3 / updates**0.5
    with pytest.raises(ValueError, match="losses must be positive and finite"):
        forecast.fit(sizes, updates, losses=losses * [1, 1, 1, 1, 1, np.nan])
    with pytest.raises(ValueError, match="losses of 4 runs do not fix 5 unknowns"):
        forecast.fit(sizes[:4], updates[:4], losses=losses[:4])
    with pytest.raises(ValueError, match="batch_sizes take 2 values"):
        forecast.fit(np.minimum(sizes, 4.0), updates, losses=losses)
