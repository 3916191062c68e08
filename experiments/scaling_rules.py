"""Which rule carries hyperparameters from a batch of 16 to one of 256?

Question    AdamW, Muon and SGD, tuned at B = 16 and carried to 256 by every rule that can be applied, derived for the
            optimiser or not: how much is each worse than the rate tuned at 256, after as many examples? And does
            `advise.rules`, with three seeds, name the rule that the exhaustive table has at its top?
Prediction  The linear rule for SGD and the square root for AdamW and Muon, with all else as it is, stand at the top of
            those without a measurement; the rate of the measured noise scale is never twice as bad as the best of them.
            The linear rule ruins AdamW. Decay in proportion to B harms where the loss is not scale-invariant, as here.
            The command's verdict is the table's, up to what cannot be told apart.
Cost        3 minutes on two CPU cores: digits and least squares. --full, 12 minutes more, adds a small transformer on
            Shakespeare.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import advise, descent, problems, report, sweep, tuning
from gdjax.commands import experiment
from gdjax.problems import datasets, models
from gdjax.theory import rules
from gdjax.theory.rules import Hyperparameters

BASE, BATCH_SIZE = 16, 256
NUM_SEEDS, STEP = 8, 2**0.5
OPTIMIZERS = {
    "sgd": lambda h: optax.chain(optax.add_decayed_weights(h.weight_decay), optax.sgd(h.learning_rate)),
    "adamw": lambda h: optax.adamw(h.learning_rate, b1=h.b1, b2=h.b2, eps=h.eps, weight_decay=h.weight_decay),
    "muon": lambda h: optax.contrib.muon(
        h.learning_rate, beta=h.momentum, weight_decay=h.weight_decay, adam_weight_decay=h.weight_decay
    ),
}


class Case(NamedTuple):
    """A problem, an optimiser, the examples that every run sees, and a rate to begin with at B = 16."""

    problem: Any
    optimizer: str
    num_examples: int
    first_rate: float


def transformer():
    """Return a transformer of one block and width 32 on Shakespeare."""
    tokens = datasets.NUM_SHAKESPEARE_CHARACTERS
    model = models.transformer(num_tokens=tokens, width=32, num_layers=1)
    return problems.language_model(model, datasets.tiny_shakespeare(), num_tokens=tokens, name="small-transformer")


def cases(options):
    digits, line = problems.digits_mlp((64,)), problems.least_squares()
    found = [Case(digits, "adamw", 6144, 0.004), Case(digits, "muon", 6144, 0.008), Case(digits, "sgd", 6144, 0.2)]
    found += [Case(line, "adamw", 6144, 0.02), Case(line, "sgd", 6144, 0.3)]
    if options.smoke:
        return [found[3]._replace(num_examples=2048)]
    if options.full:
        small = transformer()
        found += [Case(small, "adamw", 8192, 0.008), Case(small, "muon", 8192, 0.01), Case(small, "sgd", 8192, 0.5)]
    return found


def losses(case, batch_size, rows, keys):
    """Return the loss at the end, [S, R], of hyperparameters `rows`."""
    stacked = jax.tree.map(lambda *numbers: jnp.asarray(numbers, float), *rows)

    def train(point):
        evaluate = partial(case.problem.evaluate, names=("loss",))
        _, history = descent.train(
            case.problem,
            OPTIMIZERS[case.optimizer](point["h"]),
            key=point["key"],
            batch_size=batch_size,
            num_updates=case.num_examples // batch_size,
            record=lambda state, info: evaluate(state.params, judged)["loss"],
            every=case.num_examples // batch_size,
        )
        return history[-1]

    judged = jax.tree.map(lambda x: x[:512], case.problem.train)
    found = sweep.map(train, sweep.grid(key=keys, h=stacked), chunk_size=4)
    return np.where(np.isfinite(found), found, np.inf)


def tuned(case, batch_size, numbers, keys):
    """Return the best rate and its losses [S], on a grid that grows while the best is at its edge."""
    tried: dict[int, np.ndarray] = {}
    low, high = -3, 3
    while True:
        new = [i for i in range(low, high + 1) if i not in tried]
        rows = [numbers._replace(learning_rate=numbers.learning_rate * STEP**i) for i in new]
        tried |= dict(zip(new, losses(case, batch_size, rows, keys).T, strict=True))
        best = min(tried, key=lambda i: tried[i].mean())
        if low < best < high or len(tried) > 20:
            return numbers.learning_rate * STEP**best, tried[best]
        low, high = (low - 2, high) if best == low else (low, high + 2)


def table(case, key):
    """Return the rows of a case: every rule with its regret over the rate tuned at 256, with fresh seeds."""
    tune_key, fresh_key = jax.random.split(key)
    tune_keys, keys = jax.random.split(tune_key, 4), jax.random.split(fresh_key, NUM_SEEDS)
    recipe: Any = tuning.named(case.optimizer, weight_decay=0.1 if case.optimizer != "sgd" else 1e-4)[0]
    usual = recipe.hyperparameters._replace(learning_rate=case.first_rate)
    recipe = dataclasses.replace(recipe, hyperparameters=usual)
    rate, _ = tuned(case, BASE, usual, tune_keys)
    given = usual._replace(learning_rate=rate)
    factor = BATCH_SIZE / BASE
    carried: dict[str, Hyperparameters] = {}
    for name, rule in rules.RULES.items():
        if all(getattr(given, field) is not None for field in rule.needs):
            try:
                carried[name] = jax.tree.map(float, rule.apply(given, factor))
            except ValueError:  # a memory below zero
                continue
    root = given._replace(learning_rate=rate * factor**0.5)
    best_rate, _ = tuned(case, BATCH_SIZE, root, tune_keys)
    carried["tuned"] = given._replace(learning_rate=best_rate)
    options = {"base": BASE, "batch_size": BATCH_SIZE, "num_examples": case.num_examples, "names": list(rules.RULES)}
    advised = advise.rules(case.problem, recipe, seed=1, **options)
    by_noise: Any = next(o for o in advised.outcomes if o.rule == "noise_scale")
    carried["noise_scale"] = given._replace(
        learning_rate=rate * by_noise.hyperparameters.learning_rate / advised.hyperparameters.learning_rate
    )
    ends = losses(case, BATCH_SIZE, list(carried.values()), keys)
    reference = ends[:, list(carried).index("tuned")]
    rows = []
    for name, numbers, end in zip(carried, carried.values(), ends.T, strict=True):
        finite = np.isfinite(end).all()
        mean, error = experiment.mean_and_error(end - reference) if finite else (np.inf, 0.0)
        derived = name in ("tuned", "noise_scale") or case.optimizer in rules.RULES[name].optimizers
        numbers = {field: value for field, value in numbers._asdict().items() if value is not None}
        rows.append(
            {"problem": case.problem.name, "optimizer": case.optimizer, "rule": name, "derived": derived, **numbers}
            | {"loss": float(end.mean()), "regret": mean, "error": error, "losses": end}
        )
    verdict = {"problem": case.problem.name, "optimizer": case.optimizer, "advised": advised.best}
    return rows, verdict | {
        "level": advised.level,
        "sentence": advised.sentence(),
        "noise_scale": advised.scale.b_simple,
    }


def agrees(rows, advice):
    """Return whether the advised rule is the best of the table, or within twice the error of the difference to it."""
    ran = {row["rule"]: row["losses"] for row in rows if row["rule"] != "tuned"}
    best = min(ran, key=lambda name: ran[name].mean())
    groups = [advice["advised"], *advice["level"]]
    if best in groups:
        return True
    mean, error = experiment.mean_and_error(ran[advice["advised"]] - ran[best])
    return bool(mean <= 2 * error)


def judge(results):
    checks, said = {}, []
    for rows, advice in results:
        name = f"{advice['optimizer']} on {advice['problem']}"
        regret = {row["rule"]: row["regret"] for row in rows}
        loss = {row["rule"]: row["loss"] for row in rows}
        fixed = {rule: x for rule, x in loss.items() if rule not in ("tuned", "noise_scale")}
        top = min(fixed, key=fixed.__getitem__)
        expected = "linear" if advice["optimizer"] == "sgd" else "square_root"
        least = next(row for row in rows if row["rule"] == top)
        gap = np.asarray(next(row["losses"] for row in rows if row["rule"] == expected)) - least["losses"]
        level = np.isfinite(gap).all() and gap.mean() <= 2 * gap.std(ddof=1) / len(gap) ** 0.5
        checks[f"{expected} is at the top for {name}"] = bool(level)
        checks[f"the noise scale is not twice as bad as the best for {name}"] = loss["noise_scale"] < 2 * fixed[top]
        checks[f"the command agrees for {name}"] = agrees(rows, advice)
        if advice["optimizer"] == "adamw":
            checks[f"linear ruins {name}"] = loss["linear"] > 2 * fixed[top]
            checks[f"decay in proportion harms {name}"] = loss["decay_linear"] > loss["none"]
        said.append(
            f"{name}: {top} ({fixed[top]:.3g}; tuned {loss['tuned']:.3g}; by the noise scale "
            f"{loss['noise_scale']:.3g}; {expected} {regret[expected]:+.2g} over tuned; the command says "
            f"{advice['advised']})"
        )
    return experiment.verdict(checks, "Least loss of a rule at 256: " + "; ".join(said) + ".")


def main(options: experiment.Options) -> experiment.Result:
    keys = jax.random.split(jax.random.key(options.seed), 8)
    results = [table(case, key) for case, key in zip(cases(options), keys, strict=False)]
    figure = draw(results)
    rows = [row for rows, advice in results for row in [*rows, advice]]
    return experiment.Result(rows, judge(results), figure)


def draw(results):
    """Draw the loss of every rule over that of the tuned rate, one panel for a case."""
    title = f"From B = {BASE} to {BATCH_SIZE}: loss over that of the rate tuned there (mean, two errors)"
    figure, axes = report.panels(len(results), title=title, width=4.2, height=4.4)
    for axis, (rows, advice) in zip(axes, results, strict=True):
        shown = sorted((row for row in rows if row["rule"] != "tuned"), key=lambda row: row["loss"])
        reference = next(row["loss"] for row in rows if row["rule"] == "tuned")
        for i, row in enumerate(shown):
            colour = report.COLOURS[0 if row["derived"] else 1]
            if not np.isfinite(row["loss"]) or row["loss"] > 100 * reference + 10:
                axis.annotate("diverged", (0.05, i), color=colour, va="center", xycoords=("axes fraction", "data"))
                continue
            ratio, error = row["loss"] / reference, 2 * row["error"] / reference
            axis.errorbar(ratio, i, xerr=error, fmt="o" if row["derived"] else "s", color=colour, capsize=2)
        axis.axvline(1, color="gray", linewidth=1)
        axis.set_yticks(range(len(shown)), [row["rule"] for row in shown], fontsize="small")
        axis.set(xscale="log", ylim=(len(shown) - 0.5, -0.5), xlabel="loss / tuned loss")
        axis.tick_params(axis="x", which="both", labelrotation=45, labelsize="small")
        axis.set_title(f"{advice['optimizer']}, {advice['problem']}", fontsize="small")
    for colour, marker, label in ((0, "o", "derived for it, or measured"), (1, "s", "not derived for it")):
        axes[0].plot([], [], marker, color=report.COLOURS[colour], label=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    experiment.run(main)
