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

from gdjax import advise, problems, report, tuning
from gdjax.commands import experiment
from gdjax.theory import scaling

TARGET, OPTIMIZERS = "loss<=0.05", ("sgd", "momentum", "adam")
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
    rows, optima, laws = [], {}, {}
    for name in OPTIMIZERS[: 1 if options.smoke else None]:
        make, usual = tuning.named(name)
        rate = usual / 16 * sizes[0]  # a usual rate is meant for B = 32
        found = tuned_at_every_size(problem, make, rate, target, sizes, 3, jax.random.key(options.seed))
        optima[name] = {size: tuned.optimum() for size, tuned in found.items()}
        law = laws[name] = scaling.fit(list(found), np.stack([updates for _, updates in optima[name].values()]))
        for (size, (best, updates)), residual in zip(optima[name].items(), law.residuals, strict=True):
            row = {"optimizer": name, "batch_size": size, "learning_rate": best, "updates": updates}
            rows.append(row | {"at_edge": found[size].at_edge, "log_residual": residual})
    rows += [
        {"optimizer": name, "min_updates": law.min_updates, "critical_batch_size": law.critical_batch_size}
        | {"critical_batch_size_interval": np.quantile(law.draws[1], [0.05, 0.95])}
        for name, law in laws.items()
    ]
    verdict = judge(optima, laws)
    return experiment.Result(rows, verdict, draw(optima, laws, verdict))


def judge(optima, laws) -> str:
    """Compare the curves with each part of the prediction."""
    means = [updates.mean() for _, updates in optima["sgd"].values()]
    first, last = means[0] / means[1], means[-2] / means[-1]
    residuals = np.abs(np.concatenate([law.residuals for law in laws.values()]))
    share = float(np.mean(residuals < math.log(1.25)))
    critical = {name: law.critical_batch_size for name, law in laws.items()}
    spans = {name: np.quantile(law.draws[1], [0.05, 0.95]) for name, law in laws.items()}
    checks = {
        "proportional to 1/B, then flat": bool(first > 1.7 and last < 1.7),
        "the law is within 25 % of nine points in ten": share >= 0.9,
        "momentum and Adam have the larger B_crit": min(critical.values()) == critical["sgd"],
    }
    return experiment.verdict(
        checks,
        f"The first doubling saves SGD a factor {first:.2f} of the updates, the last {last:.2f}; {share:.0%} of the "
        f"points lie within 25 % of the law, the worst off by {np.exp(residuals.max()):.2f}; B_crit, "
        "with 90 % intervals, is "
        + ", ".join(f"{critical[name]:.0f} [{low:.0f}, {high:.0f}] ({name})" for name, (low, high) in spans.items())
        + ".",
    )


def draw(optima, laws, title):
    figure, (left, right) = report.panels(2, title=title, width=6)
    for i, (name, of_sizes) in enumerate(optima.items()):
        sizes, (rates, updates), law = np.asarray(list(of_sizes)), zip(*of_sizes.values(), strict=True), laws[name]
        report.band(left, sizes, np.stack(updates, axis=1), name, i)
        label = f"law of {name}: B_crit = {law.critical_batch_size:.0f}"
        left.plot(sizes, law(sizes), ":", color=report.COLOURS[i], linewidth=1, label=label)
        right.plot(sizes, rates, "os^"[i], color=report.COLOURS[i], label=name)
    for axis, label in (left, "updates to the target (range of seeds)"), (right, "best learning rate"):
        axis.set(xscale="log", yscale="log", xlabel="batch size (examples)", ylabel=label)
        axis.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    experiment.run(main)
