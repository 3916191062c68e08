import dataclasses
import itertools
import math
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest

from gdjax import batching, descent, gradients, problems, tuning
from gdjax.problem import Problem
from gdjax.problems import datasets
from gdjax.tuning import Budget, Target, Tuning, _speed

LATE = 2.0  # a rate that takes so many times the updates of the best one is not waited for


@pytest.fixture(scope="module")
def classes():
    """A problem with test examples and a metric."""
    data = datasets.gaussian_classification(jax.random.key(0), num_examples=20, dimension=3)
    return problems.logistic(data)


def same(metrics):
    """Return w^2 / 2 as the loss of every example: at any batch size, w <- (1 - learning_rate) w."""
    return Problem(lambda key: jnp.ones(()), lambda w, x: 0.5 * x * w**2, jnp.ones(16), metrics=metrics)


def search(problem, optimizer, target, *, num_runs=0, **options):
    return partial(tuning.searching(problem, optimizer, target, num_runs=num_runs), **options)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("loss<=0.05", ("loss", "train", "<=", 0.05)),
        (" test_loss <= 5e-2 ", ("loss", "test", "<=", 0.05)),
        ("accuracy>=0.95", ("accuracy", "test", ">=", 0.95)),
        ("train_accuracy>=1", ("accuracy", "train", ">=", 1.0)),
    ],
)
def test_a_target_is_read_and_written(classes, text, target):
    read = tuning.parse_target(text, classes)
    assert read == Target(*target)
    assert tuning.parse_target(f"{read}", classes) == read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss<0.05", "is not of the form 'loss<=0.05'"),
        ("0.05", "is not of the form"),
        ("loss<=low", "'low' is not a finite number"),
        ("loss<=nan", "'nan' is not a finite number"),
        ("los<=1", "no metric 'los'; it has train_loss, train_accuracy, test_loss, test_accuracy"),
    ],
)
def test_what_is_no_target_is_refused_by_name(classes, text, message):
    with pytest.raises(ValueError, match=message):
        tuning.parse_target(text, classes)


def test_without_test_examples_metrics_are_of_the_training_examples():
    problem = same({"size": lambda w, x: w})
    assert tuning.parse_target("size<=1", problem).on == "train"
    with pytest.raises(ValueError, match="it has train_loss, train_size"):
        tuning.parse_target("test_size<=1", problem)


def test_updates_to_a_target_are_those_of_the_closed_form(key):
    """w_t = (1 - eta)^t, so the loss reaches v where (1 - eta)^2t = v / (1 / 2)."""
    target = Target("loss", "train", "<=", 1e-4)
    run = search(same({}), optax.sgd, target, batch_size=5, num_seeds=2, key=key)
    rates = np.asarray([0.01, 0.035, 0.045, 0.06, 3.0])
    found = run(rates, max_examples=100_000)
    exact = math.log(2e-4) / (2 * np.log(1 - rates[:4]))
    np.testing.assert_allclose(found.costs[2:4], np.repeat(exact[2:, None], 2, axis=1), rtol=0.025)
    assert np.isinf(found.costs[[0, 1, 4]]).all()  # not beside the best, and never
    late = run(rates[[0, 3]], max_examples=100_000)
    assert np.isinf(late.costs[0]).all()  # over twice the updates of the best
    np.testing.assert_array_equal(found.diverged[:4], False)
    assert (found.best, found.found, found.at_edge) == (3, True, False)
    assert 0 <= found.best_metrics[3] <= 1e-4 < found.best_metrics[0] < 0.5
    only = run(rates[2:4], max_examples=100_000, late=1.0)
    assert np.isinf(only.costs[0]).all()
    assert not run(rates[2:3], max_examples=100_000, least=exact[2] / LATE / 1.1).found
    assert run(rates[2:3], max_examples=100_000, least=exact[2] / LATE * 1.1).found
    # Not before a lane has arrived, and as it stands, where the examples or the clock end first.
    assert run(rates, max_examples=50).found is False
    late = run(rates, max_examples=10**9, deadline=time.perf_counter() - 1)
    assert (late.found, late.best_metrics.tolist()) == (False, [0.5] * 5)


