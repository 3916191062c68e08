"""What `gdjax bench --target` shows. Nothing heavy is imported before it runs.

>>> row = {"model": "mlp", "variant": "scan", "batch_size": 2, "num_runs": 1, "kernels": 9.0, "collectives": 0.0}
>>> row |= {"loops": 1, "host_loops": 0, "temporary_bytes": 2e6, "argument_bytes": 1e6, "fits": True, "flops": 1e6}
>>> row |= {"bytes_accessed": 2e6, "least_seconds": 1e-6, "compile_seconds": 0.5}
>>> print(cells(row))
       2        9     0         0            2        1   yes    0.001         2        1      0.50
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

TITLES = ("B", "kernels", "host", "collect.", "temp MB", "args MB", "fits", "Gflop", "MB", "least us", "compile s")
WIDTHS = (8, 9, 6, 10, 13, 9, 6, 9, 10, 9, 10)
EXPLAINED = """\
Compiled for {target} by jax {version}; nothing was run. Of one update of all runs of a variant: kernels that it starts,
and collectives. host: loops that the host starts again for every iteration, where kernels.LOOPS_IN_GRAPHS lets the
device do it if it can. temp, args: memory of the program, with the data. Gflop and MB: of one mean gradient and its
update, {counted}; least us: the time they take at the published peaks.
vmapped-seeds: {seeds} runs. lanes: B is the microbatch of a tick. python-loop: the one update that is started."""


def check(target: str, profile: str | None, earlier: dict[str, Any] | None) -> None:
    """Let jax look for no other device than the CPU, and refuse what goes with no target.

    Raises:
        ValueError: for a profile of what is not run, and an earlier result of another target.
    """
    import jax

    if not os.environ.get("JAX_PLATFORMS"):  # a plugin without its device would complain
        jax.config.update("jax_platforms", "cpu")
    if profile is not None:
        raise ValueError(f"profile={profile!r} and target={target!r} exclude one another: nothing is run")
    if earlier is not None and earlier.get("target") != target:
        raise ValueError(f"compare: that result is of target={earlier.get('target')!r}, not {target!r}")


def shown(
    target: str, rows: Sequence[Row], largest: Sequence[Row], earlier: dict[str, Any] | None
) -> tuple[dict[str, Any], str, Callable[[], "Figure"]]:
    """Return the result, its text and what draws it."""
    changed = None if earlier is None else changes(rows, earlier["rows"])
    result = {"target": target, "rows": rows, "largest": largest, "changes": changed or []}
    return result, text(target, rows, largest, changed), lambda: figure(target, rows)


def text(target: str, rows: Sequence[Row], largest: Sequence[Row], changed: Sequence[Row] | None) -> str:
    """Return the table, what fits, and what has changed where anything could be compared."""
    import jax

    from gdjax import bench

    width = max(len(row["variant"]) for row in rows)
    seeds = next((row["num_runs"] for row in rows if row["variant"] == "vmapped-seeds"), bench.BATCH_SIZES[-1])
    by_compiler = any(row.get("counted_by") == "the compiler" for row in rows)
    counted = "all that its compiled form reads and writes" if by_compiler else "at least, as this compiler counts none"
    lines = [EXPLAINED.format(target=target, version=jax.__version__, seeds=seeds, counted=counted)]
    for model in dict.fromkeys(row["model"] for row in rows):
        titles = "".join(f"{title:>{column}}" for title, column in zip(TITLES, WIDTHS, strict=True))
        lines += ["", f"{model:{width}}{titles}"]
        lines += [f"{row['variant']:{width}}{cells(row)}" for row in rows if row["model"] == model]
    lines += ["", *(fitting(row) for row in largest)]
    if changed is not None:
        lines += ["", f"{'now / earlier':50}{'kernels':>10}{'temp MB':>10}"]
        for row in changed:
            name = f"{row['model']}, {row['variant']}, B = {row['batch_size']}"
            ratios = "".join(f"{_number(row[of], '.2f'):>10}" for of in ("kernels", "temporary_bytes"))
            lines.append(f"{name:50}{ratios}  {row['changed']}".rstrip())
    return "\n".join(lines) + "\n"


def cells(row: Row) -> str:
    """Return the cells of a row."""
    if "skipped" in row:
        return f"{row['batch_size']:>{WIDTHS[0]}}  skipped: {row['skipped']}"
    found = (
        str(row["batch_size"]),
        _number(row["kernels"], ".4g"),
        _number(row["host_loops"], "d"),
        _number(row["collectives"], ".3g"),
        _number(row["temporary_bytes"], ".3g", 1e-6),
        _number(row["argument_bytes"], ".3g", 1e-6),
        "yes" if row["fits"] else "NO",
        _number(row["flops"], ".3g", 1e-9),
        _number(row["bytes_accessed"], ".3g", 1e-6),
        _number(row["least_seconds"], ".2g", 1e6),
        _number(row["compile_seconds"], ".2f"),
    )
    return "".join(f"{cell:>{width}}" for cell, width in zip(found, WIDTHS, strict=True))


def fitting(row: Row) -> str:
    """Say which batch is the largest that fits."""
    usable = f"{row['usable_bytes'] / 1e9:.3g} GB that jax uses of the device"
    total = "more" if row["total_bytes"] is None else f"{row['total_bytes'] / 1e9:.3g} GB"
    if row["batch_size"] == 0:
        return f"{row['model']}: not even B = 1 fits with the data: it needs {total} of the {usable}"
    if row["limit"] == "examples":
        return f"{row['model']}: all B = {row['batch_size']} examples fit in one batch: {total} of the {usable}"
    return f"{row['model']}: the largest batch that fits is B = {row['batch_size']}: {total} of the {usable}"


def changes(rows: Sequence[Row], earlier: Sequence[Row]) -> list[Row]:
    """Return, for every row that an earlier result has too, kernels and temporary memory over those, and what grew."""

    def key(row: Row):
        return row["model"], row["variant"], row["batch_size"]

    before = {key(row): row for row in earlier if "kernels" in row}
    found = []
    for row in rows:
        old = before.get(key(row))
        if old is None or "kernels" not in row:
            continue
        ratios = {name: _ratio(row[name], old.get(name)) for name in ("kernels", "temporary_bytes")}
        sizes = {"fewer": any(r < 1 for r in ratios.values() if r), "more": any(r > 1 for r in ratios.values() if r)}
        named = {name: row[name] for name in ("model", "variant", "batch_size")}
        found.append(named | ratios | {"changed": " and ".join(name for name, holds in sizes.items() if holds)})
    return found


def figure(target: str, rows: Sequence[Row]) -> "Figure":
    """Draw kernels and memory against B, a column for each model."""
    from matplotlib.figure import Figure

    from gdjax import report

    rows = [row for row in rows if "kernels" in row and row["variant"] != "lanes"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    shown = list(dict.fromkeys(row["variant"] for row in rows))
    drawn = Figure(figsize=(max(8.0, 4.2 * len(models)), 7.5), layout="constrained")
    axes = drawn.subplots(2, max(1, len(models)), squeeze=False)
    for model, (started, memory) in zip(models, axes.T, strict=False):
        for i, variant in enumerate(shown):
            points = [row for row in rows if (row["model"], row["variant"]) == (model, variant)]
            points.sort(key=lambda row: row["batch_size"])
            style: dict[str, Any] = {"color": report.COLOURS[i % 7], "marker": "osD^vPXh<"[i % 9], "markersize": 5}
            style |= {"linestyle": report.LINES[i % 4], "linewidth": 1.4}
            sizes = [row["batch_size"] for row in points]
            started.plot(sizes, [row["kernels"] or math.nan for row in points], label=variant, **style)
            memory.plot(sizes, [row["total_bytes"] / 1e6 for row in points], **style)
        started.set(title=model, xscale="log", yscale="log", ylabel="kernels per update, of all runs")
        memory.set(xscale="log", yscale="log", ylabel="memory, with the data (MB)", xlabel="batch size B (examples)")
        for axis in (started, memory):
            axis.grid(alpha=0.3)
    drawn.suptitle(f"Compiled for {target}: what an update starts, and needs. Nothing was run")
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(5, 2 + len(models)), frameon=False)
    return drawn


def _number(value: float | None, form: str, scale: float | None = None) -> str:
    return "n/a" if value is None else format(value if scale is None else value * scale, form)


def _ratio(value: float | None, earlier: float | None) -> float | None:
    return value / earlier if value and earlier else None
