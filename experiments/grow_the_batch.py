"""Instead of decaying the learning rate, grow the batch: what does it give, per example and per update?

Question    Noisy quadratic (Zhang et al. 2019) and logistic regression on 16384 drawn examples, three phases of equal
            length in examples: does growing B fourfold at the end of a phase do what dividing the rate by four does
            (Smith et al. 2018, arXiv 1711.00489)? And a schedule that sets B to the measured noise scale (McCandlish
            et al. 2018, arXiv 1812.06162) at the best rate for it, phase by phase: is it ahead of both?
Prediction  The two end at excess losses within 10 % of one another, at less than half of that of a constant rate and
            batch, and growth makes less than half of the updates. Following the noise scale makes fewer updates than
            growth, and ends at an excess loss no more than 1.5 times as large.
Cost        90 s on two CPU cores. --full, 3 minutes: logistic regression on a9a, 32561 real examples.
"""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from gdjax import batching, descent, noise, problems, sweep
from gdjax import report as plots
from gdjax.commands import experiment
from gdjax.problems import datasets

NUM_SEEDS = 8
PHASES, FACTOR, START = 3, 4, 8  # phases, by what B grows or the rate shrinks, and the first B
EXAMPLES = 16384  # in each phase
NUM_FOLLOWING = 12  # shorter phases of the schedule that follows the noise scale
SAMPLE = 1024  # examples that the noise scale is measured on; they count as seen
SMALLEST, LARGEST = 8, 1024
RATES = 2.0 ** np.arange(-7, 2)
DAMPING, NUM_NEWTON = 1e-5, 30
POINTS = 8  # evaluations in a phase
SCHEDULES = {"constant": (1, 1), "decay": (1, 1 / FACTOR), "grow": (FACTOR, 1)}  # of batch and rate, at a phase's end


def cases(key, full):
    """Yield (problem, its least mean loss)."""
    quadratic = problems.noisy_quadratic()
    yield quadratic, float(mean_loss(quadratic, jnp.zeros(100)))
    drawn = datasets.gaussian_classification(key, num_examples=16384)
    logistic = problems.logistic(datasets.a9a(), name="a9a-logistic") if full else problems.logistic(drawn)
    start, unravel = ravel_pytree(logistic.init(key))

    def mean(flat):
        return mean_loss(logistic, unravel(flat))

    def newton(flat, _):
        hessian = jax.hessian(mean)(flat) + DAMPING * jnp.eye(len(flat))  # columns of a9a depend on one another
        return flat - jnp.linalg.solve(hessian, jax.grad(mean)(flat)), None

    end = jax.jit(lambda start: jax.lax.scan(newton, start, length=NUM_NEWTON)[0])(start)
    yield logistic, float(mean(end))


def mean_loss(problem, params):
    return jax.vmap(problem.loss, (None, 0))(params, problem.train).mean()