def test_the_loss_after_a_budget_is_that_of_the_closed_form(key):
    """40 examples at B = 5 are 8 updates, and w_8 = (1 - eta)^8."""
    run = search(same({}), optax.sgd, Budget(43), batch_size=5, num_seeds=2, key=key)
    rates = np.asarray([0.1, 0.3, 1e30])
    found = run(rates)
    np.testing.assert_allclose(found.costs[:2], np.repeat(0.5 * (1 - rates[:2, None]) ** 16, 2, axis=1), rtol=1e-6)
    assert np.isinf(found.costs[2]).all()
    assert found.diverged.tolist() == [[False] * 2, [False] * 2, [True] * 2]
    assert not run(rates, deadline=time.perf_counter() - 1).found
    below = Problem(lambda key: jnp.ones(()), lambda w, x: x * w - 9, jnp.ones(16))
    negative = search(below, optax.sgd, Budget(43), batch_size=5, num_seeds=1, key=key)(np.asarray([0.01]))
    np.testing.assert_allclose(negative.losses, [-8 - 8 * 0.01], rtol=1e-6)
    assert negative.optimum()[0] == 0.01


def test_a_target_that_is_met_at_the_start_is_refused(key):
    run = search(same({}), optax.sgd, Target("loss", "train", "<=", 0.5), batch_size=4, num_seeds=1, key=key)
    with pytest.raises(ValueError, match=r"target=train_loss<=0.5 is met before any update, at 0.5: ask for more"):
        run(np.asarray([0.1]), max_examples=100)


@pytest.mark.usefixtures("replays")
@pytest.mark.slow
def test_every_run_is_that_of_its_seed_and_rate(key):
    """Against `descent.run` on the streams that `search` documents; runs that are not used change nothing."""
    data = datasets.gaussian_classification(jax.random.key(0), num_examples=20, dimension=3)
    base = problems.logistic(data)
    problem = Problem(
        lambda key: {"weight": 0.1 * jax.random.normal(key, (3,)), "bias": jnp.zeros(())},
        base.loss, base.train, base.test, base.metrics,
    )  # fmt: skip
    target, rates, evaluated = Target("loss", "test", "<=", 0.5), np.asarray([0.05, 0.1]), [0]
    momentum = partial(optax.sgd, momentum=0.9)
    found = search(problem, momentum, target, batch_size=3, num_seeds=2, key=key)(
        rates, max_examples=900, progress=lambda updates, metric: evaluated.append(updates)
    )

    @jax.jit
    def losses(init_key, stream_key, rate):
        method = descent.method(gradients.mean(problem.loss), momentum(rate))
        stream = batching.reshuffled(stream_key, 20, length=900)

        def record(state, info):
            return jax.vmap(problem.loss, (None, 0))(state.params, problem.test).mean()

        start = method.init(problem.init(init_key))
        return record(start, None), descent.run(method, start, problem.train, batching.batches(stream, 3), record)[1]

    assert np.isfinite(found.costs).all()
    for seed, keys in enumerate(zip(*(jax.random.split(k, 2) for k in jax.random.split(key)), strict=True)):
        for i, rate in enumerate(rates):
            values = np.r_[losses(*keys, rate)][evaluated]
            end = int(np.argmax(values <= target.value))
            part = (target.value - values[end - 1]) / (values[end] - values[end - 1])
            before, after = evaluated[end - 1], evaluated[end]
            expected = np.exp((1 - part) * np.log(before) + part * np.log(after)) if before else part * after
            assert found.costs[i, seed] == pytest.approx(expected, rel=1e-6)
    padded = search(problem, momentum, target, num_runs=8, batch_size=3, num_seeds=2, key=key)(rates, max_examples=900)
    precision.assert_close(padded.costs, found.costs, rtol=1e-9)


def test_an_accuracy_does_not_hide_a_divergence(key):
    """Parameters that are infinite are on the right side of the target, and not there."""
    problem = same({"far": lambda w, x: (jnp.abs(w) > 0.9 * precision.LARGEST).astype(float)})
    target = Target("far", "train", ">=", 0.5)
    far = precision.LARGEST**0.8  # infinite after two updates
    run = search(problem, lambda rate: optax.sgd(far * rate), target, batch_size=16, num_seeds=1, key=key)
    found = run(np.asarray([1.0, 2.0]), max_examples=16 * 50)
    assert found.diverged.all()
    assert not found.found


def test_evaluated_examples_are_all_or_a_draw_that_does_not_change():
    few, many = (Problem(lambda key: 0.0, lambda w, x: w * x, jnp.arange(float(n)), jnp.ones(3)) for n in (9, 5000))
    np.testing.assert_array_equal(tuning.evaluation_examples(few, "train"), few.train)
    some = np.asarray(tuning.evaluation_examples(many, "train"))
    assert len(set(some.tolist())) == 2048
    np.testing.assert_array_equal(tuning.evaluation_examples(many, "train"), some)
    np.testing.assert_array_equal(tuning.evaluation_examples(many, "test"), np.ones(3))


