"""How good is the advice on the batch size, against an exhaustive search?

Question    For several problems: how much longer than the best batch size and rate found by searching all of them does
            the advised pair take, does every seed arrive, and what does the advice cost beside the search?
Prediction  Regret (time to target at the advised batch size and rate over the best found) at most 1.10 at the median
            and 1.30 at worst, of the problems that the method was changed on and, apart, of those that it was not and
            of those that were new to it; every seed of ten or more arrives; predictions of updates within a factor of
            1.3 at the median.
Cost        1 minute on two CPU cores; --full, with the data sets in the folder GDJAX_DATA, 25 minutes. With --kept
            FOLDER every problem's row is kept there when it is finished and read from there by the same commit
            another time, so that an interruption costs one problem.

The judge (`judging/judge.py`) is a search in plain JAX and optax that shares no code with the advice: every batch size,
rates a factor of two apart until they hurt, three seeds, then ten fresh ones for the best five pairs and the advised
one, and more where runs take little time, for the mean of ten may be 15 % off. A rate that a seed does not survive, or
at three times the median of ten, counts as infinite. The unseen problems (`judging/unseen.py`) were written down before
any of them was run, and have by now been judged by several versions of the method, the last of which was changed for
one of them, a9a-tanh: of two timings of an update the lesser counts. The new ones were written down just before that,
before they were run, and judged before and after it.
"""

import dataclasses
from pathlib import Path

import numpy as np
import optax

from experiments.judging.judge import judged
from experiments.judging.unseen import FRESH, UNSEEN
from gdjax import advise, problems, report, tuning
from gdjax.commands import experiment
from gdjax.problems import datasets, models

NUM_TOKENS = 32
SIZES = [4, 8, 16, 32, 64, 128, 256, 512]
BUDGET, LIMIT = 100.0, 90.0  # seconds for the advice, and for the judge's search, on one problem


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


# {name: (problem, target, optimiser for the advice, the same for the judge, a rate to begin with)}
CASES = {
    "digits-mlp": (problems.digits_mlp, "loss<=0.05", "sgd", optax.sgd, 0.2),
    "logistic": (problems.logistic, "loss<=0.45", "sgd", optax.sgd, 0.2),
}
FULL_CASES = CASES | {
    "a9a-logistic": (problems.BUILT_IN["a9a-logistic"], "loss<=0.34", "sgd", optax.sgd, 0.2),
    "power-plant": (problems.power_plant, "loss<=0.035", "sgd", optax.sgd, 0.2),
    "fashion-mnist-cnn": (images, "loss<=0.45", "sgd", optax.sgd, 0.2),
    "tiny-shakespeare": (texts, "loss<=2.2", "adam", optax.adam, 0.003),
}
KINDS = {"seen": FULL_CASES, "unseen": UNSEEN, "new": FRESH}


@dataclasses.dataclass(frozen=True)
class Options(experiment.Options):
    """What this experiment can be asked besides."""

    kept: Path | None = None
    """Folder for the rows of problems that are finished."""
    only: tuple[str, ...] = ()
    """Names of the problems to judge; default all."""


