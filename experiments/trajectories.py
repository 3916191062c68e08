"""What do the paths of stochastic, mini-batch and batch descent look like, and what is certain about them?

Question    Least squares in two dimensions, drawn with its contours (and as an animation), from one start, at one rate
            for each batch size; and a network 64-32-10 on digits, seen in the two principal directions of its paths.
Prediction  On the quadratic the mean of many stochastic paths is the path of batch descent at the same rate, exactly:
            E delta_t = (I - eta H)^t delta_0, within 4 standard errors. The loss falls at every update of batch
            descent, and at less than 65 % of those of stochastic descent once that is near the minimum; its path is
            more than 10 times longer than the way it comes. Two principal directions of each path of the network hold
            more than the 76 % that they hold of a random walk in many dimensions (6 / pi^2 + 6 / (4 pi^2); Antognini &
            Sohl-Dickstein 2018, arXiv 1806.08805), the more the larger the batch.
Cost        30 s on two CPU cores.
"""

import dataclasses
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from gdjax import batching, descent, problems, report, sweep
from gdjax.commands import experiment
from gdjax.problems import datasets

RATES = {1: 0.05, 16: 0.3, 256: 0.9}  # of each batch size, on 256 examples
NETWORK_RATES = {1: 0.02, 32: 0.5, 1440: 1.0}
NUM_PATHS, NUM_EPOCHS = 400, 4
NUM_SEEDS, NETWORK_EPOCHS, NUM_POINTS = 3, 20, 20
RANDOM_WALK = 6 / np.pi**2 * (1 + 1 / 4)
ROUNDING = 1e-5  # of the path of batch descent, which is alike for all seeds
START = (1.5, 4.0)  # from the minimum
NUM_FRAMES, FRAMES_A_SECOND = 48, 12


