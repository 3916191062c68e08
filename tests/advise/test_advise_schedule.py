"""A plan of batch sizes: the fit of the twin and the search of ways against exact recursions, and what users see."""

import itertools
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gdjax import advise, batching, problems, tuning
from gdjax.advise import _fitted, _pilot, _plan, _schedule, _verify, _ways
from gdjax.advise._fitted import Curve, Fitted
from gdjax.advise._plan import Plan, Run, Times
from gdjax.advise._tunings import Clock
from gdjax.advise._ways import Bounds, Way
from gdjax.problem import Problem
from gdjax.tuning import Target

H = 3 / jnp.arange(1.0, 31.0)
LEVEL = 0.2


def loss_of(rates, sizes):
    """Return losses by a loop of NumPy: s_i' = (1 - x)^2 s_i + eta^2 / B h_i (0.4 + 0.3 sum h s)."""
    h, second, losses = np.asarray(H), np.asarray(1 / H**0.5), []
    for rate, size in zip(rates, sizes, strict=True):
        second = (1 - rate * h) ** 2 * second + rate**2 / size * h * (0.4 + 0.3 * h @ second)
        losses.append(LEVEL + h @ second / 2)
    return np.asarray(losses)


@pytest.fixture(scope="module")
def twin():
    """Fitted to four runs of least squares with noise that shrinks in part."""
    curves = []
    for rate, size in ((0.1, 8), (0.3, 8), (0.3, 64), (0.55, 64)):
        updates = np.unique(np.geomspace(1, 150, 20).astype(int))
        curves.append(Curve(rate, size, updates, loss_of(np.full(150, rate), np.full(150, size))[updates - 1]))
    return _fitted.fitted(curves, start=LEVEL + float(H @ (1 / H**0.5)) / 2, target=TARGET)


@pytest.mark.parametrize(
    ("rates", "sizes"),
    [
        (np.full(200, 0.2), np.full(200, 16)),
        (np.linspace(0.5, 0.0, 150), np.full(150, 16)),
        (np.full(150, 0.3), np.repeat([8, 32, 128], 50)),
    ],
)
def test_the_fitted_twin_predicts_runs_that_it_has_not_seen(twin, rates, sizes):
    assert 0.348 < twin.error < 0.37  # of curves that were left out: 1.645 x 0.3 x sqrt(4 / (4 + 4)) and their own
    np.testing.assert_allclose(twin.losses(rates, sizes)[10:], loss_of(rates, sizes)[10:], rtol=0.08)


def exact_twin():
    h = np.asarray(H)
    return Fitted(h, 1 / h**0.5, 0.4 * h, 0.3 * h, LEVEL, 0.05, 150, 0.3)


BOUNDS = Bounds((8, 16, 32, 64, 128), lambda size: 0.5, lambda size: 1e-3 + 1e-4 * size, 400)
TARGET = 0.5


@pytest.fixture(scope="module")
def ways():
    return _ways.plan(exact_twin(), TARGET, BOUNDS, num_phases=2)


def test_every_way_that_is_planned_reaches_the_target_in_its_bounds(ways):
    assert list(ways) == list(_ways.KINDS)
    for some in ways.values():
        firsts = [way.schedule[0][1] for way in some]
        assert len(firsts) == len(set(firsts))
    for kind, way in ((kind, way) for kind, some in ways.items() for way in some):
        sizes = np.repeat([size for _, size in way.schedule], [count for count, _ in way.schedule])
        shares = 1 - np.arange(way.num_updates) / way.num_updates if way.decays else np.ones(way.num_updates)
        losses = loss_of(way.learning_rate * shares, sizes)
        assert losses[-1] < TARGET * 1.02, (kind, way)
        until = 1 + int(np.argmax(losses <= max(TARGET, losses.min())))
        assert until > 0.79 * way.num_updates if way.decays else until > 0.93 * way.num_updates, (kind, way)
        assert set(sizes) <= set(BOUNDS.sizes)
        assert way.learning_rate <= (1.0 if way.decays else 0.5) * (1 + 1e-9)
        assert (np.diff(sizes) >= 0).all()
        assert kind in ("ramp", "both") or len(way.schedule) == 1
        seconds = sum(BOUNDS.seconds_per_update(size) for size in sizes[:until])
        # Two of some 25 updates; where a rate falls, it may arrive before what is its end for another length.
        assert 0.92 < way.seconds[1] / seconds < (1.25 if way.decays else 1.08), (kind, way)
        assert way.seconds[0] < way.seconds[1] < way.seconds[2]


