"""Rules carried from one batch size to another: what is run, what is refused, and regrets that are known."""

import dataclasses
import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest

from gdjax import advise, commands, tuning
from gdjax.advise._carried import carried
from gdjax.advise._outcomes import Outcome, judged
from gdjax.problem import Problem
from gdjax.problems import datasets, least_squares, models
from gdjax.theory import rules as laws


def quiet(num_examples=512):
    """Return a problem without noise: every example has the loss theta^2 / 2, and runs are known."""
    return Problem(
        lambda key: jnp.ones(()), lambda theta, x: 0.5 * theta**2 + 0 * x, jnp.zeros(num_examples), name="quiet"
    )


@pytest.fixture(scope="module")
def found():
    """The result for SGD on noisy least squares, from 4 to 32; and what was announced."""
    problem = least_squares(datasets.gaussian_regression(jax.random.key(1), num_examples=256, dimension=4))
    said = []
    result = advise.rules(
        problem, "sgd", base=4, batch_size=32, num_examples=512, num_seeds=3, names=["none", "linear"],
        announce=said.append,
    )  # fmt: skip
    return result, said


@pytest.mark.slow
def test_every_rule_is_held_against_the_tuned_rate_with_the_same_seeds(found):
    result, said = found
    assert {outcome.rule for outcome in result.run} == {"none", "linear", "noise_scale"}
    rate = float(result.hyperparameters.learning_rate)
    rates = {outcome.rule: float(outcome.hyperparameters.learning_rate) for outcome in result.run}
    precision.assert_close(rates["linear"], 8 * rate, rtol=1e-6)
    assert rates["none"] == rate
    law = laws.law_factor("sgd", 8, batch_size=4, noise_scale=float(result.scale.b_simple))
    precision.assert_close(rates["noise_scale"], rate * law, rtol=1e-6)
    for outcome in result.run:
        differences = outcome.losses[:, -1] - result.tuned.losses[:, -1]
        fell = (outcome.losses[:, -1] < outcome.losses[:, 0]).all()
        expected = differences.mean() if fell else math.inf
        precision.assert_close(outcome.loss_regret.mean, expected, rtol=1e-9, atol=1e-12)
        assert outcome.losses[:, 0].tolist() == result.tuned.losses[:, 0].tolist()
    assert [outcome.last for outcome in result.run] == sorted(outcome.last for outcome in result.run)
    assert result.best == result.run[0].rule
    assert f"Use {result.best} to carry sgd from B = 4 to 32 (8 times)" in result.sentence()
    assert "Predicted, by the rate alone" in said[-1]
    json.dumps(jax.tree.map(np.asarray, result.summary()), default=str)


@pytest.mark.slow
def test_where_the_tuned_rate_fails_with_a_fresh_seed_no_rule_is_judged(found):
    result, _ = found
    losses = result.tuned.losses.copy()
    losses[1, -1] = 2 * losses[1, 0]
    failed = dataclasses.replace(result, tuned=dataclasses.replace(result.tuned, losses=losses))
    assert failed.sentence().startswith(
        "No rule can be judged: with one of 3 fresh seeds the rate tuned at B = 32 does"
    )
    assert "inf" not in failed.sentence()


@pytest.mark.slow
def test_the_runs_are_those_of_the_rule():
    """Of a loss without noise: theta falls by 1 - eta at every update, at both batch sizes."""
    result = advise.rules(quiet(), "sgd", base=4, batch_size=16, learning_rate=0.05, num_examples=256, num_seeds=2)
    by_rule: dict[str, Any] = {outcome.rule: outcome for outcome in result.run}
    assert by_rule.keys() == {"none", "linear"}  # and no noise scale to go by
    for name, rate in (("none", 0.05), ("linear", 0.2)):
        expected = 0.5 * (1 - rate) ** (2 * result.examples / 16)
        precision.assert_close(by_rule[name].losses[0], expected, rtol=1e-5)
    assert result.predicted == []
    assert result.tunings.keys() == {16}
    assert result.best == "linear"


