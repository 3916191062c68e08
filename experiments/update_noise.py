"""Is the noise of an update that of one example divided by the batch size?

Question    Digits, MLP 64-32-10, at three moments of training: what is the covariance of the update of SGD on a random
            batch, over eta^2 Sigma / B with Sigma the covariance of one example's gradient?
Prediction  1 for independent draws; (N - B) / (N - 1) for distinct examples, and so no noise at B = N. Exactly, at any
            parameters, in total and along each of the ten directions in which gradients vary most.
Cost        40 s on two CPU cores.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from gdjax import batching, descent, gradients, problems, report, sweep, theory
from gdjax.commands import experiment

LEARNING_RATE = 0.1
BATCH_SIZES = (1, 4, 16, 64, 240, 480, 960, 1440)
MOMENTS = (1, 90, 900)  # updates of 32 examples: at the start, after 2 epochs, after 20
NUM_DIRECTIONS = 10
DRAWS = {"with replacement": batching.with_replacement, (DISTINCT := "distinct examples"): batching.reshuffled}
CHUNK = 64  # batches at once
RATIO = "trace of the covariance of the update\nover η² tr(Σ) / B"


def spectrum(problem, params):
    """Return the mean update [P], K directions [K, P], and the trace and top eigenvalues of eta^2 Sigma [1 + K]."""
    grads = gradients.per_example(problem.loss)(params, problem.train).aux.grads
    updates = -LEARNING_RATE * jax.vmap(lambda grad: ravel_pytree(grad)[0])(grads)
    mean = updates.mean(0)
    centred = updates - mean
    sizes, shares = jnp.linalg.eigh(centred @ centred.T)  # N x N, smaller than P x P
    sizes, directions = sizes[-NUM_DIRECTIONS:], shares[:, -NUM_DIRECTIONS:].T @ centred
    of_one = jnp.append(jnp.sum(centred**2), sizes) / problem.num_examples
    return mean, directions / jnp.sqrt(sizes)[:, None], of_one


def main(options: experiment.Options) -> experiment.Result:
    problem, optimizer = problems.digits_mlp((32,)), optax.sgd(LEARNING_RATE)
    train_key, draws_key = jax.random.split(jax.random.key(options.seed))
    train = partial(descent.train, problem, optimizer, key=train_key, batch_size=32, record=lambda state, info: ())
    states = [train(num_updates=moment)[0] for moment in MOMENTS]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state.params for state in states))
    mean, directions, of_one = jax.jit(jax.vmap(partial(spectrum, problem)))(params)
    method, rows = descent.method(gradients.mean(problem.loss), optimizer), []
    for batch_size in BATCH_SIZES[-2:] if options.smoke else BATCH_SIZES:
        # Single gradients have heavy tails: the smaller the batch, the more of them are needed.
        num_batches = 16 if options.smoke else min(16_000, max(500, 64_000 // batch_size))
        keys = jax.random.split(jax.random.fold_in(draws_key, batch_size), num_batches)

        def of_batches(point, batch_size=batch_size):
            """Return |d|^2 and the squares of d's coordinates for updates mean + d of a batch of each draw, [1 + K]."""
            at = point["moment"]
            state = method.init(jax.tree.map(lambda x: x[at], params))
            found = {}
            for (name, draw), key in zip(DRAWS.items(), jax.random.split(point["key"], len(DRAWS)), strict=True):
                batch = batching.take(problem.train, draw(key, problem.num_examples, num_epochs=1)[:batch_size])
                deviation = ravel_pytree(method.step(state, batch)[1].update)[0] - mean[at]
                found[name] = jnp.append(deviation @ deviation, (directions[at] @ deviation) ** 2)
            return found

        squares = sweep.map(of_batches, sweep.grid(moment=range(len(MOMENTS)), key=keys), chunk_size=CHUNK)
        for (i, moment), name in itertools.product(enumerate(MOMENTS), DRAWS):
            ratios = np.asarray(squares[name][i], np.float64) / np.asarray(of_one[i] / batch_size)
            exact = float(theory.finite_population(batch_size, problem.num_examples)) if name == DISTINCT else 1.0
            row = {"draw": name, "batch_size": batch_size, "updates": moment, "exact": exact}
            row["ratios"] = ratios.mean(0).tolist()  # of the trace, then along each direction
            rows.append(row | {"errors": (ratios.std(0, ddof=1) / np.sqrt(num_batches)).tolist()})
    checks, numbers = judge(rows)
    return experiment.Result(rows, experiment.verdict(checks, numbers), draw_figure(rows, numbers.partition(". Of")[0]))


def judge(rows):
    # At B = N nothing is drawn, and what is left is rounding, far below 1e-6.
    scores = np.array([(np.array(row["ratios"]) - row["exact"]) / (np.array(row["errors"]) + 1e-6) for row in rows])
    beyond, farthest = (np.abs(scores[:, 1:]) > 2).mean(), np.abs(scores[:, 0]).max()
    whole = max(row["ratios"][0] for row in rows if row["exact"] == 0)
    near = [row["ratios"][0] for row in rows if 0 < row["exact"] < 0.4]
    return {"in total": bool(farthest < 4), "along each direction": bool(beyond < 0.1)}, (
        f"The {len(rows)} traces of the covariance are within {farthest:.1f} standard errors of eta^2 tr(Sigma) / B "
        f"times 1 or (N - B) / (N - 1), and {beyond:.0%} of the variances along {NUM_DIRECTIONS} directions are beyond "
        f"2 (5% expected). Of distinct examples {min(near):.3f} to {max(near):.3f} is left at B = {BATCH_SIZES[-2]} of "
        f"N = {BATCH_SIZES[-1]}, and {whole:.0e} at B = N."
    )


def draw_figure(rows, title):
    sizes = np.geomspace(1, BATCH_SIZES[-1], 200)
    left = theory.finite_population(jnp.asarray(sizes), BATCH_SIZES[-1])
    factors = {"with replacement: 1": np.ones((1, 200)), "distinct examples: (N − B)/(N − 1)": left[None]}
    figure = report.curves(sizes, factors, xlabel="batch size (examples)", ylabel=RATIO, log="x", title=title)
    [axis] = figure.axes
    for (i, moment), (j, name) in itertools.product(enumerate(MOMENTS), enumerate(DRAWS)):
        shown = [row for row in rows if (row["draw"], row["updates"]) == (name, moment)]
        beside = [row["batch_size"] * 1.1 ** (i - 1) for row in shown]
        ratios, errors = ([row[numbers][0] for row in shown] for numbers in ("ratios", "errors"))
        axis.errorbar(beside, ratios, 2 * np.array(errors), fmt="os^"[i], markersize=4, color=report.COLOURS[j])
    for marker, moment in zip("os^", MOMENTS, strict=True):
        axis.plot([], [], marker, color="gray", markersize=4, label=f"update {moment}, ± 2 standard errors")
    axis.legend(frameon=False, fontsize="small", loc="lower left")
    return figure


if __name__ == "__main__":
    experiment.run(main)
