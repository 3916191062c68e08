"""Does the best memory of Adam's second moment count examples or updates?

Question    Adam on digits, b1 = 0.9, the rate tuned for every b2: which b2 is best at each batch size, and what does it
            cost to carry b2 from B = 16 to 256 as it is, by its half-life in examples (b2^16), or as a fixed 0.999?
Prediction  The half-life rule: the best half-life, in examples, does not depend on B: its power of B is below 0.5 (it
            would be 1 if updates counted), as in a published table of language models (0.995 at 64 and 128, 0.97 at
            256, 0.95 at 512: half-lives of 8900, 17700, 5800 and 6900 examples; arXiv 2507.07101). Carried by half-life
            the loss is no more than 1.1 times that of the best b2; as it is, no less.
Cost        2 minutes on two CPU cores. --full, 8 minutes: a small transformer on Shakespeare.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.scaling_rules import transformer
from gdjax import descent, problems, report, sweep
from gdjax.commands import experiment

FORGETTING = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)  # 1 - b2
RATES = 2.0 ** np.arange(-2, 3)  # times the middle one
BASE, LARGE = 16, 256
LEVEL = 1.02  # a loss that is as good as the best


def losses(problem, batch_size, num_examples, middle, keys, forgetting):
    """Return the loss at the end [S, R, F] of every rate and b2."""
    judged = jax.tree.map(lambda x: x[:1440], problem.train)
    num_updates = num_examples // batch_size

    def train(point):
        evaluate = partial(problem.evaluate, names=("loss",))
        optimizer = optax.adam(point["rate"], b1=0.9, b2=1 - point["forgetting"])
        options = {"key": point["key"], "batch_size": batch_size, "num_updates": num_updates, "every": num_updates}
        _, ends = descent.train(
            problem, optimizer, record=lambda state, info: evaluate(state.params, judged)["loss"], **options
        )
        return ends[-1]

    rates = middle * RATES * math.sqrt(batch_size / BASE)
    found = sweep.map(train, sweep.grid(key=keys, rate=rates, forgetting=jnp.asarray(forgetting)), chunk_size=4)
    return np.where(np.isfinite(found), found, np.inf)


def main(options: experiment.Options) -> experiment.Result:
    problem, sizes, num_examples, middle, num_seeds = problems.digits_mlp((64,)), (4, 16, 64, 256), 6144, 0.005, 4
    if options.full:
        problem, sizes, num_examples, middle, num_seeds = transformer(), (16, 64, 256), 4096, 0.008, 2
    if options.smoke:
        sizes, num_examples, num_seeds = (16, 256), 512, 2
    keys = jax.random.split(jax.random.key(options.seed), num_seeds)
    rows, best = [], {}
    for size in sizes:
        found = losses(problem, size, num_examples, middle, keys, FORGETTING)
        means = found.mean(0)
        at = means.argmin(0)  # the rate that is best for each b2
        best[size] = means.min(0), found[:, at, np.arange(len(FORGETTING))].std(0, ddof=1) / num_seeds**0.5
        least = best[size][0]
        good = [f for f, loss in zip(FORGETTING, least, strict=True) if loss <= LEVEL * least.min()]
        chosen = FORGETTING[int(least.argmin())]
        rows.append(
            {"batch_size": size, "b2": [1 - f for f in FORGETTING], "losses": least, "errors": best[size][1]}
            | {
                "best_b2": 1 - chosen,
                "half_life": half_life(chosen, size),
                "rate_at_edge": at[int(least.argmin())] in (0, 4),
            }
            | {"as_good": [1 - f for f in good]}
        )
    return experiment.Result(rows, judge(rows, best), draw(rows, problem.name))


def half_life(forgetting, batch_size):
    """Return the half-life of the second moment in examples."""
    return batch_size * math.log(0.5) / math.log1p(-forgetting)


def not_told(row):
    """Return the least and the largest b2 whose loss is not two standard errors of the difference above the least."""
    losses, errors = np.asarray(row["losses"]), np.asarray(row["errors"])
    i = int(losses.argmin())
    near = [
        b2 for b2, x, e in zip(row["b2"], losses, errors, strict=True) if x - losses[i] <= 2 * np.hypot(e, errors[i])
    ]
    return min(near), max(near)


def carried(best, forgetting):
    """Return the loss at LARGE for 1 - b2, interpolated between those tried."""
    losses, _ = best[LARGE]
    x = np.log(np.asarray(FORGETTING))[::-1]
    return float(np.interp(math.log(min(forgetting, FORGETTING[0])), x, losses[::-1]))


def judge(rows, best):
    sizes = np.asarray([row["batch_size"] for row in rows])
    power = float(np.polyfit(np.log(sizes), np.log([row["half_life"] for row in rows]), 1)[0])
    base = next(row for row in rows if row["batch_size"] == BASE)
    by_half_life = carried(best, 1 - base["best_b2"] ** (LARGE / BASE))
    as_it_is, fixed, least = carried(best, 1 - base["best_b2"]), carried(best, 0.001), float(best[LARGE][0].min())
    checks = {
        "the half-life in examples has a power of B below 0.5": power < 0.5,
        "carried by half-life the loss is at most 1.1 times the best": by_half_life <= 1.1 * least,
        "as it is no less than by half-life": as_it_is >= by_half_life,
    }
    each = ", ".join(
        f"{row['best_b2']:.3f} at {row['batch_size']} ({row['half_life']:.0f} examples; not told from it: "
        "{:.3f} to {:.3f})".format(*not_told(row))
        for row in rows
    )
    return experiment.verdict(
        checks,
        f"Best b2: {each}; half-life as the power {power:.2f} of B. From B = {BASE} to {LARGE}, loss over the best: by "
        f"half-life {by_half_life / least:.2f}, as it is {as_it_is / least:.2f}, 0.999 {fixed / least:.2f}.",
    )


def draw(rows, name):
    title = f"{name}, Adam: loss at the best rate against b2 (mean, two standard errors), and where it is least"
    figure, (left, right) = report.panels(2, title=title, width=6)
    for i, row in enumerate(rows):
        half_lives = [half_life(1 - b2, row["batch_size"]) for b2 in row["b2"]]
        relative = np.asarray(row["losses"]) / np.min(row["losses"])
        style = {"color": report.COLOURS[i], "marker": "os^D"[i], "capsize": 2, "markersize": 4}
        errors = 2 * np.asarray(row["errors"]) / np.min(row["losses"])
        for axis, x in ((left, [1 - b2 for b2 in row["b2"]]), (right, half_lives)):
            axis.errorbar(x, relative, yerr=errors, label=f"B = {row['batch_size']}", **style)
    for axis, label in ((left, "1 - b2"), (right, "half-life of the second moment (examples)")):
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="loss / least loss at this B", ylim=(0.5, 10))
        axis.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    experiment.run(main)
