"""Are stochastic, mini-batch and batch gradient descent one algorithm, cut at different points?

Question    Digits, MLP 64-128-10, 60 epochs of one stream: what loss does each batch size reach at its best rate?
Prediction  Per example seen, B = 1 and B = 32 are alike, both far below the critical batch size; B = N, with one update
            an epoch, is far behind. The best learning rate grows with B.
Cost        25 s on two CPU cores.
"""

import jax
import numpy as np
import optax

from gdjax import descent, problems, report, sweep
from gdjax.commands import experiment

NUM_SEEDS = 3
LEARNING_RATES = np.logspace(-2.5, 1, 8)


def losses_of(problem, batch_size, num_epochs, keys):
    """Return the training loss for every seed and rate after each epoch, [S, R, num_epochs]."""

    def losses(point):
        optimizer = optax.sgd(point["rate"])
        return descent.train(problem, optimizer, key=point["key"], batch_size=batch_size, num_epochs=num_epochs)[1][
            "loss"
        ]

    return sweep.map(losses, sweep.grid(key=keys, rate=LEARNING_RATES))


def main(options: experiment.Options) -> experiment.Result:
    problem, num_epochs = problems.digits_mlp(), 2 if options.smoke else 60
    keys = jax.random.split(jax.random.key(options.seed), NUM_SEEDS)
    rows, curves = [], {}
    for batch_size in (1, 32, problem.num_examples):
        losses = losses_of(problem, batch_size, num_epochs, keys)
        best = experiment.best_rate(LEARNING_RATES, losses[:, :, -1])
        curves[f"B = {batch_size}"] = losses[:, best.position]
        row = {"batch_size": batch_size, "learning_rate": best.rate, "train_loss": float(best.values.mean())}
        rows.append(row | {"train_loss_std": float(best.values.std(ddof=1))})
    one, mini, full = (row["train_loss"] for row in rows)
    rates = [row["learning_rate"] for row in rows]
    checks = {
        "B = 1 and B = 32 are alike": max(one, mini) < 2 * min(one, mini),
        "B = N is far behind": full > 3 * max(one, mini),
        "the best rate grows with B": rates[0] < rates[1] <= rates[2],
    }
    numbers = (
        f"After {num_epochs} epochs the loss is {one:.2g} at B = 1, {mini:.2g} at B = 32 and {full:.2g} at B = N; "
        f"best rates {', '.join(f'{rate:.2g}' for rate in rates)}."
    )
    axes = {"xlabel": "epochs", "ylabel": "training loss", "log": "y"}
    figure = report.curves(np.arange(1, num_epochs + 1), curves, title=numbers, **axes)
    return experiment.Result(rows, experiment.verdict(checks, numbers), figure)


if __name__ == "__main__":
    experiment.run(main)