def test_a_crossing_lies_between_two_evaluations():
    before, after = np.asarray([[1.0, 1.0, np.nan, 0.2]]), np.asarray([[0.0, 0.5, 0.3, 0.3]])
    target, active = Target("loss", "train", "<=", 0.5), np.asarray([[True, True, True, False]])
    for start, crossed in ((0, 4), (2, 4)):  # half way from 0 to 8, and half way from 2 to 8, in logarithms
        costs = np.full((1, 4), np.inf)
        target.note(costs, active, (start, before), (8, after), ended=False)
        np.testing.assert_allclose(costs, [[crossed, 8, 8, np.inf]])


def test_a_run_that_arrives_before_the_first_look_is_looked_at_again(key):
    """From w = 1 at rate r, w = (1 - r)^t; at B = 1, an evaluation of 2000 examples is worth many updates."""
    problem = Problem(lambda key: jnp.ones(()), lambda w, x: 0.5 * x * w**2, jnp.ones(2000))
    run = search(problem, optax.sgd, Target("loss", "train", "<=", 0.05), batch_size=1, num_seeds=1, key=key)
    found = run(np.asarray([0.2, 0.3, 1.0]), max_examples=10**5)
    exact = math.log(0.1) / (2 * np.log([0.8, 0.7]))  # 5.2 and 3.2 updates, between looks after 4 and 8, 2 and 4
    np.testing.assert_allclose(found.costs[1, 0], exact[1], rtol=0.15)
    assert found.costs[2, 0] == 1.0  # and no less, though a line from the start crosses the target before


@pytest.mark.parametrize("part", ["loss", "gradient", "weighted", "test"])
def test_an_example_that_is_to_blame_before_any_update_is_named(key, part):
    x = jnp.ones(5000).at[jnp.asarray([17, 4000])].set(0.0)  # of 5000, 2048 are evaluated
    losses = {"loss": lambda w, x: (x * w) ** 2 / x, "gradient": lambda w, x: jnp.sqrt(x * w**2)}
    loss = losses.get(part, losses["loss"])
    if part == "weighted":
        problem = Problem(lambda key: jnp.ones(()), loss, x, weight=lambda x: x)
        assert tuning.tune(problem, batch_size=8, num_epochs=1, key=key, num_seeds=1).found
        return
    problem = Problem(lambda key: jnp.ones(()), loss, x)
    if part == "test":
        problem = Problem(lambda key: jnp.ones(()), loss, jnp.ones(9), test=x[:20])
    name = {"loss": "loss of train", "gradient": "gradient of train", "test": "loss of test"}[part]
    with pytest.raises(
        ValueError, match=rf"^the {name} example 17 is (nan|inf)( .and so for 1 others.)? before any up"
    ):
        tuning.tune(problem, batch_size=8, target=f"{part if part == 'test' else 'train'}_loss<=-1", key=key)


@pytest.mark.parametrize("scale", [1e-9, 1e-4])
def test_the_rate_is_found_however_the_loss_is_scaled(key, scale):
    """The best rate of x w^2 / 2 is 1 for x = 1."""
    problem = Problem(lambda key: jnp.ones(()), lambda w, x: 0.5 * scale * x * w**2, jnp.ones(16))
    found = tuning.tune(problem, batch_size=4, num_epochs=1, key=key, num_seeds=1)
    assert 0.5 < found.rate * scale < 2
    assert not found.at_edge


def test_the_search_climbs_until_it_hurts():
    """A bump of noise lies between the first grid and the best rate."""
    costs = {0.1: 150.0, 0.2: 100.0, 0.4: 105.0, 0.8: 110.0, 1.6: 70.0, 3.2: 80.0, 6.4: 500.0}
    found = tuning.search_grid(
        lambda rates, **limits: tuned(rates, [[costs[round(rate, 1)]] for rate in rates]), np.asarray([0.1, 0.2, 0.4])
    )
    assert found.rate == pytest.approx(1.6)
    np.testing.assert_allclose(found.learning_rates, list(costs))


def test_a_seed_that_goes_astray_makes_a_rate_infeasible():
    assert tuned([1, 2], [[100, 110, 310], [100, 100, 330]]).losses.tolist() == [520 / 3, math.inf]
    spent = dataclasses.replace(tuned([1], [[0.1, 0.1, 0.9]]), goal=Budget(8))
    np.testing.assert_allclose(spent.losses, [1.1 / 3])


