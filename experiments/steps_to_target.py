"""How many updates does a target take at every batch size, for three optimisers?

Question    Digits, a multilayer perceptron, training loss 0.05: how do updates to the target fall with the batch size
            when the learning rate is tuned at each, and how far does the law S_min (1 + B_crit / B) hold?
Prediction  Three regimes (Shallue et al. 2019, arXiv 1811.03600): S proportional to 1/B, diminishing returns, flat. The
            law is within 25 % of nine points in ten. Momentum and Adam profit from larger batches than SGD: their
            B_crit is larger (Zhang et al. 2019, arXiv 1907.04164).
Cost        40 s on two CPU cores.
"""

import math
from functools import partial

import jax
import numpy as np

from gdjax import advise, problems, tuning
from gdjax import report as plots
from gdjax.commands import experiment
from gdjax.theory import scaling

TARGET = "loss<=0.05"
FACTOR, NUM_RATES, MAX_EPOCHS = 2.0, 6, 200


def tuned_at_every_size(problem, optimizer, first_rate, target, sizes, num_seeds, key):
    """Return {B: Tuning}, each over a grid around the best rate of the size before, moved where that is at its edge."""
    found, rate = {}, first_rate
    run = tuning.searching(problem, optimizer, target, num_runs=NUM_RATES * num_seeds)
    search = partial(run, num_seeds=num_seeds, key=key, max_examples=MAX_EPOCHS * problem.num_examples)
    for size in sizes:
        grid = rate * FACTOR ** (np.arange(NUM_RATES) - (NUM_RATES - 1) / 2)
        tuned = tuning.search_grid(partial(search, batch_size=size), grid)
        if tuned.found:
            found[size] = tuned
            rate = tuned.optimum()[0] * math.sqrt(FACTOR)  # the next size will want a larger one
    return found


def main(options: experiment.Options) -> experiment.Result:
    problem = problems.digits_mlp()
    target = tuning.parse_target(TARGET, problem)
    sizes = [32, 128] if options.smoke else advise.default_batch_sizes(problem.num_examples)
    names = ["sgd"] if options.smoke else list(tuning.OPTIMIZERS)
    rows, curves, laws = [], {}, {}
    for name in names:
        make, first_rate = tuning.OPTIMIZERS[name]
        first_rate *= 1 if options.smoke else 1 / 16  # the middle of the first grid is meant for B = 32
        found = tuned_at_every_size(problem, make, first_rate, target, sizes, 3, jax.random.key(options.seed))
        optima = {size: tuned.optimum() for size, tuned in found.items()}
        laws[name] = scaling.fit(list(optima), np.stack([updates for _, updates in optima.values()]))
        curves[name] = optima
        for (size, (rate, updates)), residual in zip(optima.items(), laws[name].residuals, strict=True):
            row = {"optimizer": name, "batch_size": size, "learning_rate": rate, "updates": updates}
            rows.append(row | {"at_edge": found[size].at_edge, "log_residual": residual})
    rows += [
        {"optimizer": name, "min_updates": law.min_updates, "critical_batch_size": law.critical_batch_size}
        | {"critical_batch_size_interval": np.quantile(law.draws[1], [0.05, 0.95])}
        for name, law in laws.items()
    ]
    verdict = judge(curves, laws)
    return experiment.Result(rows, verdict, draw(curves, laws, verdict))


def judge(curves, laws) -> str:
    """Compare the curves with each part of the prediction."""
    first, second = (updates.mean() for _, updates in list(curves["sgd"].values())[:2])
    *_, before, last = (updates.mean() for _, updates in curves["sgd"].values())
    residuals = np.abs(np.concatenate([law.residuals for law in laws.values()]))
    share = np.mean(residuals < math.log(1.25))
    critical = {name: law.critical_batch_size for name, law in laws.items()}
    parts = [
        (f"the first doubling saves SGD a factor {first / second:.2f} of the updates, the last {before / last:.2f}",
         first / second > 1.7 and before / last < 1.7),
        (f"{share:.0%} of the points lie within 25 % of the law, the worst off by {np.exp(residuals.max()):.2f}",
         share >= 0.9),
    ]  # fmt: skip
    if len(laws) > 1:
        listed = ", ".join(f"{size:.0f} ({name})" for name, size in critical.items())
        parts.append((f"B_crit is {listed}", min(critical.values()) == critical["sgd"]))
    return "; ".join(f"{part} ({'as' if held else 'NOT as'} predicted)" for part, held in parts) + "."


def draw(curves, laws, title):
    figure, (updates, rates) = plots.panels(2, title=title, width=6)
    for i, (name, optima) in enumerate(curves.items()):
        sizes = np.asarray(list(optima))
        seeds = np.stack([updates for _, updates in optima.values()], axis=1)
        plots.band(updates, sizes, seeds, name, i)
        law = laws[name]
        label = f"law of {name}: B_crit = {law.critical_batch_size:.0f}"
        updates.plot(sizes, law(sizes), ":", color=plots.COLOURS[i], linewidth=1, label=label)
        rates.plot(sizes, [rate for rate, _ in optima.values()], "os^"[i], color=plots.COLOURS[i], label=name)
    updates.set(ylabel="updates to the target (range of seeds)")
    rates.set(ylabel="best learning rate")
    for axis in (updates, rates):
        axis.set(xscale="log", yscale="log", xlabel="batch size (examples)")
        axis.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    experiment.run(main)
