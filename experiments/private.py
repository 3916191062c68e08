"""What does privacy cost: accuracy against the noise on clipped gradients, and against the batch size.

Question    A network with one hidden layer of 32, SGD on gradients clipped to norm 1, Gaussian noise of deviation sigma
            on their sum (DP-SGD, Abadi et al. 2016, arXiv 1607.00133), some epochs at the best rate: which test
            accuracy?
Prediction  Accuracy falls with the noise multiplier sigma at every batch size B, and a larger B bears more noise. While
            the best rate is proportional to B, a number of epochs adds noise of deviation ~ sigma / sqrt(B) to the
            parameters: runs with equal sigma / sqrt(B) agree to within 3 points. Clipping alone costs less than 2
            points. At equal privacy, the epsilon that DP-SGD promises for all updates together, the largest batch is
            the best.
Privacy     Batches are Poisson samples, of B examples on average, and sums over them are divided by B, as the promise
            asks for. Epsilon is at delta = 1e-4 for digits and 1e-5 for MNIST, by privacy loss distributions
            (`gdjax.privacy`). Tuning the rate on the same data is not counted in it.
Cost        10 minutes on two CPU cores: digits, 10 epochs. --full: MNIST, 2 epochs. Batches are padded to a size that
            they never exceed, four times B at B = 15.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, descent, gradients, privacy, problems, tuning
from gdjax import report as plots
from gdjax.commands import experiment

MAX_NORM = 1.0
MULTIPLIERS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # as the square roots of the batch sizes, powers of 2 apart
RATE_FACTORS = 2.0 ** np.arange(-3, 4)  # around a guess; the grid grows where the best rate is at its edge


class Setting(NamedTuple):
    """Batch sizes fourfold apart, which divide the examples of all epochs, and where to look for rates.

    Attributes:
        rate_of_noise: the best rate is about this times B / sigma where the noise rules.
        delta: at which epsilon is said, below 1 / N.
    """

    name: str
    batch_sizes: tuple[int, ...]
    num_epochs: int
    num_seeds: int
    rate_of_noise: float
    delta: float


DIGITS = Setting("digits", (15, 60, 240, 960), 10, 4, 0.01, 1e-4)
MNIST = Setting("MNIST", (25, 100, 400, 1600), 2, 3, 0.002, 1e-5)


def train(problem, batch_size, num_updates, noise_multiplier, params, batch_key, key, learning_rate):
    """Return the training loss and the test accuracy at the end."""

    def loss(params, keyed):
        (example, _), _ = keyed
        return problem.loss(params, example)

    def weight(keyed):
        (_, is_one), _ = keyed
        return is_one

    noise = {"noise_multiplier": noise_multiplier, "noise_key": lambda batch: batch[1][0]} if noise_multiplier else {}
    gradient = gradients.clipped(loss, MAX_NORM, weight=weight, expected_batch_size=batch_size, **noise)
    method = descent.with_keys(descent.method(gradient, optax.sgd(learning_rate)), key)
    batches = batching.poisson(batch_key, problem.num_examples, batch_size=batch_size, num_updates=num_updates)
    state, _ = descent.run(
        method, method.init(params), problem.train, batches, every=num_updates, fetch=batching.take_padded
    )
    train_loss = jax.vmap(problem.loss, (None, 0))(state.params, problem.train).mean()
    return train_loss, jax.vmap(problem.metrics["accuracy"], (None, 0))(state.params, problem.test).mean()


def baseline(problem, batch_size, params, stream, learning_rate):
    """Return the same without clipping or noise."""
    method = descent.method(gradients.mean(problem.loss), optax.sgd(learning_rate))
    batches = batching.batches(stream, batch_size)
    state, _ = descent.run(method, method.init(params), problem.train, batches, every=len(batches))
    train_loss = jax.vmap(problem.loss, (None, 0))(state.params, problem.train).mean()
    return train_loss, jax.vmap(problem.metrics["accuracy"], (None, 0))(state.params, problem.test).mean()


def tuned(train, starts, rates):
    """Return accuracies [S] at the rate of least training loss, that rate, and whether it is inside the grid."""
    over_rates = jax.vmap(train, (None,) * len(starts) + (0,))
    run = jax.jit(jax.vmap(over_rates, (0,) * len(starts) + (None,)))
    accuracies = {}

    def losses_at(rates):
        losses, of_rates = run(*starts, jnp.asarray(rates))
        accuracies.update(zip(rates.tolist(), np.asarray(of_rates).T, strict=True))
        return np.asarray(losses).mean(0)

    best = tuning.minimise(losses_at, rates)
    return accuracies[best.rate], best.rate, not best.at_edge


def epsilon(problem, setting, batch_size, noise_multiplier):
    """Return the epsilon of a run, the smaller the more private."""
    return privacy.epsilon(
        noise_multiplier=noise_multiplier,
        num_examples=problem.num_examples,
        batch_size=batch_size,
        num_updates=setting.num_epochs * problem.num_examples // batch_size,
        delta=setting.delta,
    )


def guess(setting, batch_size, noise_multiplier):
    """Return a rate: in proportion to B / sigma where the noise rules, and flat where there is little of it."""
    without = 32 * batch_size / (batch_size + 60)
    return 1 / (1 / without + noise_multiplier / (setting.rate_of_noise * batch_size))


def judge(rows, plain, name):
    accuracy = {(row["batch_size"], row["noise_multiplier"]): 100 * row["accuracy"] for row in rows}
    sizes, sigmas = (sorted({row[name] for row in rows}) for name in ("batch_size", "noise_multiplier"))
    clipping = 100 * plain - max(accuracy[size, 0.0] for size in sizes)
    falls = all(np.all(np.diff([accuracy[size, sigma] for sigma in sigmas]) < 1) for size in sizes)
    bears = bool(np.all(np.diff([accuracy[size, sigmas[-1]] for size in sizes]) > 0))
    groups = {}
    for (size, sigma), value in accuracy.items():
        if sigma:
            groups.setdefault(round(sigma / np.sqrt(size), 6), []).append(value)
    spread = max(np.ptp(values) for values in groups.values())
    private = [row for row in rows if row["noise_multiplier"]]
    promised = {row["batch_size"]: row["epsilon"] for row in private if row["noise_multiplier"] == sigmas[-1]}
    curves = {
        size: sorted((row["epsilon"], 100 * row["accuracy"]) for row in private if row["batch_size"] == size)
        for size in sizes
    }
    low, high = max(curve[0][0] for curve in curves.values()), min(curve[-1][0] for curve in curves.values())
    at = np.geomspace(low, high, 20)
    of_size = {size: np.interp(np.log(at), np.log([m for m, _ in c]), [a for _, a in c]) for size, c in curves.items()}
    behind = max(float(np.max(values - of_size[sizes[-1]])) for values in of_size.values())
    ahead = float(np.mean(of_size[sizes[-1]] - of_size[sizes[0]]))
    checks = {
        "accuracy falls with the noise": falls,
        "a larger batch bears more": bears,
        "within 3 points at equal sigma / sqrt(B)": spread < 3,
        "clipping alone costs less than 2 points": clipping < 2,
        "the largest batch is best at equal epsilon": behind < 1,
        "all best rates are inside the grid": all(row["inside_grid"] for row in rows),
    }
    return experiment.verdict(
        checks,
        f"On {name}, without clipping {100 * plain:.1f} %; clipping costs {clipping:.1f} points; at sigma = "
        f"{sigmas[-1]:g} the accuracy is "
        + ", ".join(
            f"{accuracy[size, sigmas[-1]]:.1f} % at B = {size} (epsilon {promised[size]:.2g})" for size in sizes
        )
        + f". At equal sigma / sqrt(B) accuracies are up to {spread:.1f} points apart; at equal epsilon ({low:.2g} to "
        f"{high:.2g}), B = {sizes[-1]} is {ahead:.1f} points ahead of B = {sizes[0]} on average, and at worst "
        f"{behind:.1f} behind another.",
    )


def main(options: experiment.Options) -> experiment.Result:
    setting, multipliers = MNIST if options.full else DIGITS, MULTIPLIERS
    if options.smoke:
        setting = setting._replace(batch_sizes=setting.batch_sizes[3:], num_epochs=2, num_seeds=2)
        multipliers = MULTIPLIERS[:3:2]
    problem = problems.mnist_mlp((32,)) if setting.name == "MNIST" else problems.digits_mlp((32,))
    num_seeds, num_epochs = setting.num_seeds, setting.num_epochs
    init_key, stream_key, batch_key, noise_key = jax.random.split(jax.random.key(options.seed), 4)
    params = jax.vmap(problem.init)(jax.random.split(init_key, num_seeds))
    draw_stream = partial(batching.reshuffled, num_examples=problem.num_examples, num_epochs=num_epochs)
    streams = jax.jit(jax.vmap(draw_stream))(jax.random.split(stream_key, num_seeds))
    plain, *_ = tuned(partial(baseline, problem, 60), (params, streams), 0.5 * RATE_FACTORS)
    starts = params, jax.random.split(batch_key, num_seeds), jax.random.split(noise_key, num_seeds)
    rows = []
    for batch_size in setting.batch_sizes:
        for multiplier in multipliers:
            rates = guess(setting, batch_size, multiplier) * RATE_FACTORS
            one = partial(train, problem, batch_size, num_epochs * problem.num_examples // batch_size, multiplier)
            accuracies, rate, inside = tuned(one, starts, rates)
            rows.append(
                {
                    "data": setting.name,
                    "batch_size": batch_size,
                    "noise_multiplier": multiplier,
                    "epsilon": epsilon(problem, setting, batch_size, multiplier) if multiplier else None,
                    "learning_rate": rate,
                    "inside_grid": inside,
                    "accuracies": accuracies.tolist(),
                    "accuracy": float(accuracies.mean()),
                }
            )
    verdict = judge(rows, float(plain.mean()), setting.name)
    rows.append({"unclipped": True, "accuracies": plain.tolist(), "accuracy": float(plain.mean())})
    return experiment.Result(rows, verdict, draw(rows[:-1], float(plain.mean()), setting.name, setting.delta))


def draw(rows, plain, name, delta):
    title = f"{name}: test accuracy of DP-SGD against noise and against privacy; bands are the range of seeds"
    figure, (left, right) = plots.panels(2, title=title, width=6)
    for i, size in enumerate(sorted({row["batch_size"] for row in rows})):
        shown = [row for row in rows if row["batch_size"] == size and row["noise_multiplier"]]
        accuracies = 100 * np.array([row["accuracies"] for row in shown]).T
        for axis, name in ((left, "noise_multiplier"), (right, "epsilon")):
            plots.band(axis, [row[name] for row in shown], accuracies, f"B = {size}", i)
    left.axhline(100 * plain, color="gray", linewidth=1, label="no clipping, no noise")
    left.set(xscale="log", xlabel="noise multiplier σ", ylabel="test accuracy (%)")
    right.set(xscale="log", xlabel=f"ε of differential privacy at δ = {delta:g} (less is more private)")
    left.set_xticks(MULTIPLIERS[1:], [f"{multiplier:g}" for multiplier in MULTIPLIERS[1:]])
    left.minorticks_off()
    left.legend(frameon=False)
    return figure


if __name__ == "__main__":
    experiment.run(main)
