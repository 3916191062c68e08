"""What `gdjax bench` is asked and what it shows. Nothing heavy is imported before it runs.

>>> row = {"model": "mlp", "variant": "sharded", "batch_size": 2, "skipped": "one device only"}
>>> peaks = {"flops_per_second": 1e11, "bytes_per_second": 1e10}
>>> print(table([row], peaks).splitlines()[-1])
sharded     2  skipped: one device only
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdjax.commands import _compiled as compiled
from gdjax.commands import _specs as specs
from gdjax.commands._session import Common, progress, saving

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

TITLES = ("B", "us/update", "+-%", "examples/s", "x scan", "product", "roofline", "temp MB", "compile s")
WIDTHS = (6, 11, 5, 12, 20, 9, 10, 9, 11)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time ways to run gradient descent against one another and against what this device does at best.

    Compilation is not counted, every run is waited for and repeated until its median is known. With --target they are
    compiled for a device that need not be there, and nothing is run. Prints a table, and saves result.json and
    figure.png.
    """

    models: tuple[str, ...] = ("mlp-small", "mlp-large", "cnn", "transformer")
    """Of these four, on random data; or problems as `gdjax compare` takes them."""
    variants: tuple[str, ...] = ()
    """Of python-loop, scan, scan-unrolled, one-kernel, vmapped-seeds, sharded, microbatched, lanes, and
    'per-example: vmap', 'per-example: ghost'. Default: all.
    Or module:function of your own, (problem, learning_rate) -> run (see gdjax.variants)."""
    problem: str | None = None
    """One problem, in place of --models."""
    batch_sizes: tuple[int, ...] = (1, 32, 256)
    """Examples per update."""
    target: str | None = None
    """Compile for h100, v5e, v5p or v6e, or what a file describes (gdjax/bench/targets): kernels, memory, the largest
    batch that fits. Needs gdjax[aot-cuda] or gdjax[aot-tpu], and no such device."""
    devices: int | None = None
    """Split a CPU into so many devices, for `sharded`; the other variants may be slower then. With --target: so many
    of those."""
    compare: Path | None = None
    """An earlier result.json: print ratios to it, and mark changes beyond the noise of both."""
    profile: str | None = None
    """Folder for a trace of the measurements that https://ui.perfetto.dev opens (perfetto_trace.json.gz)."""
    cache: str | None = None
    """Folder of compiled programs to read and to add to, so that a second run compiles nothing."""
    common: Common = Common()

    def run(self) -> None:
        from gdjax import bench, report, timing

        if self.target is None and self.devices is not None:
            split_cpu(self.devices)
        earlier = None if self.compare is None else _earlier(self.compare)
        if self.target is not None:
            compiled.check(self.target, self.profile, earlier)
        with saving("bench", self, seed=0) as save:
            if self.cache is not None:
                timing.keep_compiled(self.cache)
            names = self.models if self.problem is None else (self.problem,)
            models = {name: specs.model(name) for name in names}
            chosen = {name: specs.variant(name) for name in self.variants or (*bench.VARIANTS, "lanes")}
            if len(models) < len(names) or len(chosen) < len(self.variants):
                raise ValueError(f"models={self.models} and variants={self.variants} must each be different")
            if self.target is not None:
                with progress() as show:
                    rows, largest = bench.compile_for(
                        self.target,
                        models,
                        chosen,
                        self.batch_sizes,
                        num_devices=1 if self.devices is None else self.devices,
                        progress=show,
                    )
                save(*compiled.shown(self.target, rows, largest, earlier))
                return
            with (
                progress() as show,
                timing.profiled(self.profile) if self.profile is not None else contextlib.nullcontext(),
            ):
                rows, peaks = bench.bench(models, chosen, self.batch_sizes, progress=show)
            changes = [] if earlier is None else bench.compared(rows, earlier["rows"])
            here = report.provenance(arguments={}, seed=0, wall_seconds=0.0)
            title = "Ways to run gradient descent on {count} x {kind}; bars are 95% intervals".format(**here["device"])
            report = table(rows, peaks._asdict()) + "\n"
            if earlier is not None:
                report += f"\n{comparison_table(changes, here, earlier['provenance'])}\n"
            result = {"rows": rows, "peaks": peaks._asdict(), "changes": changes}
            save(result, report, lambda: figure(rows, peaks._asdict(), title))


def split_cpu(num_devices: int) -> None:
    """Make jax show a CPU as several devices.

    Raises:
        ValueError: for a number below 1, for more than this machine has use for, and where jax has begun to use the
            devices as they are.
    """
    import jax

    most = max(8, os.cpu_count() or 1)
    if not 1 <= num_devices <= most:
        raise ValueError(
            f"devices={num_devices} must be at least 1 and at most {most}: each has threads of its own, and more than "
            f"the {os.cpu_count()} cores of this machine only wait for one another"
        )
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError as error:
        raise ValueError(f"devices={num_devices} comes too late: {error}") from error