TARGET = Target("loss", "train", "<=", 0.1)


def tuned(rates, updates, diverged=None, best_metrics=0.1):
    updates = np.asarray(updates, float)
    diverged = np.zeros(updates.shape, bool) if diverged is None else np.asarray(diverged)
    return Tuning(TARGET, 8, np.asarray(rates, float), updates, diverged, best_metrics * np.ones(len(updates)), 1.0)


def test_the_optimum_is_the_top_of_a_parabola_in_logarithms():
    rates = np.asarray([0.1, 0.2, 0.3, 0.5])
    updates = 50 * np.exp(0.7 * np.log(rates / 0.25) ** 2)[:, None] * np.asarray([0.9, 1.1])
    rate, best = tuned(rates, updates).optimum()
    assert rate == pytest.approx(0.25)
    np.testing.assert_allclose(best, [45, 55])


@pytest.mark.parametrize("updates", [[[5], [6], [7]], [[7], [5], [np.inf]], [[np.inf], [5], [9]], [[7], [5], [11]]])
def test_without_two_near_neighbours_the_optimum_is_the_best_rate(updates):
    found = tuned([1, 2, 4], updates)
    rate, best = found.optimum()
    assert (rate, best) == ([1, 2, 4][found.best], 5)


def fake(best_rate, *, cliff=math.inf, grids=None, reachable=True):
    """A search whose updates are a parabola about `best_rate`; rates above `cliff` diverge."""

    def run(rates, **limits):
        if grids is not None:
            grids.append(rates)
        updates = np.where(rates > cliff, np.inf, 100 * np.exp(np.minimum(0.3 * np.log(rates / best_rate) ** 2, 99)))
        updates = np.where(updates > LATE * updates.min(), np.inf, updates)
        if not reachable:
            updates[:] = np.inf
        return tuned(rates, updates[:, None] * np.ones(2), np.repeat((rates > cliff)[:, None], 2, 1), 1 / (1 + rates))

    return run


GRID = 10.0 ** np.arange(-2, 2)


@pytest.mark.parametrize("best_rate", [3e-7, 0.004, 0.2, 30.0, 4e4])
def test_rates_are_added_until_the_best_one_has_two_neighbours(best_rate):
    grids = []
    found = tuning.search_grid(fake(best_rate, grids=grids), GRID)
    assert found.found
    assert not found.at_edge
    assert abs(np.log10(found.learning_rates[found.best] / best_rate)) <= 0.5
    assert [len(grid) for grid in grids] == [4] + [1] * (len(grids) - 1)
    np.testing.assert_allclose(np.diff(np.log10(found.learning_rates)), 1)  # each rate once, ascending
    assert found.costs[:, 0].argmin() == found.best


def test_no_rate_is_waited_for_longer_than_the_best_so_far_allows():
    kept = []
    found = tuning.search_grid(lambda rates, **limits: kept.append(limits.get("least")) or fake(3e-4)(rates), GRID)
    assert kept[0] is None
    assert kept[1] == found.costs[found.learning_rates >= 0.009].min()
    assert kept[2] < kept[1]


def test_the_search_goes_below_rates_that_diverge():
    found = tuning.search_grid(fake(3e-6, cliff=1e-5), GRID)
    assert found.found
    assert not found.at_edge
    assert found.learning_rates[found.best] == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize(("cliff", "direction", "num_new"), [(0.0, -1, 4), (math.inf, 1, 1)])
def test_the_search_gives_up_in_the_end(cliff, direction, num_new):
    """Where everything diverges it goes down, where nothing arrives to where the nearest was, MAX_MOVES times."""
    grids = []
    found = tuning.search_grid(fake(1.0, cliff=cliff, grids=grids, reachable=False), GRID)
    assert not found.found
    assert [len(grid) for grid in grids] == [4] + [num_new] * 8
    assert all(direction * (b[0] - a[0]) > 0 for a, b in itertools.pairwise(grids))
    assert found.diverged.all() == (cliff == 0)


def test_where_the_nearest_rate_has_two_neighbours_nothing_is_left_to_try():
    grids = []
    found = tuning.search_grid(fake(1.0, cliff=0.5, grids=grids, reachable=False), GRID)
    assert (found.found, found.best, len(grids)) == (False, 1, 1)  # the nearest but for those that diverged


