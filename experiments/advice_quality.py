"""How good is the advice on the batch size, against an exhaustive search?

Question    For several problems: how much longer than the best batch size found by tuning all of them does the advised
            one take, how far off are the predictions, and what does the advice cost beside the search?
Prediction  Regret (time to target at the advised batch size and rate over the best found exhaustively) at most 1.10 at
            the median and 1.30 at worst; predictions within a factor of 1.3 at the median and nine in ten inside their
            90 % interval; cost at most a quarter of the search's.
Cost        1 minute on two CPU cores; --full, with the data sets in the folder GDJAX_DATA, 20 minutes. With --kept
            FOLDER every problem's row is kept there when it is finished and read from there by the same commit
            another time, so that an interruption costs one problem.

Exhaustive means: every power of two and N, six learning rates a factor of two apart and more where the best is at the
edge, three seeds; the first three are run again with ten fresh seeds, as the advised one is. Seconds per update are
measured at the end, for all batch sizes in turn. Its cost includes timing all batch sizes once, without which it
could not say which is fastest. The networks for images and texts are smaller than in `problems`, for the search has to
be paid.
"""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from experiments.steps_to_target import tuned_at_every_size
from gdjax import advise, problems, report, tuning
from gdjax.commands import experiment
from gdjax.problems import datasets, models

NUM_SEEDS, NUM_FRESH = 3, 10
NUM_TOKENS = 32
MAX_EPOCHS = 200


def images():
    """A convolutional network for Fashion-MNIST, half as wide as the built-in one."""
    model = models.cnn((28, 28, 1), channels=(8, 16))
    return problems.classification(model, datasets.fashion_mnist(), num_classes=10, name="fashion-mnist-cnn")


def texts():
    """A transformer of one block for Shakespeare in rows of NUM_TOKENS."""
    size = datasets.NUM_SHAKESPEARE_CHARACTERS
    model = models.transformer(num_tokens=size, width=32, num_layers=1, num_heads=2)
    data = datasets.tiny_shakespeare(num_tokens=NUM_TOKENS)
    return problems.language_model(model, data, num_tokens=size, name="tiny-shakespeare")


# {name: (problem, target, optimiser, largest batch size of the search)}
CASES = {
    "digits-mlp": (problems.digits_mlp, "loss<=0.05", "sgd", None),
    "logistic": (problems.logistic, "loss<=0.45", "sgd", None),
}
FULL_CASES = CASES | {
    "a9a-logistic": (problems.BUILT_IN["a9a-logistic"], "loss<=0.34", "sgd", 4096),
    "power-plant": (problems.power_plant, "loss<=0.035", "sgd", None),
    "fashion-mnist-cnn": (images, "loss<=0.45", "sgd", 512),
    "tiny-shakespeare": (texts, "loss<=2.2", "adam", 512),
}


@dataclasses.dataclass(frozen=True)
class Options(experiment.Options):
    """What this experiment can be asked besides."""

    kept: Path | None = None
    """Folder for the rows of problems that are finished."""