@pytest.mark.parametrize("decays", [False, True])
def test_runs_of_the_twin_in_pieces_end_and_arrive_where_single_updates_do(decays):
    sizes, num_updates = np.asarray([[8, 16, 64], [16, 16, 32]]), 1500
    columns = {"rates": np.asarray([0.4, 0.2]), "shares": np.asarray([[0.1, 0.92], [0.75, 0.85]]), "sizes": sizes}
    excess, share = 0.012, np.arange(num_updates) / num_updates
    found = zip(*_ways._runs(exact_twin(), columns | {"costs": 1e-3 * sizes}, num_updates, excess, decays), strict=True)
    arrived = []
    for rate, (first, second), (a, b, c), (end, updates, seconds) in zip(*columns.values(), found, strict=True):
        each = np.where(share < first, a, np.where(share < second, b, c))
        exact = loss_of(rate * (1 - share) if decays else np.full(num_updates, rate), each) - LEVEL
        np.testing.assert_allclose(end, exact[-1], rtol=0.01)
        arrived.append(bool((exact <= excess).any()))
        if arrived[-1]:
            until = 1 + int(np.argmax(exact <= excess))
            np.testing.assert_allclose([updates, seconds], [until, 1e-3 * each[:until].sum()], rtol=0.02)
        else:
            assert np.isinf([updates, seconds]).all()
    assert any(arrived)


@pytest.mark.parametrize(("left", "seeds"), [(1e4, 3), (130.0, 1), (70.0, 0), (10.0, 0)])
def test_effort_follows_the_time_that_is_left(ways, left, seeds):
    slow = {kind: [way._replace(seconds=(1.0, 2.0, 4.0)) for way in some] for kind, some in ways.items()}
    slow["ramp"] = [way._replace(seconds=(0.5, 1.5, 3.0)) for way in slow["ramp"]]
    slow["decay"] = [way._replace(seconds=(0.5, 1.9, 3.0)) for way in slow["decay"]]
    times = Times.of([8, 32], [1e-4, 1e-4])
    run, effort, unknown = _schedule._affordable(slow, times, 1.0, left)
    assert effort.seeds == seeds
    assert run[:2] == ["ramp", "constant"]  # what the others are compared with
    assert len(run) == 4
    assert len(unknown) == (seeds < 3)


def test_the_constant_way_is_the_fastest_of_all(ways):
    least = np.inf
    for size, rate in itertools.product(BOUNDS.sizes[:3], 0.5 * _ways.RATES[:4]):  # where it is
        losses = loss_of(np.full(400, rate), np.full(400, size))
        if (losses <= TARGET).any():
            least = min(least, (1 + int(np.argmax(losses <= TARGET))) * BOUNDS.seconds_per_update(size))
    np.testing.assert_allclose(ways["constant"][0].seconds[1], least, rtol=0.06)


def test_a_target_that_an_update_reaches_is_planned_with_one_by_every_way():
    twin = exact_twin()
    first = float(twin.losses(np.full(1, BOUNDS.highest_rate(8)), np.full(1, 8.0))[0])
    planned = _ways.plan(twin, 1.001 * first, BOUNDS, num_phases=2)
    assert {kind: some[0].num_updates for kind, some in planned.items()} == dict.fromkeys(_ways.KINDS, 1)


def test_a_target_below_the_floor_is_refused_and_the_floor_is_said():
    with pytest.raises(ValueError, match=r"target=0.15 is below .* whose floor is 0.2: ask for less"):
        _ways.plan(exact_twin(), 0.15, BOUNDS._replace(sizes=(8, 16), max_updates=40))


def test_the_cost_of_an_update_is_a_line_or_the_table():
    times = Times.of([4, 16, 64], [1e-3 + 1e-4 * size for size in (4, 16, 64)])
    np.testing.assert_allclose([times.per_update, times.per_example], [1e-3, 1e-4], rtol=1e-6)
    assert times.fits
    np.testing.assert_allclose(times.until([(10, 4), (5, 16)], 12.5), 10 * 1.4e-3 + 2.5 * 2.6e-3, rtol=1e-6)
    bent = Times.of([4, 16, 64], [1e-3, 1e-3, 64e-3])
    assert not bent.fits
    assert bent.residual > 0.2
    np.testing.assert_allclose([bent(4), bent(32), bent(128)], [1e-3, 8e-3, 128e-3], rtol=1e-6)


