import numpy as np
import pytest

from gdjax.theory import scaling

SIZES = np.asarray([4, 32, 256])
BETWEEN = np.asarray([4, 9, 50, 200, 256])


@pytest.mark.parametrize(("min_updates", "critical"), [(20, 100), (300, 7.5), (5, 900)])
def test_updates_that_obey_the_law_give_it_back(min_updates, critical):
    def exact(size):
        return min_updates * (1 + critical / size)

    law = scaling.fit(SIZES.tolist(), exact(SIZES)[:, None] * np.ones(3))
    np.testing.assert_allclose([law.min_updates, law.critical_batch_size], [min_updates, critical], rtol=0.03)
    np.testing.assert_allclose(law(BETWEEN), exact(BETWEEN), rtol=0.01)  # the search's grid is 3 % wide
    np.testing.assert_allclose(law.residuals, 0, atol=0.01)
    assert law.seed_error == pytest.approx(0, abs=1e-12)
    # One residual, of zero, beside what was believed before.
    prior = scaling.MODEL_RESIDUALS
    assert law.model_error == pytest.approx(scaling.MODEL_ERROR * np.sqrt(prior / (prior + 1)), rel=0.01)


@pytest.mark.parametrize("exact", [lambda size: 5000 / size, lambda size: 30 + 0 * size], ids=["perfect", "flat"])
def test_both_ends_of_the_law_are_reached(exact):
    law = scaling.fit(SIZES.tolist(), exact(SIZES)[:, None] * np.ones(2))
    np.testing.assert_allclose(law(BETWEEN), exact(BETWEEN), rtol=0.03)


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_rates_that_obey_a_law_give_it_and_its_power_back(power):
    def exact(size):
        return 0.7 / (1 + 40 / size) ** power

    law = scaling.fit_rates(SIZES.tolist(), exact(SIZES).tolist())
    assert law.power == power
    np.testing.assert_allclose(law(BETWEEN), exact(BETWEEN), rtol=0.02)
    np.testing.assert_allclose(law([512, 10**6]), exact(256), rtol=1e-12)  # no rate above those that worked


def test_losses_that_obey_their_law_give_it_back():
    exact = 0.03 * (1 + SIZES / 60) ** 2
    law = scaling.fit_losses(SIZES.tolist(), exact[:, None] * np.ones(3), num_examples=4096)
    assert (law.power, law.num_examples) == (2.0, 4096)
    np.testing.assert_allclose([law.least_loss, law.critical_batch_size], [0.03, 60], rtol=0.03)
    np.testing.assert_allclose(law([1, 100]), 0.03 * (1 + np.asarray([1, 100]) / 60) ** 2, rtol=0.02)
    low, middle, high = law.interval(100)
    assert low < middle < high < 2 * middle
    # Losses that do not depend on the batch size: a flat law.
    flat = scaling.fit_losses(SIZES.tolist(), np.full((3, 3), 0.5), num_examples=4096)
    np.testing.assert_allclose(flat([1, 32, 256]), 0.5, rtol=0.02)
    with pytest.raises(ValueError, match="losses must be positive and finite"):
        scaling.fit_losses([4, 32], np.asarray([[1.0], [-1.0]]), num_examples=64)


def test_two_rates_are_a_law_of_power_one():
    exact = 0.7 / (1 + 40 / SIZES)
    law = scaling.fit_rates([4, 256], exact[[0, 2]].tolist())
    assert (law.power, float(law(32))) == (1.0, pytest.approx(exact[1], rel=0.02))


@pytest.mark.parametrize("rate", [np.nan, 0.0, np.inf])
def test_rates_that_are_none_are_refused(rate):
    with pytest.raises(ValueError, match="must be positive and finite"):
        scaling.fit_rates([1, 2, 4], [0.1, rate, 0.2])


@pytest.mark.parametrize("model_error", [0.1, 0.15])
def test_the_interval_covers_as_often_as_it_says(model_error):
    """Pilots at three batch sizes, each off the law by a normal error, the seeds by another; new runs in between."""
    rng, seed_error, trials, covered = np.random.default_rng(0), 0.1, 120, []

    def runs(size, count):
        noise = model_error * rng.standard_normal() + seed_error * rng.standard_normal(count)
        return 20 * (1 + 60 / size) * np.exp(noise)

    for _ in range(trials):
        law = scaling.fit(SIZES.tolist(), np.stack([runs(size, 3) for size in SIZES]))
        for size in (16, 100):
            low, _, high = law.interval(size, num_seeds=5)
            covered.append(low <= runs(size, 5).mean() <= high)
    assert 0.85 <= np.mean(covered) <= 0.99


def test_the_interval_is_wider_for_fewer_seeds_and_beyond_the_pilots():
    rng = np.random.default_rng(0)
    updates = (20 + 2000 / SIZES)[:, None] * np.exp(0.3 * rng.standard_normal((3, 3)))
    law = scaling.fit(SIZES.tolist(), updates)

    def width(size, **options):
        low, middle, high = law.interval(size, **options)
        assert low < middle == law(size) < high
        return np.log(high / low)

    assert width(32, num_seeds=1) > 1.2 * width(32, num_seeds=100)
    assert width(32, confidence=0.5) < 0.6 * width(32)
    # A fit alone would be as certain of S(1), a constant times S(4), as of S(4).
    assert width(1) > 1.15 * width(4)
    assert width(4096) > 1.15 * width(256)
    np.testing.assert_allclose(np.asarray(law.interval([4, 512])).T, [law.interval(4), law.interval(512)])


def test_pilots_that_disobey_the_law_widen_it():
    exact = 20 * (1 + 60 / SIZES)[:, None] * np.ones(3)
    off = exact * np.asarray([1.0, 1.5, 1.0])[:, None]
    law = scaling.fit(SIZES.tolist(), off)
    prior = scaling.MODEL_RESIDUALS * scaling.MODEL_ERROR**2
    assert law.model_error == pytest.approx(np.sqrt((prior + (law.residuals**2).sum()) / law.freedom))
    assert law.model_error > 1.5 * scaling.fit(SIZES.tolist(), exact).model_error


def test_seed_error_is_the_standard_deviation_of_logs():
    logs = np.asarray([[0.0, 0.2], [0.1, 0.5]])
    law = scaling.fit([1, 2], np.exp(5 + logs))
    assert law.seed_error == pytest.approx(np.sqrt((0.02 + 0.08) / 2))
    assert scaling.fit([1, 2], np.exp(5 + logs[:, :1])).seed_error == 0


@pytest.mark.parametrize(
    ("sizes", "updates", "message"),
    [
        ([8, 8], [[1.0], [2.0]], "two different"),
        ([8], [[1.0]], "two different"),
        ([8, 9], [[1.0], [np.inf]], "positive and finite"),
        ([8, 9], [[1.0], [0.0]], "positive and finite"),
        ([8, 9], [1.0, 2.0], r"updates of shape \(2,\) must be \[2, S\]"),
        ([8, 9], [[1.0, 2.0, 3.0]], r"updates of shape \(1, 3\) must be \[2, S\]"),
    ],
)
def test_what_no_law_can_be_fitted_to_is_refused(sizes, updates, message):
    with pytest.raises(ValueError, match=message):
        scaling.fit(sizes, np.asarray(updates))


def test_the_pareto_set_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    points = rng.integers(0, 5, size=(30, 2)).astype(float)  # with ties
    points[0] = np.inf

    def beaten(point):
        return any((other <= point).all() and (other < point).any() for other in points)

    on = scaling.pareto(*points.T)
    np.testing.assert_array_equal(on, [not beaten(point) for point in points])
    assert 0 < on.sum() < 30
