"""Advice: its parts on choices made up, then one real run and every mistake, by the command in this process."""

import csv
import dataclasses
import json
import math
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from gdjax import advise, batching, commands, descent, gradients, noise, tuning
from gdjax.advise import _candidates, _race, _tunings
from gdjax.advise import _choices as choices
from gdjax.advise._goals import NUM_SEEDS, Reaching, Spending
from gdjax.problem import Problem
from gdjax.theory import scaling
from gdjax.tuning import Budget, Speed, Target, Tuning

TARGET = Target("loss", "train", "<=", 0.1)
REACHING = Reaching(TARGET)


def tuned(size, updates, *, rate=0.1):
    """Return a tuning with its best rate in the middle of three, the others of no use, 10 % spread over its seeds."""
    runs = np.full((3, 3), np.inf)
    runs[1] = updates * np.asarray([0.9, 1.0, 1.1])
    return Tuning(TARGET, size, rate * np.asarray([0.1, 1, 10]), runs, np.zeros((3, 3), bool), np.full(3, 0.1), 1.0)


def timed(sizes, *, fixed, fits=99):
    """Return speeds of updates that take `fixed` + B microseconds; only the first so many fit."""
    return [Speed(size, 1e-6 * (fixed + size), fits=i < fits, time_again=lambda: 0.0) for i, size in enumerate(sizes)]


def tuned_at(*sizes, critical=50):
    return {size: tuned(size, 20 * (1 + critical / size)) for size in sizes}


def predicted(speeds, law=None, rates=None, question=REACHING):
    law = law or scaling.fit([4, 256], np.asarray([[270.0], [24.0]]))
    return choices.predict(question, speeds, law, rates or scaling.fit_rates([4, 256], [0.1, 0.2]))


@pytest.mark.parametrize(
    ("num_examples", "sizes"), [(8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9]), (13, [1, 2, 4, 8, 13]), (16, [1, 2, 4, 8, 16])]
)
def test_candidates_are_the_powers_of_two_and_the_full_batch(num_examples, sizes):
    assert advise.default_batch_sizes(num_examples) == sizes


def test_nearest_is_in_ratio():
    assert choices.nearest([1, 16, 100], 30) == 16
    assert choices.nearest([1, 16, 100], 41) == 100


POWERS = [2**i for i in range(13)]


@pytest.mark.parametrize(
    ("found", "sizes", "fixed", "expected"),
    [
        ([32], POWERS, 30, 4),
        ([32, 4], POWERS, 30, 256),
        ([32, 4, 256], POWERS, 30, None),  # the fastest, near sqrt(30 * 50), lies between
        ([32, 4, 256], POWERS, 1e9, 2048),  # the fewest updates are the fastest
        ([32, 4, 256, 2048], POWERS, 1e9, 4096),
        ([32, 4, 256], POWERS, 0, 1),  # the fewest examples are the fastest
        ([16], POWERS[:5], 30, 2),  # nothing above the first
        ([16, 2], POWERS[:5], 30, None),
        ([16, 2], POWERS[:5], 0, 1),
        ([64], [64, 97, 1021], 30, 1021),  # nothing below it
        ([64, 512], [64, 97, 512, 4096], 1e9, 4096),
        ([32, 33], [32, 33], 30, None),
        ([32], [32], 30, None),
    ],
)
def test_the_next_tuning_is_beside_the_first_and_then_towards_the_fastest(found, sizes, fixed, expected):
    assert choices.next_tuning(REACHING, tuned_at(*found), timed(sizes, fixed=fixed)) == expected


def test_what_does_not_fit_is_neither_tuned_nor_advised():
    speeds = timed(POWERS, fixed=1e9, fits=8)
    assert choices.next_tuning(REACHING, tuned_at(32, 4), speeds) == 128
    assert choices.fastest(predicted(speeds)).batch_size == 128


def test_predictions_are_the_laws():
    law = scaling.fit([4, 32], np.asarray([[100.0, 120.0], [40.0, 50.0]]))
    rates = scaling.fit_rates([4, 32], [0.1, 0.2])
    [choice] = predicted(timed([8], fixed=30), law, rates)
    np.testing.assert_allclose(choice.updates, law.interval(8, num_seeds=NUM_SEEDS))
    np.testing.assert_allclose(choice.seconds, np.multiply(choice.updates, 38e-6))
    assert choice.learning_rate == pytest.approx(float(rates(8)))


