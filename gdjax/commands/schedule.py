"""`gdjax schedule`. Nothing heavy is imported before it runs, so that --help answers at once."""

import dataclasses
import shutil
import textwrap
from typing import Any

from gdjax.commands import _specs
from gdjax.commands._session import Common, progress, saving

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Say whether a growing batch, a decaying rate, both or neither reaches a target first: predict, then run.

    Times the update, fits a quadratic to short runs at two batch sizes, plans by it, tunes all four ways alike, runs
    them with fresh seeds, and prints predicted beside measured. Saves result.json and figure.png.
    """

    target: str
    """The training loss to reach: 'loss<=0.45'. Of more than 2048 examples, 2048 are drawn to judge it on."""
    problem: str = "digits-mlp"
    """A built-in name, or package.module:attribute, as `gdjax compare --help` says."""
    optimizer: str = "sgd"
    """sgd, momentum, nesterov, adam, adamw, lion, rmsprop, adafactor, muon, or package.module:factory, a function
    learning_rate -> optax transformation."""
    phases: int = 3
    """Batch sizes that a ramp may have: 2 or 3."""
    budget: float = 300.0
    """Seconds that all of it may take."""
    seed: int = 0
    """Seed of parameters and streams."""
    common: Common = Common()

    def run(self) -> None:
        """Plan, run, print and save."""
        from gdjax import advise

        with saving("schedule", self, seed=self.seed) as save:
            problem = _specs.problem(self.problem)
            with progress() as show:
                found = advise.schedule(
                    problem,
                    self.target,
                    optimizer=_specs.optimizer(self.optimizer),
                    num_phases=self.phases,
                    seconds=self.budget,
                    seed=self.seed,
                    progress=show,
                )
            title = f"{problem.name}, {found.goal}"
            save(found.summary() | {"problem": problem.name}, _report(found), lambda: found.figure(title))


def _report(found: Any) -> str:
    """Return a table, one row for each way, what else was found, the verdict, and the ramp to paste."""
    least = min(way.seconds[1] for way in found.ways.values())
    unit, each = next((unit, each) for unit, each in UNITS.items() if least >= each or unit == "us")
    rows = [("", "batch sizes", "rate", "updates: predicted", "run", f"{unit}: predicted", "run")]
    for kind, way in found.ways.items():
        run = found.runs.get(kind)
        low, middle, high = (x / each for x in way.seconds)
        shown = run.way if run else way
        sizes = " ".join(f"{count}x{size}" for count, size in shown.schedule)
        rate = f"{shown.learning_rate:.2g}" + (" to 0" if way.decays else "")
        measured = (f"{run.updates.mean():.0f}", f"{run.seconds.mean() / each:.3g}") if run else ("", "")
        mark = "" if run is None or found.held(kind) else " *"
        predicted = f"{middle:.3g} ({low:.3g}-{high:.3g})"
        rows.append((kind, sizes, rate, f"{way.updates:.0f}", measured[0], predicted, measured[1] + mark))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if any(kind in found.runs and not found.held(kind) for kind in found.ways):
        lines += ["* outside its predicted interval (90 %)."]
    times = found.times
    cost = f"{1e6 * times.per_update:.3g} us + {1e6 * times.per_example:.3g} us per example"
    said = [
        f"An update takes {cost} (off by {times.residual:.0%} at most" + ("" if times.fits else "; the table") + ")."
    ]
    for local in found.locals:
        end = "all that it was followed for" if local.held == local.seen else f"of {local.seen}"
        said += [
            f"The twin about the parameters after {local.num_updates} updates held, within 20 %, for {local.held} "
            f"updates, {end}."
        ]
    said += [f"Not established: {what}." for what in found.unknown]
    width = max(60, shutil.get_terminal_size().columns)
    lines += ["", *(textwrap.fill(each, width) for each in said), "", textwrap.fill(found.sentence(), width), ""]
    lines += [f"[(examples, B), ...] = {found.ramp()}", f"training.run(..., schedule={found.schedule})"]
    return "\n".join(lines)
