"""Which methods gain from a larger batch, and up to which?

Question    Noisy quadratic model, curvature 1 / i in 100 dimensions: updates until the excess loss has fallen from 2.6
            to 0.01, at the best learning rate of every batch size, for SGD, momentum, a running average of the
            parameters, and the preconditioner H^(1/2). Momentum and averaging are tuned as well.
Prediction  Real runs on 4096 examples need the updates that `theory.quadratics` says, to 5 %. Momentum helps at large
            batches only; averaging, which lowers the noise floor, at small ones only; preconditioning
            extends the range in which updates fall as 1 / B (Zhang et al. 2019, arXiv 1907.04164, section 3).
Cost        90 s on two CPU cores.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, descent, problems, sweep
from gdjax import report as plots
from gdjax.commands import experiment
from gdjax.theory import quadratics

TARGET, POWER, MAX_UPDATES = 0.01, 0.5, 10**6
LEARNING_RATES = np.logspace(-4, 0.7, 60)
MEMORIES = np.append(0.0, 1 - np.logspace(-0.3, -3.5, 12))  # of momentum and of the average
BATCH_SIZES = tuple(4**k for k in range(9))
MEASURED = tuple(4**k for k in range(7))
METHODS = ("SGD", "momentum", "averaging", "preconditioned SGD")
NUM_SEEDS = 64, 16  # up to LARGE examples an update, and above, where runs differ less and cost more
LARGE = 256
POINT = ("batch_size", "measured", "early", "late")  # of a real run


class Tuned(NamedTuple):
    """The fewest updates, and the learning rate and memory that reach the target in them."""

    num_updates: jax.Array
    learning_rate: jax.Array
    memory: jax.Array


def system(name, h, batch_size, memory, learning_rate):
    """Return the method as `quadratics` knows it."""
    common: dict[str, Any] = {"start": jnp.ones_like(h), "learning_rate": learning_rate, "batch_size": batch_size}
    if name == "momentum":
        return quadratics.momentum(h, h, momentum=memory, **common)
    if name == "averaging":
        return quadratics.averaged(h, h, decay=memory, **common)
    return quadratics.sgd(*(quadratics.preconditioned(h, h, power=POWER) if "pre" in name else (h, h)), **common)


def optimizer(name, h, memory, learning_rate):
    """Return the method as it is run; its state ends with the parameters that count."""
    before = optax.stateless(lambda grads, params: grads * h**-POWER if "pre" in name else grads)
    sgd = optax.sgd(learning_rate, momentum=memory if name == "momentum" else None)
    return optax.chain(before, sgd, average_of(memory if name == "averaging" else 0.0))


def average_of(decay):
    """Keep a running average of the parameters after each update."""

    def update(updates, state, params=None):
        return updates, jax.tree.map(lambda a, p, u: decay * a + (1 - decay) * (p + u), state, params, updates)

    return optax.GradientTransformation(lambda params: params, update)


def tune(name, h, batch_size):
    """Return `Tuned`, from theory alone."""

    def of_memory(memory):
        method = partial(system, name, h, batch_size, memory)
        return quadratics.fewest_updates(
            method, h, learning_rates=jnp.asarray(LEARNING_RATES), target=TARGET, max_updates=MAX_UPDATES
        )

    memories = jnp.asarray(MEMORIES) if name in ("momentum", "averaging") else jnp.zeros(1)
    updates, rates = jax.lax.map(of_memory, memories)
    best = jnp.argmin(updates)
    return Tuned(updates[best], rates[best], memories[best])


def train(problem, name, h, batch_size, num_updates, tuned, point):
    """Return the excess loss after each update, [T]."""
    return descent.train(
        problem,
        optimizer(name, h, tuned.memory, tuned.learning_rate),
        key=point["key"],
        batch_size=batch_size,
        num_updates=num_updates,
        record=lambda state, info: problem.metrics["excess_loss"](state.opt_state[-1], None),
        every=1,
        stream=batching.with_replacement,
    )[1]


def crossing(losses):
    """Return how many updates each of the curves [S', T] stays above the target, plus 1; NaN where to its end.

    Where a curve falls for good this is when it is first at the target; where its noise crosses the target to and fro,
    the first time would be too early.
    """
    above = losses > TARGET
    return np.where(above[:, -1], np.nan, above.sum(1) + 1.0)


def main(options: experiment.Options) -> experiment.Result:
    problem = problems.noisy_quadratic(jax.random.key(0))
    # Only the mean of theta^2 counts for the prediction: from +-1 rather than N(0, 1) the runs differ less.
    normal = problem.init
    problem = dataclasses.replace(problem, init=lambda key: jnp.sign(normal(key)))
    h = 1 / jnp.arange(1.0, 101.0)
    keys = jax.random.split(jax.random.key(options.seed), 4 if options.smoke else NUM_SEEDS[0])
    rows = []
    for name in METHODS:
        sizes = BATCH_SIZES[4:5] if options.smoke else BATCH_SIZES
        known = jax.jit(partial(jax.lax.map, partial(tune, name, h)))(jnp.asarray(sizes, float))
        for i, batch_size in enumerate(sizes):
            tuned = jax.tree.map(lambda leaf, i=i: leaf[i], known)
            row = {"method": name, "batch_size": batch_size, **{k: float(v) for k, v in tuned._asdict().items()}}
            if batch_size in MEASURED:
                row |= measure(problem, name, h, batch_size, tuned, keys[: NUM_SEEDS[batch_size > LARGE]])
            rows.append(row)
    return experiment.Result(rows, judge(rows), draw(rows))


def measure(problem, name, h, batch_size, tuned, keys):
    """Return when the mean loss over seeds is at the target, and when that less and plus 2 standard errors is."""
    num_updates = int(1.5 * tuned.num_updates) + 2
    run = partial(train, problem, name, h, batch_size, num_updates, tuned)
    losses = sweep.map(run, sweep.grid(key=keys)).astype(np.float64)
    error = losses.std(0, ddof=1) / np.sqrt(len(losses))
    measured, early, late = crossing(losses.mean(0) + np.array([[0.0], [-2.0], [2.0]]) * error)
    return {"measured": measured, "early": early, "late": late}


def judge(rows):
    updates = {(row["method"], row["batch_size"]): row["num_updates"] for row in rows}
    sizes = sorted({batch_size for _, batch_size in updates})
    small, large = sizes[0], sizes[-1]

    def gain(name, batch_size):
        return updates["SGD", batch_size] / updates[name, batch_size]

    def scaling_ends(name):
        """Return the largest B at which the examples needed are at most 20 % above those at the smallest."""
        return max(b for b in sizes if b * updates[name, b] <= 1.2 * small * updates[name, small])

    ends = {name: scaling_ends(name) for name in METHODS}
    real = [row for row in rows if "measured" in row]
    error = float(np.max([abs(row["measured"] / row["num_updates"] - 1) for row in real]))
    within = sum(row["early"] <= row["num_updates"] <= row["late"] for row in real)
    checks = {
        "momentum helps at large batches only": gain("momentum", small) < 1.05 and gain("momentum", large) > 2,
        "averaging at small ones only": gain("averaging", small) > 1.2 and gain("averaging", large) < 1.05,
        "preconditioning extends the range": ends["preconditioned SGD"] > ends["SGD"],
        "real runs need the updates of theory, to 5 %": error < 0.05,
    }
    saved = (f"{name} {gain(name, small):.2f} and {gain(name, large):.2f}" for name in ("momentum", "averaging"))
    return experiment.verdict(
        checks,
        f"Updates saved at B = {small} and at {large}, a factor of: {', '.join(saved)}. 20 % more examples buy B = "
        + ", ".join(f"{b} ({name})" for name, b in ends.items())
        + f". {len(real)} real runs are off by {100 * error:.1f} % at most, {within} within 2 standard errors.",
    )


def draw(rows):
    of = {name: [row for row in rows if row["method"] == name] for name in METHODS}
    figure = plots.curves(
        [row["batch_size"] for row in of["SGD"]],
        {f"{name}, exact": np.array([[row["num_updates"] for row in of[name]]]) for name in METHODS},
        xlabel="batch size (examples per update)",
        ylabel=f"updates until the excess loss is {TARGET}",
        log="xy",
        title="Noisy quadratic model in 100 dimensions: updates to a target at the best rate and memory",
    )
    [axis] = figure.axes
    for name, colour, marker in zip(METHODS, plots.COLOURS, "os^D", strict=False):
        shown = [[row[key] for key in POINT] for row in of[name] if "measured" in row]
        sizes, middle, early, late = np.array(shown).T
        axis.errorbar(sizes, middle, [middle - early, late - middle], fmt=marker, markersize=4, color=colour)
    axis.plot([], [], "o", color="gray", markersize=4, label="real runs, ± 2 standard errors")
    axis.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    experiment.run(main)
