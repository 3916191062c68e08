"""'Stochastic descent suits limited computing power': how much memory does a small batch save, and beside what?

Question    Memory of a gradient beside parameters and data, by the compiler's own count, against the batch size B:
            plain, microbatched by 16 examples, per-example gradients by vmap, and norms of them by `ghost`. What does
            an example cost, and from which B on do the examples outweigh the parameters, which are there at any B?
Prediction  Plain memory grows in proportion to B; vmap adds a gradient, four bytes a parameter, to every example;
            norms by `ghost` stay within 1.5 times the plain bytes an example. Microbatches hold what a plain
            batch of 16 holds, within half, at any B; beyond B = 16 they take within a fifth of the plain time. The
            activations of one example are smaller than the parameters, gradient and Adam's two moments together, so
            that B = 1 saves nothing worth having over B = 16 on the dense network; on the convolutional one it
            does, and on the transformer.
Cost        100 s on two CPU cores. Bytes are counted by the compiler: they have no spread over seeds.
"""

import itertools
from functools import partial

import jax
import numpy as np

from gdjax import gradients, problems, timing
from gdjax import report as plots
from gdjax.commands import experiment
from gdjax.problems import datasets, models

MICROBATCH = 16
BATCH_SIZES = (1, 4, 16, 64, 256, 1024)
FIT = 64  # batch sizes from here on give the bytes an example
TIMED = 256
ALPHABET = datasets.NUM_SHAKESPEARE_CHARACTERS
STATES = 4  # copies of the parameters that Adam holds: themselves, gradient, two moments
ESTIMATORS = {
    "plain": gradients.mean,
    "microbatched": partial(gradients.microbatched, microbatch_size=MICROBATCH),
    "vmap": gradients.per_example,
    "ghost": gradients.with_sq_norms,
}


def cases():
    """Return {name: problem}; images and text are drawn, as nothing is learned here."""
    key = jax.random.key(0)
    images = jax.random.normal(key, (max(BATCH_SIZES), 28, 28, 1)), jax.random.randint(key, (max(BATCH_SIZES),), 0, 10)
    text = jax.random.randint(key, (max(BATCH_SIZES), 65), 0, ALPHABET)
    dense = datasets.Split((images[0].reshape(len(images[0]), -1), images[1]), None)
    return {
        "dense 784-256-256-10": problems.classification(models.mlp((784, 256, 256, 10)), dense, num_classes=10),
        "convolutional 28x28": problems.image_cnn(datasets.Split(images, None), name="cnn"),
        "transformer of 64 characters": problems.language_model(
            models.transformer(num_tokens=ALPHABET), datasets.Split(text, None), num_tokens=ALPHABET
        ),
    }


def gradient(loss, estimator, params, batch):
    """Return the gradient, and what was measured of the examples: with vmap, the mean square of their gradients."""
    _, grad, aux = ESTIMATORS[estimator](loss)(params, batch)
    if estimator == "vmap":
        return grad, jax.tree.map(lambda g: (g**2).mean(0), aux.grads)
    return grad, aux.sq_norms if estimator == "ghost" else ()


def measure(name, problem, estimator, batch_size):
    """Return a row and the program, bound to its arguments."""
    params = problem.init(jax.random.key(0))
    batch = jax.tree.map(lambda x: x[:batch_size], problem.train)
    program = timing.compiled(partial(gradient, problem.loss, estimator), params, batch)
    leaves = [leaf.size for leaf in jax.tree.leaves(params)]
    count = sum(leaves)
    # The compiler keeps temporaries in the place of results where they fit: only the sum means something.
    results = 4 * count * (2 if estimator == "vmap" else 1)
    row = {"problem": name, "estimator": estimator, "batch_size": batch_size, "parameters": count}
    row["largest_layer"] = max(leaves) / count
    row["bytes"] = (program.temporary_bytes or 0) + results
    return row, partial(program, params, batch)


def slope(bytes_of):
    """Return the bytes an example, from {batch size: bytes}, by the largest batch sizes."""
    sizes = [size for size in bytes_of if size >= FIT]
    return float(np.polyfit(sizes, [bytes_of[size] for size in sizes], 1)[0])


