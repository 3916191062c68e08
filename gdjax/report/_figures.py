"""Figures. matplotlib is imported when a figure is drawn, and no global state of it is touched.

>>> losses = {"B = 1": [[3.0, 2.0], [5.0, 1.0], [9.0, 0.5]]}  # of three seeds
>>> figure = curves([1, 2], losses, xlabel="epochs", ylabel="training loss", title="The loss falls")
>>> figure.axes[0].lines[0].get_ydata()
array([5., 1.])
"""

import importlib.util
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gdjax import _files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008): eight colours that the colour-blind can tell apart, less yellow, which vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DPI = 150
LINES = ("-", "--", "-.", ":")


def curves(x: Any, values: Mapping[str, Any], *, xlabel: str, ylabel: str, title: str, log: str = "") -> "Figure":
    """Draw one curve for each label: medians over seeds and the range between them.

    A curve that goes a thousand times higher than the middle one of them leaves the figure at the top.

    Args:
        x: positions [E].
        values: {label: [S, E]}.
        xlabel, ylabel, title: texts; the labels with their units.
        log: the axes with a logarithmic scale: "", "x", "y" or "xy".
    """
    figure = blank(width=7, height=4.5)
    axis = figure.subplots()
    for i, (label, lanes) in enumerate(values.items()):
        band(axis, x, lanes, label, i)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    log_scales(axis, log)
    _cut_off(axis)
    axis.set_title("\n".join(textwrap.wrap(title, 80)), fontsize="medium", parse_math=False)
    axis.grid(alpha=0.3)
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1), "handlelength": 3} if len(values) > 6 else {}
    axis.legend(frameon=False, **beside)
    return figure


def _cut_off(axis: "Axes") -> None:
    """Let a curve that diverges leave the figure instead of pressing the others to the bottom."""
    drawn = [y for line in axis.lines if len(y := np.asarray(line.get_ydata()))]
    tops = np.asarray([y.max() for y in drawn])
    kept = tops[tops <= 1000 * np.median(tops)] if drawn else tops
    if 0 < len(kept) < len(tops):
        forth, back = axis.yaxis.get_transform().transform, axis.yaxis.get_transform().inverted().transform
        low, high = forth(np.asarray([min(y.min() for y in drawn), kept.max()]))
        margin = 0.05 * (high - low)
        axis.set_ylim(*back(np.asarray([low - margin, high + margin])))


def panels(
    count: int, *, title: str, width: float = 5.5, height: float = 4.2, columns: int | None = None
) -> tuple["Figure", list["Axes"]]:
    """Return (figure, its `count` axes), sizes of one in inches, for what the functions above cannot draw.

    They stand side by side, or in rows of so many `columns`. A title of more than one line stands below them.
    """
    columns = min(count, columns or count)
    rows = -(-count // columns)
    figure = blank(width=width * columns, height=height * rows)
    lines = textwrap.wrap(title, int(12 * width * columns))
    put = figure.suptitle if len(lines) == 1 else figure.supxlabel
    put("\n".join(lines), fontsize="medium", parse_math=False)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.grid(alpha=0.3)
    return figure, axes[:count]


def agreement(points: Mapping[str, tuple[Any, Any]], *, xlabel: str, ylabel: str, title: str) -> "Figure":
    """Draw measured against predicted values, {label: (predicted, measured)}, on logarithmic axes.

    A title of more than one line stands below, and what more than six labels stand for beside the axes.
    """
    many = len(points) > 6
    figure = blank(width=8 if many else 6, height=5)
    axis = figure.subplots()
    for i, (label, (predicted, measured)) in enumerate(points.items()):
        axis.plot(predicted, measured, "os^Dvx"[i % 6], color=COLOURS[i % len(COLOURS)], label=label)
    drawn = np.concatenate([np.ravel(part) for pair in points.values() for part in pair])
    low, high = drawn.min(), drawn.max()
    axis.plot([low, high], [low, high], color="gray", linewidth=1, label="equal")
    axis.set(xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
    lines = textwrap.wrap(title, 100)
    put = axis.set_title if len(lines) == 1 else figure.supxlabel
    put("\n".join(lines), fontsize="small", parse_math=False)
    axis.grid(alpha=0.3)
    if many:
        figure.legend(loc="outside right upper", frameon=False)
    else:
        axis.legend(frameon=False)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all; DPI points an inch unless matplotlib's settings say how many."""
    from matplotlib import rcParams

    dpi = rcParams["savefig.dpi"]
    with _files.atomic(path) as file:
        figure.savefig(file, format="png", dpi=DPI if dpi == "figure" else dpi)


def check_installed() -> None:
    """Raise ModuleNotFoundError, with the fix, where figures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("figures are drawn by matplotlib: pip install 'gdjax[experiments]'")


def blank(*, width: float, height: float) -> "Figure":
    check_installed()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def band(axis: "Axes", x: Any, values: Any, label: str, i: int, *, line: str | None = None) -> None:
    """Draw the median of values [S, E] over seeds and the range between them, where all seeds are finite.

    Colour and line are the i-th; `line`, one of LINES, is for a figure whose lines tell another thing than colours.
    """
    x, values = np.asarray(x), np.asarray(values)
    finite = np.isfinite(values).all(0)
    x, values = x[finite], values[:, finite]
    colour = COLOURS[i % len(COLOURS)]
    axis.plot(x, np.median(values, axis=0), line or LINES[i % len(LINES)], color=colour, label=label, linewidth=1.6)
    if len(x):
        axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)


def bars(axis: "Axes", spreads: Mapping[str, Mapping[str, float]], colours: Any = COLOURS[5]) -> None:
    """Draw horizontal bars with their intervals, {label: {"low", "median", "high"}}, the first at the top."""
    low, middle, high = (np.asarray([each[name] for each in spreads.values()]) for name in ("low", "median", "high"))
    axis.barh(list(spreads), middle, xerr=[middle - low, high - middle], color=colours, capsize=3)
    axis.invert_yaxis()


def log_scales(axis: "Axes", names: str) -> None:
    """Make these axes logarithmic, except where a value that is drawn, or none at all, has no place on such an axis."""
    points = np.concatenate([np.asarray(line.get_xydata()) for line in axis.lines] or [np.zeros((0, 2))])
    for name, values in zip("xy", points.T, strict=True):
        if name in names and len(values) and values.min() > 0:
            axis.set(**{f"{name}scale": "log"})
