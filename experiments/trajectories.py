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

import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, descent, gradients, problems
from gdjax import report as plots
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


def path(problem, batch_size, learning_rate, draw, num_epochs, every, params, key):
    """Return the parameters at every `every`-th update, the start first."""
    method = descent.method(gradients.mean(problem.loss), optax.sgd(learning_rate))
    batches = batching.batches(draw(key, problem.num_examples, num_epochs=num_epochs), batch_size)
    _, points = descent.run(method, method.init(params), problem.train, batches, params_after, every=every)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), params, points)


def params_after(state, info):
    return state.params


def mean_loss(problem, params):
    return jax.vmap(problem.loss, (None, 0))(params, problem.train).mean()


def quadratic(problem, rates, num_paths, key):
    """Return the minimum, the Hessian, and paths [S, T + 1, 2] for each batch size, from draws with replacement."""
    x, y = (np.asarray(leaf, np.float64) for leaf in problem.train)
    minimum, hessian = np.linalg.lstsq(x, y)[0], x.T @ x / len(y)
    start = jnp.asarray(minimum + START, jnp.float32)
    keys = jax.random.split(key, num_paths)
    paths = {}
    for size, rate in rates.items():
        draw = batching.with_replacement if size < len(y) else batching.reshuffled  # all examples, each once
        one = partial(path, problem, size, rate, draw, NUM_EPOCHS, 1, start)
        paths[size] = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
    return minimum, hessian, paths


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
    excess = np.einsum("stc,cd,std->st", points - minimum, hessian, points - minimum)
    falls = np.diff(excess, axis=1)[:, -(excess.shape[1] // 2) :] < 0
    return float(np.median(steps / np.linalg.norm(points[:, -1] - points[:, 0], axis=1))), float(falls.mean())


def flat(params):
    """Return parameters [..., D] in one row."""
    return np.concatenate([np.asarray(leaf).reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(params)], axis=2)


def principal(points):
    """Return the part of the variance of points [T, D] in its two principal directions, and these [2, D]."""
    _, sizes, directions = np.linalg.svd(points - points.mean(0), full_matrices=False)
    return float((sizes[:2] ** 2).sum() / (sizes**2).sum()), directions[:2]


def network(problem, rates, num_epochs, keys):
    """Return {batch size: paths [S, T + 1, D]}, every seed from one start."""
    found = {}
    for size, rate in rates.items():
        every = max(1, num_epochs * problem.num_examples // size // NUM_POINTS)
        one = partial(path, problem, size, rate, batching.reshuffled, num_epochs, every)
        params = jax.vmap(problem.init)(keys)
        found[size] = flat(jax.jit(jax.vmap(one))(params, keys))
    return found


def main(options: experiment.Options) -> experiment.Result:
    num_paths, num_epochs, seeds = (40, 2, 1) if options.smoke else (NUM_PATHS, NETWORK_EPOCHS, NUM_SEEDS)
    rates, network_rates = ({1: RATES[1], 256: RATES[256]}, {32: 0.5}) if options.smoke else (RATES, NETWORK_RATES)
    data_key, path_key, network_key = jax.random.split(jax.random.key(options.seed), 3)
    data = datasets.gaussian_regression(data_key, num_examples=256, dimension=2, condition_number=10, noise=1.0)
    plane = problems.least_squares(data)
    minimum, hessian, paths = quadratic(plane, rates, num_paths, path_key)
    rows = []
    for size, rate in rates.items():
        longer, falls = shape(paths[size], minimum, hessian)
        score = farthest(paths[size], minimum, hessian, rate)
        rows.append(
            {"batch_size": size, "learning_rate": rate, "standard_errors": score, "length": longer, "falls": falls}
        )
    problem = problems.digits_mlp((32,))
    of_network = network(problem, network_rates, num_epochs, jax.random.split(network_key, seeds))
    parts = {size: [principal(seed)[0] for seed in points] for size, points in of_network.items()}
    rows += [{"network_batch_size": size, "principal_parts": part} for size, part in parts.items()]
    verdict = judge(rows[: len(rates)], parts)
    figure = draw(minimum, hessian, paths, problem, of_network)
    frames = 4 if options.smoke else NUM_FRAMES
    return experiment.Result(rows, verdict, figure, {"paths.gif": animation(minimum, hessian, paths, frames)})


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


def contours(axis, x, y, values, logarithmic=True):
    shown = np.log10(values) if logarithmic else values
    axis.contour(x, y, shown, levels=7, colors="gray", linewidths=0.6, alpha=0.7)


def plane_of(minimum, hessian, paths):
    """Return a grid around the paths, x [P], y [P], and the excess loss on it."""
    points = np.concatenate([of_size[0] for of_size in paths.values()])
    x, y = (np.linspace(points[:, i].min() - 0.5, points[:, i].max() + 0.5, 120) for i in range(2))
    errors = np.stack(np.meshgrid(x, y), axis=-1) - minimum
    return x, y, np.sqrt(0.5 * np.einsum("abc,cd,abd->ab", errors, hessian, errors))


def draw(minimum, hessian, paths, problem, of_network):
    title = "Stochastic, mini-batch and batch descent from one start, over contours of the loss"
    figure, (left, middle, right) = plots.panels(3, title=title, width=4, height=3.8)
    for axis in (left, middle):
        contours(axis, *plane_of(minimum, hessian, paths), logarithmic=False)
        axis.plot(*minimum, "k*", markersize=9)
        axis.set(xlabel="first parameter", ylabel="second parameter")
    for i, (size, of_size) in enumerate(paths.items()):
        label = f"B = {size}, {of_size.shape[1] - 1} updates"
        left.plot(*of_size[0].T, color=plots.COLOURS[i], linewidth=0.7 + 0.4 * i, label=label)
        middle.plot(
            *of_size.mean(0)[:: 1 + len(of_size[0]) // 256].T, color=plots.COLOURS[i], linewidth=1, label=f"B = {size}"
        )
    left.set(title=f"one path each, {NUM_EPOCHS} epochs")
    middle.set(title=f"means of {len(paths[1])} paths")
    every = np.concatenate([points[0] for points in of_network.values()])
    part, directions = principal(every)
    at = {size: (points[0] - every.mean(0)) @ directions.T for size, points in of_network.items()}
    ends = np.concatenate(list(at.values()))
    x, y = (np.linspace(1.2 * ends[:, i].min(), 1.2 * ends[:, i].max(), 30) for i in range(2))
    leaves, structure = jax.tree.flatten(problem.init(jax.random.key(0)))
    splits = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def loss(place):
        pieces = jnp.split(jnp.asarray(every.mean(0)) + place @ jnp.asarray(directions), splits)
        shaped = [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
        return mean_loss(problem, jax.tree.unflatten(structure, shaped))

    places = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)
    contours(right, x, y, np.asarray(jax.jit(partial(jax.lax.map, loss))(places)).reshape(30, 30))
    for i, (size, points) in enumerate(at.items()):
        right.plot(*points.T, "o-", color=plots.COLOURS[i], markersize=2.5, linewidth=1, label=f"B = {size}")
    right.set(
        xlabel="first principal direction",
        ylabel="second principal direction",
        title=f"the network: {part:.0%} of the variance",
    )
    for axis in (left, middle, right):
        axis.legend(frameon=False, fontsize="small")
    return figure


def animation(minimum, hessian, paths, num_frames):
    """Return a GIF: the first path of each batch size, all having seen as many examples at any time."""
    from matplotlib.animation import PillowWriter

    figure, [axis] = plots.panels(1, title="As many examples seen, in batches of three sizes", width=4.5, height=4)
    contours(axis, *plane_of(minimum, hessian, paths), logarithmic=False)
    axis.plot(*minimum, "k*", markersize=9)
    axis.set(xlabel="first parameter", ylabel="second parameter")
    lines = [
        axis.plot([], [], ".-", color=plots.COLOURS[i], linewidth=1, markersize=3, label=f"B = {size}")[0]
        for i, size in enumerate(paths)
    ]
    axis.legend(frameon=False, loc="lower right")
    with tempfile.TemporaryDirectory() as folder:
        target, writer = Path(folder) / "paths.gif", PillowWriter(fps=FRAMES_A_SECOND)
        with writer.saving(figure, str(target), dpi=72):
            for seen in np.geomspace(0.01, 1, num_frames):
                for line, points in zip(lines, (of_size[0] for of_size in paths.values()), strict=True):
                    line.set_data(*points[: 1 + int(seen * (len(points) - 1))].T)
                writer.grab_frame()
        return target.read_bytes()


if __name__ == "__main__":
    experiment.run(main)
