"""How far from the minimum does SGD stay, and how much of that is the order of the stream?

Question    Fitting the mean of 64 numbers one by one, at constant rate: the mean squared error at the ends of epochs,
            after many, for examples drawn with replacement, shuffled once, reshuffled, and in a fixed order (sorted).
Prediction  `theory.stream_order`, exactly. At small rates reshuffled < shuffled once < with replacement, growing as the
            rate to the powers 3, 2 and 1; a sorted data set is as the rate squared and worse than most shuffles.
Cost        10 s on two CPU cores.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, descent, report, sweep
from gdjax.commands import experiment
from gdjax.problem import Problem
from gdjax.theory import stream_order

NUM_EXAMPLES, NUM_EPOCHS = 64, 100
LEARNING_RATES = np.logspace(-2.5, -0.1, 13)  # at the least, the start is forgotten e-fold in 5 epochs
ORDERS = ("with replacement", "shuffled once", "reshuffled")
LEARNING_RATE, ERROR = "learning rate × curvature", "mean squared error at the ends of epochs\n(variances of the data)"


def errors(problem, order, keys):
    """Return theta^2, averaged over the ends of the last half of the epochs, for every seed and rate, [S, R]."""

    def error(key, rate):
        _, squares = descent.train(
            problem, optax.sgd(rate), key=key, batch_size=1, num_epochs=NUM_EPOCHS, stream=order,
            record=lambda state, info: state.params**2,
        )  # fmt: skip
        return squares[NUM_EPOCHS // 2 :].mean()

    return np.asarray(sweep.map(lambda key: jax.vmap(partial(error, key))(LEARNING_RATES), keys), np.float64)


def main(options: experiment.Options) -> experiment.Result:
    targets_key, keys_key = jax.random.split(jax.random.key(options.seed))
    keys = jax.random.split(keys_key, 20 if options.smoke else 2000)
    targets = jnp.sort(jax.random.laplace(targets_key, (NUM_EXAMPLES,)))
    targets = (targets - targets.mean()) / targets.std()
    problem = Problem(lambda key: jnp.zeros(()), lambda theta, target: 0.5 * (theta - target) ** 2, targets)
    found = {}  # order: exact, measured, its error, [R] each
    for name in ORDERS:
        order = name.replace(" ", "_")
        known = partial(getattr(stream_order, order), target_variance=1.0, num_examples=NUM_EXAMPLES)
        measured = errors(problem, getattr(batching, order), keys)
        exact = jax.vmap(known, (0, None))(LEARNING_RATES, 1.0)
        found[name] = exact, measured.mean(0), measured.std(0, ddof=1) / np.sqrt(len(keys))
    exact = jax.vmap(lambda rate: stream_order.cyclic(rate, 1.0, targets=targets))(LEARNING_RATES) ** 2
    [measured] = errors(problem, batching.cyclic, keys[:1])
    found["sorted"] = exact, measured, 1e-3 * measured  # nothing is drawn: only rounding
    rows = [
        {"order": name} | dict(zip(("learning_rate", "exact", "measured", "error"), map(float, numbers), strict=True))
        for name, values in found.items()
        for numbers in zip(LEARNING_RATES, *values, strict=True)
    ]
    checks, numbers = judge(found)
    return experiment.Result(rows, experiment.verdict(checks, numbers), draw(found, numbers.partition(". From")[0]))


def judge(found):
    farthest = max(float(np.max(np.abs(measured - exact) / error)) for exact, measured, error in found.values())
    powers = {n: np.log(m[2] / m[0]) / np.log(LEARNING_RATES[2] / LEARNING_RATES[0]) for n, (_, m, _) in found.items()}
    first = {name: float(measured[0] / found["reshuffled"][1][0]) for name, (_, measured, _) in found.items()}
    ordered = first["with replacement"] > first["shuffled once"] > 1
    checks = {"as the theory says": farthest < 4, "reshuffled < shuffled once < with replacement": ordered}
    numbers = (
        f"{len(found) * len(LEARNING_RATES)} measured points are within {farthest:.1f} standard errors of the exact "
        "values. From the least rate on, the error grows as the rate to the power "
        + ", ".join(f"{power:.2f} ({name})" for name, power in powers.items())
        + "; there, over reshuffled, it is "
        + ", ".join(f"{times:.0f} times ({name})" for name, times in first.items() if name != "reshuffled")
        + "."
    )
    return checks, numbers


def draw(found, title):
    exact = {f"{name}, exact": values[None] for name, (values, _, _) in found.items()}
    figure = report.curves(LEARNING_RATES, exact, xlabel=LEARNING_RATE, ylabel=ERROR, log="xy", title=title)
    [axis] = figure.axes
    for (_, measured, error), colour in zip(found.values(), report.COLOURS, strict=False):
        axis.errorbar(LEARNING_RATES, measured, 2 * error, fmt="o", markersize=4, color=colour)
    axis.plot([], [], "o", color="gray", markersize=4, label="measured, ± 2 standard errors")
    axis.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    experiment.run(main)