def judge(rows, times):
    """Return the verdict, from bytes and from seconds {problem: {estimator: s}} at B = TIMED."""
    parts, missed = [], {}
    for name, seconds in times.items():
        mine = [row for row in rows if row["problem"] == name]
        count, largest_layer = mine[0]["parameters"], mine[0]["largest_layer"]
        of = {
            estimator: {row["batch_size"]: row["bytes"] for row in mine if row["estimator"] == estimator}
            for estimator in ESTIMATORS
        }
        largest = max(of["plain"])
        plain, example = of["plain"][largest], slope(of["plain"])
        extra, ghost = (slope(of["vmap"]) - example) / (4 * count), slope(of["ghost"]) / example
        small, slower = of["microbatched"][largest], seconds["microbatched"] / seconds["plain"]
        held = small / of["plain"][MICROBATCH]
        even, dense = STATES * 4 * count / example, name.startswith("dense")
        checks = {
            "plain memory is in proportion to B": abs((plain - 4 * count) / (example * largest) - 1) < 0.2,
            "vmap adds a gradient to every example": abs(extra - 1) < 0.2,
            "ghost norms stay within 1.5 times plain": ghost < 1.5,
            "microbatches hold what B = 16 holds": held < 1.5,
            "microbatches take a fifth longer at most": slower < 1.2,
            "16 examples outweigh the parameters, but not of the dense network": (even > MICROBATCH) == dense,
        }
        for claim, holds in checks.items():
            missed.setdefault(claim, []).extend([] if holds else [name.split()[0]])
        parts.append(
            f"{name}: an example costs {example / 1024:.1f} KiB, as much as parameters and Adam's state "
            f"({STATES * 4 * count / 2**20:.1f} MiB) at B = {even:.0f}; vmap adds {extra:.2f} gradients an example "
            f"({largest_layer:.2f} being the largest layer's part), "
            f"ghost takes {ghost:.2f} times plain; microbatches of {MICROBATCH} at B = {largest} hold {held:.2f} "
            f"times B = {MICROBATCH} ({small / plain:.0%} of plain), and take "
            f"{slower:.2f} times the time of plain at B = {TIMED}"
        )
    found = {f"{claim} ({', '.join(names)})" if names else claim: not names for claim, names in missed.items()}
    return experiment.verdict(found, f"{'. '.join(parts)}.")


def main(options: experiment.Options) -> experiment.Result:
    sizes, repeats = (BATCH_SIZES[2::2] + BATCH_SIZES[-1:], 3) if options.smoke else (BATCH_SIZES, 7)
    rows, times = [], {}
    for name, problem in list(cases().items())[: 1 if options.smoke else None]:
        runs = {}
        for estimator, size in itertools.product(ESTIMATORS, sizes):
            if estimator == "microbatched" and size % MICROBATCH:
                continue
            row, run = measure(name, problem, estimator, size)
            rows.append(row)
            if size == TIMED:
                runs[estimator] = run
        times[name] = dict(zip(runs, timing.in_turn(list(runs.values()), repeats=repeats), strict=True))
    timed = [{"problem": name, "seconds": of_name, "batch_size_timed": TIMED} for name, of_name in times.items()]
    return experiment.Result(rows + timed, judge(rows, times), draw(rows))


def draw(rows):
    title = "Memory of a gradient against the batch size, by the compiler's count"
    names = list(dict.fromkeys(row["problem"] for row in rows))
    figure, axes = plots.panels(len(names), title=title, width=5, height=4)
    for axis, name in zip(axes, names, strict=True):
        for i, estimator in enumerate(ESTIMATORS):
            shown = [row for row in rows if (row["problem"], row["estimator"]) == (name, estimator)]
            sizes = [row["batch_size"] for row in shown]
            plots.band(axis, sizes, np.array([[row["bytes"] / 2**20 for row in shown]]), estimator, i)
        state = STATES * 4 * next(row["parameters"] for row in rows if row["problem"] == name)
        axis.axhline(state / 2**20, color="gray", linewidth=1, label="parameters, gradient, Adam's moments")
        axis.set(xlabel="batch size (examples)", ylabel="results and temporaries (MiB)", title=name)
        axis.set(xscale="log", yscale="log")
        axis.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    experiment.run(main)
