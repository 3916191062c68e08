"""How does the gradient noise scale move along a training run, and what does watching it cost?

Question    Digits, a multilayer perceptron, SGD at batch size 32: how do B_simple = tr(S)/|G|^2 and B_noise =
            tr(HS)/(G'HG) change from the first to the last epoch, layer by layer? Do intervals from half of the
            examples hold what all of them say? Does the running interval hold the exact scale, averaged as it averages,
            and that of the moment, for a reshuffled stream and for one with replacement?
Prediction  Both grow, at least threefold, as the gradient shrinks faster than its noise (McCandlish et al. 2018, figure
            8), and differ by less than a factor of ten; 80 to 97 % of the 90 % intervals hold. The running interval
            holds at 85 % of the records or more. In reshuffled epochs |G|^2 comes out too large where B_simple is
            beyond N = 1440, since the parameters have just been fitted to the examples that are not to come; not so
            with replacement. Watching costs less than 30 % of the training time.
Cost        2 minutes on two CPU cores.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, descent, ghost, gradients, noise, problems, timing
from gdjax import report as plots
from gdjax.commands import experiment

BATCH_SIZE, LEARNING_RATE, HALF_LIFE = 32, 0.1, 1440
NUM_SEEDS, NUM_EPOCHS, NUM_POINTS = 3, 64, 10
EVERY = 3  # updates between records of the exact and of the running scale; 15 records an epoch
STREAMS = {"reshuffled": batching.reshuffled, "with replacement": batching.with_replacement}
SAMPLE, PAIR_SIZE, NUM_PAIRS = 720, 360, 50
OVERHEAD_SIZES = (32, 128, 480)
LAYERS = ("first layer", "last layer")


def exact_pair(problem, params):
    """Return (|G|^2, tr(S)) of all training examples, [2]."""
    _, grad, norms = ghost.sq_norms(problem.loss)(params, problem.train)
    signal = optax.tree.norm(grad, squared=True)
    return jnp.stack([signal, sum(leaf.mean() for leaf in jax.tree.leaves(norms)) - signal])


def train(problem, stream, num_epochs, key):
    """Return parameters, exact pairs and running noise scales at every third update, each with a leading axis."""
    init_key, stream_key = jax.random.split(key)
    method = descent.method(gradients.with_sq_norms(problem.loss), optax.sgd(LEARNING_RATE))
    method = noise.track(method, half_life=HALF_LIFE, num_examples=problem.num_examples, stream=stream)
    batches = batching.batches(stream(stream_key, problem.num_examples, num_epochs=num_epochs), BATCH_SIZE)

    def record(state, info):
        return state.params, exact_pair(problem, state.params), info.aux.noise_scale

    return descent.run(method, method.init(problem.init(init_key)), problem.train, batches, record, every=EVERY)[1]


def averaged(pairs):
    """Average exact pairs [S, E, 2] over the past as the running scale does; return the means, [S, E, 2]."""
    keep, means, total, weight = 2.0 ** (-EVERY * BATCH_SIZE / HALF_LIFE), [], 0.0, 0.0
    for pair in np.moveaxis(np.asarray(pairs, np.float64), 1, 0):
        total, weight = keep * total + pair, keep * weight + 1
        means.append(total / weight)
    return np.stack(means, 1)


def agreement(pairs, running):
    """Return what the running scales [S, E] say of the exact ones."""
    means = averaged(pairs)
    of_past, now = (np.asarray(x[..., 1] / x[..., 0]) for x in (means, pairs))
    low, high = np.asarray(running.low), np.asarray(running.high)
    last = slice(-(now.shape[1] // 4), None)  # the last quarter of the run
    words, counts = np.unique(running.verdict, return_counts=True)
    return {
        "held": np.mean((low <= of_past) & (of_past <= high)),
        "held_now": np.mean((low <= now) & (now <= high)),
        "identified": np.isfinite(high).mean(),
        "median_ratio": np.median(running.b_simple / of_past),
        "signal_ratio_at_the_end": running.grad_sq_norm[:, last].mean() / means[:, last, 0].mean(),
        "verdicts": dict(zip(words.tolist(), counts.tolist(), strict=True)),
    }


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
    tracked = noise.track(
        descent.method(gradients.with_sq_norms(problem.loss), optimizer),
        half_life=HALF_LIFE,
        num_examples=problem.num_examples,
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

    keys, runs = jax.random.split(train_key, num_seeds), {}
    for name, stream in STREAMS.items():
        over_seeds = jax.vmap(partial(train, problem, stream, num_epochs))
        runs[name] = jax.jit(over_seeds)(keys)  # [S, E, ...]
    agreements = {name: agreement(pairs, running) for name, (_, pairs, running) in runs.items()}
    epochs = np.unique(np.geomspace(1, num_epochs, NUM_POINTS).round().astype(int))
    ends = epochs * problem.num_examples // (BATCH_SIZE * EVERY) - 1
    params, _, running = jax.tree.map(lambda leaf: leaf[:, ends], runs["reshuffled"])
    means = averaged(runs["reshuffled"][1])[:, ends]

    # Loops: plain matrix products take far less time to compile than those with the axes of a vmap.
    over_points = partial(jax.lax.map, lambda point: measure(problem, num_pairs, *point))
    keys = jax.random.split(measure_key, (num_seeds, len(epochs)))
    exact, sampled, hessian = jax.jit(partial(jax.lax.map, over_points))((params, keys))
    scales = exact, sampled, hessian
    sizes, num_updates = (OVERHEAD_SIZES[:1], 20) if options.smoke else (OVERHEAD_SIZES, 500)
    start = jax.tree.map(lambda leaf: leaf[0, 0], params)
    costs = {b: overhead(problem, start, b, overhead_key, num_updates) for b in sizes}

    verdict = judge(*scales, agreements, costs)
    examples_seen = epochs * problem.num_examples
    rows = list(table(examples_seen, *scales, running))
    rows += [{"stream": name, **found} for name, found in agreements.items()]
    rows += [{"batch_size": b, "plain_seconds": p, "tracked_seconds": t, "ratio": t / p} for b, (p, t) in costs.items()]
    return experiment.Result(
        rows,
        verdict,
        draw(examples_seen / 1000, *scales, running, means[..., 1] / means[..., 0], "; ".join(verdict.split("; ")[:2])),
    )


def judge(exact, sampled, hessian, agreements, costs) -> str:
    """Compare what was found with each part of the prediction, by medians over seeds."""
    first, last = (np.median(exact.b_simple[:, i]) for i in (0, -1))
    held = np.mean((sampled.low <= exact.b_simple) & (exact.b_simple <= sampled.high))
    known = np.isfinite(hessian.high)
    apart = np.median(np.asarray(hessian.b_noise / exact.b_simple)[known]) if known.any() else np.nan
    running, fresh = agreements.values()
    inflated, right = running["signal_ratio_at_the_end"], fresh["signal_ratio_at_the_end"]
    ratios = {b: tracked / plain for b, (plain, tracked) in costs.items()}
    spent = ", ".join(f"{ratio:.2f} at B = {b}" for b, ratio in ratios.items())
    found = [
        (f"B_simple went from {first:.3g} to {last:.3g} examples", last >= 3 * first),
        (f"{held:.0%} of the intervals held it", 0.8 <= held <= 0.97),
        (f"B_noise / B_simple: {apart:.2g}, at the {known.mean():.0%} where it was identified", 0.1 < apart < 10),
        (
            f"{running['held']:.0%} of the running intervals held the scale averaged as they average, "
            f"{running['held_now']:.0%} that of the moment, {running['identified']:.0%} had an upper end; with "
            f"replacement {fresh['held']:.0%}, {fresh['held_now']:.0%} and {fresh['identified']:.0%}",
            running["held"] >= 0.85 and fresh["held"] >= 0.85,
        ),
        (
            f"running / exact |G|^2 in the last quarter: {inflated:.2g} reshuffled, {right:.2g} with replacement",
            inflated > 1.2 and abs(right - 1) < 0.2,
        ),
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


def draw(thousands, exact, sampled, hessian, running, of_past, title):
    figure, (left, right) = plots.panels(2, title=title, width=6, height=4.6)
    plots.band(left, thousands, exact.b_simple, "B_simple, all examples", 0)
    bars(left, thousands, sampled, f"interval from {SAMPLE} examples (90 %)", 0)
    plots.band(left, thousands, running.b_simple, f"running B_simple, half-life {HALF_LIFE} examples", 2)
    plots.band(left, thousands, of_past, "exact, averaged as the running scale is", 5)
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
