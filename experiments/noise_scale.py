"""How does the gradient noise scale move along a training run, and what does watching it cost?

Question    Digits, a multilayer perceptron, SGD at batch size 32: how do B_simple = tr(S)/|G|^2 and B_noise =
            tr(HS)/(G'HG) change from the first to the last epoch, layer by layer? Do intervals from half of the
            examples hold what all of them say, and does the estimate that the training itself keeps follow?
Prediction  Both grow, at least threefold, as the gradient shrinks faster than its noise (McCandlish et al. 2018, figure
            8), and differ by less than a factor of ten; 80 to 97 % of the 90 % intervals hold; the running estimate
            is within a factor of two at the median, and costs less than 30 % of the training time.
Cost        60 s on two CPU cores.
"""

from functools import partial

import jax
import numpy as np
import optax

from gdjax import batching, descent, gradients, noise, problems, timing
from gdjax import report as plots
from gdjax.commands import experiment
from gdjax.noise import _tracking as tracking

BATCH_SIZE, LEARNING_RATE, HALF_LIFE = 32, 0.1, 1440
NUM_SEEDS, NUM_EPOCHS, NUM_POINTS = 3, 64, 10
SAMPLE, PAIR_SIZE, NUM_PAIRS = 720, 360, 50
OVERHEAD_SIZES = (32, 128, 480)
LAYERS = ("first layer", "last layer")


def train(problem, num_epochs, every, key):
    """Return the parameters and the running noise scale at every `every`-th update, each with a leading axis E."""
    init_key, stream_key = jax.random.split(key)
    method = descent.method(gradients.with_sq_norms(problem.loss), optax.sgd(LEARNING_RATE))
    method = tracking.noise_scale(method, half_life=HALF_LIFE, num_examples=problem.num_examples)
    stream = batching.reshuffled(stream_key, problem.num_examples, num_epochs=num_epochs)

    def record(state, info):
        return state.params, info.aux.noise_scale

    batches = batching.batches(stream, BATCH_SIZE)
    return descent.run(method, method.init(problem.init(init_key)), problem.train, batches, record, every=every)[1]


def measure(problem, num_pairs, params, key):
    """Return B_simple of all training examples, B_simple from a sample of them, and B_noise from pairs of batches."""
    sample_key, hessian_key = jax.random.split(key)
    simple = partial(noise.measure, problem.loss, params, problem.train, sample_key)
    hessian = partial(noise.measure_hessian, problem.loss, params, problem.train, hessian_key)
    return (
        simple(num_examples=problem.num_examples),
        simple(num_examples=SAMPLE),
        hessian(batch_size=PAIR_SIZE, num_pairs=num_pairs),
    )


def overhead(problem, params, batch_size, key, num_updates):
    """Return seconds per update (plain, with the running scale), medians of runs in turn and in both orders."""
    stream = batching.reshuffled(key, problem.num_examples, length=batch_size * num_updates)
    batches = batching.batches(stream, batch_size)
    optimizer = optax.sgd(LEARNING_RATE)
    plain = descent.method(gradients.mean(problem.loss), optimizer)
    tracked = tracking.noise_scale(
        descent.method(gradients.with_sq_norms(problem.loss), optimizer), half_life=HALF_LIFE
    )
    runs = []
    for method, record in ((plain, descent.batch_loss), (tracked, lambda state, info: info.aux.noise_scale)):
        run = partial(descent.run, method, record=record, every=num_updates)
        arguments = method.init(params), problem.train, batches
        runs.append(partial(timing.compiled(run, *arguments), *arguments))
    return [seconds / num_updates for seconds in timing.in_turn(runs)]


def main(options: experiment.Options) -> experiment.Result:
    problem = problems.digits_mlp()
    num_epochs, num_seeds, num_pairs = (4, 2, 4) if options.smoke else (NUM_EPOCHS, NUM_SEEDS, NUM_PAIRS)
    train_key, measure_key, overhead_key = jax.random.split(jax.random.key(options.seed), 3)

    every = problem.num_examples // BATCH_SIZE  # updates an epoch
    over_seeds = jax.vmap(partial(train, problem, num_epochs, every))
    params, running = jax.jit(over_seeds)(jax.random.split(train_key, num_seeds))  # [S, E, ...]
    epochs = np.unique(np.geomspace(1, num_epochs, NUM_POINTS).round().astype(int))
    params, running = jax.tree.map(lambda leaf: leaf[:, epochs - 1], (params, running))

    # Loops: plain matrix products take far less time to compile than those with the axes of a vmap.
    over_points = partial(jax.lax.map, lambda point: measure(problem, num_pairs, *point))
    keys = jax.random.split(measure_key, (num_seeds, len(epochs)))
    exact, sampled, hessian = jax.jit(partial(jax.lax.map, over_points))((params, keys))
    scales = exact, sampled, hessian
    sizes, num_updates = (OVERHEAD_SIZES[:1], 20) if options.smoke else (OVERHEAD_SIZES, 500)
    start = jax.tree.map(lambda leaf: leaf[0, 0], params)
    costs = {b: overhead(problem, start, b, overhead_key, num_updates) for b in sizes}

    verdict = judge(*scales, running, costs)
    examples_seen = epochs * problem.num_examples
    rows = list(table(examples_seen, *scales, running))
    rows += [{"batch_size": b, "plain_seconds": p, "tracked_seconds": t, "ratio": t / p} for b, (p, t) in costs.items()]
    return experiment.Result(rows, verdict, draw(examples_seen / 1000, *scales, running, verdict))


