"""What each rule makes of the hyperparameters, and what the noise scale lets expect of it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from gdjax.advise._outcomes import Outcome
from gdjax.theory import rules as laws
from gdjax.theory.rules import RULES, Hyperparameters

LAW = "noise_scale"


def law_factor(recipe, base: int, batch_size: int, scale: float) -> float:
    return float(laws.law_factor(recipe.name, batch_size / base, batch_size=base, noise_scale=scale))


def carried(recipe, numbers: Hyperparameters, names, base: int, batch_size: int, scale: float | None) -> list[Outcome]:
    """Return what each rule makes of the hyperparameters, what is the same put together, and what is expected of it."""
    factor, known = batch_size / base, scale is not None and math.isfinite(scale) and scale > 0
    options: dict[str, Any] = {"batch_size": base, "noise_scale": scale}
    outcomes: list[Outcome] = []
    for name, rule in RULES.items():
        why = laws.why_not(rule, recipe.name, numbers)
        asked = names is None or name in names
        underived = why is not None and recipe.name not in rule.optimizers and "not given" not in why
        if not asked or (why is not None and not (names and underived)):
            outcomes += [Outcome(name, why_not=why)] * asked
            continue
        try:
            carried = jax.tree.map(float, rule.apply(numbers, factor))
        except ValueError as error:
            outcomes.append(Outcome(name, why_not=str(error)))
            continue
        same = [
            i for i, other in enumerate(outcomes) if other.hyperparameters and _close(other.hyperparameters, carried)
        ]
        if same:
            first = outcomes[same[0]]
            outcomes[same[0]] = dataclasses.replace(first, same=(*first.same, name))
            continue
        flag = laws.outside(rule, recipe.name, factor, **options) if known else None
        flag = "; ".join(filter(None, (why, flag))) or None
        predicted = float(laws.predicted_gain(rule, recipe.name, factor, **options)) if known else math.nan
        outcomes.append(Outcome(name, (), carried, None, flag, predicted))
    if known:
        rate = float(numbers.learning_rate) * law_factor(recipe, base, batch_size, float(scale or 0))
        outcomes.append(Outcome(LAW, (), numbers._replace(learning_rate=rate), None, None, 1.0))
    return outcomes


def _close(first: Hyperparameters, second: Hyperparameters) -> bool:
    return all(
        a == b or (a is not None and b is not None and math.isclose(a, b)) for a, b in zip(first, second, strict=True)
    )


def prediction(outcomes: Sequence[Outcome], scale, geometry: str) -> str:
    order = sorted((o for o in outcomes if o.hyperparameters), key=lambda outcome: -outcome.predicted)
    if not order or math.isnan(order[0].predicted):
        return f"No prediction: {scale}."
    groups: dict[float, list[str]] = {}
    for outcome in order:
        groups.setdefault(round(outcome.predicted, 2), []).append(outcome.rule)
    said = "; ".join(f"{' = '.join(names)} ({share:.2f})" for share, names in groups.items())
    return f"Predicted, by the rate alone, as the progress of an update over the best ({geometry}, {scale}): {said}."
