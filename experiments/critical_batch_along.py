"""How does the critical batch size move along a run, and where does branching measure curvature instead of noise?

Question    From six checkpoints of a run at B_0 = 4 and a constant rate, branches of k B_0 are trained on a window of
            examples (Merrill et al. 2025, arXiv 2505.23971). Which B keeps a fraction f = 0.8 of the progress of B_0,
            each branch at its best rate, and which ends, at k times the rate, within 10 % of the loss of B_0? How do
            these compare with B_simple and B_noise at the checkpoint?
Prediction  Digits: the B that keeps f is within a factor of 2 of B_0 + (1 / f - 1) (B_0 + B_noise) at every checkpoint
            whose progress is known; it grows along the run, as B_simple and B_noise do. The noisy quadratic settles on
            its noise: at the last two checkpoints the B within 10 % is that of the floor, which curvature decides,
            within 30 %, and less than a fifth of B_simple; the B that keeps f is refused there, as progress is within
            two standard errors of 0.
Cost        2 minutes on two CPU cores.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.critical_batch import HESSIAN_BATCH, crossing
from gdjax import descent, noise, problems, report, theory
from gdjax.commands import experiment
from gdjax.problem import Problem

BASE, KEPT, TOLERANCE = 4, 0.8, 0.1  # B_0; f; of the loss, relative
SIZES = tuple(BASE * 2**i for i in range(8))
RATES = 0.25, 0.5, 1.0, 2.0  # of a branch, in units of k times the rate of the run
NUM_CHECKPOINTS = 6


class Setting(NamedTuple):
    """A problem, the rate at B_0, the metric that branches are judged by, examples at the first checkpoint and after.

    Each further checkpoint is at twice the examples. `window` is the length of a branch, in examples.
    """

    problem: Problem
    rate: float
    metric: str
    first: int
    window: int
    num_seeds: int


def settings() -> list[Setting]:
    return [
        Setting(problems.digits_mlp((32,)), 0.05, "loss", 256, 256, 16),
        Setting(problems.noisy_quadratic(num_examples=2**16), 0.1, "excess_loss", 1024, 4096, 48),
    ]


def checkpoints(setting: Setting, key):
    """Return ([C] updates made, parameters [C, ...]) along one run at B_0."""
    updates = setting.first // BASE * 2 ** np.arange(NUM_CHECKPOINTS)
    options = {"batch_size": BASE, "num_updates": int(updates[-1]), "every": int(updates[0]), "key": key}
    sgd, record = optax.sgd(setting.rate), lambda state, info: state.params
    _, along = jax.jit(partial(descent.train, setting.problem, sgd, record=record, **options))()
    return updates, jax.tree.map(lambda leaf: leaf[updates // updates[0] - 1], along)


def measured(setting: Setting, params):
    """Return the metric, of all examples of digits and of one where it is the same for all."""
    count = 1 if setting.metric == "excess_loss" else setting.problem.num_examples
    examples = jax.tree.map(lambda x: x[:count], setting.problem.train)
    return setting.problem.evaluate(params, examples, names=(setting.metric,))[setting.metric]


def branches(setting: Setting, starts, key):
    """Return the metric at the end of every branch, no larger than its window, [B, C, R, S]: a stream for each seed."""
    problem, window = setting.problem, setting.window

    def end(size, params, rate, key):
        from_here = dataclasses.replace(problem, init=lambda key: params)
        count = window // size
        state, _ = descent.train(
            from_here, optax.sgd(rate * size / BASE), key=key, batch_size=size, num_updates=count, every=count
        )
        return measured(setting, state.params)

    def at(size):
        over_seeds = jax.vmap(partial(end, size), (None, None, 0))
        over_rates = jax.vmap(over_seeds, (None, 0, None))
        keys, rates = jax.random.split(key, setting.num_seeds), setting.rate * jnp.asarray(RATES)
        return jax.jit(lambda starts: jax.lax.map(lambda params: over_rates(params, rates, keys), starts))(starts)

    return np.stack([np.asarray(at(size), float) for size in SIZES if size <= window])


def scales(problem: Problem, starts, key):
    """Return B_simple and B_noise at every checkpoint, [C] each."""
    count = min(problem.num_examples, 4096)

    def measure(params):
        simple = noise.measure(problem.loss, params, problem.train, key, num_examples=count)
        pairs = noise.measure_hessian(problem.loss, params, problem.train, key, batch_size=HESSIAN_BATCH, num_pairs=24)
        return simple.b_simple, pairs.b_noise

    return [np.asarray(x, float) for x in jax.jit(lambda starts: jax.lax.map(measure, starts))(starts)]


def judged(setting: Setting, updates, before, ends, b_simple, b_noise) -> list[dict]:
    """Return a row for each checkpoint: the B that keeps f, that within the tolerance, and what theory says of both."""
    rows, sizes = [], SIZES[: len(ends)]
    for i, count in enumerate(updates):
        means = np.where(np.isfinite(ends[:, i]).all(-1), ends[:, i].mean(-1), np.inf)  # [B, R]
        best, linear = means.min(1), means[:, RATES.index(1.0)]
        of_base = ends[0, i, int(means[0].argmin())]
        progress, error = before[i] - of_base.mean(), of_base.std(ddof=1) / len(of_base) ** 0.5
        made = before[i] - best
        known = bool(progress > 2 * error)
        with np.errstate(divide="ignore"):
            lost = np.where(made > 0, progress / made, np.inf)  # 1 / f of every size
        rows.append(
            {
                "problem": setting.problem.name,
                "examples": int(count) * BASE,
                "before": before[i],
                "progress": progress,
                "error": error,
                "keeps": crossing(sizes, lost, 1 / KEPT) if known else None,
                "keeps_by_theory": float(theory.critical.batch_size_keeping(KEPT, BASE, b_noise[i])),
                "within": crossing(sizes, linear / linear[0], 1 + TOLERANCE),
                "b_simple": b_simple[i],
                "b_noise": b_noise[i],
                "best": best,
                "linear": linear,
            }
        )
    return rows


def main(options: experiment.Options) -> experiment.Result:
    rows = []
    for setting in settings()[: 1 if options.smoke else None]:
        setting = setting._replace(first=8, window=64, num_seeds=2) if options.smoke else setting
        run_key, branch_key, noise_key = jax.random.split(jax.random.key(options.seed), 3)
        updates, starts = checkpoints(setting, run_key)
        before = np.asarray(jax.lax.map(partial(measured, setting), starts), float)
        ends = branches(setting, starts, branch_key)
        rows += judged(setting, updates, before, ends, *scales(setting.problem, starts, noise_key))
    h = 1 / jnp.arange(1.0, 101.0)
    floor = float(theory.critical.batch_size_at_floor(TOLERANCE, BASE, h, noise=h, learning_rate=0.1))
    return experiment.Result(rows, judge(rows, floor), draw(rows, floor))


def judge(rows, floor: float) -> str:
    digits = [row for row in rows if row["problem"] == "digits-mlp"]
    known = [row for row in digits if row["keeps"] is not None]
    last = [row for row in rows if row["problem"] == "noisy-quadratic"][-2:]
    checks = {
        "digits: the B that keeps f is within a factor of 2 of theory's": all(
            0.5 < row["keeps"] / row["keeps_by_theory"] < 2 for row in known
        ),
        "digits: it grows along the run": bool(known) and known[-1]["keeps"] > known[0]["keeps"],
        "digits: so do B_simple and B_noise": all(
            digits[-1][name] > digits[0][name] for name in ("b_simple", "b_noise")
        ),
        "settled: the B within 10 % is that of the floor, within 30 %": all(
            1 / 1.3 < row["within"] / floor < 1.3 for row in last
        ),
        "settled: it is less than a fifth of B_simple": all(row["within"] < row["b_simple"] / 5 for row in last),
        "settled: the B that keeps f is refused": all(row["keeps"] is None for row in last),
    }
    text = "; ".join(
        f"{row['problem']} after {row['examples']} examples: "
        + ("refused" if row["keeps"] is None else f"{row['keeps']:.0f}")
        + f" keeps f (theory {row['keeps_by_theory']:.0f}), {row['within']:.0f} is within 10 %, "
        f"B_simple {row['b_simple']:.0f}, B_noise {row['b_noise']:.0f}"
        for row in rows
    )
    return experiment.verdict(checks, f"{text}. On the floor {floor:.0f} is within 10 %, by curvature.")


def draw(rows, floor: float):
    names = list(dict.fromkeys(row["problem"] for row in rows))
    title = "The critical batch size along a run at B = 4"
    figure, (*axes, aside) = report.panels(len(names) + 1, title=title, width=5)
    lines = {
        "keeps": f"keeps {KEPT:g} of the progress, at its best rate",
        "keeps_by_theory": "the same by theory, from B_noise",
        "within": f"within {TOLERANCE:.0%} of the loss, at k times the rate",
        "b_simple": "B_simple",
        "b_noise": "B_noise",
    }
    for axis, name in zip(axes, names, strict=True):
        here = [row for row in rows if row["problem"] == name]
        x = [row["examples"] for row in here]
        for i, (key, label) in enumerate(lines.items()):
            y = [np.nan if row[key] is None else row[key] for row in here]
            axis.plot(x, y, "os^Dv"[i] + ("-", ":", "-", "--", "-.")[i], color=report.COLOURS[i], label=label)
        if name == "noisy-quadratic":
            axis.axhline(floor, color="0.5", linewidth=1, label="on the floor, by curvature")
        axis.set(xscale="log", yscale="log", xlabel="examples seen", ylabel="batch size (examples)", title=name)
        axis.set_xticks(x, x)
        axis.minorticks_off()
    aside.axis("off")
    aside.legend(*axes[-1].get_legend_handles_labels(), frameon=False, loc="center left")
    return figure


if __name__ == "__main__":
    experiment.run(main)
