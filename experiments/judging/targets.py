"""What `gdjax schedule` recommends against seven ways to spend a run: on problems seen and unseen."""

import math
import sys
import time
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.judging import ways
from experiments.judging.unseen import LATER, UNSEEN
from gdjax import advise, report, tuning
from gdjax.commands import experiment

SCHEDULE_SECONDS, RACE_SECONDS = 90.0, 45.0  # for `gdjax schedule`, and for the tuning of the seven, on one problem


def at_targets(options: experiment.Options) -> experiment.Result:
    """Race the seven ways, and what `gdjax schedule` recommends, to the targets of problems seen and unseen."""
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
            ("of those chosen later, ", [row for row in rows if row["later"]]),
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
    names = [*ways.WAYS, "noise scale", "recommended"]
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
    for way, (factor, growth) in ways.WAYS.items():
        firsts = sorted({max(1, round(x * size)) for x in ways.SIZES}, key=lambda x: abs(math.log(x / size)))
        lengths = ways.LENGTHS if way != "constant" else (1.0,)
        tried = [ways.schedule_of(first, growth, round(x * least)) for first in firsts for x in lengths]
        most = min(ways.LARGEST, problem.num_examples)
        tried = [schedule for schedule in tried if schedule[-1][1] <= most]
        found[way] = tried, partial(rows, factor)
    follow = ways.followed(problem, make, size, rate, round(1.5 * least), follow_key)
    found["noise scale"] = [follow], partial(rows, 1.0)
    for first in {tried[0][0][1] for tried, _ in found.values() if tried}:  # programs of which no way is to pay
        search(np.resize(ways.row_of([(1, first)], rate), (4, 6)), batch_size=first, num_seeds=2, key=tune_key)
    raced, deadline = {}, time.perf_counter() + RACE_SECONDS
    for i, (way, (tried, of)) in enumerate(found.items()):
        now = time.perf_counter()
        ends = now + (deadline - now) / (len(found) - i)
        options = {"key": tune_key, "deadline": ends, "longer": 4.0 if ways.WAYS.get(way, (1.0,))[0] == 1 else 1.0}
        _, schedule, row = ways.fastest(search, times, tried, of, **options)
        if schedule is not None:
            raced[way] = ways.fresh(search, times, schedule, row, key=fresh_key, longer=4.0)
    way = plan.way
    row = ways.row_of(way.schedule, way.learning_rate, slope=1 / way.num_updates if way.decays else 0.0)
    raced["recommended"] = ways.fresh(search, times, way.schedule, row, key=fresh_key, longer=4.0)
    return raced
