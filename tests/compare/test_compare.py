import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest

from gdjax import _files, batching, compare, gradients, problems, tuning
from gdjax.problem import Problem
from gdjax.problems import datasets, models


@pytest.fixture(scope="module")
def problem():
    return problems.logistic(datasets.gaussian_classification(jax.random.key(0), num_examples=48, dimension=3))


@pytest.fixture(scope="module")
def rows(problem):
    return compare.batch_sizes(problem, (1, 5, 48), num_epochs=4, num_seeds=2)


def test_every_batch_size_sees_the_same_stream_less_a_last_incomplete_batch(rows):
    assert [(row.name, row.batch_size) for row in rows] == [("stochastic", 1), ("mini-batch", 5), ("batch", 48)]
    assert [(row.num_updates, row.num_examples) for row in rows] == [(192, 192), (38, 190), (4, 192)]
    assert [row.examples_seen[-1] for row in rows] == [192, 190, 192]
    assert all(row.losses.shape == (2, len(row.examples_seen)) for row in rows)


@pytest.fixture(scope="module")
def drawn():
    """A problem whose parameters are drawn, so that seeds and keys make a difference."""
    data = datasets.gaussian_classification(jax.random.key(0), num_examples=24, dimension=3)
    return problems.classification(models.mlp((3, 4, 2)), data, num_classes=2)


@pytest.fixture(scope="module")
def drawn_rows(drawn):
    return compare.batch_sizes(drawn, sizes=(1, 7), learning_rate=0.1, num_epochs=3, num_seeds=2, seed=5)


def test_every_batch_size_starts_from_the_same_parameters_one_draw_for_each_seed(drawn_rows):
    stochastic, mini = (row.losses[:, 0] for row in drawn_rows)
    precision.assert_close(mini, stochastic, rtol=1e-12)
    assert stochastic[0] != stochastic[1]


@pytest.mark.slow
def test_every_run_is_that_of_a_loop_over_the_stream_of_its_seed(drawn, drawn_rows):
    """The keys are those that `compare` documents, whatever B is; evaluation is every N // B updates and at the end."""
    mean_loss = jax.jit(lambda params, data: jax.vmap(drawn.loss, (None, 0))(params, data).mean())
    gradient = jax.jit(jax.grad(mean_loss))
    init_keys, stream_keys = (jax.random.split(key, 2) for key in jax.random.split(jax.random.key(5)))
    evaluated = {1: [0, 24, 48, 72], 7: [0, 21, 42, 63, 70]}
    for row in drawn_rows:
        np.testing.assert_array_equal(row.examples_seen, evaluated[row.batch_size])
        for seed, (init_key, stream_key) in enumerate(zip(init_keys, stream_keys, strict=True)):
            params = drawn.init(init_key)
            stream = batching.reshuffled(stream_key, 24, num_epochs=3)
            losses = {0: mean_loss(params, drawn.train)}
            for end in range(row.batch_size, 73, row.batch_size):
                grad = gradient(params, batching.take(drawn.train, stream[end - row.batch_size : end]))
                params = jax.tree.map(lambda weight, g: weight - 0.1 * g, params, grad)
                losses[end] = mean_loss(params, drawn.train)
            precision.assert_close(row.losses[seed], [losses[i] for i in row.examples_seen.tolist()], rtol=1e-9)


@pytest.mark.slow
def test_without_test_examples_metrics_are_of_the_training_examples_and_named_so():
    data = datasets.gaussian_classification(jax.random.key(0), num_examples=16, dimension=3)
    [row] = compare.batch_sizes(
        problems.logistic(data._replace(test=None)), sizes=(16,), learning_rate=0.1, num_epochs=1
    )
    x, y = map(np.asarray, data.train)
    # From zero, the first update goes along the mean of x (y - 1/2), and only the sign of the logit matters.
    weight, bias = (y - 0.5) @ x, (y - 0.5).sum()
    accuracy = np.mean((x @ weight + bias > 0) == (y == 1))
    assert row.summary()["train_accuracy"] == pytest.approx(accuracy)
    assert row.summary()["test_accuracy"] is None


@pytest.mark.slow
def test_a_best_rate_at_the_edge_is_reported_as_such(rows):
    assert not any(row.at_edge for row in rows)
    # The mean of -w x has no minimum: the larger the rate, the lower the loss.
    unbounded = Problem(lambda key: jnp.zeros(()), lambda w, x: -w * x, jnp.ones(4))
    [tuned] = compare.batch_sizes(unbounded, sizes=(4,), num_epochs=1, num_seeds=1)
    assert (tuned.learning_rate, tuned.at_edge) == (max(tuned.learning_rates), True)
    [given] = compare.batch_sizes(unbounded, sizes=(4,), num_epochs=1, num_seeds=1, learning_rate=0.5)
    assert not given.at_edge


