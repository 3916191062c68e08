"""The figure of `advise.schedule`: batch size and rate along each way, and the losses predicted and measured."""

from typing import TYPE_CHECKING, Any

import numpy as np

from gdjax import batching, report
from gdjax.advise import _fitted
from gdjax.advise._plan import Plan
from gdjax.advise._ways import Way

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plan(found: Plan, title: str) -> "Figure":
    """Draw batch sizes and rates against examples, the pilot beside its twin, and seconds predicted and measured."""
    figure, (sizes, rates, pilot, times) = report.panels(4, title=title, width=4.4)
    for i, (kind, planned) in enumerate(found.ways.items()):
        way = found.runs[kind].way if kind in found.runs else planned
        style: Any = {"color": report.COLOURS[i], "linestyle": ("-", "--", "-.", ":")[i], "label": kind}
        ends = np.cumsum([0, *(count * size for count, size in way.schedule)])
        steps = [size for _, size in way.schedule]
        sizes.step(ends, [*steps, steps[-1]], where="post", **style)
        t = np.linspace(0, way.num_updates, 50).round().astype(int)
        rates.plot(_examples(way)(t), way.learning_rate * (1 - t / way.num_updates if way.decays else t**0), **style)
        low, middle, high = planned.seconds
        times.errorbar([i - 0.12], [middle], [[middle - low], [high - middle]], fmt="o", color="0.5", capsize=3)
        if kind in found.runs:
            seconds = found.runs[kind].seconds
            times.plot(np.full(len(seconds), i + 0.12), seconds, "_", color=report.COLOURS[i], markersize=14, mew=2)
    times.plot([], [], "o", color="0.5", label="predicted, 90 %")
    times.plot([], [], "_", color=report.COLOURS[0], markersize=14, mew=2, label="measured, seed by seed")
    times.set_xticks(range(len(found.ways)), list(found.ways))
    for i, curve in enumerate(found.curves):
        colour = report.COLOURS[i % len(report.COLOURS)]
        label = f"B = {curve.batch_size}, rate {curve.learning_rate:.2g}"
        pilot.plot(curve.updates * curve.batch_size, curve.losses, ".", markersize=4, color=colour, label=label)
        pilot.plot(curve.updates * curve.batch_size, _fitted.at(found.twin, curve), color=colour, linewidth=1)
    pilot.axhline(found.goal.value, color="0.7", linewidth=1)
    sizes.set(xlabel="examples", ylabel="batch size (examples)", yscale="log")
    used = sorted({size for line in sizes.lines for size in np.asarray(line.get_ydata()).tolist()})
    sizes.set_yticks(used, [f"{size:g}" for size in used], minor=False)
    sizes.minorticks_off()
    rates.set(xlabel="examples", ylabel="learning rate")
    pilot.set(xlabel="examples", ylabel="loss: runs (points), twin (lines)", xscale="log", yscale="log")
    times.set(ylabel=f"seconds to {found.goal}", yscale="log")
    for axis in (sizes, rates, pilot, times):
        axis.legend(frameon=False, fontsize="x-small")
    return figure


def _examples(way: Way):
    return np.vectorize(batching.Phases.of(way.schedule).examples)