def found(seconds):
    """Return a plan whose ways took so long."""
    schedule = {"constant": ((10, 8),), "both": ((6, 8), (3, 32))}
    ways = {kind: Way(kind, parts, 0.5, 0.4, (1.0, 2.0, 3.0)) for kind, parts in schedule.items()}
    runs = {kind: Run(ways[kind], np.asarray([9.0, 9.5, 9.2]), np.asarray(seconds[kind])) for kind in seconds}
    times = Times.of([8, 32], [0.1, 0.2])
    return Plan(Target("loss", "train", "<=", 0.4), ways, runs, exact_twin(), (), times, (), (), 1.0)


def test_a_plan_is_a_list_and_a_schedule_for_optax():
    plan = found({"constant": [3.0, 3.1, 3.2], "both": [2.0, 2.1, 2.05]})
    assert (plan.best, plan.schedule, plan.ramp()) == ("both", [(6, 8), (3, 32)], [(0, 8), (48, 32)])
    np.testing.assert_allclose([plan.learning_rate(t) for t in (0, 3, 9, 12)], [0.5, 0.5 * 2 / 3, 0, 0], atol=1e-7)
    state = optax.sgd(plan.learning_rate).init(jnp.zeros(()))
    update, _ = optax.sgd(plan.learning_rate).update(jnp.ones(()), state)
    assert np.asarray(update) == -0.5


def test_the_verdict_says_whether_a_difference_is_one():
    clear = found({"constant": [3.0, 3.1, 3.2], "both": [2.0, 2.1, 2.05]}).sentence()
    assert "constant takes 1.51 x (" in clear
    assert "noise" not in clear
    assert "holds what was measured of 1 of 2" in clear  # 3.1 s is outside 1 to 3
    assert "foreseen a difference of none" in clear  # both were planned to take 2 s
    assert "within the noise of the seeds" in found({"constant": [2.0, 3.0, 2.0], "both": [2.2, 1.9, 2.1]}).sentence()
    assert "nothing was run" in found({}).sentence()


@pytest.mark.parametrize(
    ("constant", "best"),
    [
        ([2.03, 2.1, 2.1], "constant"),  # 1 % slower, as the noise is, and simpler
        ([2.06, 2.16, 2.11], "both"),  # 3 % slower for sure
        ([1.5, 3.2, 2.1], "both"),  # nothing is sure, and 11 % slower
        ([1.9, 2.0, 1.95], "constant"),
    ],
)
def test_of_ways_that_seeds_do_not_tell_apart_the_simplest_that_is_not_slower_is_best(constant, best):
    both = [2.0, 2.1, 2.05]
    assert found({"constant": constant, "both": both}).best == best
    low, mean, high = _plan.ratio(*(found({"constant": x}).runs["constant"] for x in ([*constant, 9.0], both)))
    np.testing.assert_allclose(mean, np.prod(np.divide(constant, both)) ** (1 / 3))  # of the seeds of both
    assert low < mean < high


def test_a_seed_that_does_not_arrive_counts_what_it_was_given():
    way, times = Way("constant", ((10, 8),), 0.5, 0.4, (1.0, 2.0, 3.0)), Times.of([8, 32], [0.1, 0.2])
    run = _plan.counted(way, np.asarray([9.0, np.inf, 12.0]), times)
    np.testing.assert_allclose(run.updates, [9, 40, 12])
    np.testing.assert_allclose(run.seconds, [0.9, 4, 1.2], rtol=1e-6)
    assert run.missed == 1
    assert not run.arrives  # with a third of the seeds
    other = _plan.counted(way._replace(kind="both"), np.asarray([80.0, 70.0, 90.0]), times)
    assert _plan.best_of({"constant": run, "both": other._replace(missed=0)}) == "both"  # slower, but there
    assert _plan.best_of({"constant": run}) == "constant"


@pytest.mark.parametrize(
    ("planned", "claims"), [(2.0, {}), (1.7, {}), (5.0, {"constant": True}), (0.5, {"constant": False})]
)
def test_a_difference_is_foreseen_beyond_the_error_of_rates_twin_and_seeds_only(planned, claims):
    plan = found({"constant": [3.0, 3.1, 3.2], "both": [2.0, 2.1, 2.05]})
    plan.ways["constant"] = plan.ways["constant"]._replace(seconds=(0.1, planned, 9.0))
    low, middle, high = plan.foreseen("constant")
    assert middle == planned / 2  # seconds of both
    seeds = 2.920 * np.std(np.log([3.0 / 2.0, 3.1 / 2.1, 3.2 / 2.05]), ddof=1) / 3**0.5  # Student's, of two degrees
    rates = 1.645 * np.log(1.26) * (2 / 12) ** 0.5  # two of a uniform distribution over a step of the grid
    np.testing.assert_allclose(np.log(high / middle), np.sqrt(seeds**2 + rates**2 + 0.3**2), rtol=1e-3)
    np.testing.assert_allclose(low * high, middle**2)
    assert plan.claims() == claims
    assert ("rightly" in plan.sentence()) == (claims == {"constant": True})


