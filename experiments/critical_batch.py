"""What is the critical batch size: do four definitions of it name the same number?

Question    A network with one hidden layer of 32, SGD to a given training loss: where do these put the critical batch
            size? The noise scales B_simple and B_noise on the way (medians over the updates of the run with the largest
            batch); the hyperbola S = S_min (1 + B_crit / B) through the updates to the target, tuned at every B
            (McCandlish et al. 2018, arXiv 1812.06162); the B that costs 20 % more examples than the smallest (Zhang et
            al. 2024, arXiv 2410.21676); and branched training, the largest B = 4 k whose branch, at k times the rate,
            ends a window of examples later within 10 % of the loss of the run at B = 4 (Merrill et al. 2025, arXiv
            2505.23971).
Prediction  B_noise is within a factor of 2 of the hyperbola's B_crit; 20 % overhead comes within a factor of 2 of 0.2
            B_crit; branched training lies between these two; B_simple is within a factor of 10 of B_noise.
Cost        45 s on two CPU cores: digits to a loss of 0.1, about 2000 examples. --full, 5 minutes: Fashion-MNIST to a
            loss of 0.5, about 8000 examples.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import descent, noise, problems, sweep, theory, tuning
from gdjax import report as plots
from gdjax.commands import experiment
from gdjax.problems import datasets

RATE_FACTORS = 2.0 ** np.arange(-1.5, 1.6, 0.5)  # around a guess; the grid grows where the best rate is at its edge
TOLERANCE = 1.1  # of branched training: loss over that of the smallest batch
HESSIAN_BATCH = 360  # examples


class Setting(NamedTuple):
    """What is trained to which loss.

    Attributes:
        rates: B_crit and the rate at B = N of the law of best learning rates, a guess that saves time.
        checkpoints, window: of branched training, in examples.
        num_measured: training examples that a noise scale is measured on.
    """

    name: str
    target: float
    num_seeds: int
    batch_sizes: tuple[int, ...]
    rates: tuple[float, float]
    branches: tuple[int, ...]
    checkpoints: tuple[int, ...]
    window: int
    num_measured: int


SIZES = tuple(2**i for i in range(1, 11))
DIGITS = Setting("digits", 0.1, 5, SIZES[:9], (64.0, 2.0), SIZES[1:8], (512, 768, 1024), 768, 1440)
FASHION = Setting("Fashion-MNIST", 0.5, 5, SIZES, (50.0, 0.25), SIZES[1:9], (2048, 3072, 4096), 3072, 2048)


def tuned(problem, setting, batch_size, key):
    """Return the search for the rate of the fewest updates to the target."""
    critical, full_batch = setting.rates
    guess = float(theory.best_learning_rate(batch_size, critical, full_batch=full_batch))
    target, rates = f"loss<={setting.target}", (guess * RATE_FACTORS).tolist()
    return tuning.tune(
        problem, batch_size=batch_size, key=key, target=target, learning_rates=rates, num_seeds=setting.num_seeds
    )


def path(problem, **arguments):
    """Return the parameters along a run, stacked."""
    return descent.train(problem, record=lambda state, info: state.params, **arguments)[1]


def noise_scales(problem, setting, num_updates, num_pairs, rate, point):
    """Return B_simple and B_noise at every update of a run with the largest batch, each [T]."""
    run_key, key = jax.random.split(point["key"])

    def measure(params):
        arguments = problem.loss, params, problem.train, key
        simple = noise.measure(*arguments, num_examples=setting.num_measured)
        hessian = noise.measure_hessian(*arguments, batch_size=HESSIAN_BATCH, num_pairs=num_pairs)
        return simple.b_simple, hessian.b_noise

    size, sgd = setting.batch_sizes[-1], optax.sgd(rate)
    along = path(problem, optimizer=sgd, key=run_key, batch_size=size, num_updates=num_updates, every=1)
    return jax.lax.map(measure, along)


def branched(problem, setting, rate, point):
    """Return loss [K] of each branch over that of the smallest batch, the mean over checkpoints."""
    run_key, branch_key = jax.random.split(point["key"])
    first, every = setting.branches[0], setting.checkpoints[0] // 2
    num_updates, sgd = max(setting.checkpoints) // first, optax.sgd(rate)
    along = path(problem, optimizer=sgd, key=run_key, batch_size=first, num_updates=num_updates, every=every // first)
    chosen = jnp.asarray(setting.checkpoints) // every - 1

    def branch(size, params):
        from_here = dataclasses.replace(problem, init=lambda key: params)
        sgd, num_updates = optax.sgd(rate * size / first), setting.window // size
        _, history = descent.train(from_here, sgd, key=branch_key, batch_size=size, num_updates=num_updates)
        return history["loss"][-1]

    starts = jax.tree.map(lambda leaf: leaf[chosen], along)
    losses = jnp.stack([jax.vmap(partial(branch, size))(starts) for size in setting.branches], axis=1)
    return (losses / losses[:, :1]).mean(0)


def crossing(sizes, values, limit):
    """Return the B where values [B], in the end, exceed the limit, interpolated between logarithms."""
    values = np.where(np.isfinite(values), values, 1e9)  # a run that diverged
    below = np.flatnonzero(values <= limit)[-1]
    if below == len(sizes) - 1:
        return float(sizes[-1])
    (x0, x1), (y0, y1) = np.log(sizes[below : below + 2]), np.log(values[below : below + 2])
    return float(np.exp(x0 + (x1 - x0) * (np.log(limit) - y0) / (y1 - y0)))


def hyperbola(sizes, updates):
    """Return (B_crit, root mean squared residual of log S) of S = S_min (1 + B_crit / B), fitted to logarithms."""
    candidates = np.geomspace(1, 1e4, 2000)
    excess = np.log(updates) - np.log1p(candidates[:, None] / np.asarray(sizes))
    best = int(np.argmin(excess.std(1)))
    return float(candidates[best]), float(excess[best].std())


def interval(values):
    """Return the geometric mean over seeds and its 90 % interval."""
    logs = np.log(values)
    half = noise.student(len(logs) - 1, confidence=0.9) * logs.std(ddof=1) / np.sqrt(len(logs))
    return tuple(float(x) for x in np.exp(logs.mean() + half * np.array([0, -1, 1])))


def judge(found, residual, inside, name):
    value = {definition: middle for definition, (middle, _, _) in found.items()}
    fit, overhead = value["hyperbola"], float(theory.batch_size_at_overhead(value["hyperbola"]))
    checks = {
        "B_noise within a factor of 2 of the hyperbola's B_crit": 0.5 < value["B_noise"] / fit < 2,
        "20 % overhead within a factor of 2 of 0.2 B_crit": 0.5 < value["20 % overhead"] / overhead < 2,
        "branched training between these": overhead < value["branched"] < fit,
        "B_simple within a factor of 10 of B_noise": 0.1 < value["B_simple"] / value["B_noise"] < 10,
        "all best rates are inside the grid": inside,
    }
    numbers = ", ".join(f"{key} {middle:.0f} ({low:.0f} to {high:.0f})" for key, (middle, low, high) in found.items())
    return experiment.verdict(
        checks,
        f"Critical batch sizes of {name}, in examples, with 90 % intervals over seeds: {numbers}; 0.2 B_crit is "
        f"{overhead:.0f}. The hyperbola misses the updates by {residual:.0%} (root mean square).",
    )


def main(options: experiment.Options) -> experiment.Result:
    setting, num_pairs = FASHION if options.full else DIGITS, 24
    if options.smoke:
        sizes, branches = setting.batch_sizes[1::7], setting.branches[::6]
        setting, num_pairs = setting._replace(batch_sizes=sizes, branches=branches, num_seeds=2), 2
    problem = problems.digits_mlp((32,))
    if setting.name != DIGITS.name:
        problem = problems.mnist_mlp((32,), data=datasets.fashion_mnist())
    sizes, branches = setting.batch_sizes, setting.branches
    tune_key, noise_key, branch_key = jax.random.split(jax.random.key(options.seed), 3)
    searches = [tuned(problem, setting, size, tune_key) for size in sizes]
    rates, inside = [found.rate for found in searches], [not found.at_edge for found in searches]
    updates = np.stack([found.costs[found.best] for found in searches], axis=1)  # [S, B]
    examples = updates * np.asarray(sizes)
    longest = int(np.ceil(updates[:, -1].max()))
    measure = partial(noise_scales, problem, setting, longest, num_pairs, rates[-1])
    b_simple, b_noise = sweep.map(measure, sweep.grid(key=jax.random.split(noise_key, setting.num_seeds)))
    branch = partial(branched, problem, setting, rates[sizes.index(branches[0])])
    ratios = sweep.map(branch, sweep.grid(key=jax.random.split(branch_key, setting.num_seeds)))  # [S, K]
    fits = [hyperbola(sizes, of_seed) for of_seed in updates]
    least = examples[:, :3].min(1)
    of_seeds = {
        "B_simple": np.median(b_simple, axis=1).tolist(),
        "B_noise": np.median(b_noise, axis=1).tolist(),
        "hyperbola": [fit for fit, _ in fits],
        "20 % overhead": [crossing(sizes, *pair) for pair in zip(examples, 1.2 * least, strict=True)],
        "branched": [crossing(branches, of_seed, TOLERANCE) for of_seed in ratios],
    }
    found = {name: interval(values) for name, values in of_seeds.items()}
    verdict = judge(found, float(np.mean([residual for _, residual in fits])), all(inside), setting.name)
    rows = [{"definition": n, "examples": v, "interval": v90, "seeds": of_seeds[n]} for n, (v, *v90) in found.items()]
    rows += [
        {"batch_size": b, "learning_rate": rate, "inside_grid": ok, "updates": u}
        for b, rate, ok, u in zip(sizes, rates, inside, updates.T.tolist(), strict=True)
    ]
    rows += [{"branch": b, "loss_ratio": r} for b, r in zip(branches, ratios.T.tolist(), strict=True)]
    return experiment.Result(rows, verdict, draw(setting, examples, ratios, found))


def draw(setting, examples, ratios, found):
    sizes, branches = setting.batch_sizes, setting.branches
    title = f"{setting.name}: examples to the target, branched training, and the critical batch size by each definition"
    figure, (left, middle, right) = plots.panels(3, title=title, width=4.6, height=4)
    plots.band(left, sizes, examples, "tuned", 0)
    fit, x = found["hyperbola"][0], np.geomspace(sizes[0], sizes[-1], 50)
    scale = np.exp(np.mean(np.log(examples / theory.examples_to_target(jnp.asarray(sizes), fit, min_examples=1.0))))
    plots.band(left, x, theory.examples_to_target(x, fit, min_examples=scale)[None], "hyperbola", 1)
    left.set(xlabel="batch size (examples)", ylabel=f"examples to a loss of {setting.target}")
    left.legend(frameon=False)
    plots.band(middle, branches, ratios, "branches", 2)
    middle.axhline(TOLERANCE, color="gray", linewidth=1)
    middle.set(xlabel="batch size of the branch (examples)", ylabel="loss over that at B = 4")
    for axis in (left, middle):
        axis.set(xscale="log", yscale="log")
    for i, (middle_value, low, high) in enumerate(found.values()):
        error = [[middle_value - low], [high - middle_value]]
        right.errorbar([middle_value], [i], xerr=error, fmt="o", capsize=4, color=plots.COLOURS[i])
    right.set(xscale="log", xlabel="critical batch size (examples), 90 % interval", xlim=(2, 1000), ylim=(-0.5, 4.5))
    right.set_yticks(range(len(found)), list(found))
    return figure


if __name__ == "__main__":
    experiment.run(main)
