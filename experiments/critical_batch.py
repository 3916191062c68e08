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

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, descent, gradients, noise, problems, theory, tuning
from gdjax import report as plots
from gdjax.commands import experiment
from gdjax.problems import datasets

RATE_FACTORS = 2.0 ** np.arange(-1.5, 1.6, 0.5)  # around a guess; the grid grows where the best rate is at its edge
BUDGET, RESOLUTION = 3, 50  # updates over those guessed, and evaluations in as many updates as guessed
TOLERANCE = 1.1  # of branched training: loss over that of the smallest batch
HESSIAN_BATCH = 360  # examples


class Setting(NamedTuple):
    """What is trained to which loss, and guesses that save time.

    Attributes:
        rates: B_crit and the rate at B = N of the law of best learning rates.
        updates: B_crit and the updates at B = N of the hyperbola.
        checkpoints, window: of branched training, in examples.
        num_judged: training examples that losses are judged on.
        num_epochs: of the stream, more than any run sees.
    """

    name: str
    target: float
    num_seeds: int
    batch_sizes: tuple[int, ...]
    rates: tuple[float, float]
    updates: tuple[float, float]
    branches: tuple[int, ...]
    checkpoints: tuple[int, ...]
    window: int
    num_judged: int
    num_epochs: int


SIZES = tuple(2**i for i in range(1, 11))
DIGITS = Setting(
    "digits", 0.1, 5, SIZES[:9], (64.0, 2.0), (200.0, 12.0), SIZES[1:8], (512, 768, 1024), 768, 1440, 20
)  # fmt: skip
FASHION = Setting(
    "Fashion-MNIST", 0.5, 5, SIZES, (50.0, 0.25), (105.0, 75.0), SIZES[1:9], (2048, 3072, 4096), 3072, 2048, 6
)  # fmt: skip


def run(problem, batch_size, num_updates, every, record, params, stream, learning_rate):
    """Return what `record` keeps of a run, at every `every`-th update."""
    method = descent.method(gradients.mean(problem.loss), optax.sgd(learning_rate))
    batches = batching.batches(stream[: batch_size * num_updates], batch_size)
    return descent.run(method, method.init(params), problem.train, batches, record, every=every)[1]


def mean_loss(problem, setting, params):
    judged = jax.tree.map(lambda x: x[: setting.num_judged], problem.train)
    return jax.vmap(problem.loss, (None, 0))(params, judged).mean()