def row_of(case, sizes, *, budget, seed):
    """Return a row for one problem: the advice, the search, and their times at speeds measured in turn."""
    make_problem, asked, optimizer, largest = case
    problem = make_problem()
    target = tuning.parse_target(asked, problem)
    sizes = sizes or [b for b in advise.default_batch_sizes(problem.num_examples) if b <= (largest or np.inf)]
    found = advise.batch_size(problem, target, optimizer=optimizer, sizes=sizes, seconds=budget, seed=seed)

    began = time.perf_counter()
    make, middle = tuning.named(optimizer)
    key = jax.random.key(seed + 1)
    searched = tuned_at_every_size(problem, make, middle / 32 * sizes[0], target, sizes, NUM_SEEDS, key)
    timed = tuning.speeds(problem, make, sizes, learning_rate=middle)
    search_seconds = time.perf_counter() - began

    clocks = {choice.batch_size: choice.time_again for choice in timed if choice.time_again}  # of what fits
    rounds = [[again() for again in clocks.values()] for _ in range(3)]
    speeds = dict(zip(clocks, np.median(rounds, axis=0), strict=True))
    # The best of many noisy numbers is too good to be true: the search's first three are run again, with the seeds that
    # the advised batch size is run with.
    optima = {size: tuned.optimum() for size, tuned in searched.items()}
    times = {size: float(updates.mean()) * speeds[size] for size, (_, updates) in optima.items()}
    search = tuning.searching(problem, make, target, num_runs=NUM_FRESH)
    limits = {"num_seeds": NUM_FRESH, "max_examples": MAX_EPOCHS * problem.num_examples}

    def fresh_seconds(size, rate):
        tuned = search(np.asarray([rate]), batch_size=size, key=jax.random.key(seed + 2), **limits)
        return float(tuned.costs.mean()) * speeds[size]

    fresh = {size: fresh_seconds(size, optima[size][0]) for size in sorted(times, key=times.__getitem__)[:3]}
    best = min(fresh, key=fresh.__getitem__)
    advised_seconds = fresh_seconds(found.batch_size, found.learning_rate)
    run = [choice for choice in found.choices if np.isfinite(choice.measured_updates)]
    return {
        "problem": problem.name,
        "target": str(target),
        "optimizer": optimizer,
        "advised": found.batch_size,
        "advised_seconds": advised_seconds,
        "best": best,
        "best_seconds": fresh[best],
        "regret": advised_seconds / fresh[best],
        "searched_seconds_to_target": times,
        "unknown": found.unknown,
        "batch_sizes_run": [choice.batch_size for choice in run],
        "inside": [choice.inside for choice in run],
        "predicted": [choice.updates for choice in run],
        "measured": [choice.measured_updates for choice in run],
        "never_arrived": [choice.batch_size for choice in found.choices if np.isinf(choice.measured_updates)],
        "advice_seconds": found.seconds,
        "search_seconds": search_seconds,
        "cost": found.seconds / search_seconds,
    }


def rows_of(options: Options, cases):
    """Return the row of every case, those that are kept from their file."""
    sizes, budget = ([16, 128], 60) if options.smoke else (None, 900)
    journal, rows = None, {}
    if options.kept:
        options.kept.mkdir(parents=True, exist_ok=True)
        made = report.provenance(arguments={}, seed=options.seed, wall_seconds=0)
        journal = report.journal(options.kept / "rows.jsonl", {"seed": options.seed, "commit": made["commit"]})
        rows = {row["case"]: row for row in journal.rows}
    for name in (name for name in cases if name not in rows):
        rows[name] = {"case": name} | row_of(cases[name], sizes, budget=budget, seed=options.seed)
        if journal:
            journal.keep(rows[name])
    return [rows[name] for name in cases]


def main(options: Options) -> experiment.Result:
    cases = FULL_CASES if options.full else CASES
    rows = rows_of(options, dict(list(cases.items())[: 1 if options.smoke else None]))
    regrets, costs = (np.asarray([row[name] for row in rows]) for name in ("regret", "cost"))
    ratios = np.concatenate([np.divide(row["measured"], np.asarray(row["predicted"])[:, 1]) for row in rows])
    errors = np.maximum(ratios, 1 / ratios)
    inside = np.concatenate([row["inside"] + [False] * len(row["never_arrived"]) for row in rows])
    checks = {
        "small regret": bool(np.median(regrets) <= 1.1 and regrets.max() <= 1.3),
        "good predictions": bool(np.median(errors) <= 1.3 and inside.mean() >= 0.9),
        "a cheap answer": bool(costs.max() <= 0.25),
    }
    verdict = experiment.verdict(
        checks,
        f"{len(rows)} problems: regret {np.median(regrets):.2f} at the median, {regrets.max():.2f} at worst; "
        f"predictions off by {np.median(errors):.2f} at the median, {inside.mean():.0%} of {len(inside)} inside; cost "
        f"{np.median(costs):.2f} of the search at the median, {costs.max():.2f} at worst.",
    )
    points = {row["problem"]: (np.asarray(row["predicted"])[:, 1], row["measured"]) for row in rows}
    axes = {"xlabel": "updates to target, predicted", "ylabel": "updates to target, measured with fresh seeds"}
    return experiment.Result(rows, verdict, report.agreement(points, **axes, title=verdict))


if __name__ == "__main__":
    experiment.run(main, Options)
