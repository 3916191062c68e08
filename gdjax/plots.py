"""Figures. matplotlib is imported when a figure is drawn, and no global state of it is touched.

>>> losses = {"B = 1": [[3.0, 2.0], [5.0, 1.0], [9.0, 0.5]]}  # of three seeds
>>> figure = curves([1, 2], losses, xlabel="epochs", ylabel="training loss", title="The loss falls")
>>> figure.axes[0].lines[0].get_ydata()
array([5., 1.])
"""

import importlib.util
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gdjax import records
from gdjax.advise_answer import Advice
from gdjax.compare import DIVERGED, Row
from gdjax.targets import Budget

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008): eight colours that the colour-blind can tell apart, less yellow, which vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")


def comparison(rows: Sequence[Row], title: str) -> "Figure":
    """Draw the training loss against examples seen, updates, and seconds; bands run from lowest to highest seed."""
    figure = _figure(width=12, height=4.2)
    axes = figure.subplots(1, 3, sharey=True)
    for i, row in enumerate(rows):
        # What has diverged would press everything else flat.
        initial = row.losses[:, :1]
        losses = np.where(row.losses - initial <= DIVERGED * np.abs(initial), row.losses, np.nan)
        updates = row.examples_seen / row.batch_size
        positions = (row.examples_seen / 1000, updates, updates * row.seconds / row.num_updates)
        label = f"{row.name}, B = {row.batch_size}" + (" (diverged)" if row.num_diverged else "")
        for axis, x in zip(axes, positions, strict=True):
            shown = (x > 0) | (axis is axes[0])  # zero has no place on a logarithmic axis
            band(axis, x[shown], losses[:, shown], label, i)
    for axis, name in zip(axes, ("examples seen (thousands)", "updates", "seconds on this device"), strict=True):
        axis.set(xlabel=name)
        _log_scales(axis, "y" if axis is axes[0] else "xy")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="training loss (mean over examples)")
    figure.suptitle(title, parse_math=False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(rows), 4), frameon=False)
    return figure