def phase(problem, batch_size, num_updates, params, key, learning_rate):
    """Return the parameters after a phase, and the mean loss at POINTS times of it."""
    state, losses = descent.train(
        dataclasses.replace(problem, init=lambda key: params),
        optax.sgd(learning_rate),
        key=key,
        batch_size=batch_size,
        num_updates=num_updates,
        record=lambda state, info: mean_loss(problem, state.params),
        every=max(1, num_updates // POINTS),
        stream=batching.with_replacement,
    )
    return state.params, losses


def scheduled(problem, growth, decay, examples, point):
    """Return the mean loss along three phases, [PHASES * POINTS]."""
    params, curves = problem.init(point["key"]), []
    for i in range(PHASES):
        size, rate, key = START * growth**i, point["rate"] * decay**i, jax.random.fold_in(point["key"], i)
        params, losses = phase(problem, size, examples // size, params, key, rate)
        curves.append(losses)
    return jnp.concatenate(curves)


def following(run, measured, num_phases, examples, params, keys, learning_rate):
    """Return mean losses [S, num_phases], and the batch size of each phase: the noise scale, a power of two."""
    curves, sizes = [], []
    for i in range(num_phases):
        scales = np.asarray(measured(params, jax.random.split(jax.random.key(i), len(keys))))
        size = 2 ** int(np.clip(np.round(np.log2(np.median(scales))), np.log2(SMALLEST), np.log2(LARGEST)))
        phase_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        params, losses = run(
            size, (PHASES * examples // num_phases - SAMPLE) // size, params, phase_keys, learning_rate
        )
        curves.append(np.asarray(losses)[:, -1])
        sizes.append(size)
    return np.stack(curves, axis=1), sizes


def compare(problem, least, rates, num_following, examples, keys):
    """Return a row for each schedule, with its curves [S, E] in thousands of examples and in updates."""
    ends, grid = {}, sweep.grid(key=keys, rate=rates)
    for name, (growth, decay) in SCHEDULES.items():
        losses = sweep.map(partial(scheduled, problem, growth, decay, examples), grid)
        sizes = np.repeat([START * growth**i for i in range(PHASES)], POINTS)
        ends[name] = losses, sizes, np.full(len(sizes), examples / POINTS), 0
    run = jax.jit(jax.vmap(partial(phase, problem), (None, None, 0, 0, None)), static_argnums=(0, 1))
    measured = jax.jit(
        jax.vmap(
            lambda params, key: noise.measure(problem.loss, params, problem.train, key, num_examples=SAMPLE).b_simple
        )
    )
    init = jax.vmap(problem.init)(keys)
    curves, sizes = zip(
        *(following(run, measured, num_following, examples, init, keys, rate) for rate in rates), strict=True
    )
    losses, each = np.stack(curves, axis=1), PHASES * examples / num_following
    best = experiment.best_rate(rates, losses[:, :, -1]).position
    ends["follow"] = losses, np.array(sizes[best]), np.full(num_following, each), SAMPLE
    for name, (losses, sizes, seen, measured_on) in ends.items():
        # Decay and growth are compared at one rate, the best for decay; the others have their own.
        chosen = experiment.best_rate(rates, ends["decay" if name == "grow" else name][0][:, :, -1])
        excess = losses[:, chosen.position] - least
        end, error = experiment.mean_and_error(excess[:, -1])
        yield {
            "problem": problem.name,
            "schedule": name,
            "learning_rate": chosen.rate,
            "inside_grid": chosen.inside,
            "batch_sizes": sizes.tolist(),
            "examples": np.cumsum(seen).tolist(),
            "updates": np.cumsum((seen - measured_on) / sizes).tolist(),
            "excess_losses": excess.tolist(),
            "end": end,
            "standard_error": error,
        }


def judge(rows):
    checks, parts = {}, []
    for name in dict.fromkeys(row["problem"] for row in rows):
        of = {row["schedule"]: row for row in rows if row["problem"] == name}
        end = {schedule: row["end"] for schedule, row in of.items()}
        updates = {schedule: row["updates"][-1] for schedule, row in of.items()}
        of_name = {
            "growth ends as decay": abs(end["grow"] / end["decay"] - 1) < 0.1,
            "both end at half of the loss of a constant rate": max(end["grow"], end["decay"]) < end["constant"] / 2,
            "growth makes half of the updates": updates["grow"] < updates["decay"] / 2,
            "following the noise scale makes fewer updates": updates["follow"] < updates["grow"],
            "following it ends no more than 1.5 times higher": end["follow"] < 1.5 * end["grow"],
            "best rates are inside the grid": all(row["inside_grid"] for row in of.values()),
        }
        checks |= {f"{claim} ({name})": holds for claim, holds in of_name.items()}
        numbers = ", ".join(
            f"{schedule} {row['end']:.2e} ({row['standard_error']:.0e}) in {updates[schedule]:.0f} updates"
            for schedule, row in of.items()
        )
        sizes = of["follow"]["batch_sizes"]
        parts.append(f"{name}: {numbers}; batches that follow the noise scale: {min(sizes)} to {max(sizes)}")
    return experiment.verdict(checks, f"Excess loss at the end, with its standard error. {'. '.join(parts)}.")


def main(options: experiment.Options) -> experiment.Result:
    rates, num_following, examples, num_seeds = (
        (RATES[4:6], 2, 2 * SAMPLE, 2) if options.smoke else (RATES, NUM_FOLLOWING, EXAMPLES, NUM_SEEDS)
    )
    data_key, run_key = jax.random.split(jax.random.key(options.seed))
    keys = jax.random.split(run_key, num_seeds)
    known = itertools.islice(cases(data_key, options.full), 1 if options.smoke else None)
    rows = [row for problem, least in known for row in compare(problem, least, rates, num_following, examples, keys)]
    return experiment.Result(rows, judge(rows), draw(rows))


def draw(rows):
    title = "Excess loss of four schedules of batch size and rate, along the examples and along the updates"
    names = list(dict.fromkeys(row["problem"] for row in rows))
    figure, axes = plots.panels(2 * len(names), title=title, width=4)
    for i, row in enumerate(rows):
        pair = axes[2 * names.index(row["problem"]) :]
        for axis, x in zip(pair, (np.array(row["examples"]) / 1000, row["updates"]), strict=False):
            plots.band(axis, x, row["excess_losses"], row["schedule"], i % 4)
            axis.set(yscale="log")
    for i, name in enumerate(names):
        axes[2 * i].set(xlabel="examples (thousands)", ylabel=f"excess loss, {name}")
        axes[2 * i + 1].set(xlabel="updates", xscale="log", xlim=(80, 8000))
        axes[2 * i + 1].set_xticks((100, 1000))
        axes[2 * i + 1].minorticks_off()
        axes[2 * i].legend(frameon=False)
    return figure


if __name__ == "__main__":
    experiment.run(main)