def row_of(case, sizes, *, budget, limit, seed):
    """Return a row for one problem: the advice, and what the judge says of it."""
    make_problem, asked, optimizer, plain, rate = case
    problem = make_problem()
    target = tuning.parse_target(asked, problem)
    sizes = [size for size in sizes if size <= problem.num_examples]
    row = {"problem": problem.name, "target": str(target), "optimizer": getattr(optimizer, "__name__", optimizer)}
    try:
        found = advise.batch_size(problem, target, optimizer=optimizer, sizes=sizes, seconds=budget, seed=seed)
    except ValueError as error:
        return row | {
            "failed": str(error),
            "regret": np.inf,
            "num_seeds": 10,
            "arrived": 0,
            "predicted": [],
            "measured": [],
        }
    best = judged(problem, plain, target, sizes, rate, (found.batch_size, found.learning_rate), limit=limit)
    run = [choice for choice in found.choices if np.isfinite(choice.measured_updates)]
    return row | {
        "sentence": found.sentence(),
        "advised": found.batch_size,
        "advised_rate": found.learning_rate,
        "advised_seconds": best.advised_seconds,
        "num_seeds": best.num_seeds,
        "arrived": best.arrived,
        "best": best.batch_size,
        "best_rate": best.learning_rate,
        "best_seconds": best.seconds,
        "regret": best.advised_seconds / best.seconds,
        "searched": best.searched,
        "at_edge": best.at_edge,
        "complete": best.complete,
        "unknown": found.unknown,
        "predicted": [choice.updates for choice in run],
        "measured": [choice.measured_updates for choice in run],
        "inside": [choice.inside for choice in run],
        "advice_seconds": found.seconds,
        "search_seconds": best.search_seconds,
        "cost": found.seconds / best.search_seconds,
    }


def rows_of(options: Options, cases):
    """Return the row of every case, those that are kept from their file."""
    sizes, budget, limit = ([16, 64], 60.0, 20.0) if options.smoke else (SIZES, BUDGET, LIMIT)
    journal, rows = None, {}
    if options.kept:
        options.kept.mkdir(parents=True, exist_ok=True)
        made = report.provenance(arguments={}, seed=options.seed, wall_seconds=0)
        journal = report.journal(options.kept / "rows.jsonl", {"seed": options.seed, "commit": made["commit"]})
        rows = {row["case"]: row for row in journal.rows}
    for name in (name for name in cases if name not in rows):
        [kind] = [kind for kind, of_kind in KINDS.items() if name in of_kind]
        rows[name] = {"case": name, "kind": kind} | row_of(
            cases[name], sizes, budget=budget, limit=limit, seed=options.seed
        )
        if journal:
            journal.keep(rows[name])
    return [rows[name] for name in cases]


def main(options: Options) -> experiment.Result:
    known = FULL_CASES | UNSEEN | FRESH
    chosen = options.only or list(known if options.full else CASES)[: 1 if options.smoke else None]
    rows = rows_of(options, {name: known[name] for name in chosen})
    checks, said = {}, []
    for kind in KINDS:
        of_kind = [row for row in rows if row["kind"] == kind]
        if not of_kind:
            continue
        regrets = np.asarray([row["regret"] for row in of_kind], float)
        arrived = [row["arrived"] == row["num_seeds"] for row in of_kind]
        checks[f"small regret, {kind}"] = bool(np.median(regrets) <= 1.1 and regrets.max() <= 1.3)
        checks[f"all seeds arrive, {kind}"] = all(arrived)
        said.append(
            f"{len(of_kind)} {kind} problems: regret {np.median(regrets):.2f} at the median, {regrets.max():.2f} at "
            f"worst, all of ten seeds or more arrive in {sum(arrived)}"
        )
    run = [row for row in rows if row["measured"]]
    ratios = np.concatenate([np.divide(row["measured"], np.asarray(row["predicted"])[:, 1]) for row in run])
    errors = np.maximum(ratios, 1 / ratios)
    checks["good predictions"] = bool(np.median(errors) <= 1.3)
    costs = np.asarray([row["cost"] for row in run])
    verdict = experiment.verdict(
        checks,
        f"{'; '.join(said)}. Predictions off by {np.median(errors):.2f} at the median; cost {np.median(costs):.2f} of "
        f"the search at the median.",
    )
    points = {row["problem"]: (np.asarray(row["predicted"])[:, 1], row["measured"]) for row in run}
    axes = {"xlabel": "updates to target, predicted", "ylabel": "updates to target, measured with fresh seeds"}
    return experiment.Result(rows, verdict, report.agreement(points, **axes, title=verdict))


if __name__ == "__main__":
    experiment.run(main, Options)
