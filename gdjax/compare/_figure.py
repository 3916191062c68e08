"""The figure of a comparison."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gdjax import report
from gdjax.compare._rows import DIVERGED, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def comparison(rows: Sequence[Row], title: str) -> "Figure":
    """Draw the training loss against examples seen, updates, and seconds; bands run from lowest to highest seed."""
    figure = report.blank(width=12, height=4.2)
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
            report.band(axis, x[shown], losses[:, shown], label, i)
    for axis, name in zip(axes, ("examples seen (thousands)", "updates", "seconds on this device"), strict=True):
        axis.set(xlabel=name)
        report.log_scales(axis, "y" if axis is axes[0] else "xy")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="training loss (mean over examples)")
    figure.suptitle(title, parse_math=False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(rows), 4), frameon=False)
    return figure
