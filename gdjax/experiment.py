"""Run an experiment from the command line and keep what it found.

An experiment is `main(options) -> Result`. A script ends with `experiment.run(main)` and is then called as

    python -m experiments.NAME [--smoke] [--full] [--seed SEED] [--data DIR] [--out DIR]

>>> verdict({"the loss falls": True, "to half": False}, "It falls by a third.")
'1 of 2 predictions held. Failed: to half. It falls by a third.'
"""

import dataclasses
import inspect
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from gdjax import plots, records, sources
from gdjax.hosts import Hosts, joined

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Options:
    """What every experiment can be asked."""

    smoke: bool = False
    """Run a version that takes seconds and shows only that everything works; its verdict means nothing."""
    full: bool = False
    """Take longer, for experiments whose Cost says so: larger problems, or more, on real data."""
    seed: int = 0
    """Seed of the key that everything random is drawn from."""
    data: Path | None = None
    """Folder of the data sets that --full reads (see gdjax.sources). Default: the environment variable GDJAX_DATA."""
    hosts: Hosts = Hosts()
    out: Path | None = None
    """Folder for result.json and figure.png. Default: runs/NAME-DATE-TIME."""


class Result(NamedTuple):
    """Rows of numbers for result.json, a verdict in a sentence or two, a figure, and further files by their names."""

    rows: list[dict[str, Any]]
    verdict: str
    figure: "Figure"
    files: Mapping[str, bytes] = MappingProxyType({})


def verdict(checks: Mapping[str, bool], numbers: str) -> str:
    """Return in words how many predictions held and which did not, {prediction: whether it held}, then the numbers."""
    failed = [prediction for prediction, holds in checks.items() if not holds]
    if not failed:
        return f"All {len(checks)} predictions held. {numbers}"
    held = len(checks) - len(failed)
    return f"{held or 'None'} of {len(checks)} predictions held. Failed: {'; '.join(failed)}. {numbers}"


def run(main: Callable[[Options], Result]) -> None:
    """Parse the command line, run `main`, print its verdict, and save result.json, figure.png and its files."""
    import tyro

    from gdjax import cli

    module = inspect.getmodule(main)
    name = Path(inspect.getfile(main)).stem
    options = tyro.cli(
        Options,
        prog=f"python -m experiments.{name}",
        description=getattr(module, "__doc__", None),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    try:
        if options.data:
            sources.read_from(options.data)
        with joined(options.hosts) as aside:
            _run(main, name, dataclasses.replace(options, out=aside) if aside else options)
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(cli.complain(f"{error}", 2))


def _run(main: Callable[[Options], Result], name: str, options: Options) -> None:
    start = time.perf_counter()
    plots.check_installed()
    if options.smoke:  # nearly all of its time is compilation
        jax.config.update("jax_disable_most_optimizations", True)
    with records.run_folder(options.out or records.timestamped(name)) as folder:
        result = main(options)
        print(result.verdict)
        provenance = records.provenance(
            arguments=dataclasses.asdict(options), seed=options.seed, wall_seconds=time.perf_counter() - start
        )
        content = {"experiment": name, "rows": result.rows, "verdict": result.verdict, "provenance": provenance}
        records.write_json(folder / "result.json", content)
        plots.save(result.figure, folder / "figure.png")
        for file_name, content in result.files.items():
            with records.atomic(folder / file_name) as file:
                file.write(content)
    print(f"Saved {folder / 'result.json'} and {', '.join(['figure.png', *result.files])}")
