"""How should weight decay change with the batch size?

Question    AdamW at a fixed number of examples, 512 digits of which a fifth have wrong labels, judged by clean test
            examples: which weight decay is best at B = 16, 64 and 256, at one rate and at one that grows as sqrt(B)?
            For an ordinary network, and for one whose loss ignores the scale of its weights.
Prediction  With the rate as sqrt(B), the best decay grows as B^p with p within 0.3 of 1/2 for the ordinary network (the
            invariant of `rules.adamw_invariant`). With the rate fixed, it grows in proportion to B, p within 0.3 of 1,
            for the scale-free network (`rules.decay_linear`, arXiv 2505.13738). Decay held constant at the rate as
            sqrt(B) costs no more than 5 % of the test loss for the ordinary network.
Cost        3 minutes on two CPU cores.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import descent, problems, report, sweep
from gdjax.commands import experiment
from gdjax.problem import Problem
from gdjax.problems import datasets, models

SIZES = (16, 64, 256)
DECAYS = 2.0 ** np.arange(-7, 8, 1.5)
NUM_EXAMPLES, NUM_TRAIN, WRONG, WIDTH = 16384, 512, 0.2, 64
RATE, NUM_SEEDS = 0.005, 6
TOLERATED = 1.1  # of the least loss: where little decay does no harm, the best one is not defined, but this is


def noisy_digits(key):
    """Return (training examples, some with random labels; clean test examples)."""
    (x, labels), test = datasets.digits()
    x, labels = x[:NUM_TRAIN], labels[:NUM_TRAIN]
    which_key, label_key = jax.random.split(key)
    wrong = jax.random.uniform(which_key, labels.shape) < WRONG
    return (x, jnp.where(wrong, jax.random.randint(label_key, labels.shape, 0, 10), labels)), test


def ordinary(data):
    """Return the usual multilayer perceptron."""
    train, test = data
    return problems.classification(models.mlp((64, WIDTH, 10)), datasets.Split(train, test), num_classes=10)


def scale_free(data):
    """Return a network of two matrices, each divided by its norm: its loss does not know their scale."""
    train, test = data
    rows, gain = (64, WIDTH), 30.0

    def init(key):
        first, second = jax.random.split(key)
        shapes = rows, (WIDTH, 10)
        return [
            jax.random.normal(k, shape) / math.sqrt(shape[0]) for k, shape in zip((first, second), shapes, strict=True)
        ]

    def loss(params, example):
        x, label = example
        first, second = (w / jnp.linalg.norm(w) for w in params)
        logits = gain * jax.nn.relu(x @ first) @ second
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    return Problem(init, loss, train, test, name="scale-free")


def losses(problem, batch_size, rate, decays, keys):
    """Return the test loss at the end, [S, D]."""
    num_updates = NUM_EXAMPLES // batch_size

    def train(point):
        _, ends = descent.train(
            problem,
            optax.adamw(rate, weight_decay=point["decay"]),
            key=point["key"],
            batch_size=batch_size,
            num_updates=num_updates,
            every=num_updates,
            record=lambda state, info: problem.evaluate(state.params, on="test", names=("loss",))["loss"],
        )
        return ends[-1]

    found = sweep.map(train, sweep.grid(key=keys, decay=decays), chunk_size=4)
    return np.where(np.isfinite(found), found, np.inf)


def best_decay(decays, found):
    """Return the decay of the least mean loss, by a parabola through the logarithm of it and its neighbours."""
    means = found.mean(0)
    i = int(means.argmin())
    if not 0 < i < len(decays) - 1:
        return float(decays[i])
    x, y = np.log(decays[i - 1 : i + 2]), np.log(means[i - 1 : i + 2])
    a, b, _ = np.polyfit(x - x[1], y, 2)
    return float(np.exp(x[1] + np.clip(-b / (2 * a), -1, 1)))


def largest_decay(decays, losses):
    """Return the largest decay whose loss is tolerated, interpolated between logarithms."""
    limit = TOLERATED * losses.min()
    i = int(np.flatnonzero(losses <= limit)[-1])
    if i == len(decays) - 1:
        return float(decays[i])
    (x, y), (a, b) = np.log(decays[i : i + 2]), np.log(losses[i : i + 2])
    return float(np.exp(x + (y - x) * (np.log(limit) - a) / (b - a)))


def main(options: experiment.Options) -> experiment.Result:
    data_key, run_key = jax.random.split(jax.random.key(options.seed))
    data = noisy_digits(data_key)
    networks = {"ordinary": ordinary(data), "scale-free": scale_free(data)}
    sizes, decays = (SIZES[1:], DECAYS[::4]) if options.smoke else (SIZES, DECAYS)
    keys = jax.random.split(run_key, 2 if options.smoke else NUM_SEEDS)
    rows = []
    for name, problem in networks.items():
        for rule, power in (("fixed", 0.0), ("sqrt", 0.5)):
            for size in sizes:
                rate = RATE * (size / SIZES[0]) ** power
                found = losses(problem, size, rate, decays, keys)
                mean, error = found.mean(0), found.std(0, ddof=1) / len(keys) ** 0.5
                rows.append(
                    {"network": name, "rate_rule": rule, "batch_size": size, "rate": rate, "decays": decays}
                    | {"losses": mean, "errors": error, "best_decay": best_decay(decays, found)}
                )
    return experiment.Result(rows, judge(rows), draw(rows))


def judge(rows):
    power, constant, largest = {}, {}, {}
    for name in ("ordinary", "scale-free"):
        for rule in ("fixed", "sqrt"):
            mine = [row for row in rows if (row["network"], row["rate_rule"]) == (name, rule)]
            x, y = (np.log([row[field] for row in mine]) for field in ("batch_size", "best_decay"))
            power[name, rule] = float(np.polyfit(x, y, 1)[0])
            ends = [largest_decay(np.asarray(row["decays"]), np.asarray(row["losses"])) for row in mine]
            largest[name, rule] = float(np.polyfit(x, np.log(ends), 1)[0])
            last = mine[-1]
            kept = np.interp(np.log(mine[0]["best_decay"]), np.log(last["decays"]), last["losses"])
            constant[name, rule] = float(kept / np.min(last["losses"]))
    checks = {
        "as B^(1/2) for the ordinary network, rate as sqrt(B)": abs(power["ordinary", "sqrt"] - 0.5) < 0.3,
        "in proportion to B for the scale-free network, rate fixed": abs(power["scale-free", "fixed"] - 1) < 0.3,
        "constant decay costs at most 5 % for the ordinary network": constant["ordinary", "sqrt"] <= 1.05,
    }
    names = {"fixed": "rate fixed", "sqrt": "rate as sqrt(B)"}
    each = "; ".join(
        f"{name}, {names[rule]}: power {p:.2f}, the decay of B = 16 costs {constant[name, rule] - 1:+.0%} at 256, "
        f"largest decay within {TOLERATED - 1:.0%} of the least loss: power {largest[name, rule]:.2f}"
        for (name, rule), p in power.items()
    )
    return experiment.verdict(checks, f"Best decay as a power of B: {each}.")


def draw(rows):
    title = "Test loss against weight decay (mean, two standard errors); 512 digits, a fifth of the labels wrong"
    figure, axes = report.panels(4, title=title, width=4)
    panels = [(name, rule) for name in ("ordinary", "scale-free") for rule in ("fixed", "sqrt")]
    for axis, (name, rule) in zip(axes, panels, strict=True):
        for i, row in enumerate(row for row in rows if (row["network"], row["rate_rule"]) == (name, rule)):
            finite = np.isfinite(row["losses"])
            axis.errorbar(
                np.asarray(row["decays"])[finite], row["losses"][finite], yerr=2 * row["errors"][finite],
                color=report.COLOURS[i], marker="os^"[i], markersize=4, capsize=2, label=f"B = {row['batch_size']}",
            )  # fmt: skip
            axis.axvline(row["best_decay"], color=report.COLOURS[i], linestyle=":", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="weight decay")
        axis.set_title(f"{name}, rate {'fixed' if rule == 'fixed' else 'as sqrt(B)'}", fontsize="small")
    axes[0].set_ylabel("test loss")
    axes[0].legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    experiment.run(main)