def curves(x: Any, values: Mapping[str, Any], *, xlabel: str, ylabel: str, title: str, log: str = "") -> "Figure":
    """Draw one curve for each label: medians over seeds and the range between them.

    Args:
        x: positions [E].
        values: {label: [S, E]}.
        xlabel, ylabel, title: texts; the labels with their units.
        log: the axes with a logarithmic scale: "", "x", "y" or "xy".
    """
    figure = _figure(width=7, height=4.5)
    axis = figure.subplots()
    for i, (label, lanes) in enumerate(values.items()):
        band(axis, x, lanes, label, i)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    _log_scales(axis, log)
    axis.set_title("\n".join(textwrap.wrap(title, 80)), fontsize="medium", parse_math=False)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def panels(count: int, *, title: str, width: float = 5.5, height: float = 4.2) -> tuple["Figure", list["Axes"]]:
    """Return (figure, its `count` axes side by side), sizes in inches, for what the functions above cannot draw."""
    figure = _figure(width=width * count, height=height)
    lines = textwrap.wrap(title, int(12 * width * count))
    figure.suptitle("\n".join(lines), fontsize="medium", parse_math=False)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def agreement(points: Mapping[str, tuple[Any, Any]], *, xlabel: str, ylabel: str, title: str) -> "Figure":
    """Draw measured against predicted values, {label: (predicted, measured)}, on logarithmic axes."""
    figure = _figure(width=6, height=5)
    axis = figure.subplots()
    for i, (label, (predicted, measured)) in enumerate(points.items()):
        axis.plot(predicted, measured, "os^Dvx"[i % 6], color=COLOURS[i % len(COLOURS)], label=label)
    drawn = np.concatenate([np.ravel(part) for pair in points.values() for part in pair])
    low, high = drawn.min(), drawn.max()
    axis.plot([low, high], [low, high], color="gray", linewidth=1, label="equal")
    axis.set(xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
    axis.set_title("\n".join(textwrap.wrap(title, 80)), fontsize="small", parse_math=False)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def advice(found: Advice, title: str) -> "Figure":
    """Draw updates, seconds per update and time to the target against B, and the examples that the time costs.

    With a budget to spend, it is the loss in place of updates and of examples.
    """
    figure, (costs, speed, times, trade) = panels(4, title=title, width=4.4)
    choices = [choice for choice in found.choices if choice.fits]
    sizes = np.asarray([choice.batch_size for choice in choices])
    run = [choice for choice in choices if np.isfinite(choice.measured_seconds)]
    at = [choice.batch_size for choice in run]
    spent = isinstance(found.goal, Budget)
    for axis, rows, measured in (
        (
            costs,
            [choice.loss if spent else choice.updates for choice in choices],
            [choice.costs.mean() for choice in run],
        ),
        (times, [choice.seconds for choice in choices], [choice.measured_seconds for choice in run]),
    ):
        low, middle, high = np.asarray(rows).T
        axis.plot(sizes, middle, color=COLOURS[0], label="predicted")
        if not (spent and axis is times):
            axis.fill_between(sizes, low, high, color=COLOURS[0], alpha=0.2, linewidth=0, label="90 % interval")
        axis.plot(at, measured, "o", color=COLOURS[1], label="verified", fillstyle="none", markeredgewidth=1.5)
    optima = {size: pilot.optimum()[1].mean() for size, pilot in found.pilots.items()}
    costs.plot(list(optima), list(optima.values()), "s", color=COLOURS[2], markersize=5, label="pilots")
    times.axvline(found.batch_size, color="gray", linewidth=1, linestyle=":", label=f"advice: B = {found.batch_size}")
    for label, form, guessed in (("measured", "o-", False), ("extrapolated", "o:", True)):
        some = [(choice.batch_size, choice.seconds_per_update) for choice in choices if choice.extrapolated is guessed]
        if some:
            speed.plot(*zip(*some, strict=True), form, color=COLOURS[0], label=label)
    points = [(c.expected_seconds, c.expected_loss if spent else c.expected_updates * c.batch_size) for c in choices]
    points, on = np.asarray(points), np.isin(sizes, found.pareto)
    trade.plot(*points[~on].T, "o", color=COLOURS[6], fillstyle="none", label="beaten in both")
    trade.plot(*points[on][points[on][:, 0].argsort()].T, "o-", color=COLOURS[0], label="Pareto set")
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


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with records.atomic(path) as file:
        figure.savefig(file, format="png", dpi=150)


def check_installed() -> None:
    """Raise ModuleNotFoundError, with the fix, where figures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("figures are drawn by matplotlib: pip install 'gdjax[experiments]'")


def _figure(*, width: float, height: float) -> "Figure":
    check_installed()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def band(axis: "Axes", x: Any, values: Any, label: str, i: int) -> None:
    """Draw the median of values [S, E] over seeds and the range between them, where all seeds are finite.

    Colour and line are the i-th.
    """
    x, values = np.asarray(x), np.asarray(values)
    finite = np.isfinite(values).all(0)
    x, values = x[finite], values[:, finite]
    colour, line = COLOURS[i % len(COLOURS)], LINES[i % len(LINES)]
    axis.plot(x, np.median(values, axis=0), line, color=colour, label=label, linewidth=1.6)
    if len(x):
        axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)


def _log_scales(axis: "Axes", names: str) -> None:
    """Make these axes logarithmic, except where a value that is drawn, or none at all, has no place on such an axis."""
    points = np.concatenate([np.asarray(line.get_xydata()) for line in axis.lines] or [np.zeros((0, 2))])
    for name, values in zip("xy", points.T, strict=True):
        if name in names and len(values) and values.min() > 0:
            axis.set(**{f"{name}scale": "log"})