@pytest.mark.slow
def test_a_row_reports_the_time_of_its_updates(problem):
    plan = compare.plan(problem, (48,), learning_rate=0.1, num_epochs=3, num_seeds=1)
    slow = dataclasses.replace(plan, speeds=(plan.speeds[0]._replace(seconds_per_update=100.0),))
    [row] = compare.batch_sizes(problem, planned=slow)
    assert row.seconds == 300
    assert 0 < row.compile_seconds < 1e4


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
    precision.assert_close(row.losses[:, -1], expected, rtol=1e-10)
    test_x, test_y = map(np.asarray, problem.test)
    accuracy = np.mean((test_x @ weight + bias > 0) == (test_y == 1))
    precision.assert_close(row.metrics["accuracy"][:, -1], accuracy, rtol=1e-12)


def test_the_chosen_rate_has_the_lowest_loss_and_its_history_is_kept(rows):
    for row in rows:
        best = np.argmin(row.tuning_losses)
        assert row.learning_rate == row.learning_rates[best]
        precision.assert_close(row.losses[:, -1].mean(), row.tuning_losses[best], rtol=1e-12)


@pytest.mark.slow
def test_gradient_noise_is_the_variance_of_the_update_over_its_squared_mean(problem, rows):
    x, y = map(np.asarray, problem.train)
    grads = np.column_stack([(0.5 - y)[:, None] * x, 0.5 - y])
    mean = grads.mean(0)
    expected = np.sum((grads - mean) ** 2, axis=1).mean() / np.sum(mean**2)
    precision.assert_close(rows[0].gradient_noise, expected, rtol=1e-10)
    assert rows[2].gradient_noise < (32 * precision.EPS) ** 2
    # Batches of 5 without replacement: (1/5) (48 - 5)/(48 - 1) of that on average.
    gradient = gradients.mean(problem.loss)
    many = jax.vmap(lambda key: compare.gradient_noise(problem, gradient, 5, problem.train, key, key))
    sampled = np.asarray(many(jax.random.split(jax.random.key(1), 400)))
    error = sampled.std(ddof=1) / np.sqrt(len(sampled))
    np.testing.assert_allclose(sampled.mean(), expected / 5 * 43 / 47, atol=4 * error)


