import json

import jax
import numpy as np
import pytest

from gdjax import claims, compare, datasets, plots, problems, records


@pytest.fixture(scope="module")
def problem():
    return problems.logistic(datasets.gaussian_classification(jax.random.key(0), num_examples=48, dimension=3))


@pytest.fixture(scope="module")
def rows(problem):
    return compare.compare(problem, batch_sizes=(1, 5, 48), num_epochs=4, num_seeds=2)


def test_every_batch_size_sees_the_same_stream_less_a_last_incomplete_batch(rows):
    assert [(row.name, row.batch_size) for row in rows] == [("stochastic", 1), ("mini-batch", 5), ("batch", 48)]
    assert [(row.num_updates, row.num_examples) for row in rows] == [(192, 192), (38, 190), (4, 192)]
    assert [row.examples_seen[-1] for row in rows] == [192, 190, 192]
    assert all(row.losses.shape == (2, len(row.examples_seen)) for row in rows)


def test_every_batch_size_starts_from_the_same_parameters(rows):
    np.testing.assert_allclose([row.losses[:, 0] for row in rows], np.log(2), rtol=1e-12)


def test_the_final_loss_is_that_of_a_run_written_by_hand(problem, rows):
    """B = N from zero parameters, where neither stream nor initialisation matters."""
    row = rows[2]
    x, y = map(np.asarray, problem.train)
    weight, bias = np.zeros(3), 0.0
    for _ in range(4):
        error = 1 / (1 + np.exp(-(x @ weight + bias))) - y
        weight, bias = weight - row.learning_rate * error @ x / 48, bias - row.learning_rate * error.mean()
    logits = x @ weight + bias
    expected = np.mean(np.logaddexp(0, logits) - y * logits)
    np.testing.assert_allclose(row.losses[:, -1], expected, rtol=1e-10)
    test_x, test_y = map(np.asarray, problem.test)
    accuracy = np.mean((test_x @ weight + bias > 0) == (test_y == 1))
    np.testing.assert_allclose(row.metrics["accuracy"][:, -1], accuracy, rtol=1e-12)


def test_the_chosen_rate_has_the_lowest_loss_and_its_history_is_kept(rows):
    for row in rows:
        best = np.argmin(row.tuning_losses)
        assert row.learning_rate == row.learning_rates[best]
        np.testing.assert_allclose(row.losses[:, -1].mean(), row.tuning_losses[best], rtol=1e-12)


def test_gradient_noise_is_the_variance_of_the_update_over_its_squared_mean(problem, rows):
    x, y = map(np.asarray, problem.train)
    grads = np.column_stack([(0.5 - y)[:, None] * x, 0.5 - y])
    mean = grads.mean(0)
    expected = np.sum((grads - mean) ** 2, axis=1).mean() / np.sum(mean**2)
    np.testing.assert_allclose(rows[0].gradient_noise, expected, rtol=1e-10)
    assert rows[2].gradient_noise < 1e-25
    # Batches of 5 without replacement: (1/5) (48 - 5)/(48 - 1) of that on average.
    many = jax.vmap(lambda key: compare.gradient_noise(problem, 5, problem.train, key, key))
    sampled = np.asarray(many(jax.random.split(jax.random.key(1), 400)))
    error = sampled.std(ddof=1) / np.sqrt(len(sampled))
    np.testing.assert_allclose(sampled.mean(), expected / 5 * 43 / 47, atol=4 * error)


def parabola(center):
    """Return losses that are lowest at the rate `center`, and infinite above 30 times it."""
    return lambda rates: np.where(rates > 30 * center, np.nan, (np.log10(rates) - np.log10(center)) ** 2)


@pytest.mark.parametrize("center", [1e-8, 1e-4, 0.05, 3.0, 700.0])
def test_the_grid_grows_until_its_best_rate_is_inside(center):
    calls = []

    def losses_at(rates):
        calls.append(len(rates))
        return parabola(center)(rates)

    found = compare.tune(losses_at, np.asarray(compare.LEARNING_RATES))
    best = compare.best_rate(found)
    assert min(found) < best < max(found)
    assert abs(np.log10(best / center)) <= 0.25 + 1e-9
    assert set(calls) == {8}
    steps = np.diff(np.log10(list(found)))
    np.testing.assert_allclose(steps, 0.5)


def test_where_every_rate_diverges_smaller_ones_are_tried():
    found = compare.tune(lambda rates: np.where(rates > 1e-4, np.inf, rates), np.asarray(compare.LEARNING_RATES))
    assert compare.best_rate(found) < 1e-4


def test_a_given_rate_is_not_tuned():
    assert compare.tune(lambda rates: rates, np.asarray([0.5]), grow=False) == {0.5: 0.5}


