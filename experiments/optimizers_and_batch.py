"""Which optimiser goes on profiting from larger batches the longest?

Question    Digits, a multilayer perceptron, training loss 0.1: how many updates do SGD, momentum, AdamW, Lion and Muon
            take at eight batch sizes, the rate tuned at each? Whose critical batch size is largest, and where do the
            curves of SGD and AdamW cross?
Prediction  Each follows S_min (1 + B_crit / B), nine points in ten within 25 %. Momentum's B_crit is above that of SGD
            (Zhang et al. 2019, arXiv 1907.04164), and Muon's is the largest of all (as is reported of language models).
            Where noise dominates, at B = 8, SGD takes no more than 1.5 times the updates of AdamW; at B = 1024 it takes
            more than twice as many, so that the curves, if they cross, do so at small batches.
Cost        2 minutes on two CPU cores. --full, 10 minutes: MNIST, to a loss of 0.1.
"""

import math

import jax
import numpy as np

from experiments.steps_to_target import tuned_at_every_size
from gdjax import problems, report, tuning
from gdjax.commands import experiment
from gdjax.theory import scaling

OPTIMIZERS = ("sgd", "momentum", "adamw", "lion", "muon")
SIZES = tuple(2**i for i in range(3, 11))
TARGET, NUM_SEEDS = "loss<=0.1", 3


def main(options: experiment.Options) -> experiment.Result:
    problem = problems.mnist_mlp((128,)) if options.full else problems.digits_mlp()
    target = tuning.parse_target(TARGET, problem)
    names, sizes = (OPTIMIZERS[:1], (64, 256)) if options.smoke else (OPTIMIZERS, SIZES)
    rows, optima, laws = [], {}, {}
    for name in names:
        make, usual = tuning.named(name)
        first = usual * sizes[0] / 32 if name == "sgd" else usual * math.sqrt(sizes[0] / 32)
        found = tuned_at_every_size(problem, make, first, target, sizes, NUM_SEEDS, jax.random.key(options.seed))
        optima[name] = {size: tuned.optimum() for size, tuned in found.items()}
        law = laws[name] = scaling.fit(list(found), np.stack([updates for _, updates in optima[name].values()]))
        for (size, (rate, updates)), residual in zip(optima[name].items(), law.residuals, strict=True):
            row = {"optimizer": name, "batch_size": size, "learning_rate": rate, "updates": updates}
            rows.append(row | {"at_edge": found[size].at_edge, "log_residual": residual})
        low, high = np.quantile(law.draws[1], [0.05, 0.95])
        rows.append(
            {"optimizer": name, "min_updates": law.min_updates, "critical_batch_size": law.critical_batch_size}
            | {"critical_batch_size_interval": [low, high]}
        )
    said = judge(optima, laws)
    return experiment.Result(rows, said, draw(optima, laws, problem.name))


def judge(optima, laws) -> str:
    critical = {name: law.critical_batch_size for name, law in laws.items()}
    residuals = np.abs(np.concatenate([law.residuals for law in laws.values()]))
    means = {name: {size: updates.mean() for size, (_, updates) in best.items()} for name, best in optima.items()}
    checks = {"nine points in ten within 25 % of the law": float(np.mean(residuals < math.log(1.25))) >= 0.9}
    crossing = "nowhere"
    if "adamw" in means and "momentum" in means:
        shared = [size for size in means["sgd"] if size in means["adamw"]]
        ratio = {size: means["sgd"][size] / means["adamw"][size] for size in shared}
        below = [size for size in shared if ratio[size] < 1]
        crossing = f"above B = {below[-1]}" if below else "nowhere: AdamW is ahead at all of them"
        checks |= {
            "momentum's B_crit is above SGD's": critical["momentum"] > critical["sgd"],
            "Muon's is the largest": max(critical, key=critical.__getitem__) == "muon",
            "SGD within 1.5 times AdamW at the smallest batch": ratio[shared[0]] <= 1.5,
            "and beyond twice at the largest": ratio[shared[-1]] > 2,
        }
        crossing += f" (updates of SGD over AdamW: {ratio[shared[0]]:.2f} at {shared[0]}, "
        crossing += f"{ratio[shared[-1]]:.2f} at {shared[-1]})"
    spans = {name: np.quantile(law.draws[1], [0.05, 0.95]) for name, law in laws.items()}
    numbers = ", ".join(f"{name} {critical[name]:.0f} [{low:.0f}, {high:.0f}]" for name, (low, high) in spans.items())
    least = ", ".join(f"{name} {law.min_updates:.0f}" for name, law in laws.items())
    return experiment.verdict(
        checks,
        f"B_crit with 90 % intervals: {numbers}; fewest updates: {least}. SGD and AdamW cross {crossing}.",
    )


def draw(optima, laws, name):
    """Draw updates to the target, and examples, against the batch size."""
    title = f"{name}, {TARGET}: updates and examples to the target, the rate tuned at every batch size"
    figure, (left, right) = report.panels(2, title=title, width=6)
    for i, (optimizer, of_sizes) in enumerate(optima.items()):
        sizes, (_, updates) = np.asarray(list(of_sizes)), zip(*of_sizes.values(), strict=True)
        steps, law = np.stack(updates, axis=1), laws[optimizer]
        report.band(left, sizes, steps, optimizer, i)
        report.band(right, sizes, steps * sizes, f"{optimizer}: B_crit = {law.critical_batch_size:.0f}", i)
        left.plot(sizes, law(sizes), ":", color=report.COLOURS[i], linewidth=1)
    for axis, label in ((left, "updates to the target (dotted: the law)"), (right, "examples to the target")):
        axis.set(xscale="log", yscale="log", xlabel="batch size (examples)", ylabel=label)
        axis.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    experiment.run(main)