@pytest.mark.parametrize(("target", "best"), [(TARGET, 2), (Target("accuracy", "test", ">=", 0.9), 1)])
def test_the_nearest_rate_is_nearest_in_the_sense_of_the_target(target, best):
    found = Tuning(
        target, 8, GRID, np.full((4, 1), np.inf), np.zeros((4, 1), bool), np.asarray([0.4, 0.6, 0.3, np.nan]), 1
    )
    assert found.best == best


def test_the_search_ends_with_the_clock_and_keeps_what_arrived_before():
    grids = []
    found = tuning.search_grid(fake(1e9, grids=grids), GRID, deadline=time.perf_counter() - 1)
    assert (len(grids), found.at_edge) == (1, True)

    # The clock ends the second search before anything arrives.
    calls = iter([[[9], [8], [7], [6]], *[[[np.inf]]] * 9])
    found = tuning.search_grid(lambda rates, **limits: tuned(rates, next(calls)), GRID)
    assert found.costs[found.best] == 6
    assert not found.at_edge


def test_the_best_of_values():
    assert TARGET.best([np.nan, 0.2, 0.7]) == 0.2
    assert Target("accuracy", "test", ">=", 1.0).best([np.nan, 0.2, 0.7]) == 0.7
    assert math.isnan(TARGET.best([np.nan, np.inf]))


def test_what_a_tuning_says_of_itself_holds_its_tuning():
    grid = tuned([1, 2, 4], [[np.inf], [5], [7]])
    said = dataclasses.replace(tuned([2], [[4, 5, 6]]), tuning=grid).summary()
    assert (said["best_learning_rate"], said["tuning"]["best_learning_rate"], said["tuning"]["tuning"]) == (2, 2, None)
    assert said["costs"].tolist() == [[4, 5, 6]]


@pytest.mark.slow
def test_tune_is_the_search_of_what_it_is_asked(key):
    """w^2 / 2 from w = 1: at rate r, w = (1 - r)^t, so the best default rate about 0.2 is that nearest to 1."""
    tuned = tuning.tune(same({}), batch_size=4, num_epochs=1, key=key, num_seeds=2)
    assert tuned.rate == pytest.approx(0.2 * 10**0.75, rel=1e-6)
    np.testing.assert_allclose(tuned.losses[tuned.best], 0.5 * (1 - tuned.rate) ** 8, rtol=1e-5)
    assert not tuned.at_edge
    reached = tuning.tune(same({}), optax.sgd, batch_size=4, target="loss<=1e-4", key=key, learning_rates=(0.1, 0.2))
    assert reached.found
    assert 0.2 < reached.rate < 2
    with pytest.raises(ValueError, match="is met before any update"):
        tuning.tune(same({}), batch_size=4, target="loss<=1", key=key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give num_epochs=None or target=None, one of the two"),
        ({"num_epochs": 1, "target": "loss<=1"}, "one of the two"),
        ({"num_epochs": 1, "batch_size": 17}, "batch_size=17 must be between 1 and N=16"),
        ({"num_epochs": 1, "num_seeds": 0}, "num_seeds=0 must be at least 1"),
        ({"num_epochs": 1, "learning_rates": (0.1,)}, r"learning_rates=\[0.1\] must be at least two"),
        ({"num_epochs": 1, "learning_rates": (0.2, 0.1)}, "positive, finite and ascending"),
        ({"num_epochs": 1, "optimizer": "rms"}, "optimizer='rms' is not one of sgd, momentum, nesterov, adam"),
    ],
)
def test_tune_refuses_by_name(key, options, message):
    with pytest.raises(ValueError, match=message):
        tuning.tune(same({}), key=key, **{"batch_size": 4} | options)


def test_a_search_that_is_called_again_compiles_nothing(key):
    traces = []

    def loss(w, x):
        traces.append(x)
        return 0.5 * x * w**2

    problem = Problem(lambda key: jnp.ones(()), loss, jnp.ones(16))
    first = tuning.tune(problem, batch_size=4, num_epochs=2, key=key)
    count = len(traces)
    again = tuning.tune(problem, batch_size=4, num_epochs=2, key=key)
    assert len(traces) == count
    np.testing.assert_array_equal(first.costs, again.costs)


@pytest.fixture(scope="module")
def problem():
    return problems.least_squares(datasets.gaussian_regression(jax.random.key(0), num_examples=48, dimension=3))