def judge(exact, sampled, hessian, running, costs) -> str:
    """Compare what was found with each part of the prediction, by medians over seeds."""
    first, last = (np.median(exact.b_simple[:, i]) for i in (0, -1))
    held = np.mean((sampled.low <= exact.b_simple) & (exact.b_simple <= sampled.high))
    known = np.isfinite(hessian.high)
    apart = np.median(np.asarray(hessian.b_noise / exact.b_simple)[known]) if known.any() else np.nan
    lag = np.median(running.b_simple / exact.b_simple)
    ratios = {b: tracked / plain for b, (plain, tracked) in costs.items()}
    spent = ", ".join(f"{ratio:.2f} at B = {b}" for b, ratio in ratios.items())
    found = [
        (f"B_simple went from {first:.3g} to {last:.3g} examples", last >= 3 * first),
        (f"{held:.0%} of the intervals held it", 0.8 <= held <= 0.97),
        (f"B_noise / B_simple: {apart:.2g}, at the {known.mean():.0%} where it was identified", 0.1 < apart < 10),
        (f"running / B_simple: {lag:.2g}", 0.5 < lag < 2),
        (f"training time with / without watching: {spent}", max(ratios.values()) <= 1.3),
    ]
    return "; ".join(f"{part} ({'as' if right else 'NOT as'} predicted)" for part, right in found) + "."


def table(examples_seen, exact, sampled, hessian, running):
    for seed, i in np.ndindex(exact.b_simple.shape):
        one, sample, curved = jax.tree.map(lambda leaf, at=(seed, i): leaf[at], (exact, sampled, hessian))
        layers = zip(LAYERS, one.per_leaf, sample.per_leaf, strict=True)
        yield {
            "seed": seed,
            "examples_seen": examples_seen[i],
            "b_simple": one.b_simple,
            "interval": [sample.low, sample.high],
            "verdict": sample.verdict,
            "b_noise": curved.b_noise,
            "b_noise_interval": [curved.low, curved.high],
            "b_noise_verdict": curved.verdict,
            "running": running.b_simple[seed, i],
            "layers": {
                name: {"b_simple": all_of_it["weight"].b_simple, "interval": [some["weight"].low, some["weight"].high]}
                for name, all_of_it, some in layers
            },
        }


def draw(thousands, exact, sampled, hessian, running, title):
    figure, (left, right) = plots.panels(2, title=title, width=6, height=4.6)
    plots.band(left, thousands, exact.b_simple, "B_simple, all examples", 0)
    bars(left, thousands, sampled, f"interval from {SAMPLE} examples (90 %)", 0)
    plots.band(left, thousands, running.b_simple, f"running B_simple, half-life {HALF_LIFE} examples", 2)
    bars(left, thousands * 1.15, hessian, "B_noise, interval (90 %)", 1)
    for i, name in enumerate(LAYERS):
        plots.band(right, thousands, exact.per_leaf[i]["weight"].b_simple, f"{name}'s weights", 3 + i)
        bars(right, thousands * 1.15**i, sampled.per_leaf[i]["weight"], None, 3 + i)
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="examples seen (thousands)", ylabel="noise scale (examples)")
        axis.legend(frameon=False, fontsize="small")
    return figure


def bars(axis, x, scales, label, i):
    """Draw every seed's interval, as an arrow upwards where it has no upper end."""
    for seed, (low, high) in enumerate(zip(np.asarray(scales.low), np.asarray(scales.high), strict=True)):
        at, known, colour = x * 1.03**seed, np.isfinite(high), plots.COLOURS[i]
        label = label if seed == 0 else None
        axis.vlines(at[known], low[known], high[known], color=colour, linewidth=1.2, alpha=0.6, label=label)
        axis.plot(at[~known], low[~known], "^", color=colour, markersize=4, alpha=0.6)


if __name__ == "__main__":
    experiment.run(main)