def test_a_diverged_run_is_reported_as_diverged():
    data = datasets.gaussian_regression(jax.random.key(0), num_examples=16, dimension=2)
    linear = problems.least_squares(data)
    rows = compare.compare(linear, batch_sizes=(1, 16), learning_rate=1e6, num_epochs=40, num_seeds=2)
    assert [row.num_diverged for row in rows] == [2, 2]
    text = records.to_json([row.summary() for row in rows])
    assert json.loads(text)[0]["train_loss"] is None
    assert claims.judge(rows) == []
    plots.comparison(rows, "diverged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": (0,)}, "batch_size=0 must be between 1 and N=48"),
        ({"batch_sizes": (-3,)}, "batch_size=-3 must be"),
        ({"batch_sizes": (49,)}, "batch_size=49 must be between 1 and N=48"),
        ({"batch_sizes": (4, 4)}, r"batch_sizes=\(4, 4\) must be different"),
        ({"batch_sizes": ()}, r"batch_sizes=\(\) must be"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be positive"),
        ({"num_epochs": 0}, "num_epochs=0 must be at least 1"),
        ({"num_seeds": 0}, "num_seeds=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_compiles(problem, arguments, message):
    stages = []
    with pytest.raises(ValueError, match=message):
        compare.compare(problem, progress=stages.append, **arguments)
    assert stages == []


def test_default_batch_sizes_fit_the_data():
    assert compare.default_batch_sizes(1440) == (1, 32, 1440)
    assert compare.default_batch_sizes(32) == (1, 32)
    assert compare.default_batch_sizes(7) == (1, 7)
    assert compare.default_batch_sizes(1) == (1,)


def row(name, batch_size, **changes):
    """A row of numbers made up so that every claim of the textbook holds, before `changes`."""
    num_updates = 96 // batch_size
    values = {
        "num_updates": num_updates,
        "num_examples": 96,
        "num_epochs": 2.0,
        "learning_rate": 0.1,
        "learning_rates": [0.1],
        "tuning_losses": [0.1],
        "at_edge": False,
        "examples_seen": np.asarray([0, 48, 96]),
        "losses": np.asarray([[1.0, 0.5, 0.1]] * 3) * (0.9 if name == "batch" else 1),
        "metrics": {"accuracy": np.asarray([[0.1, 0.5, 0.9], [0.1, 0.5, 0.901], [0.1, 0.5, 0.899]])},
        "metrics_on": "test",
        "gradient_noise": 10.0 / batch_size,
        "seconds": 1.0 / batch_size,
        "compile_seconds": 0.1,
        "flops_per_gradient": 100.0 if batch_size == 1 else 80.0 * batch_size,
        "memory_per_gradient": 100 * batch_size,
        "sweep_seconds": 1.0,
        "num_runs": 3,
    }
    return compare.Row(name=name, batch_size=batch_size, **(values | changes))


ROWS = {"stochastic": 1, "mini-batch": 8, "batch": 48}


def judged(**changes):
    """Judge the three made-up rows; `changes` maps a name to the fields to change in that row."""
    rows = [row(name, size, **changes.get(name.replace("-", "_"), {})) for name, size in ROWS.items()]
    return {claim.claim: claim.verdict for claim in claims.judge(rows)}


def test_every_claim_can_be_agreed_with():
    verdicts = judged()
    assert len(verdicts) == 8
    assert set(verdicts.values()) == {"agrees"}


LOWER = np.asarray([[0.1, 0.5, 0.80]] * 3)
NOISY = np.asarray([[0.1, 0.5, 0.95], [0.1, 0.5, 0.85], [0.1, 0.5, 0.9]])


@pytest.mark.parametrize(
    ("changes", "claim", "verdict"),
    [
        ({"mini_batch": {"num_updates": 96}}, "fewer updates", "disagrees"),
        ({"mini_batch": {"flops_per_gradient": 800.0}}, "less calculation", "disagrees"),
        ({"mini_batch": {"flops_per_gradient": None}}, "less calculation", "cannot tell"),
        ({"mini_batch": {"metrics": {"accuracy": LOWER}}}, "end performance", "disagrees"),
        ({"mini_batch": {"metrics": {"accuracy": NOISY}}}, "end performance", "cannot tell"),
        ({"stochastic": {"gradient_noise": 1.0}}, "noisier", "disagrees"),
        ({"stochastic": {"seconds": 1e-3}}, "takes longer", "disagrees"),
        ({"stochastic": {"losses": np.asarray([[1.0, 0.05, 0.04]] * 3)}}, "less progress", "disagrees"),
        ({"stochastic": {"memory_per_gradient": 10**6}}, "limited computing power", "disagrees"),
        ({"batch": {"losses": np.asarray([[1.0, 1.5, 0.04]] * 3)}}, "falls at every update", "disagrees"),
    ],
)
def test_every_claim_can_come_out_the_other_way(changes, claim, verdict):
    verdicts = judged(**changes)
    assert [found for name, found in verdicts.items() if claim in name] == [verdict]


def test_a_claim_needs_the_rows_it_speaks_of():
    assert {claim.claim.split(":")[0] for claim in claims.judge([row("batch", 48)])} == {"Batch"}
    assert claims.judge([row("mini-batch", 8)]) == []