def test_without_time_speed_is_in_proportion_to_the_examples(problem):
    first, *rest = tuning.speeds(problem, optax.sgd, [3, 6, 48], learning_rate=0.1, deadline=-math.inf)
    assert not first.extrapolated
    assert [speed.extrapolated for speed in rest] == [True, True]
    np.testing.assert_allclose([s.seconds_per_update / first.seconds_per_update for s in rest], [2, 16])
    assert all(speed.time_again is None for speed in rest)


def test_a_timed_run_takes_a_millisecond_for_its_call_costs_tens_of_microseconds(problem, monkeypatch):
    counts = []

    def per_update(program, arguments, num_updates):
        counts.append(num_updates)
        assert arguments[2].shape[0] == num_updates
        return 1e-7 * arguments[2].shape[1]  # seconds, in proportion to the examples

    monkeypatch.setattr(_speed, "_per_update", per_update)
    for _ in range(2):
        tuning.speeds(problem, optax.sgd, [3, 6, 48], learning_rate=0.4)
    # As many as 1024 examples are, times a power of 4 where the size before it is known to be fast.
    assert counts == 4 * [341, 170 * 16, 21 * 16]


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: out of memory", "INTERNAL: a bug"])
def test_what_does_not_fit_is_said_and_other_errors_are_not_hidden(problem, message):
    def failing(batch_size):
        def gradient(params, batch):
            if batch_size > 4:
                raise jax.errors.JaxRuntimeError(message)
            return gradients.mean(problem.loss)(params, batch)

        return gradient

    if "INTERNAL" in message:
        with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
            tuning.speeds(problem, optax.sgd, [4, 8], learning_rate=0.2, gradient=failing)
        return
    known = tuning.speeds(problem, optax.sgd, [4, 8, 16], learning_rate=0.3, gradient=failing)
    assert [speed.fits for speed in known] == [True, False, False]
    assert 0 < known[0].seconds_per_update < 1


@pytest.mark.slow
def test_gradients_that_do_not_fit_are_taken_in_pieces():
    """Every example needs 10,000 numbers beside the parameters: the sizes of the pieces bound them."""
    wide = Problem(lambda key: jnp.zeros(()), lambda w, x: jnp.sum(jnp.sin(w * x * jnp.arange(1e4))), jnp.ones(600))
    found = tuning.microbatch_sizes(wide, [1, 32, 600], memory=150 * 1e4 * 8)
    assert (found[1], found[32]) == (None, None)
    assert found[600] is not None
    assert 5 <= found[600] <= 150
    with pytest.raises(ValueError, match=r"memory=.* bytes: the gradient of one example needs .*: allow more"):
        tuning.microbatch_sizes(wide, [1, 32], memory=1e3)
    gradient = tuning.estimator(wide, found)
    whole = gradients.mean(wide.loss)(jnp.asarray(0.3), wide.train)
    precision.assert_close(gradient(600)(jnp.asarray(0.3), wide.train).grad, whole.grad, rtol=1e-9)


@pytest.mark.slow
def test_a_schedule_is_tuned_in_the_stream_of_one_run():
    """Every run is the loop over phases on the windows of its own stream, whatever the looks in between."""
    problem, schedule = problems.least_squares(), [(7, 8), (3, 32), (2, 16)]
    options = {"key": jax.random.key(2), "num_seeds": 2, "learning_rates": [0.1, 0.3, 0.9]}
    tuned = tuning.tune(problem, optax.sgd, schedule=schedule, num_epochs=184 / 1024, **options)
    init_key, stream_key = jax.random.split(options["key"])
    phases = batching.Phases.of(schedule)
    for seed, keys in enumerate(zip(jax.random.split(init_key, 2), jax.random.split(stream_key, 2), strict=True)):
        params = problem.init(keys[0])
        batches = phases.batches(batching.reshuffled(keys[1], 1024, length=184))
        method = descent.method(gradients.mean(problem.loss), optax.sgd(0.3))
        state, _ = descent.run(method, method.init(params), problem.train, batches)
        at = list(tuned.learning_rates).index(0.3)
        np.testing.assert_allclose(tuned.costs[at, seed], problem.evaluate(state.params)["loss"], rtol=1e-6)
    with pytest.raises(ValueError, match="give batch_size=8 or schedule="):
        tuning.tune(problem, optax.sgd, batch_size=8, schedule=schedule, num_epochs=1, **options)
    with pytest.raises(ValueError, match="batch_size=2000 must be between 1 and N=1024"):
        tuning.tune(problem, optax.sgd, schedule=[(1, 2000)], num_epochs=1, **options)
