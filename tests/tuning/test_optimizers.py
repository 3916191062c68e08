"""Optimisers by name against optax's own, schedules by the share of the run, and what factories are refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest

from gdjax import tuning
from gdjax.problem import Problem
from gdjax.tuning._optimizers import OPTIMIZERS

OWN = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adam": optax.adam,
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.1),
    "lion": lambda rate: optax.lion(rate, weight_decay=0.1),
    "rmsprop": optax.rmsprop,
    "adafactor": optax.adafactor,
    "muon": lambda rate: optax.contrib.muon(rate, weight_decay=0.1, adam_weight_decay=0.1),
}
SHAPES = {  # of ten updates, two of them warm-up: the shares of the rate, by hand
    "constant": [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1],
    "linear": [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    "cosine": [0, 0.5, *(0.5 + 0.5 * np.cos(np.pi * np.arange(8) / 8))],
    "wsd": [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 5 / 8],
}


def moved(optimizer, num_updates=5):
    """Return the parameters after some updates of unlike gradients."""
    params: Any = {"weight": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "bias": jnp.asarray([0.3, -0.2])}

    @jax.jit
    def run(params):
        state = optimizer.init(params)
        for i in range(num_updates):
            grads = jax.tree.map(lambda x: jnp.cos(3 * x + i), params)  # noqa: B023
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax's own
        return run(params)


@pytest.mark.parametrize("name", OWN)
def test_an_optimiser_by_name_is_that_of_optax(name):
    assert OPTIMIZERS.keys() == OWN.keys()
    by_name, rate = tuning.named(name)
    assert rate > 0
    mine, own = moved(by_name(0.1)), moved(OWN[name](0.1))
    jax.tree.map(lambda a, b: precision.assert_close(a, b, rtol=1e-9, atol=1e-12), mine, own)


def test_decay_and_clip_are_what_they_are_called():
    decayed, _ = tuning.named("sgd", weight_decay=0.5, clip=0.25)
    by_hand = optax.chain(optax.clip_by_global_norm(0.25), optax.add_decayed_weights(0.5), optax.sgd(0.1))
    jax.tree.map(lambda a, b: precision.assert_close(a, b, rtol=1e-12), moved(decayed(0.1)), moved(by_hand))


@pytest.mark.parametrize("name", SHAPES)
def test_schedules_are_functions_of_the_share_of_the_run(name):
    recipe, _ = tuning.named("sgd", schedule=name, warmup=0.2)
    steps = []
    for num_updates in (10, 20):
        transform = recipe(2.0, num_updates)
        state, params = transform.init(jnp.ones(())), jnp.ones(())
        rates = []
        for _ in range(num_updates):
            update, state = transform.update(jnp.ones(()), state, params)
            rates.append(-float(jnp.asarray(update)) / 2.0)  # pyright: ignore
        steps.append(rates)
    precision.assert_close(steps[0], SHAPES[name], atol=1e-12)
    precision.assert_close(steps[1][::2], SHAPES[name], atol=1e-12)


def test_what_the_options_cannot_be_is_said():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"schedule": "step"}, "schedule='step' is not one of constant, linear, cosine, wsd"),
        ({"warmup": 1.0}, "warmup=1.0 is a share of the run"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be zero or positive"),
        ({"clip": 0.0}, "clip=0.0, the largest norm of a gradient, must be positive"),
    ]
    for options, said in cases:
        with pytest.raises(ValueError, match=said):
            tuning.named("adamw", **options)
    with pytest.raises(ValueError, match=r"clip=1.0 is of an optimiser by name"):
        tuning.named(optax.sgd, clip=1.0)
    with pytest.raises(ValueError, match="give num_updates"):
        tuning.named("sgd", schedule="linear")[0](0.1)


def test_factories_that_cannot_be_used_are_refused_with_what_to_write():
    branching = lambda rate: optax.adamw(optax.warmup_cosine_decay_schedule(0.0, rate, 20, 500))  # noqa: E731
    with pytest.raises(ValueError, match=r"branches on the learning rate, which is traced.*optax.scale"):
        tuning.named(branching)
    fixed = optax.linear_schedule(1.0, 0.0, 500)
    with pytest.raises(ValueError, match=r"after 512 updates it makes none at all.*take .learning_rate, num_updates"):
        tuning.named(lambda rate: optax.sgd(lambda count: rate * fixed(count)))

    def workaround(rate, num_updates):
        return optax.chain(optax.adamw(optax.cosine_decay_schedule(1.0, num_updates)), optax.scale(rate))

    labelled = lambda rate: optax.partition({"a": optax.sgd(rate)}, lambda params: {"w": "a"})  # noqa: E731
    for factory in (workaround, optax.adamw, labelled):
        assert tuning.named(factory) == (factory, 0.03)


@pytest.mark.parametrize("num_batches", [2, 3, 7, 64])
def test_factories_that_add_up_gradients_before_an_update_may_be_used(num_batches):
    for factory in (
        lambda rate: optax.MultiSteps(optax.adam(rate), num_batches).gradient_transformation(),
        lambda rate: optax.chain(optax.sgd(rate), optax.apply_every(num_batches)),
    ):
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            assert tuning.named(factory)[0] is factory


def quadratic():
    """Return a problem whose every run is known: theta' = (1 - eta) theta."""
    return Problem(lambda key: jnp.ones(()), lambda theta, x: 0.5 * theta**2 + 0 * x, jnp.zeros(64))


