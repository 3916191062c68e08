"""Are stochastic, mini-batch and batch gradient descent one algorithm, cut at different points?

Question    Digits, MLP 64-128-10, 60 epochs of one stream: what loss does each batch size reach at its best rate?
Prediction  Per example seen, B = 1 and B = 32 are alike, both far below the critical batch size; B = N, with one update
            an epoch, is far behind. The best learning rate grows with B.
Cost        25 s on two CPU cores.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, descent, gradients, problems
from gdjax import report as plots
from gdjax.commands import experiment

NUM_SEEDS = 3
LEARNING_RATES = np.logspace(-2.5, 1, 8)


def train(problem, batch_size, num_epochs, data, key, learning_rate):
    """Return the training loss after each epoch, [num_epochs]."""
    init_key, stream_key = jax.random.split(key)
    method = descent.method(gradients.mean(problem.loss), optax.sgd(learning_rate))
    stream = batching.reshuffled(stream_key, problem.num_examples, num_epochs=num_epochs)

    def train_loss(state, info):
        return jax.vmap(problem.loss, (None, 0))(state.params, data).mean()

    state = method.init(problem.init(init_key))
    batches = batching.cut(stream, batch_size)
    _, losses = descent.run(method, state, data, batches, train_loss, every=problem.num_examples // batch_size)
    return losses


def sweep(problem, batch_size, num_epochs, keys):
    """Return the training loss for every seed and rate, [S, R, num_epochs]."""
    over_rates = jax.vmap(partial(train, problem, batch_size, num_epochs), (None, None, 0))
    over_seeds = jax.jit(jax.vmap(over_rates, (None, 0, None)))
    return over_seeds(problem.train, keys, LEARNING_RATES)


def main(options: experiment.Options) -> experiment.Result:
    problem = problems.digits_mlp()
    num_epochs = 2 if options.smoke else 60
    keys = jax.random.split(jax.random.key(options.seed), NUM_SEEDS)
    rows, curves = [], {}
    for batch_size in (1, 32, problem.num_examples):
        losses = sweep(problem, batch_size, num_epochs, keys)
        best = int(jnp.nanargmin(losses[:, :, -1].mean(0)))
        curves[f"B = {batch_size}"] = losses[:, best]
        rows.append(
            {
                "batch_size": batch_size,
                "learning_rate": float(LEARNING_RATES[best]),
                "train_loss": float(losses[:, best, -1].mean()),
                "train_loss_std": float(losses[:, best, -1].std(ddof=1)),
            }
        )
    one, mini, full = (row["train_loss"] for row in rows)
    rates = [row["learning_rate"] for row in rows]
    as_predicted = max(one, mini) < 2 * min(one, mini) and full > 3 * max(one, mini) and rates[0] < rates[1] <= rates[2]
    verdict = (
        f"{'As predicted' if as_predicted else 'Not as predicted'}: after {num_epochs} epochs the loss is {one:.2g} at "
        f"B = 1, {mini:.2g} at B = 32 and {full:.2g} at B = N; best rates {', '.join(f'{rate:.2g}' for rate in rates)}."
    )
    figure = plots.curves(
        jnp.arange(1, num_epochs + 1), curves, xlabel="epochs", ylabel="training loss", log="y", title=verdict
    )
    return experiment.Result(rows, verdict, figure)


if __name__ == "__main__":
    experiment.run(main)