@pytest.mark.parametrize(
    ("steps", "timed_again", "expected"),
    [
        (0, 13, [32, 16, 64, 1, 4096]),  # as predicted
        (2, 13, [32, 16, 64, 128, 256, 1, 4096]),  # four times larger
        (-9, 13, [32, 16, 8, 4, 2, 1, 4096]),
        (0, 6, [32, 16, 1]),  # what was not compiled cannot be timed anew
    ],
)
def test_the_fastest_its_neighbours_and_the_ends_are_verified(steps, timed_again, expected):
    speeds = timed(POWERS, fixed=30)
    speeds = [*speeds[:timed_again], *(speed._replace(time_again=None) for speed in speeds[timed_again:])]
    known = predicted(speeds)
    run, verified = [], {}
    law = scaling.fit([4, 256], np.asarray([[270.0], [24.0]]))
    while choice := choices.next_to_verify(choices.settled(known, verified, law), run):
        run.append(choice.batch_size)
        costs = 1 + abs(np.log2([choice.batch_size / 32]) - steps)
        verified[choice.batch_size] = choices.Verified(costs, 1.0)
    assert run == expected


def test_what_could_not_be_run_is_not_asked_for_again():
    known = predicted(timed(POWERS, fixed=30))
    assert choices.next_to_verify(known, [32, 16]).batch_size == 64
    law = scaling.fit([4, 256], np.asarray([[270.0], [24.0]]))
    never = choices.settled(known, {64: choices.Verified(np.asarray([np.inf]), 1.0)}, law)
    assert choices.next_to_verify(never, [32, 16, 64]).batch_size == 1


def test_what_was_measured_counts_before_what_was_predicted():
    choice = choices.Choice(REACHING, Speed(8, 2.0), 0.1, (80.0, 100.0, 125.0), expected=90.0)
    assert (choice.seconds, choice.expected_seconds) == ((160, 200, 250), 180)
    assert math.isnan(choice.measured_seconds)
    law = scaling.fit([4, 256], np.asarray([[270.0], [24.0]]))
    [run] = choices.settled([choice], {8: choices.Verified(np.asarray([120.0, 140.0]), 3.0)}, law)
    assert (run.measured_updates, run.measured_seconds, run.expected_seconds) == (130, 390, 390)
    assert not run.inside
    [run] = choices.settled([choice], {8: choices.Verified(np.asarray([120.0, 120.0]), 3.0)}, law)
    assert run.inside


def test_the_least_memory_is_the_smallest_batch_where_it_is_unknown():
    def least(*memory):
        speeds = [Speed(2**i, 1.0, memory=x) for i, x in enumerate(memory)]
        return choices.least_memory(predicted(speeds)).batch_size

    assert [least(None, None), least(7, 0), least(5, 3, None), least(4, 4)] == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("value", "relation", "easier"),
    [(0.1201, "<=", 0.13), (0.9549, ">=", 0.95), (-1.234, "<=", -1.2), (0.0, "<=", 0.0), (2.0, "<=", 2.0)],
)
def test_the_target_that_is_suggested_was_reached(value, relation, easier):
    assert Target("loss", "train", relation, 0.1).easier(value) == Target("loss", "train", relation, easier)


