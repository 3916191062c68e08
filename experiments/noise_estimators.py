"""What do seven published ways to compute the noise scale return, where it is known exactly?

Question    Gaussian gradients of 400 parameters, 40 of them in normalisation layers, B_simple = 1024, batches of 64
            examples: what do seven ways return after 64 and after 1024 updates, and how far do they scatter?
Prediction  Ratios of means are right to 5 % in the long run, from single examples, microbatches, devices or two batch
            sizes; a single microbatch of 8, or a batch of 8 drawn apart, scatters more than the mean over all. The mean
            of the ratio scatters at least twice as much and does not settle. Normalisation layers alone return their
            own noise scale, 1536 here, to 15 %.
Cost        60 s on two CPU cores.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gdjax import noise
from gdjax import report as plots
from gdjax.commands import experiment

DIMENSION, NORM_DIMENSION, BATCH_SIZE, NUM_PARTS = 400, 40, 64, 8
B_SIMPLE, NORM_B_SIMPLE = 1024.0, 1536.0
NUM_UPDATES, NUM_RUNS = (64, 1024), 100
SHARE = 0.1  # of |G|^2 in the normalisation layers

WAYS = {
    "two batch sizes": "McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1: batches of 8 and of 64, drawn apart",
    "single examples": "Gray et al. 2024 (arXiv 2411.00999): norms of single examples against the batch's",
    "microbatches": "GPT-NeoX, gradient_noise_scale: accumulated gradients against one of them, ours the last of 8",
    "devices": "McCandlish et al. 2018, A.1; AdaScale, Johnson et al. 2020 (arXiv 2007.05105): 8 against their mean",
    "mean of the ratio": "the ratio of every update, averaged: what appendix A.1 of McCandlish et al. warns of",
    "ratio of running means": "McCandlish et al. 2018, A.1: both averaged, half-life a quarter of it, then divided",
    "normalisation layers only": "Gray et al. 2024: single examples, of the normalisation layers alone",
}


def distribution():
    """Return the mean gradient and the standard deviations of its coordinates, [D] each."""
    is_norm = jnp.arange(DIMENSION) < NORM_DIMENSION
    count = jnp.where(is_norm, NORM_DIMENSION, DIMENSION - NORM_DIMENSION)
    share = jnp.where(is_norm, SHARE, 1 - SHARE)
    rest = (B_SIMPLE - SHARE * NORM_B_SIMPLE) / (1 - SHARE)
    scale = jnp.where(is_norm, NORM_B_SIMPLE, rest)
    return jnp.sqrt(share / count), jnp.sqrt(share * scale / count)


def squares(key):
    """Return, of one update: the mean |g_b|^2 of every way of making parts, and |g_B|^2; of norm layers too."""
    mean, deviation = distribution()
    batch_key, small_key = jax.random.split(key)
    grads = mean + deviation * jax.random.normal(batch_key, (BATCH_SIZE, DIMENSION))
    small = mean + deviation / np.sqrt(BATCH_SIZE // NUM_PARTS) * jax.random.normal(small_key, (DIMENSION,))
    parts = grads.reshape(NUM_PARTS, -1, DIMENSION).mean(1)
    whole, norms = grads.mean(0), slice(0, NORM_DIMENSION)
    return {
        "batch": jnp.sum(whole**2),
        "apart": jnp.sum(small**2),
        "examples": jnp.mean(jnp.sum(grads**2, 1)),
        "parts": jnp.mean(jnp.sum(parts**2, 1)),
        "last part": jnp.sum(parts[-1] ** 2),
        "norms, examples": jnp.mean(jnp.sum(grads[:, norms] ** 2, 1)),
        "norms, batch": jnp.sum(whole[norms] ** 2),
    }


def estimates(num_updates, key):
    """Return the noise scale by each of WAYS after a run of so many updates."""
    seen = jax.lax.map(squares, jax.random.split(key, num_updates))  # [T] each

    def pair(small, large, size):
        return noise.unbiased(seen[small], seen[large], batch_sizes=(size, BATCH_SIZE))

    def ratio_of_means(pair, weights=None):
        signal, variance = (jnp.average(x, weights=weights) for x in pair)
        return variance / signal

    part = BATCH_SIZE // NUM_PARTS
    signal, variance = devices = pair("parts", "batch", part)
    recent = 2.0 ** (jnp.arange(num_updates) / (num_updates / 4))
    return {
        "two batch sizes": ratio_of_means(pair("apart", "batch", part)),
        "single examples": ratio_of_means(pair("examples", "batch", 1)),
        "microbatches": ratio_of_means(pair("last part", "batch", part)),
        "devices": ratio_of_means(devices),
        "mean of the ratio": jnp.mean(variance / signal),
        "ratio of running means": ratio_of_means(devices, recent),
        "normalisation layers only": ratio_of_means(pair("norms, examples", "norms, batch", 1)),
    }


def main(options: experiment.Options) -> experiment.Result:
    lengths, num_runs = ((16,), 8) if options.smoke else (NUM_UPDATES, NUM_RUNS)
    key, rows = jax.random.key(options.seed), []
    for length in lengths:
        keys = jax.random.split(jax.random.fold_in(key, length), num_runs)
        found = jax.jit(lambda keys, length=length: jax.lax.map(partial(estimates, length), keys))(keys)
        for name, source in WAYS.items():
            values = np.asarray(found[name], np.float64)
            low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
            rows.append(
                {
                    "way": name,
                    "source": source,
                    "num_updates": length,
                    "b_simple": B_SIMPLE,
                    "median": middle,
                    "low": low,
                    "high": high,
                    "not_positive": np.mean(values <= 0),
                }
            )
    return experiment.Result(rows, judge(rows, lengths[-1]), figure(rows, lengths))


def judge(rows, length):
    last = {row["way"]: row for row in rows if row["num_updates"] == length}
    unbiased = ("two batch sizes", "single examples", "microbatches", "devices", "ratio of running means")
    far = max(abs(last[name]["median"] / B_SIMPLE - 1) for name in unbiased)
    width = {name: (row["high"] - row["low"]) / B_SIMPLE for name, row in last.items()}
    norms = last["normalisation layers only"]
    checks = {
        "ratios of means are right": far <= 0.05,
        "one part of eight scatters more": min(width["microbatches"], width["two batch sizes"])
        > 1.1 * width["devices"],
        "the mean of the ratio does not settle": width["mean of the ratio"] > 2 * width["devices"],
        "normalisation layers return their own": abs(norms["median"] / NORM_B_SIMPLE - 1) <= 0.15,
    }
    lines = "; ".join(
        f"{name} {row['median']:.3g} ({row['low']:.3g} to {row['high']:.3g})" for name, row in last.items()
    )
    return experiment.verdict(
        checks, f"Of {B_SIMPLE:g}, after {length} updates, medians and nine runs in ten: {lines}."
    )


def figure(rows, lengths):
    drawn, axes = plots.panels(
        len(lengths), title=f"Seven ways to compute a noise scale of {B_SIMPLE:g}", width=6.5, height=4.2
    )
    for axis, length in zip(axes, lengths, strict=True):
        of_length = [row for row in rows if row["num_updates"] == length]
        for i, row in enumerate(of_length):
            # The mean of a ratio can be anything: what is beyond the axis is drawn at its end.
            low, middle, high = np.clip([row["low"], row["median"], row["high"]], 0, 3 * B_SIMPLE)
            axis.plot([low, high], [-i, -i], color=plots.COLOURS[0], linewidth=2)
            axis.plot([middle], [-i], "o", color=plots.COLOURS[0])
        axis.axvline(B_SIMPLE, color=plots.COLOURS[1], linestyle="--", linewidth=1)
        axis.set(
            yticks=[-i for i in range(len(of_length))],
            yticklabels=[row["way"] for row in of_length],
            xlim=(0, 3 * B_SIMPLE),
            xlabel=f"noise scale (examples) after {length} updates,\nmedian and nine runs in ten",
        )
    return drawn


if __name__ == "__main__":
    experiment.run(main)
