"""Is the noise of an update that of one example divided by the batch size?

Question    Digits, MLP 64-32-10, at three moments of training: what is the covariance of the update of SGD on a random
            batch, over eta^2 Sigma / B with Sigma the covariance of one example's gradient?
Prediction  1 for independent draws; (N - B) / (N - 1) for distinct examples, and so no noise at B = N. Exactly, at any
            parameters, in total and along each of the ten directions in which gradients vary most.
Cost        40 s on two CPU cores.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gdjax import batching, descent, gradients, problems, theory
from gdjax import report as plots
from gdjax.commands import experiment

LEARNING_RATE = 0.1
BATCH_SIZES = (1, 4, 16, 64, 240, 480, 960, 1440)
MOMENTS = (0, 90, 900)  # updates of 32 examples: at the start, after 2 epochs, after 20
NUM_DIRECTIONS = 10
DRAWS = {"with replacement": batching.with_replacement, "distinct examples": batching.reshuffled}


def train(problem, method, key):
    """Return the parameters at MOMENTS, every leaf [3, ...]."""
    init_key, stream_key = jax.random.split(key)
    state = method.init(problem.init(init_key))
    stream = batching.reshuffled(stream_key, problem.num_examples, num_epochs=20)
    _, history = descent.run(
        method, state, problem.train, batching.batches(stream, 32), lambda state, info: state.params, every=90
    )
    return jax.tree.map(
        lambda first, later: jnp.stack([first, *(later[m // 90 - 1] for m in MOMENTS[1:])]), state.params, history
    )


def spectrum(problem, params):
    """Return the mean update [P], K directions [K, P], and the trace and top eigenvalues of eta^2 Sigma [1 + K]."""
    updates = -LEARNING_RATE * jax.vmap(flat)(gradients.per_example(problem.loss)(params, problem.train).aux.grads)
    mean = updates.mean(0)
    centred = updates - mean
    sizes, shares = jnp.linalg.eigh(centred @ centred.T)  # N x N, smaller than P x P
    sizes, directions = sizes[-NUM_DIRECTIONS:], shares[:, -NUM_DIRECTIONS:].T @ centred
    of_one = jnp.append(jnp.sum(centred**2), sizes) / problem.num_examples
    return mean, directions / jnp.sqrt(sizes)[:, None], of_one


def spread(problem, method, batch_size, params, mean, directions, keys):
    """Return |d|^2 and the squares of d's coordinates of updates mean + d on M batches of both DRAWS, [M, 2, 1 + K]."""

    def of_batch(indices):
        _, info = method.step(method.init(params), batching.take(problem.train, indices))
        deviation = flat(info.update) - mean
        return jnp.append(deviation @ deviation, (directions @ deviation) ** 2)

    def one(key):
        draws = zip(DRAWS.values(), jax.random.split(key, len(DRAWS)), strict=True)
        return jax.vmap(of_batch)(
            jnp.stack([draw(key, problem.num_examples, num_epochs=1)[:batch_size] for draw, key in draws])
        )

    return lax.map(one, keys, batch_size=8)


def main(options: experiment.Options) -> experiment.Result:
    problem = problems.digits_mlp((32,))
    train_key, draws_key = jax.random.split(jax.random.key(options.seed))
    method = descent.method(gradients.mean(problem.loss), optax.sgd(LEARNING_RATE))
    params = jax.jit(partial(train, problem, method))(train_key)
    mean, directions, of_one = jax.jit(jax.vmap(partial(spectrum, problem)))(params)
    rows = []
    for batch_size in BATCH_SIZES[-2:] if options.smoke else BATCH_SIZES:
        # Single gradients have heavy tails: the smaller the batch, the more of them are needed.
        num_batches = 16 if options.smoke else min(16_000, max(500, 64_000 // batch_size))
        keys = jax.random.split(jax.random.fold_in(draws_key, batch_size), num_batches)
        at_moments = jax.jit(jax.vmap(partial(spread, problem, method, batch_size), (0, 0, 0, None)))
        of_batches = np.asarray(at_moments(params, mean, directions, keys), np.float64)
        for i, moment in enumerate(MOMENTS):
            for j, name in enumerate(DRAWS):
                ratios = of_batches[i, :, j] / np.asarray(of_one[i] / batch_size)
                exact = float(theory.finite_population(batch_size, problem.num_examples)) if j else 1.0
                row = {"draw": name, "batch_size": batch_size, "updates": moment, "exact": exact}
                row["ratios"] = ratios.mean(0).tolist()  # of the trace, then along each direction
                row["errors"] = (ratios.std(0, ddof=1) / np.sqrt(num_batches)).tolist()
                rows.append(row)
    verdict = judge(rows)
    return experiment.Result(rows, verdict, draw_figure(rows, verdict.partition(". Of")[0]))


def judge(rows):
    # At B = N nothing is drawn, and what is left is rounding, far below 1e-6.
    scores = np.array([(np.array(row["ratios"]) - row["exact"]) / (np.array(row["errors"]) + 1e-6) for row in rows])
    beyond, farthest = (np.abs(scores[:, 1:]) > 2).mean(), np.abs(scores[:, 0]).max()
    agrees = farthest < 4 and beyond < 0.1
    whole = max(row["ratios"][0] for row in rows if row["exact"] == 0)
    near = [row["ratios"][0] for row in rows if 0 < row["exact"] < 0.4]
    return (
        f"{'As predicted' if agrees else 'Not as predicted'}: the {len(rows)} traces of the covariance are within "
        f"{farthest:.1f} standard errors of eta^2 tr(Sigma) / B times 1 or (N - B) / (N - 1), and {beyond:.0%} of the "
        f"variances along {NUM_DIRECTIONS} directions are beyond 2 (5% expected). Of distinct examples "
        f"{min(near):.3f} to {max(near):.3f} is left at B = {BATCH_SIZES[-2]} of N = {BATCH_SIZES[-1]}, "
        f"and {whole:.0e} at B = N."
    )


def draw_figure(rows, title):
    sizes = jnp.geomspace(1, BATCH_SIZES[-1], 200)
    factors = {
        "with replacement: 1": np.ones((1, 200)),
        "distinct examples: (N − B)/(N − 1)": theory.finite_population(sizes, BATCH_SIZES[-1])[None],
    }
    figure = plots.curves(
        sizes,
        factors,
        xlabel="batch size (examples per update)",
        ylabel="trace of the covariance of the update\nover η² tr(Σ) / B",
        log="x",
        title=title,
    )
    [axis] = figure.axes
    for name, colour in zip(DRAWS, plots.COLOURS, strict=False):
        for i, moment in enumerate(MOMENTS):
            shown = [row for row in rows if row["draw"] == name and row["updates"] == moment]
            axis.errorbar(
                [row["batch_size"] * 1.1 ** (i - 1) for row in shown],  # side by side
                [row["ratios"][0] for row in shown],
                [2 * row["errors"][0] for row in shown],
                fmt="os^"[i],
                markersize=4,
                color=colour,
            )
    for marker, moment in zip("os^", MOMENTS, strict=True):
        axis.plot([], [], marker, color="gray", markersize=4, label=f"after {moment} updates, ± 2 standard errors")
    axis.legend(frameon=False, fontsize="small", loc="lower left")
    return figure


def flat(tree):
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


if __name__ == "__main__":
    experiment.run(main)