MODULE = """
import jax, jax.numpy as jnp, optax
from gdjax import problems
from gdjax.problems import datasets
from gdjax.problem import Problem
problem = problems.least_squares(datasets.gaussian_regression(jax.random.key(0), num_examples=48, dimension=3))
small = problems.least_squares(datasets.gaussian_regression(jax.random.key(0), num_examples=7, dimension=3))
# Its slope where it begins is infinite: no learning rate is small enough.
steep = Problem(lambda key: jnp.zeros(()), lambda w, x: x * (1 - jnp.sqrt(w)), jnp.ones(8))
# It is finite where it begins, and nowhere else.
wild = Problem(lambda key: jnp.zeros(()), lambda w, x: x * (1 + w + jnp.where(w == 0, 0.0, jnp.inf)), jnp.ones(8))
made = []
def heavy_ball(learning_rate):
    made.append(jnp.shape(learning_rate))
    return optax.sgd(learning_rate, momentum=0.5)
def broken(learning_rate):
    raise RuntimeError("no")
def wrong(learning_rate):
    return learning_rate
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Return a function that calls `gdjax advise` with arguments, in a folder of its own."""
    (tmp_path / "advised_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "advised_module", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["gdjax", "advise", *arguments])
        commands.main()

    return call


def strict(text):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.slow
def test_the_command_predicts_verifies_and_advises(command, monkeypatch, capsys, tmp_path):
    inner, kept = advise.batch_size, []
    monkeypatch.setattr(advise, "batch_size", lambda *args, **options: kept.append(inner(*args, **options)) or kept[0])
    command(
        *("--problem", "advised_module:problem", "--target", "loss<=0.02", "--batch-sizes", "4", "16", "full"),
        *("--optimizer", "advised_module:heavy_ball", "--budget", "100", "--out", "here", "--json", "-"),
        *("--cost", "3600"),
    )
    printed = capsys.readouterr()
    result = strict(printed.out)
    assert result == strict((tmp_path / "here" / "result.json").read_text())
    assert (tmp_path / "here" / "figure.png").stat().st_size > 10_000
    [found] = kept
    assert sys.modules["advised_module"].made

    assert found.unknown == ()
    assert list(found.tunings) == [48, 4]  # 48 is the nearest to 32
    assert [choice.batch_size for choice in found.choices] == [4, 16, 48]
    assert all(choice.verified.costs.shape == (NUM_SEEDS,) for choice in found.choices)
    pick = found[found.batch_size]
    assert pick.measured_seconds <= 1.5 * min(choice.measured_seconds for choice in found.choices)
    assert found.refitted == any(not choice.inside for choice in found.choices)
    expected = [(choice.measured_seconds, choice.measured_updates * choice.batch_size) for choice in found.choices]
    on = [not any((a < x and b <= y) or (a <= x and b < y) for a, b in expected) for x, y in expected]
    assert list(found.pareto) == [choice.batch_size for choice, kept in zip(found.choices, on, strict=True) if kept]
    assert found.fewest_examples == min(found.choices, key=lambda c: c.measured_updates * c.batch_size).batch_size

    # What was measured is what `search` measures, at the rate predicted, with seeds that no tuning had.
    fresh = jax.random.split(jax.random.key(0), 3)[1]
    problem = sys.modules["advised_module"].problem
    search = tuning.searching(problem, sys.modules["advised_module"].heavy_ball, found.goal)
    rate = np.asarray([found[16].learning_rate])
    again = search(rate, batch_size=16, num_seeds=3, key=fresh, max_examples=10**5)
    np.testing.assert_allclose(found[16].verified.costs, again.costs[0], rtol=1e-9)

    with open(tmp_path / "here" / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["batch_size"]) for row in rows if row["advised"] == "True"] == [found.batch_size]
    for row, choice in zip(rows, found.choices, strict=True):
        assert [float(row[name]) for name in ("updates_low", "updates", "updates_high")] == list(choice.updates)
    assert f"At 3600 an hour a run costs {pick.expected_seconds:.3g}" in printed.err
    table = printed.err.splitlines()
    assert table[0].split()[:2] == ["B", "rate"]
    assert [line.split()[0] for line in table[1:4]] == ["4", "16", "48"]
    assert found.sentence().startswith(f"Use batch size {pick.batch_size} (learning rate {found.learning_rate:.2g}")
    # The rate advised is among the best of three or more about the predicted one, with the same seeds and then more.
    at = list(found.tuned.learning_rates)
    np.testing.assert_allclose(found.tuned.costs[at.index(pick.learning_rate)], pick.verified.costs)
    assert 0 < found.tuned.best < len(at) - 1
    i = at.index(found.learning_rate)
    assert i <= found.tuned.best
    with np.errstate(invalid="ignore"):  # of a rate that does not arrive
        judged = found.tuned.costs.mean(1) + found.tuned.costs.std(1, ddof=1)
    assert judged[i] <= 1.06 * np.nanmin(judged)
    assert 10 <= len(found.race.costs) <= 100
    np.testing.assert_array_equal(found.race.costs[:NUM_SEEDS], found.tuned.costs[i])
    said = f"reached by {len(found.race.costs)} of {len(found.race.costs)} seeds"
    assert said in found.sentence()
    elsewhere = [dataclasses.replace(choice, verified=None) for choice in found.choices]  # the race runs others too
    assert said in dataclasses.replace(found, choices=tuple(elsewhere)).sentence()
    np.testing.assert_allclose(np.diff(np.log2(at)), 0.5)
    assert result["learning_rate"] == found.learning_rate
    assert found.sentence() in " ".join(printed.err.split())
    assert [row["measured_updates"] for row in result["choices"]] == [c.measured_updates for c in found.choices]
    assert len(found.noise_scales) == 3


