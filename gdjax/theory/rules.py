"""Rules that carry hyperparameters from one batch size to another, by name, each with where it was derived.

A rule is a pure function (hyperparameters, kappa) -> hyperparameters for a batch that grew to kappa B. `RULES` holds
them with the optimisers and the range of batch sizes for which they were derived; `why_not` says in words why one does
not apply, and `outside` where it leaves its range.

>>> adam = Hyperparameters(0.001, weight_decay=0.1, b1=0.9, b2=0.99)
>>> for name in ("square_root", "square_root_half_life", "adamw_invariant"):
...     carried = RULES[name].apply(adam, 4)
...     print(f"{name:22} {carried.learning_rate:.4f} {carried.weight_decay:.2f} {carried.b1:.4f} {carried.b2:.4f}")
square_root            0.0020 0.10 0.9000 0.9900
square_root_half_life  0.0020 0.10 0.6561 0.9606
adamw_invariant        0.0020 0.20 0.9000 0.9900
>>> why_not(RULES["square_root_half_life"], "muon", Hyperparameters(0.02, momentum=0.95))
'square_root_half_life sets b1 and b2, which muon was not given'
>>> outside(RULES["square_root"], "adam", 64, batch_size=8, noise_scale=100)
'the rule raises the rate to 8.0 times, the law of one update at a noise scale of 100 examples to 3.4 times'
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdjax.theory import _laws as theory
from gdjax.theory._laws import Number

PROPORTIONAL = ("sgd", "momentum", "nesterov")
"""Optimisers whose update is proportional to the gradient: the best rate is eta_max / (1 + B_noise / B)."""
NORMALIZED = ("adam", "adamw", "lion", "rmsprop", "adafactor", "muon", "shampoo")
"""Optimisers whose update does not grow with the gradient: the best rate is eta_max / sqrt(1 + B_noise / B)."""
TOLERANCE = 1.25  # ratio of a rule's rate to that of the law, beyond which it has left its range


class Hyperparameters(NamedTuple):
    """What a rule may change; None is a number that the optimiser does not have.

    Attributes:
        learning_rate: eta.
        weight_decay: decoupled lambda, multiplied by eta as in optax.
        momentum: beta of SGD or Muon.
        b1, b2: decays of Adam's moments, per update.
        eps: Adam's.
    """

    learning_rate: Number
    weight_decay: Number | None = None
    momentum: Number | None = None
    b1: Number | None = None
    b2: Number | None = None
    eps: Number | None = None


Apply = Callable[[Hyperparameters, Number], Hyperparameters]


class Rule(NamedTuple):
    """A rule and where it comes from.

    Attributes:
        apply: (hyperparameters, kappa) -> hyperparameters.
        optimizers: names of those for which it was derived.
        rate_power: the rate grows as kappa to this power.
        needs: fields of the hyperparameters that it changes and that must be given.
        derived: where and under which assumption, in words.
    """

    apply: Apply
    optimizers: tuple[str, ...]
    rate_power: float
    needs: tuple[str, ...]
    derived: str


def none(hyperparameters: Hyperparameters, factor: Number) -> Hyperparameters:
    """Return them as they are."""
    return hyperparameters


def linear(hyperparameters: Hyperparameters, factor: Number) -> Hyperparameters:
    """Return kappa eta, all else as it is: with lambda fixed this is the invariant of SGD with weight decay."""
    return hyperparameters._replace(learning_rate=theory.linear_rule(hyperparameters.learning_rate, factor))


def square_root(hyperparameters: Hyperparameters, factor: Number) -> Hyperparameters:
    """Return sqrt(kappa) eta, all else as it is."""
    return hyperparameters._replace(learning_rate=hyperparameters.learning_rate * jnp.sqrt(factor))


def square_root_sde(hyperparameters: Hyperparameters, factor: Number) -> Hyperparameters:
    """Return `theory.sqrt_rule`: sqrt(kappa) eta, kappa (1 - b), eps / sqrt(kappa).

    Raises:
        ValueError: where kappa (1 - b) is above 1.
    """
    rate, _, _, b1, b2, eps = hyperparameters
    adam = theory.sqrt_rule(theory.Adam(rate, _given(b1), _given(b2), 0.0 if eps is None else eps), factor)
    return hyperparameters._replace(
        learning_rate=adam.learning_rate, b1=adam.b1, b2=adam.b2, eps=None if eps is None else adam.eps
    )


def half_life(hyperparameters: Hyperparameters, factor: Number) -> Hyperparameters:
    """Return b1^kappa and b2^kappa, memories of as many examples as before; eta as it is."""
    b1, b2 = (theory.same_half_life(_given(b), factor) for b in (hyperparameters.b1, hyperparameters.b2))
    return hyperparameters._replace(b1=b1, b2=b2)


def b2_half_life(hyperparameters: Hyperparameters, factor: Number) -> Hyperparameters:
    """Return b2^kappa, a second moment over as many examples as before; eta and b1 as they are."""
    return hyperparameters._replace(b2=theory.same_half_life(_given(hyperparameters.b2), factor))


def decay_square_root(hyperparameters: Hyperparameters, factor: Number) -> Hyperparameters:
    """Return sqrt(kappa) lambda; eta as it is."""
    return hyperparameters._replace(weight_decay=_given(hyperparameters.weight_decay) * jnp.sqrt(factor))


def decay_linear(hyperparameters: Hyperparameters, factor: Number) -> Hyperparameters:
    """Return kappa lambda at the same eta, which keeps the timescale B / (eta lambda E)."""
    return hyperparameters._replace(weight_decay=_given(hyperparameters.weight_decay) * jnp.asarray(factor))


def composed(*rules: Apply) -> Apply:
    """Return the rule that applies `rules` one after another."""

    def apply(hyperparameters: Hyperparameters, factor: Number) -> Hyperparameters:
        for rule in rules:
            hyperparameters = rule(hyperparameters, factor)
        return hyperparameters

    return apply


def constant_timescale(rule: Apply) -> Apply:
    """Return `rule` with the lambda that keeps B / (eta lambda), the examples that weights remember (`decay`)."""

    def apply(hyperparameters: Hyperparameters, factor: Number) -> Hyperparameters:
        carried = rule(hyperparameters, factor)
        kept = _given(hyperparameters.weight_decay) * hyperparameters.learning_rate * jnp.asarray(factor)
        return carried._replace(weight_decay=kept / carried.learning_rate)

    return apply


RULES: dict[str, Rule] = {
    "none": Rule(none, (*PROPORTIONAL, *NORMALIZED), 0.0, (), "nothing changes: right far above the noise scale"),
    "linear": Rule(
        linear, PROPORTIONAL, 1.0, (), "the same movement per example, B far below B_noise (arXiv 1706.02677)"
    ),
    "square_root": Rule(
        square_root, NORMALIZED, 0.5, (), "the same variance per example, B far below B_noise (arXiv 2205.10287)"
    ),
    "square_root_sde": Rule(
        square_root_sde, ("adam", "adamw"), 0.5, ("b1", "b2"), "the same SDE where noise dominates (arXiv 2205.10287)"
    ),
    "square_root_half_life": Rule(
        composed(square_root, half_life),
        ("adam", "adamw"),
        0.5,
        ("b1", "b2"),
        "the same SDE to first order in 1 - b, for any kappa (arXiv 2205.10287, 2507.07101)",
    ),
    "b2_half_life": Rule(
        b2_half_life, ("adam", "adamw"), 0.0, ("b2",), "language models from B = 1 on, eta tuned (arXiv 2507.07101)"
    ),
    "adamw_invariant": Rule(
        composed(square_root, decay_square_root),
        ("adamw", "lion", "muon"),
        0.5,
        ("weight_decay",),
        "the same run of frozen AdamW where noise dominates; keeps B / (eta lambda) too",
    ),
    "decay_linear": Rule(
        decay_linear,
        ("adamw",),
        0.0,
        ("weight_decay",),
        "B / (eta lambda E) kept at fixed eta: for losses that ignore the scale of the weights (arXiv 2505.13738)",
    ),
    "linear_timescale": Rule(
        constant_timescale(linear), PROPORTIONAL, 1.0, ("weight_decay",), "SGD with decay: eta / B and lambda stay"
    ),
    "muon_square_root": Rule(
        square_root, ("muon",), 0.5, (), "E cos(g, G) ~ sqrt(B) far below B_simple; exact on a matrix of one column"
    ),
}


def law_factor(optimizer: str, factor: Number, *, batch_size: Number, noise_scale: Number) -> jax.Array:
    """Return by what the best rate of one update grows from B to kappa B: [(1 + Bn / B) / (1 + Bn / (kappa B))]^p.

    p = 1 for updates proportional to the gradient (`theory.best_learning_rate`), 1/2 for normalised ones
    (`adaptive.frozen` of one coordinate).

    Raises:
        ValueError: for an optimiser that is not in PROPORTIONAL or NORMALIZED.
    """
    if optimizer not in (*PROPORTIONAL, *NORMALIZED):
        raise ValueError(f"optimizer={optimizer!r} is not one of {', '.join((*PROPORTIONAL, *NORMALIZED))}")
    share = batch_size / (batch_size + jnp.asarray(noise_scale))  # B / (B + Bn), 0 for an infinite noise scale
    ratio = 1 / (share + (1 - share) / factor)
    return ratio if optimizer in PROPORTIONAL else jnp.sqrt(ratio)


def predicted_gain(rule: Rule, optimizer: str, factor: Number, *, batch_size: Number, noise_scale: Number) -> jax.Array:
    """Return q (2 - q), the progress of an update at the carried rate over that at the best, from a rate tuned at B.

    q = kappa^rate_power / `law_factor`; below 0 the loss rises. It orders rules before any of them is run, as far as
    the rate is concerned.
    """
    q = jnp.asarray(factor) ** rule.rate_power / law_factor(
        optimizer, factor, batch_size=batch_size, noise_scale=noise_scale
    )
    return q * (2 - q)


def why_not(rule: Rule, optimizer: str, hyperparameters: Hyperparameters) -> str | None:
    """Return why a rule does not apply to an optimiser, in words, or None where it does."""
    name = next((name for name, known in RULES.items() if known is rule), "the rule")
    missing = [field for field in rule.needs if getattr(hyperparameters, field) is None]
    if missing:
        return f"{name} sets {' and '.join(missing)}, which {optimizer} was not given"
    if optimizer in rule.optimizers:
        return None
    if rule.optimizers == PROPORTIONAL:
        return f"{name} was derived for updates proportional to the gradient, which those of {optimizer} are not"
    if rule.optimizers == NORMALIZED:
        return f"{name} was derived for updates that do not grow with the gradient, as those of {optimizer} do"
    return f"{name} was derived for {', '.join(rule.optimizers)}, not for {optimizer}"


def outside(rule: Rule, optimizer: str, factor: float, *, batch_size: float, noise_scale: float) -> str | None:
    """Return how far a factor leaves the range where the rule was derived, in words, or None where it does not.

    That is where the rule's rate is more than TOLERANCE times `law_factor`, or less than 1 / TOLERANCE times.
    """
    carried = factor**rule.rate_power
    law = float(law_factor(optimizer, factor, batch_size=batch_size, noise_scale=noise_scale))
    if 1 / TOLERANCE <= carried / law <= TOLERANCE:
        return None
    return (
        f"the rule raises the rate to {carried:.1f} times, the law of one update at a noise scale of "
        f"{noise_scale:g} examples to {law:.1f} times"
    )


def _given(number: Number | None) -> Number:
    if number is None:
        raise ValueError("this rule changes a hyperparameter that was not given: see `why_not`")
    return number
