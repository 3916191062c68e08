"""Grow the batch, let the rate fall, both or neither: which ends lowest, and which reaches a target first?

Question    Digits, a budget of examples in four equal parts, seven ways to spend it: a constant batch and rate; a rate
            that halves from part to part; a batch that doubles (eta, 2B; Smith et al. 2018, arXiv 1711.00489) or grows
            fourfold; both; Seesaw (eta / sqrt 2, 2B; Meterez et al. 2025, arXiv 2510.14717); B doubled whenever the
            measured noise scale has. All tuned alike, over rates and two first batch sizes: the least loss at the end?
            --full: of nine problems that `gdjax schedule` was not made on, each with a target: is what it recommends as
            fast as the fastest of the seven, each tuned over first batch sizes, lengths and rates? Do its predictions
            hold?
Prediction  With SGD ramp and decay end within 15 % of one another, both below the constant. Both together are no more
            than 10 % better than the better one. Doubling with the noise scale is not better than the constant. With
            AdamW, Seesaw is within 15 % of the decay. --full: it takes at most 1.10 times the seconds of the fastest
            way, over the same 24 fresh seeds, on six problems and on three chosen before its method was mended;
            wherever it foresaw a difference of two ways beyond its own error, the faster one is faster; 80 % of the
            times that it measures lie in the intervals of 90 % that it had predicted. (When each kind was run with
            nine seeds and no more, of six, and ways were judged by their ends, it was 1.38 times at worst, and of eight
            differences beyond the noise of the seeds one had been predicted with the wrong sign.)
Cost        4 minutes on two CPU cores; --full, 25 minutes.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from experiments.judging import ways
from experiments.judging.unseen import LATER, UNSEEN
from gdjax import advise, batching, noise, problems, report, tuning
from gdjax.commands import experiment

EPOCHS = 6
SCHEDULE_SECONDS, RACE_SECONDS = 90.0, 45.0  # for `gdjax schedule`, and for the tuning of the seven, on one problem
SIZES = 8, 16, 32, 64
NUM_PHASES, NUM_SEEDS, FACTOR = 4, 3, 2.0
WAYS = {  # by what the rate shrinks and the batch grows from each quarter of the examples to the next
    "constant": (1.0, 1),
    "decay": (0.5, 1),
    "ramp": (1.0, 2),
    "both": (0.5, 2),
    "Seesaw": (2**-0.5, 2),
    "steep ramp": (1.0, 4),
}


def schedule_of(size: int, growth: int, num_examples: int) -> list[tuple[int, int]]:
    """Return phases of a quarter of the examples each."""
    each = num_examples // NUM_PHASES
    return [(max(1, each // (size * growth**i)), size * growth**i) for i in range(NUM_PHASES)]


def stepwise(optimizer: tuning.Optimizer, shrink: float, schedule: list[tuple[int, int]]) -> tuning.Optimizer:
    """Return the optimiser with its updates shrunk by a factor where a phase ends."""
    ends = np.cumsum([count for count, _ in schedule])[:-1].tolist()
    shares = optax.piecewise_constant_schedule(1.0, dict.fromkeys(ends, shrink))
    return optimizer if shrink == 1 else lambda rate: optax.chain(optimizer(rate), optax.scale_by_schedule(shares))


def followed(problem, optimizer, size, rate, num_examples, key) -> list[tuple[int, int]]:
    """Return the phases of one run that doubles B whenever the noise scale, measured eight times, has doubled."""
    goal = tuning.Budget(num_examples)
    trainer = tuning.training(problem, optimizer, goal, num_runs=NUM_SEEDS * 3)
    run_key, measure_key = jax.random.split(key)
    run = trainer.start(np.asarray([rate]), num_seeds=1, key=run_key)
    only = np.arange(len(run.seeds)) == 0
    measure = jax.jit(lambda params, key: noise.measure(problem.loss, params, problem.train, key, num_examples=512))
    schedule, seen, first = [], 0, None
    for _ in range(8):
        count = max(1, num_examples // 8 // size)
        schedule.append((count, size))
        run = trainer.advance(run, count, only, batch_size=batching.Phases.of(schedule))
        seen += count * size
        params = jax.tree.map(lambda leaf: leaf[0], run.states.params)
        scale = float(measure(params, jax.random.clone(measure_key)).b_simple)
        first = scale if first is None and math.isfinite(scale) else first
        if first is not None and scale > 2 * first and 2 * size <= problem.num_examples:
            size, first = 2 * size, scale
    return schedule


@dataclasses.dataclass(frozen=True)
class Found:
    """A way at its best first batch size and rate: the losses of its seeds and the updates it made."""

    schedule: list[tuple[int, int]]
    rate: float
    losses: np.ndarray
    updates: int
    at_edge: bool


def best_of(problem, optimizer, shrink, schedules, rates: Callable[[int], float], num_examples, key) -> Found:
    """Return the best of some schedules, each with its rate tuned from a grid about `rates(first size)`."""
    best = None
    for schedule in schedules:
        make = stepwise(optimizer, shrink, schedule)
        goal = tuning.Budget(sum(count * size for count, size in schedule))
        search = tuning.searching(problem, make, goal, num_runs=NUM_SEEDS * 3)
        grid = rates(schedule[0][1]) * FACTOR ** np.arange(-1.0, 2.0)
        found = tuning.search_grid(
            lambda rates, schedule=schedule, search=search, **limits: search(
                rates, batch_size=batching.Phases.of(schedule), num_seeds=NUM_SEEDS, key=key, **limits
            ),
            grid,
        )
        updates = sum(count for count, _ in schedule)
        one = Found(schedule, found.rate, found.costs[found.best], updates, found.at_edge)
        if best is None or one.losses.mean() < best.losses.mean():
            best = one
    assert best is not None
    return best


def main(options: experiment.Options) -> experiment.Result:
    if options.full:
        return at_targets(options)
    sizes = SIZES[1:2] if options.smoke else SIZES[1:3]
    rows, found = [], {}
    for name in ["digits-mlp"]:
        problem = problems.named(name)
        num_examples = (1 if options.smoke else EPOCHS) * problem.num_examples
        for optimizer in ("sgd",) if options.smoke else ("sgd", "adamw"):
            make, usual = tuning.named(optimizer)
            tune_key, follow_key = jax.random.split(jax.random.key(options.seed))

            def rates(size, usual=usual, optimizer=optimizer):
                return usual * (size / 32) ** (1 if optimizer == "sgd" else 0.5)

            for way, (shrink, growth) in WAYS.items():
                schedules = [schedule_of(size, growth, num_examples) for size in sizes]
                fits = [schedule for schedule in schedules if schedule[-1][1] <= problem.num_examples]
                key = jax.random.clone(tune_key)
                found[name, optimizer, way] = best_of(problem, make, shrink, fits, rates, num_examples, key)
            start = found[name, optimizer, "constant"]
            follow = followed(problem, make, start.schedule[0][1], start.rate, num_examples, follow_key)
            key = jax.random.clone(tune_key)
            found[name, optimizer, "noise scale"] = best_of(problem, make, 1.0, [follow], rates, num_examples, key)
    for (name, optimizer, way), one in found.items():
        rows.append({"problem": name, "optimizer": optimizer, "way": way} | dataclasses.asdict(one))
    verdict = judge(found)
    return experiment.Result(rows, verdict, draw(found))


def judge(found) -> str:
    """Compare the ways with each part of the prediction."""
    cases = sorted({key[:2] for key in found})
    loss = {key: float(one.losses.mean()) for key, one in found.items()}
    sgd = [case for case in cases if case[1] == "sgd"]
    adam = [case for case in cases if case[1] == "adamw"]
    checks = {
        "SGD: ramp and decay within 15 %": all(
            abs(math.log(loss[*case, "ramp"] / loss[*case, "decay"])) < math.log(1.15) for case in sgd
        ),
        "SGD: both below the constant": all(
            max(loss[*case, "ramp"], loss[*case, "decay"]) < loss[*case, "constant"] for case in sgd
        ),
        "SGD: both together gain at most 10 %": all(
            loss[*case, "both"] > 0.9 * min(loss[*case, "ramp"], loss[*case, "decay"]) for case in sgd
        ),
        "doubling with the noise scale is not better than a constant": all(
            loss[*case, "noise scale"] >= loss[*case, "constant"] for case in cases
        ),
        "AdamW: Seesaw within 15 % of the decay": all(
            abs(math.log(loss[*case, "Seesaw"] / loss[*case, "decay"])) < math.log(1.15) for case in adam
        ),
    }
    text = "; ".join(
        f"{name}, {optimizer}: "
        + ", ".join(
            f"{way} {loss[name, optimizer, way]:.3g} ({one.updates} updates)"
            for (n, o, way), one in found.items()
            if (n, o) == (name, optimizer)
        )
        for name, optimizer in cases
    )
    return experiment.verdict(checks, f"Loss at the end: {text}.")


def draw(found):
    cases = list(dict.fromkeys(key[:2] for key in found))
    figure, axes = report.panels(len(cases), title="Seven ways to spend the examples of a run", width=6)
    for axis, case in zip(axes, cases, strict=True):
        for i, (key, one) in enumerate((key, one) for key, one in found.items() if key[:2] == case):
            colour = report.COLOURS[i % len(report.COLOURS)]
            axis.plot([one.updates] * len(one.losses), one.losses, "_", color=colour, markersize=10)
            axis.plot(one.updates, one.losses.mean(), "os^Dv<>"[i % 7], color=colour, label=key[2])
        axis.set(yscale="log", xlabel="updates", ylabel="training loss, each seed and mean")
        axis.set_title(", ".join(case))
        axis.legend(frameon=False, fontsize="small")
    return figure


def at_targets(options: experiment.Options) -> experiment.Result:
    """Race the seven ways, and what `gdjax schedule` recommends, to the targets of problems that it was not made on."""
    rows = [
        judged(name, make, target, optimizer, later, seed=options.seed)
        for later, cases in ((False, UNSEEN), (True, LATER))
        for name, (make, target, optimizer, *_) in cases.items()
        if target.startswith("loss")
    ]
    checks = {
        f"{said}what is recommended takes at most 1.10 times the fastest": max(row["regret"] for row in some) <= 1.1
        for said, some in (
            ("", [row for row in rows if not row["later"]]),
            ("of three chosen later, ", [row for row in rows if row["later"]]),
        )
    }
    claims = [right for row in rows for right in row["claims"].values()]
    signs = [right for row in rows for right in row["signs"].values()]
    inside = [held for row in rows for held in row["inside"].values()]
    checks |= {
        "where it foresaw a difference beyond its error, the faster of two is": all(claims),
        "80 % lie in the predicted intervals": bool(np.mean(inside) >= 0.8),
    }
    text = "; ".join(
        f"{row['problem']}, {row['optimizer']}: {row['recommended']} {row['regret']:.2f} "
        f"({row['interval'][0]:.2f}-{row['interval'][1]:.2f}) x {row['best']}"
        for row in rows
    )
    numbers = (
        f"{text}. {sum(claims)} of {len(claims)} foreseen differences are right, and of {len(signs)} measured ones "
        f"{sum(signs)} had been foreseen with that sign; {sum(inside)} of {len(inside)} intervals hold."
    )
    return experiment.Result(rows, experiment.verdict(checks, numbers), draw_targets(rows))


def judged(name: str, make, target: str, optimizer: str, later: bool, *, seed: int) -> dict[str, Any]:
    """Return what was recommended on one problem, and what that and the seven ways took."""
    problem = make()
    plan = advise.schedule(problem, target, optimizer=optimizer, seconds=SCHEDULE_SECONDS, seed=seed)
    raced = race(problem, optimizer, plan, jax.random.key(seed + 1))
    means = {way: float(one.seconds.mean()) for way, one in raced.items()}
    best = min((way for way in raced if way != "recommended"), key=means.__getitem__)
    # The seeds are the same: of the difference, over the mean of the fastest.
    difference = (raced["recommended"].seconds - raced[best].seconds) / means[best]
    half = 1.645 * difference.std(ddof=1) / math.sqrt(len(difference))
    measured = {kind: float(run.seconds.mean()) for kind, run in plan.runs.items()}
    beyond = [kind for kind in plan.runs if kind != plan.best and plan.compared(kind)[0] > 1]
    row = {
        "problem": name,
        "optimizer": optimizer,
        "later": later,
        "recommended": plan.best,
        "best": best,
        "regret": means["recommended"] / means[best],
        "interval": [1 + difference.mean() - half, 1 + difference.mean() + half],
        "seconds": means,
        "ways": {way: one._asdict() for way, one in raced.items()},
        "predicted": {kind: way.seconds for kind, way in plan.ways.items()},
        "measured": measured,
        "inside": {kind: plan.held(kind) for kind in measured},
        "foreseen": {kind: plan.foreseen(kind) for kind in measured},
        "compared": {kind: plan.compared(kind) for kind in measured},
        "claims": plan.claims(),
        "signs": {kind: plan.foreseen(kind)[1] > 1 for kind in beyond},
        "unknown": plan.unknown,
        "schedule_seconds": plan.seconds,
    }
    shown = f"{plan.best} {row['regret']:.2f} x {best}, {plan.seconds:.0f} s, {row['claims']} {row['signs']}"
    print(f"{name}: {shown}", file=sys.stderr, flush=True)
    return row


def draw_targets(rows: list[dict[str, Any]]):
    title = f"Seconds to a target with {ways.ROUNDS * ways.FRESH_SEEDS} fresh seeds each, over the mean of the fastest"
    figure, axes = report.panels(len(rows), title=title, width=3.6, height=2.6, columns=3)
    names = [*WAYS, "noise scale", "recommended"]
    for number, (axis, row) in enumerate(zip(axes, rows, strict=True)):
        for i, way in enumerate(names):
            seconds = row["ways"].get(way, {}).get("seconds")  # none in a file where it was infinite
            x = np.asarray([] if seconds is None else seconds, float) / row["seconds"][row["best"]]
            axis.plot(x, np.full(len(x), -i), "|", color=report.COLOURS[i % 7])
            if len(x):
                axis.plot(x.mean(), -i, "o" if way == "recommended" else ".", color=report.COLOURS[i % 7])
        axis.axvline(1, color="0.7", linewidth=1)
        axis.set(xscale="log", ylim=(0.5 - len(names), 0.5))
        axis.set_title(f"{row['problem']}, {row['optimizer']}" + (", later" if row["later"] else ""), fontsize="small")
        axis.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
        axis.minorticks_off()
        axis.set_yticks(-np.arange(len(names)), names if number % 3 == 0 else [])
    return figure


def race(problem, optimizer, plan, key) -> dict[str, ways.Raced]:
    """Return what each way takes to the target with the same fresh seeds, and what the plan recommends."""
    make, _ = tuning.named(optimizer)
    search = tuning.searching(problem, ways.shaped(make), plan.goal, num_runs=8)
    tune_key, fresh_key, follow_key = jax.random.split(key, 3)
    run, constant, times = plan.runs.get("constant"), plan.ways["constant"], plan.times
    constant = run.way if run else constant
    size, rate = constant.schedule[0][1], constant.learning_rate
    least = float(run.updates.mean() if run else constant.num_updates) * size

    def rows(factor, schedule):
        power = 1 if optimizer in ("sgd", "momentum") else 0.5
        middle = rate * (schedule[0][1] / size) ** power
        return [ways.row_of(schedule, middle * x * (1 if factor == 1 else 1.6), factor) for x in ways.RATES]

    found = {}
    for way, (factor, growth) in WAYS.items():
        firsts = sorted({max(1, round(x * size)) for x in ways.SIZES}, key=lambda x: abs(math.log(x / size)))
        lengths = ways.LENGTHS if way != "constant" else (1.0,)
        tried = [schedule_of(first, growth, round(x * least)) for first in firsts for x in lengths]
        most = min(ways.LARGEST, problem.num_examples)
        tried = [schedule for schedule in tried if schedule[-1][1] <= most]
        found[way] = tried, partial(rows, factor)
    follow = followed(problem, make, size, rate, round(1.5 * least), follow_key)
    found["noise scale"] = [follow], partial(rows, 1.0)
    for first in {tried[0][0][1] for tried, _ in found.values() if tried}:  # programs of which no way is to pay
        search(np.resize(ways.row_of([(1, first)], rate), (4, 6)), batch_size=first, num_seeds=2, key=tune_key)
    raced, deadline = {}, time.perf_counter() + RACE_SECONDS
    for i, (way, (tried, of)) in enumerate(found.items()):
        now = time.perf_counter()
        ends = now + (deadline - now) / (len(found) - i)
        options = {"key": tune_key, "deadline": ends, "longer": 4.0 if WAYS.get(way, (1.0,))[0] == 1 else 1.0}
        _, schedule, row = ways.fastest(search, times, tried, of, **options)
        if schedule is not None:
            raced[way] = ways.fresh(search, times, schedule, row, key=fresh_key, longer=4.0)
    way = plan.way
    row = ways.row_of(way.schedule, way.learning_rate, slope=1 / way.num_updates if way.decays else 0.0)
    raced["recommended"] = ways.fresh(search, times, way.schedule, row, key=fresh_key, longer=4.0)
    return raced


if __name__ == "__main__":
    experiment.run(main)