@pytest.mark.slow
def test_a_dry_run_says_what_would_be_done_and_trains_nothing(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(advise, "batch_size", None)
    command("--problem", "advised_module:problem", "--target", "loss<=0.02", "--budget", "77", "--dry-run")
    printed = capsys.readouterr().out
    assert "N = 48, train_loss<=0.02, in 77 s at most" in printed
    assert "B = 1, 2, 4, 8, 16, 32, 48" in printed
    assert "Largest gradient in one piece: B = 48." in printed
    assert os.listdir(tmp_path) == ["advised_module.py"]


def test_with_a_budget_the_fastest_within_the_interval_of_the_least_loss_is_best():
    law = scaling.fit_losses([4, 32, 256], np.asarray([[1.0, 1.1], [1.0, 1.1], [2.0, 2.2]]), num_examples=4096)
    known = predicted(timed(POWERS, fixed=30), law, question=Spending(Budget(4096)))
    assert [choice.updates[1] for choice in known[:3]] == [4096, 2048, 1024]
    # Student's t of 2 degrees, over sqrt(3), times the deviation of the logarithm from seed to seed.
    limit = known[0].expected * math.exp(2.91999 / 3**0.5 * law.seed_error)
    best = choices.fastest(known)
    assert known[0].expected < best.expected <= limit < known[known.index(best) + 1].expected
    verified = {
        size: choices.Verified(loss + 0.1 * np.asarray([-1, 0, 1]), seconds)
        for size, loss, seconds in ((8, 1.0, 3.0), (16, 1.15, 2.0), (32, 1.2, 1.0))
    }
    run = choices.settled(known, verified, law)
    assert choices.fastest(run[3:6]) is run[4]  # 1.2 is above 1 + 2.92 x 0.1 / sqrt(3) = 1.169
    assert [choice.expected_updates for choice in run[:4]] == [4096, 2048, 1024, 512]
    assert run[0].expected == pytest.approx(float(law(1)))
    with pytest.raises(ValueError, match=r"examples=4096: the loss after them is -1, but laws are .* add a constant"):
        Spending(Budget(4096)).fit([4, 32], np.asarray([[1.0], [-1.0]]))


@pytest.mark.slow
def test_the_command_spends_a_budget(command, capsys):
    command(
        *("--problem", "advised_module:problem", "--examples", "200", "--batch-sizes", "4", "16", "full"),
        *("--budget", "100", "--out", "here", "--json", "-"),
    )
    printed = capsys.readouterr()
    result = strict(printed.out)
    rows = {row["batch_size"]: row for row in result["choices"]}
    assert [row["updates"][1] for row in rows.values()] == [50, 12, 4]
    assert all(len(row["verified"]["costs"]) == NUM_SEEDS for row in rows.values())
    least = min(rows.values(), key=lambda row: row["expected"])
    assert rows[result["batch_size"]]["expected"] <= 1.5 * least["expected"]
    # The runs that verify are those of the last updates of `descent.run` on the same streams.
    problem, rate = sys.modules["advised_module"].problem, rows[16]["learning_rate"]
    for seed, keys in enumerate(
        zip(*(jax.random.split(k, 3) for k in jax.random.split(jax.random.split(jax.random.key(0), 3)[1])), strict=True)
    ):
        method = descent.method(gradients.mean(problem.loss), optax.sgd(rate))
        stream = batching.reshuffled(keys[1], 48, length=12 * 16)
        state, _ = descent.run(method, method.init(problem.init(keys[0])), problem.train, batching.batches(stream, 16))
        loss = jax.vmap(problem.loss, (None, 0))(state.params, problem.train).mean()
        assert rows[16]["verified"]["costs"][seed] == pytest.approx(float(loss), rel=1e-6)
    assert "train_loss after 200 examples" in result["goal"]
    assert "after 200 examples in" in " ".join(printed.err.split())


SMALL = ("--problem", "advised_module:problem", "--batch-sizes", "8", "16", "--budget", "30")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SMALL, "--target", "loss<=99", "--optimizer", "sgd"), "target=train_loss<=99 is met before any update"),
        ((*SMALL, "--target", "loss<=-1", "--budget", "300"), "train_loss<=-1 was not reached with every seed"),
        ((*SMALL, "--target", "accuracy>=0.5"), "no metric 'accuracy'; it has train_loss, train_squared_error"),
        ((*SMALL, "--target", "loss=0.5"), "target='loss=0.5' is not of the form"),
        ((*SMALL, "--target", "loss<=0.02", "--budget", "1e-3"), "budget=0.001 s: the share of the first tuning ended"),
        ((*SMALL, "--target", "loss<=0.02", "--budget", "-1"), "budget=-1.0 seconds must be positive"),
        ((*SMALL, "--target", "loss<=0.02", "--batch-sizes", "8"), "batch_sizes=[8] must be at least two"),
        ((*SMALL, "--target", "loss<=0.02", "--batch-sizes", "8", "49"), "between 1 and N=48"),
        ((*SMALL, "--target", "loss<=0.02", "--optimizer", "rms"), "optimizer='rms' is not one of sgd, momentum"),
        ((*SMALL, "--target", "loss<=0.02", "--optimizer", "advised_module:broken"), "raised RuntimeError('no')"),
        ((*SMALL, "--target", "loss<=0.02", "--optimizer", "advised_module:wrong"), "not an optax.Gradient"),
        ((*SMALL, "--target", "loss<=0.02", "--cost", "-1"), "cost=-1.0 must be a price per hour"),
        (SMALL, "give exactly one of --target 'loss<=0.05', to reach, and --examples"),
        ((*SMALL, "--target", "loss<=0.02", "--examples", "200"), "give exactly one of --target"),
        ((*SMALL, "--examples", "7"), "examples=7 must be at least 8"),
        ((*SMALL, "--examples", "15"), "examples=15 are fewer than one batch of 16"),
        ((*SMALL, "--examples", "200", "--budget", "1e-3"), "first tuning ended before the end of examples=200"),
        (("--problem", "advised_module:steep", "--examples", "64"), "example 0 is inf (and so for 7 others) before"),
        (("--problem", "advised_module:small", "--target", "loss<=0.02"), "has 7 examples: advice on a batch size"),
        (("--problem", "advised_module:steep", "--target", "loss<=0.1"), "the gradient of train example 0 is inf"),
        (("--problem", "advised_module:wild", "--target", "loss<=0.1"), "the loss diverges at all learning rates"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_mistake_is_one_line_exit_status_2_and_no_file(command, capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as end:
        command(*arguments)
    assert end.value.code == 2
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith("gdjax: ")
    assert message in line
    assert printed.out == ""
    assert os.listdir(tmp_path) == ["advised_module.py"]
    if "-1 was not" in message:
        suggested = float(line.rpartition("try train_loss<=")[2])
        x, y = sys.modules["advised_module"].problem.train
        least = np.linalg.lstsq(np.asarray(x), np.asarray(y), rcond=None)[1][0] / 2 / len(y)
        assert least < suggested < 1.2 * least + 1e-3


def made_up(too_high, asked):
    """A search that takes 100 updates, at any rate with one seed, and with several at none from `too_high` on."""

    def search(rates, *, batch_size, num_seeds, key, max_examples, deadline, progress, least=math.inf):
        asked.append((list(rates), num_seeds, max_examples))
        costs = np.full((len(rates), num_seeds), 100.0)
        costs[:, -1] = np.where((num_seeds > 1) & (rates >= too_high), np.inf, 100 * np.exp(np.log(rates / 0.1) ** 2))
        return Tuning(TARGET, batch_size, rates, costs, ~np.isfinite(costs), np.full(len(rates), 0.2), 1.0)

    return search


@pytest.mark.parametrize(("too_high", "rates"), [(0.2, [0.1]), (0.08, [0.1, 0.0707]), (0.01, [0.1, 0.0707, 0.05])])
def test_a_batch_size_is_tuned_with_one_seed_and_repeated_lower_where_several_do_not_arrive(too_high, rates):
    asked = []
    clock = _tunings.Clock(time.perf_counter(), 1e3, 10**9, lambda stage, fraction: None)
    found = _tunings._repeated(made_up(too_high, asked), 8, 0.1, None, clock, 1.0, max_examples=5000)
    assert asked[0] == ([0.05, 0.1, 0.2], 1, 5000)
    np.testing.assert_allclose([rate for [rate], num_seeds, _ in asked[1:] if num_seeds == NUM_SEEDS], rates, 1e-2)
    assert {most for *_, most in asked[1:]} == {_tunings.ALLOWANCE * 100 * 8}
    assert found.found == (too_high > 0.05)
    assert found.tuning is not None
    assert not found.at_edge
    assert found.optimum()[0] == pytest.approx(rates[-1], rel=1e-2)


def candidate(costs, *, size=8, rate=0.1, seconds=1.0):
    return _candidates.Candidate(size, rate, np.asarray(costs, float), seconds)


def test_a_rate_that_a_seed_does_not_survive_is_no_candidate():
    assert candidate([100, 110, 290]).seconds == pytest.approx(500 / 3)
    assert candidate([100, 100, 310]).seconds == math.inf  # more than three times the median
    assert candidate([10, 10, np.inf]).seconds == math.inf
    assert candidate([*[100] * 49, 310]).seconds == pytest.approx(104.2)  # one in fifty is forgiven, if it arrives
    assert candidate([*[100] * 9, 310]).seconds == pytest.approx(121)
    assert candidate([*[100] * 8, 310]).seconds == math.inf
    assert candidate([*[100] * 48, 310, 310]).seconds == math.inf
    assert math.isfinite(candidate([*[100] * 49, 310, 310]).seconds)
    assert candidate([*[100] * 49, np.inf]).seconds == math.inf
    known = candidate([*[100] * 18, 310, np.inf], rate=0.2)
    assert _candidates.leader([candidate([np.inf, 10, np.inf]), known, candidate([9, np.inf, 9], size=4)]) is known


@pytest.mark.parametrize(("deviation", "reliable"), [(0.4, True), (0.5, False)])
def test_where_seeds_differ_much_one_of_the_next_ones_would_go_astray(deviation, reliable):
    """Quantiles of a normal distribution of logarithms, none beyond three times the median."""
    costs = 100 * np.exp(deviation * scipy.stats.norm.ppf((np.arange(40) + 0.5) / 40))
    costs = np.minimum(costs, 299)
    assert math.isfinite(candidate(costs[1::4]).seconds)  # ten are too few to tell
    assert math.isfinite(candidate(costs).seconds) == reliable


def test_the_lower_rate_leads_where_two_are_within_the_noise():
    best = candidate([100, 120, 140], rate=0.4)
    for costs, leads in (([106, 116, 144], True), ([104, 123, 146], False), ([101, 121, 141], True)):
        lower = candidate(costs, rate=0.2)  # 4 % slower for every seed is no noise, 1 % does not count
        assert (_candidates.leader([best, lower]) is lower) == leads
    assert _candidates.leader([best, candidate([90, 90, np.inf], rate=0.2)]) is best
    assert _candidates.leader([best, candidate([101, 121, 141], rate=0.2, size=4)]) is best


def test_where_seeds_differ_the_next_ones_will():
    near_the_edge, calm = candidate([30, 30, 62], rate=0.4), candidate([42, 43, 44], rate=0.2)
    assert near_the_edge.seconds < calm.seconds
    assert _candidates.leader([near_the_edge, calm]) is calm


def test_among_batch_sizes_the_mean_over_ten_seeds_decides():
    """A neighbour that is faster on average is not passed over because its three first seeds differ."""
    costs = {8: [40, 60, 95], 16: [79, 80, 81], 32: [300, 300, 300], 64: [300, 300, 300]}
    won, _ = raced(lambda size: np.resize(costs[size], 100), varying=True, steepness=10)
    assert (won.batch_size, won.costs.shape) == (8, (100,))  # its seeds differ
    assert [other.batch_size for other in won.others] == [16]
    assert all(other.seconds > won.costs.mean() * won.seconds_per_update for other in won.others)


@pytest.mark.parametrize(("slower", "seeds"), [(0, (100, 100)), (10, (25, 20)), (30, (25, 3))])
def test_batch_sizes_that_cannot_be_told_apart_are_run_with_more_seeds(slower, seeds):
    """Seeds deviate by 15 of 100: of the winner that takes 25 seeds, of one 10 slower 20, of one level with it all."""
    ten = np.asarray([80.0, 120, 100, 85, 115, 100, 80, 120, 100, 100])
    costs = {16: np.resize(ten, 100), 32: np.resize(ten + slower, 100)}
    won, _ = raced(costs.get, varying=True, sizes=(16, 32), steepness=10)
    assert won.batch_size == 16
    assert (len(won.costs), len(won.others[0].costs)) == seeds


def test_rates_of_one_batch_size_that_cannot_be_told_apart_are_run_with_more_seeds():
    """The three first seeds are bad luck at the better rate; of the worst one three are enough."""
    seeds = {0.1: [104, 96, 100, *[118, 122] * 9], 0.14: [106, 114, 110, *[81, 79] * 9], 0.2: [190, 210] * 10}
    asked = []

    def more(entry, total):
        asked.append(entry.learning_rate)
        return entry._replace(costs=np.asarray(seeds[entry.learning_rate][:total], float))

    three = [candidate(costs[:3], rate=rate) for rate, costs in seeds.items()]
    found, unsure = _candidates.settled(three, 8, more, None, lambda seconds: False, 100.0)
    assert (_candidates.leader(found).learning_rate, unsure) == (0.14, [])
    assert set(asked) == {0.1, 0.14}


def test_where_the_last_rate_loses_a_seed_lower_ones_are_run_however_long_they_take():
    """0.1 was given up in the tuning, for it was slow beside 0.2, which loses its eleventh seed."""
    seeds = {0.2: [*[100] * 10, np.inf], 0.1: [170] * 20, 0.05: [300] * 20}

    def more(entry, total):
        costs = next(costs for rate, costs in seeds.items() if math.isclose(rate, entry.learning_rate))
        return entry._replace(costs=np.asarray(costs[:total], float))

    def lower(failed):
        return more(failed._replace(learning_rate=failed.learning_rate / 2), 3)

    begun = [candidate([100] * 3, rate=0.2), candidate([np.inf] * 3, rate=0.1), candidate([90] * 3, size=4, rate=0.4)]
    begun[2] = begun[2]._replace(costs=np.asarray([90, 90, np.inf]))
    for deviation in (0.0, 30.0):  # with more than ten seeds asked for only where they differ
        seeds[0.2][:10] = [100 - deviation, 100 + deviation] * 5
        first = begun[0]._replace(costs=np.asarray(seeds[0.2][:3], float))
        found, unsure = _candidates.settled([*begun[1:], first], 8, more, lower, lambda seconds: False, 100.0)
        won = _candidates.leader(found)
        assert (won.learning_rate, unsure) == (0.2 if deviation == 0 else 0.1, [])
    assert len([entry for entry in found if math.isclose(entry.learning_rate, 0.1)]) == 1


def test_how_much_seeds_differ_is_known_of_all_candidates_together():
    same = [candidate([100, 100, 100]), candidate([120, 120, 120], rate=0.2)]
    assert _candidates._doubted([same[0]._replace(costs=np.full(10, 100.0)), same[1]]) is None
    apart = candidate([150, 300, 450], rate=0.3)  # a deviation of a half, with 2 of 6 degrees of freedom
    assert _candidates._deviation([*same, apart, candidate([1, 1, np.inf])]) == pytest.approx((1 / 12) ** 0.5)
    assert _candidates._doubted([same[0]._replace(costs=np.full(10, 100.0)), same[1], apart]) is same[1]


def test_first_seeds_that_were_bad_luck_are_outweighed():
    lucky, unlucky = np.r_[80, 85, 90, np.full(97, 101.0)], np.r_[98, 104, 110, np.full(97, 85.0)]
    won, _ = raced({8: np.full(100, 400.0), 16: lucky, 32: unlucky, 64: np.full(100, 400.0)}.get, varying=True)
    assert won.batch_size == 32


def test_what_the_budget_cuts_off_is_not_held_against_the_leader():
    """Time is over in the run of the eleventh seed and on: what it would have said of the rate is not known."""
    ten = np.asarray([40.0, 160, 100, 60, 140, 100, 50, 150, 100, 100])
    costs = {
        8: np.full(100, 400.0),
        16: np.r_[ten, np.full(90, np.inf)],
        32: np.resize(ten, 100),
        64: np.full(100, 400.0),
    }
    won, _ = raced(costs.get, varying=True, late=lambda asked: [row[::2] for row in asked].count((16, 5)) == 2)
    assert (won.batch_size, len(won.costs), won.unknown) == (16, 10, ())


def raced(
    updates, *, failing=(), sizes=(8, 16, 32, 64), varying=False, late=lambda asked: False, steepness=1.0, measured=None
):
    """Race by made up runs: `updates(size)` at rate 0.1, more away from it; rates in `failing` lose later seeds.

    Where they are `varying`, these are the updates of all seeds. What was `measured` is {size: updates}.
    """
    asked = []

    def run(choice, rates, *, num_seeds, draw=0, max_examples=0, **limits):
        asked.append((choice.batch_size, *np.round(rates, 3), num_seeds))
        base = updates(choice.batch_size) * np.ones(100)
        base = base[draw : draw + num_seeds]
        costs = base * np.exp(steepness * np.log(rates / 0.1) ** 2)[:, None]
        if draw:
            costs[[any(abs(rate / bad - 1) < 0.01 for bad in failing) for rate in rates], -1] = np.inf
        return Tuning(TARGET, choice.batch_size, rates, costs, np.isinf(costs), np.full(len(rates), 0.1), 1.0)

    known = [choices.Choice(REACHING, speed, 0.1, (1.0, 100.0, 1e3)) for speed in timed(sizes, fixed=0)]
    known = [
        choices.dataclasses.replace(
            choice,
            speed=choice.speed._replace(seconds_per_update=1.0, time_again=lambda: 1.0),
            verified=choices.Verified(np.full(3, measured[choice.batch_size]), 1.0)
            if choice.batch_size in (measured or {})
            else None,
        )
        for choice in known
    ]
    pick = known[sizes.index(16)]
    begun = {16: run(pick, np.asarray([0.1]), num_seeds=3)}
    return _race.race(known, pick, begun, run, lambda seconds: late(asked), lambda stage: None), asked


def test_the_race_goes_on_to_the_neighbours_that_are_faster_and_confirms_what_leads():
    won, asked = raced({8: 300, 16: 100, 32: 90, 64: 200}.get)
    assert (won.batch_size, won.learning_rate, won.costs.shape) == (32, 0.1, (10,))
    assert [other.batch_size for other in won.others] == [8, 16, 64]  # all were predicted to be near
    assert [num_seeds for *_, num_seeds in asked if num_seeds != 3] == [5, 2]  # seeds do not differ
    assert not won.unknown


def test_what_a_busy_machine_adds_to_a_time_is_not_believed():
    """The first time of one batch size was the least, a later one of the other."""
    again = iter([3.0, 9.0, 2.0, 5.0, 4.0, 7.0])
    first = [choices.Choice(REACHING, speed, 0.1, (1.0, 1.0, 1.0)) for speed in timed([8, 16], fixed=0)]
    known = [
        dataclasses.replace(
            choice, speed=choice.speed._replace(seconds_per_update=1.0 * i, time_again=lambda: next(again))
        )
        for i, choice in zip((4, 1), first, strict=True)
    ]
    assert _race._timed_in_turn(known, lambda seconds: False) == {8: 2.0, 16: 1.0}


def test_beyond_a_batch_size_that_is_hardly_slower_a_faster_one_is_found():
    won, _ = raced({8: 300, 16: 100, 32: 105, 64: 80}.get)
    assert won.batch_size == 64
    won, _ = raced({8: 300, 16: 100, 32: 130, 64: 80}.get)
    assert won.batch_size == 16


def test_a_neighbour_whose_predicted_rate_was_bad_is_tuned():
    """It took 200 updates at that rate; 100 were predicted at its best one."""
    won, _ = raced({8: 300, 16: 100, 32: 50, 64: 200}.get, measured={8: 300.0, 32: 200.0, 64: 200.0})
    assert won.batch_size == 32


def test_a_rate_that_loses_a_further_seed_is_given_up():
    won, _ = raced({8: 300, 16: 100, 32: 300, 64: 300}.get, failing=[0.1])
    assert won.batch_size == 16
    assert won.learning_rate in (pytest.approx(0.1 / 2**0.5), pytest.approx(0.1 * 2**0.5))
    assert np.isfinite(won.costs).all()
    won, _ = raced({8: 300, 16: 100, 32: 300, 64: 300}.get, failing=0.1 * 2.0 ** (np.arange(-12, 12) / 2))
    assert [line[:29] for line in won.unknown] == ["a learning rate that every se"]


@pytest.mark.slow
def test_the_noise_scale_is_that_of_the_weighted_examples():
    """Half the examples have gradients a hundred times as large, and weigh next to nothing."""
    large = jnp.arange(128) % 2
    x = jax.random.normal(jax.random.key(0), (128, 4)) * jnp.where(large == 1, 10.0, 0.1)[:, None] + 1
    problem = Problem(
        lambda key: jnp.zeros(4),
        lambda w, e: 0.5 * jnp.sum((w - e[0]) ** 2),
        (x, large),
        weight=lambda e: jnp.where(e[1] == 1, 1e-3, 1.0),
    )
    expected = noise.measure(
        problem.loss, jnp.zeros(4), problem.train, jax.random.key(1), num_examples=128, weight=problem.weight
    )
    [(updates, found), *_] = advise.batch_size(problem, "loss<=0.3", seconds=20).noise_scales
    assert updates == 0
    np.testing.assert_allclose(found.b_simple, expected.b_simple, rtol=1e-9)
    unweighted = noise.measure(problem.loss, jnp.zeros(4), problem.train, jax.random.key(1), num_examples=128)
    assert unweighted.b_simple > 10 * expected.b_simple
    ruled = advise.rules(problem, "sgd", base=4, batch_size=16, learning_rate=0.05, num_examples=256, num_seeds=2)
    assert ruled.scale.b_simple < unweighted.b_simple / 10