def test_regrets_of_known_curves():
    examples = np.asarray([0.0, 100.0, 200.0, 400.0])
    tuned = np.asarray([[4.0, 2.0, 1.0, 0.5]] * 2)
    worse = np.asarray([[4.0, 3.0, 2.0, 1.5], [4.0, 3.0, 2.0, 1.0]])
    outcome = judged(Outcome("worse"), worse, tuned, examples)
    assert outcome.loss_regret is not None
    precision.assert_close(outcome.loss_regret.mean, 0.75, rtol=1e-12)
    times = np.asarray([400 / 150, 400 / 200])  # the tuned run is at 1.5 half way between 100 and 200
    half = 6.313751514675043 * np.log(times).std(ddof=1) / 2**0.5  # Student's t of one degree, 90 %
    expected = np.exp(np.log(times).mean() + np.asarray([0, -half, half])) - 1
    precision.assert_close(outcome.examples_regret, expected, rtol=1e-9)
    better = judged(Outcome("better"), tuned, worse, examples).examples_regret
    assert better is not None
    assert better.mean < 0
    lost = judged(Outcome("lost"), np.asarray([[4.0, 9.0, np.inf, np.nan], [4.0, 2.0, 8.0, 1e25]]), tuned, examples)
    assert lost.last == math.inf
    assert lost.examples_regret is not None
    assert lost.examples_regret.mean == math.inf


def test_rules_that_do_not_apply_are_listed_with_the_reason_and_run_only_when_named():
    recipe = tuning.named("adamw")[0]
    given = recipe.hyperparameters  # pyright: ignore
    by_default: dict[str, Any] = {o.rule: o for o in carried(recipe, given, None, 16, 256, 100.0)}
    assert "proportional to the gradient" in by_default["linear"].why_not
    assert "1 - b1 above 1" in by_default["square_root_sde"].why_not
    assert by_default["none"].flag is not None
    named: dict[str, Any] = {
        o.rule: o for o in carried(recipe, given, ["linear", "muon_square_root", "square_root"], 16, 256, 100.0)
    }
    assert named["linear"].hyperparameters is not None
    assert "proportional to the gradient" in named["linear"].flag
    assert named.keys() == {"linear", "square_root", "noise_scale"}
    assert named["square_root"].same == ("muon_square_root",)
    assert [o.rule for o in carried(recipe, given, ["linear"], 16, 256, math.nan)] == ["linear"]


@pytest.mark.slow
def test_what_cannot_be_carried_is_refused_before_it_is_run():
    cases = [
        ({"optimizer": optax.adam}, r"optimizer: rules change the hyperparameters of one by name, as 'adamw'"),
        ({"base": 32}, r"from 32 to 16: must be 1 <= from < to <= N=512"),
        ({"names": ["cubic"]}, r"rules='cubic' is not one of none, linear"),
        ({"names": ["b2_half_life"]}, r"none of them can be applied: b2_half_life sets b2, which sgd was not given"),
        ({"num_seeds": 1}, r"num_seeds=1 must be at least 2"),
        ({"num_examples": 64}, r"num_examples=64 are fewer than 8 updates of 16"),
        ({"learning_rate": -1.0}, r"learning_rate=-1.0 must be positive"),
        ({"learning_rate": 3.0, "num_examples": 256}, r"learning_rate=3 diverges .* carry from; 1.5 does not"),
        ({"seconds": 1.0}, r"budget=1 seconds leave fewer than 8 updates of 16: allow \d+"),
    ]
    for options, said in cases:
        arguments = {"optimizer": "sgd", "base": 4, "batch_size": 16} | options
        with pytest.raises(ValueError, match=said):
            advise.rules(quiet(), **arguments)


@pytest.mark.slow
def test_the_command_says_what_the_library_found(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = [
        "rules",
        "--problem",
        "least-squares",
        "--optimizer",
        "sgd",
        "--from",
        "8",
        "--to",
        "64",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["gdjax", *arguments, "--examples", "2048"])
    monkeypatch.setenv("COLUMNS", "80")
    commands.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("Saved")) <= 80
    printed = " ".join(" ".join(lines).split())
    result = json.loads((out / "result.json").read_text())
    assert result["verdict"] in printed
    assert result["best"] in [row["rule"] for row in result["rules"]]
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["gdjax", *arguments, "--b2", "0.9"])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 2
    assert "b2=0.9: this optimiser has no b2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.nightly
def test_one_program_serves_all_numbers_of_muon():
    """Weight decay and momentum are traced: rules of a transformer compile once for each batch size."""
    tokens = jax.random.randint(jax.random.key(0), (64, 9), 0, 5)
    model = models.transformer(num_tokens=5, width=8, num_layers=1, num_heads=2)

    def loss(params, example):
        logits = model.apply(params, example[:-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, example[1:]).mean()

    problem = Problem(model.init, loss, tokens)
    recipe = dataclasses.replace(tuning.named("muon", weight_decay=0.2)[0], schedule="cosine")  # pyright: ignore
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax's own
        found = advise.rules(problem, recipe, base=2, batch_size=8, num_examples=128, num_seeds=2)
    assert {"adamw_invariant", "square_root"} <= {o.rule for o in found.run}
    assert found.geometry == "spectral"
