"""Run an experiment from the command line and keep what it found.

An experiment is `main(options) -> Result`. A script ends with `experiment.run(main)` and is then called as

    python -m experiments.NAME [--smoke] [--full] [--seed SEED] [--out DIR]

>>> verdict({"the loss falls": True, "to half": False}, "It falls by a third.")
'1 of 2 predictions held. Failed: to half. It falls by a third.'
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from gdjax.commands import _arguments as arguments
from gdjax.commands import _session as command
from gdjax.commands._session import Common

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
    common: Common = Common()


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


class Best(NamedTuple):
    """The rate whose mean over seeds is least: its position, itself, its values [S], whether rates lie beyond it."""

    position: int
    rate: float
    values: np.ndarray
    inside: bool


def best_rate(rates: Any, values: Any) -> Best:
    """Return the best of the rates [R] by values [S, R], for instance losses; one that is not finite never is.

    >>> best_rate([0.1, 0.3, 1.0], [[2.0, 1.0, 0.5], [2.0, 1.0, float("nan")]]).rate
    0.3
    """
    rates, values = np.asarray(rates), np.asarray(values)
    i = int(np.argmin(np.where(np.isfinite(values), values, np.inf).mean(0)))
    return Best(i, float(rates[i]), values[:, i], 0 < i < len(rates) - 1)


def mean_and_error(values: Any) -> tuple[float, float]:
    """Return the mean over seeds of values [S] and its standard error.

    >>> mean_and_error([1.0, 2.0, 3.0, 2.0])[0]
    2.0
    """
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def run(main: Callable[[Any], Result], options_type: type[Options] = Options) -> None:
    """Parse the command line, run `main`, save result.json, figure.png and its files, and print its verdict.

    `options_type` is `Options` or a dataclass that adds an experiment's own to it.
    """
    name = Path(inspect.getfile(main)).stem
    with command.ended():
        text = getattr(inspect.getmodule(main), "__doc__", None) or ""
        text = re.sub(r"\n(?!\n)", "\n ", text.strip())  # a help joins lines that are not indented
        options = arguments.parse(options_type, prog=f"python -m experiments.{name}", description=text)
    command.run(options, lambda options: _run(main, name, options))


def _run(main: Callable[[Any], Result], name: str, options: Options) -> None:
    with command.saving(name, options, seed=options.seed) as save:
        if options.smoke:  # nearly all of its time is compilation
            jax.config.update("jax_disable_most_optimizations", True)
        result = main(options)
        content = {"experiment": name, "rows": result.rows, "verdict": result.verdict}
        save(content, result.verdict, lambda: result.figure, result.files)