def test_the_error_of_a_ratio_is_without_what_runs_have_in_common(monkeypatch):
    slow, none = Fitted(np.asarray([0.1 / 1.5]), np.asarray([30.0]), *2 * [np.zeros(1)], 0.0, 0.0, 0, 0.0), 0.0
    monkeypatch.setattr(_fitted, "_fit", lambda *_: slow)  # every run takes 1.5 times what it did
    updates = np.arange(1, 1000)
    curves = [Curve(rate, 8, updates, (1 - 0.1 * rate) ** (2 * updates)) for rate in (0.01, 0.02, 0.03, 0.04)]
    twin = _fitted.fitted(curves, start=1.0, target=0.5)
    for error, own in ((twin.error, np.log(1.5)), (twin.ratio_error, none)):
        np.testing.assert_allclose(error, 1.645 * np.sqrt((4 * 0.3**2 + 4 * (1.4826 * own) ** 2) / 8), rtol=0.05)


def checking():
    """Return how ways of 8, 16 or 32 examples are checked, for want of a problem by what is put in its place."""
    clock = Clock(time.perf_counter(), 60.0, 10**9, lambda *_: None)
    times, key = Times.of([8, 32], [1.0, 1.0]), jax.random.key(0)
    return _verify.Check(None, None, None, times, (8, 16, 32), 0.0, _verify.Effort(3, 2, 9), key, clock)


def test_climbing_finds_the_rate_length_and_batch_size_that_are_fastest():
    class Bowl(_verify.Check):
        def over(self, way, num_seeds, key, ends):
            size, length = way.schedule[0][1], way.num_updates
            away = np.log(way.learning_rate / 0.5) ** 2 + np.log(length / 400) ** 2 + np.log(size / 16) ** 2
            return lambda rates: SimpleNamespace(costs=np.full((1, num_seeds), 50 * (1 + away)))

    check = Bowl(*checking())
    for start in (
        Way("decay", ((200, 8),), 0.1, 0.4, (1.0, 2.0, 3.0)),
        Way("decay", ((600, 32),), 1.0, 0.4, (1, 2, 3)),
    ):
        way, tried = _verify._climbed(check, start, check.key, time.perf_counter() + 60)
        assert tried
        assert abs(np.log(way.learning_rate / 0.5)) < 0.24
        assert abs(np.log(way.num_updates / 400)) < 0.15
        assert way.schedule[0][1] == 16
    way, tried = _verify._climbed(check, start, check.key, 0.0)  # no time for another
    assert (way, tried) == (start, False)


@pytest.mark.slow
def test_a_rate_falls_by_its_row():
    problem, key = problems.least_squares(), jax.random.key(0)
    search = _pilot.searching(problem, optax.sgd, tuning.Budget(640), fall=0.1)
    found = search(np.asarray([0.1]), batch_size=64, num_seeds=1, key=key)
    init_key, stream_key = jax.random.split(key)
    params = problem.init(jax.random.split(init_key, 1)[0])
    order = np.asarray(batching.reshuffled(jax.random.split(stream_key, 1)[0], 1024, length=640)).reshape(10, 64)
    loss = jax.grad(lambda params, batch: jax.vmap(problem.loss, (None, 0))(params, batch).mean())
    for i, rows in enumerate(order):
        grads = loss(params, batching.take(problem.train, rows))
        params = jax.tree.map(lambda p, g, i=i: p - 0.1 * (1 - i / 10) * g, params, grads)
    np.testing.assert_allclose(found.costs[0, 0], problem.evaluate(params, problem.train)["loss"], rtol=1e-5)
    np.testing.assert_array_equal(found.learning_rates, [0.1])


