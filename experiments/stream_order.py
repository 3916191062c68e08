"""How far from the minimum does SGD stay, and how much of that is the order of the stream?

Question    Fitting the mean of 64 numbers one by one, at constant rate: the mean squared error at the ends of epochs,
            after many, for examples drawn with replacement, shuffled once, reshuffled, and in a fixed order (sorted).
Prediction  `gdjax.stream_order`, exactly. At small rates reshuffled < shuffled once < with replacement, growing as the
            rate to the powers 3, 2 and 1; a sorted data set is as the rate squared and worse than most shuffles.
Cost        10 s on two CPU cores.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, descent, gradients
from gdjax import report as plots
from gdjax.commands import experiment
from gdjax.theory import stream_order

NUM_EXAMPLES, NUM_EPOCHS = 64, 100
LEARNING_RATES = np.logspace(-2.5, -0.1, 13)  # at the least, the start is forgotten e-fold in 5 epochs
ORDERS = ("with_replacement", "shuffled_once", "reshuffled")


def loss(theta, target):
    return 0.5 * (theta - target) ** 2


def train(order, targets, key, learning_rate):
    """Return theta^2, averaged over the ends of the last half of the epochs."""
    method = descent.method(gradients.mean(loss), optax.sgd(learning_rate))
    batches = batching.cut(order(key, NUM_EXAMPLES, num_epochs=NUM_EPOCHS), 1)
    state = method.init(jnp.zeros(()))
    _, thetas = descent.run(method, state, targets, batches, lambda state, info: state.params, every=NUM_EXAMPLES)
    return (thetas[NUM_EPOCHS // 2 :] ** 2).mean()


def sweep(order, targets, keys):
    """Return the mean squared error for every seed and rate, [S, R]."""
    over_rates = jax.vmap(partial(train, order, targets), (None, 0))
    return jax.jit(jax.vmap(over_rates, (0, None)))(keys, LEARNING_RATES)


def main(options: experiment.Options) -> experiment.Result:
    targets_key, keys_key = jax.random.split(jax.random.key(options.seed))
    keys = jax.random.split(keys_key, 20 if options.smoke else 2000)
    targets = jnp.sort(jax.random.laplace(targets_key, (NUM_EXAMPLES,)))
    targets = (targets - targets.mean()) / targets.std()
    exact, measured, errors, rows = {}, {}, {}, []
    for name in ORDERS:
        known = partial(getattr(stream_order, name), target_variance=1.0, num_examples=NUM_EXAMPLES)
        exact[name] = jax.vmap(known, (0, None))(LEARNING_RATES, 1.0)
        lanes = np.asarray(sweep(getattr(batching, name), targets, keys), np.float64)
        measured[name], errors[name] = lanes.mean(0), lanes.std(0, ddof=1) / np.sqrt(len(keys))
    exact["cyclic"] = jax.vmap(lambda rate: stream_order.cyclic(rate, 1.0, targets=targets))(LEARNING_RATES) ** 2
    measured["cyclic"] = np.asarray(sweep(batching.cyclic, targets, keys[:1])[0])
    errors["cyclic"] = 1e-3 * measured["cyclic"]  # nothing is drawn: only rounding
    for name, values in exact.items():
        for i, rate in enumerate(LEARNING_RATES):
            numbers = float(rate), float(values[i]), float(measured[name][i]), float(errors[name][i])
            rows.append(
                {"order": name} | dict(zip(("learning_rate", "exact", "measured", "error"), numbers, strict=True))
            )
    farthest = max(abs(row["measured"] - row["exact"]) / row["error"] for row in rows)
    powers = [
        np.log(measured[name][2] / measured[name][0]) / np.log(LEARNING_RATES[2] / LEARNING_RATES[0]) for name in exact
    ]
    first = {name: float(values[0] / measured["reshuffled"][0]) for name, values in measured.items()}
    agrees = farthest < 4 and first["with_replacement"] > first["shuffled_once"] > 1
    verdict = (
        f"{'As predicted' if agrees else 'Not as predicted'}: {len(rows)} measured points are within {farthest:.1f} "
        f"standard errors of the exact values. From the least rate on, the error grows as the rate to the power "
        + ", ".join(f"{power:.2f} ({_words(name)})" for power, name in zip(powers, exact, strict=True))
        + f"; there, over reshuffled, it is {first['with_replacement']:.0f} times (with replacement), "
        f"{first['shuffled_once']:.0f} times (shuffled once) and {first['cyclic']:.0f} times (sorted)."
    )
    return experiment.Result(rows, verdict, draw(exact, measured, errors, verdict.partition(". From")[0]))


def draw(exact, measured, errors, title):
    lines = {f"{_words(name)}, exact": values[None] for name, values in exact.items()}
    figure = plots.curves(
        LEARNING_RATES,
        lines,
        xlabel="learning rate × curvature",
        ylabel="mean squared error at the ends of epochs\n(variances of the data)",
        log="xy",
        title=title,
    )
    [axis] = figure.axes
    for name, colour in zip(exact, plots.COLOURS, strict=False):
        axis.errorbar(LEARNING_RATES, measured[name], 2 * errors[name], fmt="o", markersize=4, color=colour)
    axis.plot([], [], "o", color="gray", markersize=4, label="measured, ± 2 standard errors")
    axis.legend(frameon=False, fontsize="small")
    return figure


def _words(name: str) -> str:
    return "sorted" if name == "cyclic" else name.replace("_", " ")


if __name__ == "__main__":
    experiment.run(main)