def path(problem, batch_size, learning_rate, stream, num_epochs, num_points, key):
    """Return the parameters in a row, the start first and then at equal distances, about [num_points, D]."""
    start = problem.init(jax.random.split(key)[0])  # what `descent.train` begins with
    every = max(1, int(num_epochs * problem.num_examples // batch_size // num_points))
    _, points = descent.train(
        problem, optax.sgd(learning_rate), key=key, batch_size=batch_size, num_epochs=num_epochs, stream=stream,
        record=lambda state, info: ravel_pytree(state.params)[0], every=every,
    )  # fmt: skip
    return jnp.concatenate([ravel_pytree(start)[0][None], points])


def paths_of(problem, rates, draw, num_epochs, num_points, keys):
    """Return {batch size: paths [S, T + 1, D]}."""
    found = {}
    for size, rate in rates.items():
        stream = draw if size < problem.num_examples else batching.reshuffled  # all examples, each once
        found[size] = sweep.map(partial(path, problem, size, rate, stream, num_epochs, num_points), keys)
    return found


def farthest(paths, minimum, hessian, learning_rate):
    """Return the most standard errors that the mean path is away from (I - eta H)^t delta_0, in any coordinate."""
    errors = paths - minimum
    matrix = np.eye(2) - learning_rate * hessian
    expected = np.stack([np.linalg.matrix_power(matrix, t) @ START for t in range(paths.shape[1])])
    error = errors.std(0, ddof=1) / np.sqrt(len(paths))
    return float(np.max(np.abs(errors.mean(0) - expected)[1:] / (error[1:] + ROUNDING)))


def shape(points, minimum, hessian):
    """Return length over displacement, and the part of the updates in the second half at which the loss falls."""
    steps = np.linalg.norm(np.diff(points, axis=1), axis=2).sum(1)
    falls = np.diff(excess(points, minimum, hessian), axis=1)[:, -(points.shape[1] // 2) :] < 0
    return float(np.median(steps / np.linalg.norm(points[:, -1] - points[:, 0], axis=1))), float(falls.mean())


def excess(points, minimum, hessian):
    """Return the excess loss at points [..., 2]."""
    return 0.5 * np.einsum("...c,cd,...d->...", points - minimum, hessian, points - minimum)


def principal(points):
    """Return the part of the variance of points [T, D] in its two principal directions, and these [2, D]."""
    _, sizes, directions = np.linalg.svd(points - points.mean(0), full_matrices=False)
    return float((sizes[:2] ** 2).sum() / (sizes**2).sum()), directions[:2]


def main(options: experiment.Options) -> experiment.Result:
    num_paths, num_epochs, seeds = (40, 2, 1) if options.smoke else (NUM_PATHS, NETWORK_EPOCHS, NUM_SEEDS)
    rates, network_rates = ({1: RATES[1], 256: RATES[256]}, {32: 0.5}) if options.smoke else (RATES, NETWORK_RATES)
    data_key, path_key, network_key = jax.random.split(jax.random.key(options.seed), 3)
    data = datasets.gaussian_regression(data_key, num_examples=256, dimension=2, condition_number=10, noise=1.0)
    x, y = (np.asarray(leaf, np.float64) for leaf in data.train)
    quadratic = np.linalg.lstsq(x, y)[0], x.T @ x / len(y)  # the minimum and the Hessian
    start = jnp.asarray(quadratic[0] + START, jnp.float32)
    plane = dataclasses.replace(problems.least_squares(data), init=lambda key: start)
    keys = jax.random.split(path_key, num_paths)
    found = paths_of(plane, rates, batching.with_replacement, NUM_EPOCHS, np.inf, keys)
    paths = {size: np.asarray(points, np.float64) for size, points in found.items()}
    rows = []
    for size, rate in rates.items():
        longer, falls = shape(paths[size], *quadratic)
        row = {"batch_size": size, "learning_rate": rate, "length": longer, "falls": falls}
        rows.append(row | {"standard_errors": farthest(paths[size], *quadratic, rate)})
    network, keys = problems.digits_mlp((32,)), jax.random.split(network_key, seeds)
    of_network = paths_of(network, network_rates, batching.reshuffled, num_epochs, NUM_POINTS, keys)
    parts = {size: [principal(seed)[0] for seed in points] for size, points in of_network.items()}
    verdict = judge(rows, parts)
    rows += [{"network_batch_size": size, "principal_parts": part} for size, part in parts.items()]
    files = {"paths.gif": animation(quadratic, paths, 4 if options.smoke else NUM_FRAMES)}
    return experiment.Result(rows, verdict, draw(quadratic, paths, network, of_network), files)


def judge(rows, parts):
    one, *_, whole = rows
    score = max(row["standard_errors"] for row in rows)
    medians = [float(np.median(part)) for part in parts.values()]
    least = min(min(part) for part in parts.values())
    checks = {
        "mean paths are as expected": score < 4,
        "the loss falls at every update of batch descent": whole["falls"] == 1,
        "the loss falls at less than 65 % of stochastic updates": one["falls"] < 0.65,
        "the stochastic path is ten times as long as its way": one["length"] > 10,
        "two directions hold more than of a random walk": least > RANDOM_WALK,
        "they hold the more the larger the batch": bool(np.all(np.diff(medians) > 0)),
    }
    return experiment.verdict(
        checks,
        f"Mean paths are within {score:.1f} standard errors of their expectation. The loss falls at "
        + ", ".join(f"{row['falls']:.0%} of the updates at B = {row['batch_size']}" for row in rows)
        + "; paths are "
        + ", ".join(f"{row['length']:.1f}" for row in rows)
        + " times as long as the way. Two directions hold "
        + ", ".join(f"{m:.1%} at B = {size}" for size, m in zip(parts, medians, strict=True))
        + f" of the network's paths ({RANDOM_WALK:.0%} of a random walk).",
    )


def show_plane(axis, quadratic, paths):
    """Draw contours of the square root of the excess loss around the paths, and the minimum."""
    points = np.concatenate([of_size[0] for of_size in paths.values()])
    x, y = (np.linspace(low - 0.5, high + 0.5, 120) for low, high in zip(points.min(0), points.max(0), strict=True))
    contours(axis, x, y, np.sqrt(excess(np.stack(np.meshgrid(x, y), axis=-1), *quadratic)))
    axis.plot(*quadratic[0], "k*", markersize=9)
    axis.set(xlabel="first parameter", ylabel="second parameter")


def show_network(axis, problem, of_network):
    """Draw paths of the first seed in their principal plane, over contours of the loss."""
    every = np.concatenate([points[0] for points in of_network.values()])
    (part, directions), centre = principal(every), every.mean(0)
    at = {size: (points[0] - centre) @ directions.T for size, points in of_network.items()}
    ends = 1.2 * ((every - centre) @ directions.T)
    x, y = (np.linspace(low, high, 30) for low, high in zip(ends.min(0), ends.max(0), strict=True))
    _, params_of = ravel_pytree(problem.init(jax.random.key(0)))

    def loss(place):
        return problem.evaluate(params_of(centre + place @ directions), names=("loss",))["loss"]

    places = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)
    contours(axis, x, y, np.log10(sweep.map(loss, places)).reshape(30, 30))
    for i, (size, points) in enumerate(at.items()):
        axis.plot(*points.T, "o-", color=report.COLOURS[i], markersize=2.5, linewidth=1, label=f"B = {size}")
    axis.set(xlabel="first principal direction", ylabel="second principal direction")
    axis.set_title(f"the network: {part:.0%} of the variance")


def contours(axis, x, y, values):
    axis.contour(x, y, values, levels=7, colors="gray", linewidths=0.6, alpha=0.7)


def draw(quadratic, paths, problem, of_network):
    title = "Stochastic, mini-batch and batch descent from one start, over contours of the loss"
    figure, (left, middle, right) = report.panels(3, title=title, width=4, height=3.8)
    for axis in (left, middle):
        show_plane(axis, quadratic, paths)
    for i, (size, of_size) in enumerate(paths.items()):
        style = {"color": report.COLOURS[i], "linewidth": 0.7 + 0.4 * i}
        left.plot(*of_size[0].T, **style, label=f"B = {size}, {of_size.shape[1] - 1} updates")
        middle.plot(*of_size.mean(0)[:: 1 + len(of_size[0]) // 256].T, **style, label=f"B = {size}")
    left.set(title=f"one path each, {NUM_EPOCHS} epochs")
    middle.set(title=f"means of {len(paths[1])} paths")
    show_network(right, problem, of_network)
    for axis in (left, middle, right):
        axis.legend(frameon=False, fontsize="small")
    return figure


def animation(quadratic, paths, num_frames):
    """Return a GIF: the first path of each batch size, all having seen as many examples at any time."""
    from matplotlib.animation import PillowWriter

    figure, [axis] = report.panels(1, title="As many examples seen, in batches of three sizes", width=4.5, height=4)
    show_plane(axis, quadratic, paths)
    colours = zip(paths, report.COLOURS, strict=False)
    lines = [axis.plot([], [], ".-", color=c, lw=1, ms=3, label=f"B = {size}")[0] for size, c in colours]
    axis.legend(frameon=False, loc="lower right")
    with tempfile.TemporaryDirectory() as folder:
        target, writer = Path(folder) / "paths.gif", PillowWriter(fps=FRAMES_A_SECOND)
        with writer.saving(figure, str(target), dpi=72):
            for seen in np.geomspace(0.01, 1, num_frames):
                for line, (points, *_) in zip(lines, paths.values(), strict=True):
                    line.set_data(*points[: 1 + int(seen * (len(points) - 1))].T)
                writer.grab_frame()
        return target.read_bytes()


if __name__ == "__main__":
    experiment.run(main)
