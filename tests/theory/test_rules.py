"""Rules for hyperparameters: their numbers, their invariants in exact recursions, and what Adam does in the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest

from gdjax import descent, gradients, theory
from gdjax.theory import adaptive, decay, rules

ADAM = rules.Hyperparameters(0.002, weight_decay=0.1, b1=0.99, b2=0.999, eps=1e-8)
SGD = rules.Hyperparameters(0.1, weight_decay=0.2)


def assert_same(found, expected):
    assert [number is None for number in found] == [number is None for number in expected]
    precision.assert_close([x for x in found if x is not None], [x for x in expected if x is not None], rtol=1e-12)


def test_what_every_rule_does():
    expected = {
        "none": ADAM,
        "linear": ADAM._replace(learning_rate=0.008),
        "square_root": ADAM._replace(learning_rate=0.004),
        "square_root_sde": ADAM._replace(learning_rate=0.004, b1=0.96, b2=0.996, eps=5e-9),
        "square_root_half_life": ADAM._replace(learning_rate=0.004, b1=0.99**4, b2=0.999**4),
        "b2_half_life": ADAM._replace(b2=0.999**4),
        "adamw_invariant": ADAM._replace(learning_rate=0.004, weight_decay=0.2),
        "decay_linear": ADAM._replace(weight_decay=0.4),
        "linear_timescale": ADAM._replace(learning_rate=0.008, weight_decay=0.1),
        "muon_square_root": ADAM._replace(learning_rate=0.004),
    }
    assert expected.keys() == rules.RULES.keys()
    for name, rule in rules.RULES.items():
        assert_same(rule.apply(ADAM, 4), expected[name])
        assert_same(rule.apply(ADAM, 1), ADAM)
        twice = rule.apply(rule.apply(ADAM, 2), 3)
        assert_same(rule.apply(ADAM, 6), twice)
        grown = rule.apply(ADAM, 4).learning_rate / ADAM.learning_rate
        precision.assert_close(grown, 4**rule.rate_power, rtol=1e-12)
        fields = [f for f in ADAM._fields[1:] if f != "momentum"]
        changed = {f for f in fields if not np.isclose(getattr(expected[name], f), getattr(ADAM, f), rtol=1e-9)}
        assert changed - {"eps"} <= set(rule.needs)


def test_half_lives_and_the_linear_rule_of_memories():
    for b2, by_half_life, by_sde in ((0.95, 0.440, 0.2), (0.999, 0.98412, 0.984)):
        given = ADAM._replace(b1=0.99, b2=b2)
        np.testing.assert_allclose(rules.half_life(given, 16).b2, by_half_life, atol=5e-4 if b2 == 0.95 else 5e-6)
        np.testing.assert_allclose(rules.square_root_sde(given, 16).b2, by_sde, atol=1e-9)
    with pytest.raises(ValueError, match="asks for 1 - b1 above 1"):
        rules.square_root_sde(ADAM, 200)


def test_the_timescale_is_kept_whatever_the_rate_does():
    for rule in (rules.none, rules.linear, rules.square_root):
        carried = rules.constant_timescale(rule)(ADAM, 16)
        kept = [
            decay.timescale(h.learning_rate, h.weight_decay, batch_size=b).examples
            for h, b in ((ADAM, 32), (carried, 512))
        ]
        precision.assert_close(*kept, rtol=1e-12)
    by_decay = rules.constant_timescale(rules.none)(ADAM, 16)
    assert_same(by_decay, rules.decay_linear(ADAM, 16))
    by_roots = rules.composed(rules.square_root, rules.decay_square_root)(ADAM, 16)
    assert_same(rules.constant_timescale(rules.square_root)(ADAM, 16), by_roots)


def test_the_best_rates_of_the_exact_step_follow_the_law():
    grad, variance, hessian = jnp.asarray([0.3]), jnp.asarray([[2.0]]), jnp.asarray([[1.5]])
    scale = theory.b_simple(grad, variance)

    def best(size):
        return adaptive.best_learning_rate(adaptive.frozen(grad, variance, batch_size=size), grad, hessian)

    for size, factor in ((1, 4), (16, 64), (500, 2)):
        options = {"batch_size": size, "noise_scale": scale}
        grown = best(size * factor) / best(size)
        precision.assert_close(rules.law_factor("adamw", factor, **options), grown, rtol=1e-12)
        plain = [theory.best_learning_rate(b, scale, full_batch=1.0) for b in (size, size * factor)]
        precision.assert_close(rules.law_factor("sgd", factor, **options), plain[1] / plain[0], rtol=1e-12)
        for name in ("none", "square_root", "linear"):
            direction = adaptive.frozen(grad, variance, batch_size=size * factor)
            rate = best(size) * factor ** rules.RULES[name].rate_power
            change = adaptive.expected_change(direction, grad, hessian, learning_rate=rate)
            gain = change / adaptive.best_change(direction, grad, hessian)
            found = rules.predicted_gain(rules.RULES[name], "adam", factor, **options)
            precision.assert_close(found, gain, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="optimizer='newton' is not one of sgd"):
        rules.law_factor("newton", 2, batch_size=1, noise_scale=1)


def test_the_law_at_both_ends_of_the_noise_scale():
    for scale, expected in ((np.inf, (16, 4)), (0.0, (1, 1))):
        found = [rules.law_factor(name, 16.0, batch_size=4, noise_scale=scale) for name in ("sgd", "adam")]
        precision.assert_close(found, expected, rtol=0)


def test_rules_that_do_not_apply_say_why():
    known = rules.RULES
    assert "proportional to the gradient" in (rules.why_not(known["linear"], "adam", ADAM) or "")
    assert "do not grow with the gradient" in (rules.why_not(known["square_root"], "sgd", SGD) or "")
    assert (
        rules.why_not(known["square_root_sde"], "sgd", SGD) == "square_root_sde sets b1 and b2, which sgd was not given"
    )
    assert "derived for muon, not for adam" in (rules.why_not(known["muon_square_root"], "adam", ADAM) or "")
    for name, optimizer, given in (("linear", "sgd", SGD), ("adamw_invariant", "adamw", ADAM), ("none", "muon", SGD)):
        assert rules.why_not(known[name], optimizer, given) is None
    with pytest.raises(ValueError, match="was not given"):
        rules.half_life(SGD, 2)


def test_a_factor_out_of_range_is_flagged_and_one_within_is_not():
    linear = rules.RULES["linear"]
    assert rules.outside(linear, "sgd", 4, batch_size=1, noise_scale=100) is None
    flagged = rules.outside(linear, "sgd", 64, batch_size=8, noise_scale=100)
    assert flagged is not None
    assert "to 64.0 times" in flagged
    assert rules.outside(rules.RULES["none"], "sgd", 64, batch_size=8, noise_scale=100) is not None
    assert rules.outside(rules.RULES["none"], "sgd", 64, batch_size=1e4, noise_scale=100) is None


@pytest.mark.slow
def test_the_square_root_rule_keeps_the_floor_of_adam_and_the_linear_one_does_not():
    pool, seeds = 2048, 400
    noises = np.sort(np.random.default_rng(0).normal(size=pool))
    noises = jnp.asarray((noises - noises.mean()) / noises.std())
    adam = ADAM._replace(eps=0.0)

    def floor(rule, factor):
        h = rule(adam, factor)
        num_updates, batch_size = 6400 // factor, 4 * factor  # a dozen memories of parameters, six of b2
        optimizer = optax.adam(h.learning_rate, b1=h.b1, b2=h.b2, eps=0.0)
        method = descent.method(gradients.mean(lambda theta, noise: 0.5 * theta**2 + noise * theta), optimizer)

        @jax.jit
        @jax.vmap
        def train(key):
            batches = jax.random.randint(key, (num_updates, batch_size), 0, pool, jnp.int32)
            squares = descent.run(method, method.init(0.0), noises, batches, lambda s, i: s.params**2)[1]
            return squares[num_updates // 2 :].mean()

        with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes int32 and float64
            found = np.asarray(train(jax.random.split(jax.random.key(factor), seeds)))
        return found.mean(), found.std() / np.sqrt(seeds)

    def linear(hyperparameters, factor):
        return rules.square_root_sde(hyperparameters, factor)._replace(learning_rate=0.002 * factor)

    for rule, factor, expected in (
        (rules.none, 1, 5.00e-4),
        (rules.square_root_sde, 4, 4.97e-4),
        (rules.square_root_sde, 16, 4.92e-4),
        (linear, 4, 9.9e-4),
        (linear, 16, 19.0e-4),
    ):
        mean, error = floor(rule, factor)
        assert error < 0.03 * expected
        assert abs(mean - expected) < 4 * error + 0.005 * expected