def test_more_seeds_go_to_what_may_be_the_best(monkeypatch):
    ways = {kind: Way(kind, ((12, 8),), 0.5, 0.4, (1.0, 2.0, 3.0)) for kind in ("constant", "ramp", "decay")}
    rounds = {"constant": [10.0, 30.0, 30.0, 30.0], "ramp": [11.0, 11.0, 11.0, 11.0], "decay": [30.0]}  # lucky at first
    spread = np.linspace(0.5, 1.5, 9)
    times = Times.of([8, 32], [1.0, 1.0])

    def fresh(check, way, wanted, ends):
        slow = 1.0 if way.learning_rate == 0.5 else 9.0
        updates = [rounds[way.kind][i] * slow * (spread if way.kind == "constant" else spread[::-1]) for i in wanted]
        return np.where(np.isclose(updates, 11.0), np.inf, updates).reshape(-1)  # who is in the middle does not arrive

    runs = {kind: _plan.counted(way, fresh(None, way, range(1), 0), times) for kind, way in ways.items()}
    runs["ramp"] = _plan.counted(ways["ramp"], 11.0 * spread[::-1], times)
    assert _plan.best_of(runs) == "constant"
    monkeypatch.setattr(_verify, "_fresh", fresh)
    settled = _verify._settled(checking(), runs)
    assert {kind: len(run.updates) for kind, run in settled.items()} == {
        "constant": 27,
        "ramp": 27,
        "decay": 9,
    }  # then it is settled
    assert _plan.best_of(settled) == "ramp"
    assert settled["ramp"].missed == 2
    assert settled["ramp"].way == ways["ramp"]  # a rate of which all arrive is slower still


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("accuracy>=0.9", {}, "must be of the training loss"),
        ("loss<=0.1", {"num_phases": 7}, "phases=7 must be 2 or 3"),
        ("loss<=0.1", {"seconds": 0}, "budget=0 seconds must be positive"),
        ("loss<=0.1", {"optimizer": lambda rate, num_updates: optax.sgd(rate)}, "its own schedule of the rate is in"),
    ],
)
def test_bad_input_is_refused_at_once(target, options, message):
    with pytest.raises(ValueError, match=message):
        advise.schedule(problems.digits_mlp(), target, **options)


@pytest.mark.slow
def test_few_examples_and_a_pilot_that_diverges_are_refused():
    few = Problem(lambda key: jnp.ones(()), lambda w, x: 0.5 * (w - x) ** 2, jnp.ones(20))
    with pytest.raises(ValueError, match="has 20 examples: a schedule takes at least 64"):
        advise.schedule(few, "loss<=0.1")
    steep = Problem(lambda key: jnp.ones(()), lambda w, x: 1e30 * jnp.exp(w * x), jnp.ones(64))
    with pytest.raises(ValueError, match="the pilot diverges at all learning rates from"):
        advise.schedule(steep, "loss<=1e-3", seconds=60)


@pytest.mark.slow
@pytest.mark.nightly  # the smoke of ramp_or_decay makes such a plan
def test_a_schedule_of_least_squares_is_predicted_and_run():
    plan = advise.schedule(problems.least_squares(), "loss<=0.02", seconds=90)
    assert set(plan.ways) == set(plan.runs) == set(_ways.KINDS)
    assert plan.twin.error < 0.6
    for kind, run in plan.runs.items():
        assert len(run.updates) in [effort.fresh * i for effort in _verify.EFFORTS for i in range(1, 9)]
        assert np.isfinite(run.updates).all()
        assert run.way.kind == kind
    least = min(run.seconds.mean() for run in plan.runs.values())
    assert plan.runs[plan.way.kind].seconds.mean() <= 1.03 * least
    assert jax.tree.leaves(plan.summary())


def test_a_pilot_whose_share_went_into_compilation_has_another_go(monkeypatch):
    deadlines = []

    def search_grid(search, rates, *, max_examples, deadline):
        size = search.keywords["batch_size"]
        deadlines.append((size, deadline - clock.began))
        # Runs are seen neither the first time, nor at the second batch size.
        updates, losses = ([0, 4, 8], [2.0, 1.0, 0.5]) if len(deadlines) == 2 else ([0], [2.0])
        history = SimpleNamespace(updates=np.asarray(updates), values=np.resize(losses, (len(rates), 1, len(losses))))
        return SimpleNamespace(learning_rates=rates, batch_size=size, rate=rates[0], history=history)

    monkeypatch.setattr(tuning, "search_grid", search_grid)
    clock = Clock(time.perf_counter() - 30.0, 90.0, 10**9, lambda *_: None)  # a third is gone: more than its share
    found, curves, start = _pilot.pilots(problems.least_squares(), lambda *_: None, 0.1, jax.random.key(0), clock)
    assert (list(found), start, len(curves)) == ([16], 2.0, 5)
    np.testing.assert_allclose([share for size, share in deadlines if size == 16], [0.22 * 90, 0.4 * 90])
