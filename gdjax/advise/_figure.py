"""The figures of an advice, and of rules."""

from typing import TYPE_CHECKING

import numpy as np

from gdjax import report
from gdjax.advise._answer import Advice
from gdjax.advise._outcomes import Rules
from gdjax.tuning import Budget

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def advice(found: Advice, title: str) -> "Figure":
    """Draw updates, seconds per update and time to the target against B, and the examples that the time costs.

    With a budget to spend, it is the loss in place of updates and of examples.
    """
    figure, (costs, speed, times, trade) = report.panels(4, title=title, width=4.4)
    choices = [choice for choice in found.choices if choice.fits]
    sizes = np.asarray([choice.batch_size for choice in choices])
    run = found.verified
    at = [choice.batch_size for choice in run]
    spent = isinstance(found.goal, Budget)
    for axis, rows, measured in (
        (
            costs,
            [choice.predicted for choice in choices],
            [choice.verified.costs.mean() for choice in run if choice.verified],
        ),
        (times, [choice.seconds for choice in choices], [choice.measured_seconds for choice in run]),
    ):
        low, middle, high = np.asarray(rows).T
        axis.plot(sizes, middle, color=report.COLOURS[0], label="predicted")
        if not (spent and axis is times):
            axis.fill_between(sizes, low, high, color=report.COLOURS[0], alpha=0.2, linewidth=0, label="90 % interval")
        axis.plot(at, measured, "o", color=report.COLOURS[1], label="verified", fillstyle="none", markeredgewidth=1.5)
    optima = {size: tuning.optimum()[1].mean() for size, tuning in found.tunings.items()}
    costs.plot(list(optima), list(optima.values()), "s", color=report.COLOURS[2], markersize=5, label="tuned")
    times.axvline(found.batch_size, color="gray", linewidth=1, linestyle=":", label=f"advice: B = {found.batch_size}")
    for label, form, guessed in (("measured", "o-", False), ("extrapolated", "o:", True)):
        some = [
            (choice.batch_size, choice.speed.seconds_per_update)
            for choice in choices
            if choice.speed.extrapolated is guessed
        ]
        if some:
            speed.plot(*zip(*some, strict=True), form, color=report.COLOURS[0], label=label)
    points = [(choice.expected_seconds, found.question.price(choice)) for choice in choices]
    points, on = np.asarray(points), np.isin(sizes, found.pareto)
    trade.plot(*points[~on].T, "o", color=report.COLOURS[6], fillstyle="none", label="beaten in both")
    trade.plot(*points[on][points[on][:, 0].argsort()].T, "o-", color=report.COLOURS[0], label="Pareto set")
    labelled, apart = -np.inf, 0.07 * np.ptp(np.log(points[:, 0]))
    for (x, y), size in sorted(zip(points[on].tolist(), sizes[on], strict=True)):  # the fastest first
        if np.log(x) > labelled + apart:
            trade.annotate(f" {size}", (x, y), fontsize="small")
            labelled = np.log(x)
    cost, price = ("loss after the budget",) * 2 if spent else ("updates to target", "examples to target")
    time = "seconds to spend the budget" if spent else "seconds to target"
    for axis, label in ((costs, cost), (speed, "seconds per update"), (times, time)):
        axis.set(xlabel="batch size (examples)", ylabel=label)
    trade.set(xlabel=time, ylabel=price)
    trade.tick_params(axis="x", which="minor", labelrotation=45)  # it may span less than a decade
    for axis in (costs, speed, times, trade):
        axis.set(xscale="log", yscale="log")
        axis.legend(frameon=False, fontsize="small")
    return figure


def regrets(found: Rules, title: str) -> "Figure":
    """Draw the regret of every rule that was run, in loss and in examples, and the loss along its runs."""
    figure, (loss, examples, runs) = report.panels(3, title=title, width=5, height=4.6)
    names = [" = ".join((outcome.rule, *outcome.same)) for outcome in found.run]
    intervals = [(outcome.loss_regret, outcome.examples_regret) for outcome in found.run]
    for axis, which, scale in ((loss, 0, 1.0), (examples, 1, 100.0)):
        for i, pair in enumerate(intervals):
            interval = pair[which]
            if interval is None or not np.isfinite(interval.mean):
                axis.annotate("diverged", (0, i), color=report.COLOURS[1], va="center", fontsize="small")
                continue
            mean, low, high = (scale * x for x in interval)
            style = {"color": report.COLOURS[0], "capsize": 3, "fmt": "o"}
            axis.errorbar(mean, i, xerr=[[mean - low], [high - mean]], **style)
        axis.axvline(0, color="gray", linewidth=1)
        axis.set_yticks(range(len(names)), names if which == 0 else [""] * len(names))
        axis.set_ylim(len(names) - 0.5, -0.5)
    loss.set_xlabel(f"loss over that of the rate tuned at B = {found.batch_size}\n(mean, 90 % interval)")
    examples.set_xlabel("examples over those of the tuned rate (%)\n(mean, 90 % interval)")
    for axis, which in ((loss, 0), (examples, 1)):
        means = [abs(pair[which].mean) for pair in intervals if pair[which]]  # pyright: ignore
        largest = max((mean for mean in means if np.isfinite(mean)), default=1.0) * (100 if which else 1)
        axis.set_xscale("symlog", linthresh=max(largest / 10, 1e-6))
    for i, outcome in enumerate((*found.run, found.tuned)):
        line = report.LINES[i // len(report.COLOURS) % len(report.LINES)]
        report.band(runs, found.examples[1:], outcome.losses[:, 1:], outcome.rule, i, line=line)  # pyright: ignore
    runs.set(xlabel="examples seen", ylabel="training loss (median and range of seeds)")
    report.log_scales(runs, "xy")
    runs.tick_params(axis="x", which="both", labelrotation=45)  # it may span less than a decade
    runs.legend(frameon=False, fontsize="x-small")
    return figure