@pytest.mark.parametrize(("dtype", "unit"), [("float32", 1e-20), ("float32", 1e18), ("float16", 10.0)])
def test_gradient_noise_is_the_same_in_any_unit_and_dtype(dtype, unit):
    """One batch a time of 4 examples, against numpy in float64."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (8, 3), jnp.float32))
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        loss = lambda w, x: 100 * unit * 0.5 * jnp.sum((w.astype(jnp.float32) - x) ** 2)  # noqa: E731
        problem = Problem(lambda key: jnp.full(3, 0.5, dtype), loss, jnp.asarray(x))
        key = jax.random.key(1)
        found = compare.gradient_noise(problem, gradients.mean(loss), 4, problem.train, key, key)
        order = np.asarray(batching.reshuffled(key, 8, num_epochs=1)).reshape(2, 4)
    grads = 0.5 - x.astype(float)
    errors = ((grads[order].mean(1) - grads.mean(0)) ** 2).sum(1)
    np.testing.assert_allclose(
        found, errors.mean() / (grads.mean(0) ** 2).sum(), rtol=1e-2 if dtype == "float16" else 1e-4
    )


def test_a_given_rate_is_not_tuned(problem):
    [row] = compare.batch_sizes(problem, (48,), learning_rate=0.5, num_epochs=1, num_seeds=1)
    assert (row.learning_rates, row.num_runs, row.at_edge) == ([0.5], 1, False)


@pytest.mark.usefixtures("nans")
@pytest.mark.slow
def test_a_diverged_run_is_reported_as_diverged():
    data = datasets.gaussian_regression(jax.random.key(0), num_examples=16, dimension=2)
    linear = problems.least_squares(data)
    rows = compare.batch_sizes(linear, sizes=(1, 16), learning_rate=1e6, num_epochs=40, num_seeds=2)
    assert [row.num_diverged for row in rows] == [2, 2]
    text = _files.to_json([row.summary() for row in rows])
    assert json.loads(text)[0]["train_loss"] is None
    assert compare.judge(rows) == []
    compare.comparison(rows, "diverged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": (0,)}, "batch_size=0 must be between 1 and N=48"),
        ({"sizes": (-3,)}, "batch_size=-3 must be"),
        ({"sizes": (49,)}, "batch_size=49 must be between 1 and N=48"),
        ({"sizes": (4, 4)}, r"batch_sizes=\(4, 4\) must be different"),
        ({"sizes": ()}, r"batch_sizes=\(\) must be"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be positive"),
        ({"num_epochs": 0}, "num_epochs=0 must be at least 1"),
        ({"num_seeds": 0}, "num_seeds=0 must be at least 1"),
        ({"num_seeds": 10**9}, "num_seeds=1000000000 must be at least 1 and at most"),
        ({"budget": 0.0}, "budget=0.0 must be positive and finite"),
        ({"memory": -1.0}, "memory=-1.0 must be positive and finite"),
        ({"optimizer": "rms"}, "optimizer='rms' is not one of sgd, momentum, nesterov, adam"),
    ],
)
def test_bad_arguments_are_refused_before_anything_compiles(problem, arguments, message):
    stages = []
    with pytest.raises(ValueError, match=message):
        compare.batch_sizes(problem, progress=lambda *stage: stages.append(stage), **arguments)
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
        "num_noise": 48,
        "extrapolated": False,
        "microbatch_size": None,
        "seconds": 1.0 / batch_size,
        "compile_seconds": 0.1,
        "flops_per_gradient": 100.0 if batch_size == 1 else 80.0 * batch_size,
        "memory_per_gradient": 100 * batch_size,
        "sweep_seconds": 1.0,
        "num_runs": 3,
    }
    return compare.Row(name=name, batch_size=batch_size, **(values | changes))


def test_a_summary_adds_final_values_over_seeds_and_rates():
    summary = row("mini-batch", 8, seconds=0.5).summary()
    assert summary["num_updates"] == 12
    assert summary["microseconds_per_update"] == pytest.approx(1e6 * 0.5 / 12)
    assert summary["examples_per_second"] == pytest.approx(96 / 0.5)
    assert (summary["train_loss"], summary["test_accuracy"]) == pytest.approx((0.1, 0.9))
    # deviations -0.001, 0 and 0.001 over three seeds: sqrt(2e-6 / 2)
    assert (summary["train_loss_std"], summary["test_accuracy_std"]) == pytest.approx((0, 0.001))


def test_the_figure_shows_the_median_loss_against_examples_updates_and_seconds():
    losses = np.asarray([[1.0, 0.5, 0.1], [1.0, 0.6, 0.2], [1.0, 0.9, 0.9]])
    figure = compare.comparison([row("batch", 48), row("mini-batch", 8, seconds=3.0, losses=losses)], "title")
    median = [1.0, 0.6, 0.2]
    expected = {
        "examples seen (thousands)": [(0, 0.048, 0.096), median],
        "updates": [(6, 12), median[1:]],  # zero has no place on a logarithmic axis
        "seconds on this device": [(1.5, 3.0), median[1:]],
    }
    assert [axis.get_xlabel() for axis in figure.axes] == list(expected)
    for axis, points in zip(figure.axes, expected.values(), strict=True):
        line = axis.lines[1]
        assert line.get_label() == "mini-batch, B = 8"
        precision.assert_close(line.get_xydata(), np.transpose(points), rtol=1e-12)


ROWS = {"stochastic": 1, "mini-batch": 8, "batch": 48}


def judged(**changes):
    """Judge the three made-up rows; `changes` maps a name to the fields to change in that row."""
    rows = [row(name, size, **changes.get(name.replace("-", "_"), {})) for name, size in ROWS.items()]
    return {claim.claim: claim.verdict for claim in compare.judge(rows)}


def test_every_claim_can_be_agreed_with():
    verdicts = judged()
    assert len(verdicts) == 8
    assert set(verdicts.values()) == {"agrees"}


def test_the_predicted_ratio_of_noise_is_that_of_sampling_from_a_finite_set():
    """tr Sigma (N - B) / (N - 1) / B at N = 48: the ratio of B = 1 to B = 8 is 8 * 47 / 40."""
    evidence = {claim.claim: claim.evidence for claim in compare.judge([row("stochastic", 1), row("mini-batch", 8)])}
    assert "sampling theory says 9.4" in evidence["Stochastic: updates are noisier"]


LOWER = np.asarray([[0.1, 0.5, 0.80]] * 3)
HIGHER = np.asarray([[0.1, 0.5, 0.99]] * 3)
# Paired differences of 0.009, 0.007 and 0.008, whose interval is 0.008 ± 4.303 * 0.001 / sqrt(3): it ends above 0.01,
# and below it with the quantile of a one-sided interval, 2.920.
BORDERLINE = np.asarray([[0.1, 0.5, 0.909], [0.1, 0.5, 0.908], [0.1, 0.5, 0.907]])
NOISY = np.asarray([[0.1, 0.5, 0.95], [0.1, 0.5, 0.85], [0.1, 0.5, 0.9]])


@pytest.mark.parametrize(
    ("changes", "claim", "verdict"),
    [
        ({"mini_batch": {"num_updates": 96}}, "fewer updates", "disagrees"),
        ({"mini_batch": {"flops_per_gradient": 800.0}}, "less calculation", "disagrees"),
        # 760 * 6 against 100 * 48 operations: 5 % less is not less
        ({"mini_batch": {"flops_per_gradient": 760.0}}, "less calculation", "disagrees"),
        ({"mini_batch": {"flops_per_gradient": None}}, "less calculation", "cannot tell"),
        ({"mini_batch": {"metrics": {"accuracy": LOWER}}}, "end performance", "disagrees"),
        ({"mini_batch": {"metrics": {"accuracy": HIGHER}}}, "end performance", "disagrees"),
        ({"mini_batch": {"metrics": {"accuracy": BORDERLINE}}}, "end performance", "cannot tell"),
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
    assert {claim.claim.split(":")[0] for claim in compare.judge([row("batch", 48)])} == {"Batch"}
    assert compare.judge([row("mini-batch", 8)]) == []


@pytest.fixture(scope="module")
def speeds():
    """Of updates that take a millisecond, and a microsecond more for each example."""
    return {size: 1e-3 + 1e-6 * size for size in (1, 32, 10_000)}


def planned(speeds, monkeypatch, **options):
    """Return the plan for 10,000 examples where updates take so long."""
    data = jnp.ones((10_000, 1))
    problem = Problem(lambda key: jnp.zeros(()), lambda w, x: (w - x[0]) ** 2, data)
    known = [tuning.Speed(size, seconds) for size, seconds in speeds.items()]
    monkeypatch.setattr(tuning, "speeds", lambda *arguments, **named: known)
    return compare.plan(problem, tuple(speeds), **options)


@pytest.mark.slow
def test_a_plan_fits_its_budget_and_says_so(speeds, monkeypatch):
    """At B = 1 an epoch takes 10 s: 64 of them with 24 runs would be hours."""
    plan = planned(speeds, monkeypatch, budget=600.0)
    assert plan.seconds <= 600
    assert 1 <= plan.num_epochs < 64
    assert "64 epochs would take" in f"{plan}"
    assert f"{plan.num_epochs:.3g} epochs of" in f"{plan}"
    longer = planned(speeds, monkeypatch, budget=6000.0)
    assert (longer.num_epochs, longer.num_seeds) > (plan.num_epochs, plan.num_seeds)
    assert longer.seconds <= 6000


def test_fewer_runs_would_not_make_compilation_shorter(speeds, monkeypatch):
    fast = {size: 1e-6 * seconds for size, seconds in speeds.items()}
    plan = planned(fast, monkeypatch, budget=8.0)
    assert (plan.num_epochs, plan.num_seeds, len(plan.learning_rates)) == (64, 3, 8)
    assert (plan.skipped, plan.shortened) == ({}, False)
    assert plan.seconds > 8


def test_what_is_asked_for_is_done_whatever_it_takes(speeds, monkeypatch):
    plan = planned(speeds, monkeypatch, budget=60.0, num_epochs=20, num_seeds=7)
    assert (plan.num_epochs, plan.num_seeds, plan.num_examples) == (20, 7, 200_000)
    assert plan.seconds > 60
    assert "min" in f"{plan}" or "h" in f"{plan}"


def test_where_less_than_an_epoch_fits_the_full_batch_is_left_out_with_the_reason(speeds, monkeypatch):
    slow = {size: 100 * seconds for size, seconds in speeds.items()}
    plan = planned(slow, monkeypatch, budget=600.0)
    assert plan.num_epochs < 1
    assert [speed.batch_size for speed in plan.speeds] == [1, 32]
    assert plan.skipped.keys() == {10_000}
    assert "B = 10000 is left out: one update takes 1.1 s" in f"{plan}"


def test_rows_that_are_known_are_not_run_again_and_every_row_is_kept(problem, rows):
    kept = []
    again = compare.batch_sizes(problem, (1, 5, 48), num_epochs=4, num_seeds=2, done=rows[:2], keep=kept.append)
    assert again[0] is rows[0]
    assert again[1] is rows[1]
    assert kept == again[2:]
    np.testing.assert_array_equal(again[2].losses, rows[2].losses)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_taken_in_pieces_and_gives_the_same_row():
    data = datasets.gaussian_classification(jax.random.key(0), num_examples=256, dimension=3)
    problem = problems.classification(models.mlp((3, 64, 2)), data, num_classes=2)
    options = {"learning_rate": 0.1, "num_epochs": 2, "num_seeds": 1}
    [whole] = compare.batch_sizes(problem, (256,), **options)
    [pieces] = compare.batch_sizes(problem, (256,), memory=50_000.0, **options)
    assert whole.microbatch_size is None
    assert 1 <= pieces.microbatch_size < 256
    precision.assert_close(pieces.losses, whole.losses, rtol=1e-9)
    assert pieces.memory_per_gradient < whole.memory_per_gradient