def test_a_factory_of_two_arguments_is_told_how_long_its_runs_are():
    seen: list[int] = []

    def factory(rate, num_updates):
        seen.append(num_updates)
        return optax.sgd(lambda count: rate * (1 - jnp.asarray(count, float) / num_updates))

    found = tuning.tune(quadratic(), factory, batch_size=16, num_epochs=2, key=jax.random.key(0), num_seeds=1)
    assert set(seen) == {8, 100}  # 100 where it is only checked
    expected = [0.5 * np.prod(1 - rate * (1 - np.arange(8) / 8)) ** 2 for rate in found.learning_rates]
    precision.assert_close(found.costs[:, 0], expected, rtol=1e-9)


def test_the_updates_to_a_target_with_a_schedule_are_the_fewest_over_its_lengths():
    recipe, _ = tuning.named("sgd", schedule="linear")
    target = tuning.Target("loss", "train", "<=", 0.001)

    def crossing(rate, horizon):
        thetas = np.cumprod(1 - rate * (1 - np.arange(horizon) / horizon))
        below = np.flatnonzero(0.5 * thetas**2 <= 0.001)
        return below[0] + 1 if len(below) else np.inf

    search = tuning.searching(quadratic(), recipe, target)
    for rate, max_examples in ((0.4, 512), (0.05, 512), (0.05, 100)):
        found = search(np.asarray([rate]), batch_size=2, num_seeds=1, key=jax.random.key(0), max_examples=max_examples)
        best = min(crossing(rate, horizon) for horizon in range(1, max_examples // 2 + 1))
        assert best - 1 <= found.costs[0, 0] <= 1.2 * best, rate


def test_the_average_is_evaluated_beside_the_last_parameters_and_judged_in_their_place():
    recipe, half_life = tuning.named("sgd")[0], 8.0
    goal = tuning.Budget(64)
    average = tuning.searching(quadratic(), recipe, goal, average=half_life)
    found = average(np.asarray([0.1]), batch_size=4, num_seeds=1, key=jax.random.key(0))
    thetas = 0.9 ** np.arange(1, 17)
    weights = 2.0 ** (-4 * np.arange(15, -1, -1) / half_life)
    precision.assert_close(found.costs[0, 0], 0.5 * (weights @ thetas / weights.sum()) ** 2, rtol=1e-9)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"optimizer": optax.sgd(0.1)}, "optimizer is a GradientTransformation.*not a name or a function of the rate"),
        ({"optimizer": lambda rate: None}, "optimizer returns a NoneType"),
        ({"num_epochs": 0}, "num_epochs=0 must be positive and finite"),
        ({"num_epochs": float("nan")}, "num_epochs=nan must be positive and finite"),
        ({"num_epochs": None, "target": 3}, "target=3 must be as 'loss<=0.05'"),
        ({"batch_size": 32.0}, "batch_size=32.0 must be a whole number"),
    ],
)
def test_arguments_of_tune_that_cannot_be_used_are_named(changed, said):
    options = {"optimizer": "sgd", "batch_size": 32, "num_epochs": 1, "key": jax.random.key(0)} | changed
    with pytest.raises(ValueError, match=said):
        tuning.tune(quadratic(), **options)