def table(rows: Sequence[Row], peaks: dict[str, float]) -> str:
    """Return the rows as text, the peaks above."""
    width = max(len(row["variant"]) for row in rows)
    lines = [
        f"peaks: matrix product {peaks['flops_per_second'] / 1e9:.3g} Gflop/s, copy "
        f"{peaks['bytes_per_second'] / 1e9:.3g} GB/s. +-%: half the 95% interval of the median. x scan: median of",
        "ratios in turn, and its interval. product, roofline: of the time that these peaks allow; cached: above it,",
        "for the bytes come from a cache. lanes: B is the microbatch of a tick, x scan the scans one after another.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        titles = "".join(f"{title:>{column}}" for title, column in zip(TITLES, WIDTHS, strict=True))
        lines += ["", f"{model:{width}}{titles}"]
        lines += [f"{row['variant']:{width}}{_cells(row)}" for row in rows if row["model"] == model]
    return "\n".join(lines)


def comparison_table(changes: Sequence[Row], now: dict[str, Any], then: dict[str, Any]) -> str:
    """Return the ratios of `compared` as text, and what differs between the provenance of both results."""
    lines = [f"{'time over the earlier one':50}{'ratio':>8}"]
    for change in changes:
        name = f"{change['model']}, {change['variant']}, B = {change['batch_size']}"
        lines.append(f"{name:50}{change['ratio']:>8.2f}  {change['changed']}".rstrip())
    for part in ("versions", "device"):
        for name, value in now[part].items():
            if value != then[part].get(name):
                lines.append(f"not the same: {name} {value} (was {then[part].get(name)})")
    return "\n".join(lines)


def figure(rows: Sequence[Row], peaks: dict[str, float], title: str) -> "Figure":
    """Draw examples per second, with the peak, and temporary memory against B, a column for each model."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get("seconds")]
    models = list(dict.fromkeys(row["model"] for row in rows))
    shown = list(dict.fromkeys(row["variant"] for row in rows))
    drawn = Figure(figsize=(max(8.0, 4.2 * len(models)), 7.5), layout="constrained")
    axes = drawn.subplots(2, max(1, len(models)), squeeze=False)
    for model, (speed, memory) in zip(models, axes.T, strict=True):
        for i, variant in enumerate(shown):
            points = [row for row in rows if (row["model"], row["variant"]) == (model, variant)]
            _curve(speed, memory, sorted(points, key=lambda row: row["batch_size"]), variant, i)
        work = {row["batch_size"]: row["flops"] for row in rows if row["model"] == model and row["flops"]}
        rates = [size * peaks["flops_per_second"] / work[size] for size in sorted(work)]
        speed.plot(sorted(work), rates, color="gray", linewidth=4, alpha=0.5, label="matrix-product peak")
        speed.set(title=model, xscale="log", yscale="log", ylabel="examples per second, of all runs")
        memory.set(xscale="log", yscale="log", ylabel="temporary memory (MB)", xlabel="batch size B (examples)")
        for axis in (speed, memory):
            axis.grid(alpha=0.3)
    drawn.suptitle(title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(5, 2 + len(models)), frameon=False)
    return drawn


def _curve(speed: "Axes", memory: "Axes", points: Sequence[Row], label: str, i: int) -> None:
    from gdjax import report

    style: dict[str, Any] = {"color": report.COLOURS[i % 7], "marker": "osD^vPXh<"[i % 9], "markersize": 5}
    style |= {"linestyle": report.LINES[i % 4], "linewidth": 1.4}
    sizes = [row["batch_size"] for row in points]
    rates = [row["examples_per_second"] for row in points]
    below = [rate * (1 - row["seconds"] / row["high"]) for row, rate in zip(points, rates, strict=True)]
    above = [rate * (row["seconds"] / row["low"] - 1) for row, rate in zip(points, rates, strict=True)]
    speed.errorbar(sizes, rates, yerr=[below, above], label=label, capsize=2, **style)
    counted = [row for row in points if row["temporary_bytes"]]
    memory.plot([row["batch_size"] for row in counted], [row["temporary_bytes"] / 1e6 for row in counted], **style)


def _earlier(path: Path) -> dict[str, Any]:
    """Read an earlier result.

    Raises:
        ValueError: where the file cannot be read or is none of `gdjax bench`.
    """
    try:
        if path.exists() and not path.is_file():  # a device need not end
            raise OSError("it is not a file")
        result = json.loads(path.read_text())
        parts = result["provenance"]["versions"], result["provenance"]["device"]
        if all(_is_row(row) for row in result["rows"]) and all(isinstance(part, dict) and part for part in parts):
            return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"compare={str(path)!r} cannot be read as a result of gdjax bench: {error!r}") from error
    raise ValueError(
        f"compare={str(path)!r} is no result of gdjax bench: its rows name no model and variant, or no times"
    )


def _is_row(row: Row) -> bool:
    named = [type(row.get(name)) for name in ("model", "variant", "batch_size")] == [str, str, int]
    if "seconds" not in row:
        return named
    numbers = [type(row.get(name)) for name in ("low", "seconds", "high", "num_repeats")] == [float, float, float, int]
    return named and numbers and 0 < row["low"] <= row["seconds"] <= row["high"] < math.inf


def _cells(row: Row) -> str:
    """Return the cells of a row; fewer than MIN_RUNS repeats give no interval."""
    if "skipped" in row:
        return f"{row['batch_size']:>{WIDTHS[0]}}  skipped: {row['skipped']}"

    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "n/a" if value is None or not math.isfinite(value) else format(value * scale, form)

    from gdjax import timing

    few, over, roofline = row["num_repeats"] < timing.MIN_RUNS, row["over_scan"], row["fraction_of_roofline"]
    half = None if few else (row["high"] - row["low"]) / 2 / row["seconds"]
    between = "" if few or not over or row["variant"] == "scan" else f" ({over['low']:.2f}-{over['high']:.2f})"
    cells = (
        str(row["batch_size"]),
        number(row["seconds"], ".3g", 1e6),
        number(half, ".0f", 100),
        number(row["examples_per_second"], ".3g"),
        number(over and over["median"], ".2f") + between,
        number(row["fraction_of_product"], ".1%"),
        "cached" if roofline and roofline > 1 else number(roofline, ".1%"),
        number(row["temporary_bytes"], ".3g", 1e-6),
        number(row["compile_seconds"], ".2f"),
    )
    shown = "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
    return f"{shown}  {row['runs_at_once']} of {row['num_runs']} at once" if "runs_at_once" in row else shown
