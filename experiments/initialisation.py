"""Weights are drawn from a Gaussian: does its scale matter, or its shape, and how much with depth?

Question    ReLU networks of width 32 on digits, 2 to 16 layers, weights of deviation gain / sqrt(fan_in): what becomes
            of the signal and of the gradient on the way through, and how far does SGD come in 5 epochs, tuned?
Prediction  The mean square of the logits is gain^2 (gain^2 / 2)^(layers - 1) times that of the input, exactly in
            expectation over draws (He et al. 2015, arXiv 1502.01852). The gradients of the first and of the last hidden
            weights differ by less than a factor of 2 at every gain, as one carries the signal backwards and the other
            forwards. Two layers train to within a factor of 5 of the best at any gain; at 16 only He's sqrt(2) does,
            and gain 1/2 does not train at all. Uniform weights of He's deviation do as Gaussian ones, within a fifth.
Cost        80 s on two CPU cores.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import descent, gradients, problems, sweep
from gdjax import report as plots
from gdjax.commands import experiment
from gdjax.problems import datasets, models

WIDTH, DEPTHS = 32, (2, 4, 8, 16)
HE = 2**0.5
GAINS = (0.5, 1.0, HE, 2.0, 3.0)
NUM_DRAWS, NUM_SEEDS, NUM_EPOCHS, BATCH_SIZE = 2000, 5, 5, 32
NUM_RATES, LOWEST, HIGHEST = 14, 2.0**-7, 4.0  # the lowest is divided by what the signal is multiplied by, if above 1
CHANCE, UNTRAINED = float(np.log(10)), 0.95  # loss of guessing, and the part of it that counts as not trained
STANDARD_ERRORS = 4


def multiplier(gain, depth):
    """Return the mean square of the logits over that of the input, in expectation."""
    return gain**2 * (gain**2 / 2) ** (depth - 1)


def uniform(key, shape):
    return jax.random.uniform(key, shape, minval=-(3**0.5), maxval=3**0.5)  # of variance 1


def weighted(problem, depth, draw, gain):
    """Return the problem with weights of deviation gain / sqrt(fan_in), biases zero."""

    def init(key):
        blocks = draw(key, (depth + 1, WIDTH, WIDTH))  # one draw compiles faster than one for each layer
        weights = [blocks[:2].reshape(2 * WIDTH, WIDTH), *blocks[2:-1], blocks[-1, :, :10]]
        return [{"weight": gain * w / jnp.sqrt(float(w.shape[0])), "bias": jnp.zeros(w.shape[1])} for w in weights]

    return dataclasses.replace(problem, init=init)


def at_start(problem, apply, depth, draw, point):
    """Return mean square of logits over that of inputs, and gradient norms of the first and last hidden weights."""
    problem = weighted(problem, depth, draw, point["gain"])
    params, batch = problem.init(point["key"]), jax.tree.map(lambda x: x[:64], problem.train)
    signal = jnp.mean(apply(params, batch[0]) ** 2) / jnp.mean(batch[0] ** 2)
    grad = gradients.mean(problem.loss)(params, batch).grad
    return signal, jnp.linalg.norm(grad[1]["weight"]), jnp.linalg.norm(grad[-2]["weight"])


def train(problem, depth, draw, num_epochs, point):
    """Return the training loss at the end."""
    problem = weighted(problem, depth, draw, point["gain"])
    optimizer, key = optax.sgd(point["rate"]), point["key"]
    return descent.train(problem, optimizer, key=key, batch_size=BATCH_SIZE, num_epochs=num_epochs)[1]["loss"][-1]


def measure(depth, num_draws, num_epochs, key):
    """Return a row for each gain, and one for uniform weights."""
    model = models.mlp((64, *[WIDTH] * (depth - 1), 10))
    problem = problems.classification(model, datasets.digits(), num_classes=10)
    keys = jax.random.split(key, num_draws)
    for name, draw, gains in (("Gaussian", jax.random.normal, GAINS), ("uniform", uniform, (HE,))):
        trained = partial(train, problem, depth, draw, num_epochs)
        starts = sweep.map(partial(at_start, problem, model.apply, depth, draw), sweep.grid(gain=gains, key=keys))
        for gain, signal, first, last in zip(gains, *starts, strict=True):
            expected = multiplier(gain, depth)
            rates = np.geomspace(LOWEST / max(1.0, expected), HIGHEST, NUM_RATES)
            losses = sweep.map(trained, sweep.grid(key=keys[:NUM_SEEDS], rate=rates, gain=[gain]))[..., 0]
            best = experiment.best_rate(rates, losses)
            mean, error = experiment.mean_and_error(signal)
            yield {
                "shape": name,
                "layers": depth,
                "gain": gain,
                "signal": mean,
                "standard_error": error,
                "signal_expected": expected,
                "gradient_first": float(np.median(first)),
                "gradient_last": float(np.median(last)),
                "learning_rate": best.rate,
                "inside_grid": best.inside,
                "losses": best.values.tolist(),
                "loss": float(np.median(best.values)),
            }


def judge(rows):
    gaussian = {(row["layers"], row["gain"]): row for row in rows if row["shape"] == "Gaussian"}
    even = {row["layers"]: row for row in rows if row["shape"] == "uniform"}
    score = max(abs(row["signal"] - row["signal_expected"]) / row["standard_error"] for row in rows)
    ratios = [row["gradient_first"] / row["gradient_last"] for row in gaussian.values() if row["layers"] > 2]
    apart = max(max(ratio, 1 / ratio) if ratio > 0 else np.inf for ratio in ratios)
    least = {depth: min(gaussian[depth, gain]["loss"] for gain in GAINS) for depth in sorted(even)}
    shallow, deep = ([gain for gain in GAINS if gaussian[depth, gain]["loss"] <= 5 * least[depth]] for depth in (2, 16))
    shape = max(abs(even[depth]["loss"] / gaussian[depth, HE]["loss"] - 1) for depth in even)
    small = gaussian[16, 0.5]["loss"] / CHANCE
    learned = [row for row in rows if row["loss"] < UNTRAINED * CHANCE]
    checks = {
        "the signal is as expected": score < STANDARD_ERRORS,
        "gradients of first and last weights differ less than twofold": apart < 2,
        "two layers train at any gain": len(shallow) == len(GAINS),
        "sixteen layers train at He's gain alone": deep == [HE],
        "sixteen layers do not train at gain 1/2": small > UNTRAINED,
        "uniform weights are within a fifth of Gaussian ones": shape < 0.2,
        "best rates are inside the grid, where anything is learned": all(row["inside_grid"] for row in learned),
    }
    losses = ", ".join(f"{gaussian[16, gain]['loss']:.3g} at {gain:.2g}" for gain in GAINS)
    spread = max(np.ptp(gaussian[depth, HE]["losses"]) / gaussian[depth, HE]["loss"] for depth in even)
    return experiment.verdict(
        checks,
        f"The signal is within {score:.1f} standard errors of its expectation; gradients of first and last hidden "
        f"weights differ up to {apart:.1f}-fold. Within 5 times the least loss: {len(shallow)} of {len(GAINS)} gains "
        f"with 2 layers, {', '.join(f'{gain:.2g}' for gain in deep)} with 16, where gain 1/2 ends at {small:.2f} of "
        f"guessing's loss. The loss with 16: {losses} ({CHANCE:.3g} by guessing). Uniform weights: within {shape:.0%} "
        f"of the Gaussian's loss, whose own seeds spread over up to {spread:.0%} of it.",
    )


def main(options: experiment.Options) -> experiment.Result:
    num_draws, num_epochs, depths = (50, 1, DEPTHS[::3]) if options.smoke else (NUM_DRAWS, NUM_EPOCHS, DEPTHS)
    key = jax.random.key(options.seed)
    rows = [row for depth in depths for row in measure(depth, num_draws, num_epochs, jax.random.fold_in(key, depth))]
    return experiment.Result(rows, judge(rows), draw(rows))


def draw(rows):
    title = "ReLU networks of width 32 on digits: signal, gradient and training against depth and the scale of weights"
    figure, (left, middle, right) = plots.panels(3, title=title, width=4.2, height=4)
    for i, gain in enumerate(GAINS):
        shown = [row for row in rows if row["shape"] == "Gaussian" and row["gain"] == gain]
        depths, label = [row["layers"] for row in shown], f"gain {gain:.3g}"
        left.plot(depths, [row["signal"] for row in shown], "o", color=plots.COLOURS[i], label=label)
        plots.band(left, depths, np.array([[row["signal_expected"] for row in shown]]), "", i)
        for name, line in (("gradient_first", "o-"), ("gradient_last", "x--")):
            middle.plot(depths, [row[name] for row in shown], line, color=plots.COLOURS[i])
        plots.band(right, depths, np.array([row["losses"] for row in shown]).T, label, i)
    shown = [row for row in rows if row["shape"] == "uniform"]
    layers, losses = ([row[name] for row in shown] for name in ("layers", "loss"))
    right.plot(layers, losses, "ks", fillstyle="none", label="uniform")
    right.axhline(CHANCE, color="gray", linewidth=1)
    left.set(ylabel="signal: mean square of logits over inputs", yscale="log")
    middle.set(ylabel="gradient norm, first (o) and last (x)", yscale="log")
    right.set(ylabel="training loss (gray: guessing)", yscale="log")
    for axis in (left, middle, right):
        axis.set(xlabel="layers", xscale="log")
        axis.set_xticks(DEPTHS, list(map(str, DEPTHS)))
        axis.minorticks_off()
        if axis is not middle:
            axis.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    experiment.run(main)