def tuned(problem, setting, batch_size, starts):
    """Return (updates to the target of each seed at the best rate [S], that rate, whether it is inside the grid)."""
    critical, least = setting.updates
    guessed = float(theory.updates_to_target(batch_size, critical, min_updates=least))
    every = max(1, int(guessed) // RESOLUTION)
    critical, full_batch = setting.rates
    guess = float(theory.best_learning_rate(batch_size, critical, full_batch=full_batch))

    def record(state, info):
        return mean_loss(problem, setting, state.params)

    one = partial(run, problem, batch_size, int(BUDGET * guessed), every, record)
    over_seeds = jax.jit(jax.vmap(jax.vmap(one, (None, None, 0)), (0, 0, None)))
    found = {}

    def updates_at(rates):
        reached = np.asarray(over_seeds(*starts, jnp.asarray(rates))) < setting.target
        updates = np.where(reached.any(-1), (reached.argmax(-1) + 1.0) * every, np.inf)  # [S, R]
        found.update(zip(rates.tolist(), updates.T, strict=True))
        return updates.mean(0)

    best = tuning.minimise(updates_at, guess * RATE_FACTORS)
    return found[best.rate], best.rate, not best.at_edge


def noise_scales(problem, setting, num_updates, num_pairs, params, stream, learning_rate, key):
    """Return B_simple and B_noise at every update of a run with the largest batch, each [T]."""
    size = setting.batch_sizes[-1]
    params = run(problem, size, num_updates, 1, lambda state, info: state.params, params, stream, learning_rate)

    def measure(params):
        simple = noise.measure(problem.loss, params, problem.train, key, num_examples=setting.num_judged)
        hessian = noise.measure_hessian(
            problem.loss, params, problem.train, key, batch_size=HESSIAN_BATCH, num_pairs=num_pairs
        )
        return simple.b_simple, hessian.b_noise

    return jax.lax.map(measure, params)


def branched(problem, setting, reference_rate, params, stream):
    """Return loss [C, K] of each branch over that of the smallest batch, for each checkpoint."""
    sizes, every = setting.branches, setting.checkpoints[0] // 2
    before = run(
        problem, sizes[0], max(setting.checkpoints) // sizes[0], every // sizes[0],
        lambda state, info: state.params, params, stream, reference_rate,
    )  # fmt: skip
    chosen = jnp.asarray([at // every - 1 for at in setting.checkpoints])
    params = jax.tree.map(lambda leaf: leaf[chosen], before)

    def branch(batch_size, params):
        optimizer = optax.sgd(reference_rate * batch_size / sizes[0])
        method = descent.method(gradients.mean(problem.loss), optimizer)
        batches = batching.batches(stream[-setting.window :], batch_size)
        state, _ = descent.run(method, method.init(params), problem.train, batches)
        return mean_loss(problem, setting, state.params)

    losses = jnp.stack([jax.vmap(partial(branch, size))(params) for size in sizes], axis=1)
    return losses / losses[:, :1]


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
    sizes, branches, num_seeds = setting.batch_sizes, setting.branches, setting.num_seeds
    init_key, stream_key, noise_key = jax.random.split(jax.random.key(options.seed), 3)
    draw_stream = partial(batching.reshuffled, num_examples=problem.num_examples, num_epochs=setting.num_epochs)
    params = jax.vmap(problem.init)(jax.random.split(init_key, num_seeds))
    starts = params, jax.jit(jax.vmap(draw_stream))(jax.random.split(stream_key, num_seeds))
    updates, rates, inside = zip(*(tuned(problem, setting, size, starts) for size in sizes), strict=True)
    updates = np.stack(updates, axis=1)  # [S, B]
    examples = updates * np.asarray(sizes)
    longest = int(updates[:, -1].max())
    measured = jax.jit(jax.vmap(partial(noise_scales, problem, setting, longest, num_pairs), (0, 0, None, 0)))
    noise_keys = jax.random.split(noise_key, num_seeds)
    b_simple, b_noise = (np.asarray(x) for x in measured(*starts, rates[-1], noise_keys))
    over_seeds = jax.jit(jax.vmap(partial(branched, problem, setting, rates[sizes.index(branches[0])])))
    ratios = np.asarray(over_seeds(*starts)).mean(1)  # [S, K]
    fits = [hyperbola(sizes, of_seed) for of_seed in updates]
    least = examples[:, :3].min(1)
    of_seeds = {
        "B_simple": [np.median(x[: int(u)]) for x, u in zip(b_simple, updates[:, -1], strict=True)],
        "B_noise": [np.median(x[: int(u)]) for x, u in zip(b_noise, updates[:, -1], strict=True)],
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
    fit = found["hyperbola"][0]
    scale = np.exp(np.mean(np.log(examples / theory.examples_to_target(jnp.asarray(sizes), fit, min_examples=1.0))))
    law = theory.examples_to_target(np.geomspace(sizes[0], sizes[-1], 50), fit, min_examples=scale)
    plots.band(left, np.geomspace(sizes[0], sizes[-1], 50), law[None], "hyperbola", 1)
    left.set(
        xscale="log", yscale="log", xlabel="batch size (examples)", ylabel=f"examples to a loss of {setting.target}"
    )
    left.legend(frameon=False)
    plots.band(middle, branches, ratios, "branches", 2)
    middle.axhline(TOLERANCE, color="gray", linewidth=1)
    middle.set(
        xscale="log", yscale="log", xlabel="batch size of the branch (examples)", ylabel="loss over that at B = 4"
    )
    for i, (middle_value, low, high) in enumerate(found.values()):
        error = [[middle_value - low], [high - middle_value]]
        right.errorbar([middle_value], [i], xerr=error, fmt="o", capsize=4, color=plots.COLOURS[i])
    right.set(xscale="log", xlabel="critical batch size (examples), 90 % interval", xlim=(2, 1000), ylim=(-0.5, 4.5))
    right.set_yticks(range(len(found)), list(found))
    return figure


if __name__ == "__main__":
    experiment.run(main)
