"""`gdjax advise`. Nothing heavy is imported before it runs, so that --help answers at once."""

import csv
import dataclasses
import io
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from gdjax.commands import _specs
from gdjax.commands._optimizer import Descent, half_life
from gdjax.commands._session import Common, progress, saving

if TYPE_CHECKING:
    from gdjax.advise import Advice, Choice


@dataclasses.dataclass(frozen=True)
class Advise:
    """Advise which batch size reaches a target first on this device: predict from a few tunings, then verify.

    Times the training step at every batch size, tunes the learning rate at a few, fits how many updates each takes,
    runs the best and others with fresh seeds, and prints predicted beside measured. What is advised is reached by ten
    seeds. Saves result.json, table.csv and figure.png.
    """

    target: str | None = None
    """What to reach: 'loss<=0.05' or 'accuracy>=0.95'. Of more than 2048 examples, 2048 are drawn to judge it on.
    The loss is that of training, another metric that of test examples, or as train_ or test_ before the name says."""
    examples: int | None = None
    """Instead of a target: how many examples to spend, for the least training loss after them.
    The advice is the fastest batch size whose loss is within the interval, over seeds, of the least one."""
    problem: str = "digits-mlp"
    """A built-in name, or package.module:attribute, as `gdjax compare --help` says."""
    descent: Descent = Descent()
    ema: str | None = None
    """Half-life, in examples, of an average of the parameters along each run, or 'mean': it is then what must reach
    the target, in place of the last parameters. Default: none."""
    batch_sizes: tuple[int | Literal["full"], ...] = ()
    """Batch sizes to choose from. Default: the powers of two below N, and N."""
    budget: float = 120.0
    """Seconds that all of it may take."""
    memory: float | None = None
    """Gigabytes that one gradient may need; larger batches are added up in pieces.
    Default: a quarter of what is free."""
    cost: float | None = None
    """Price of this device per hour, in any currency: what a run costs is printed too."""
    dry_run: bool = False
    """Print what would be done and how long it may take, train nothing, and save nothing."""
    seed: int = 0
    """Seed of parameters and streams."""
    common: Common = Common()

    def run(self) -> None:
        """Advise, print and save."""
        from gdjax import advise, tuning

        if (self.target is None) == (self.examples is None):
            raise ValueError("give exactly one of --target 'loss<=0.05', to reach, and --examples 8192, to spend")
        if self.cost is not None and not self.cost >= 0:
            raise ValueError(f"cost={self.cost} must be a price per hour, 0 or more")
        if self.dry_run:
            print(self._plan())
            return
        with saving("advise", self, seed=self.seed) as save:
            problem = _specs.problem(self.problem)
            sizes = [problem.num_examples if size == "full" else size for size in self.batch_sizes or ()]
            with progress() as show:
                found = advise.batch_size(
                    problem,
                    tuning.Budget(self.examples or 0) if self.target is None else self.target,
                    optimizer=self.descent.factory(),
                    sizes=sizes or None,
                    seconds=self.budget,
                    memory=self.memory and 1e9 * self.memory,
                    average=half_life(self.ema),
                    seed=self.seed,
                    progress=show,
                )
            title = f"{problem.name}, {found.goal}"
            text = _report(found) + self._price(found)
            files = {"table.csv": _csv(found.table())}
            save(found.summary() | {"problem": problem.name}, text, lambda: advise.advice(found, title), files)

    def _plan(self) -> str:
        """Return what would be done, by what costs nothing to know."""
        from gdjax import advise, tuning

        problem = _specs.problem(self.problem)
        count = problem.num_examples
        sizes = [count if size == "full" else size for size in self.batch_sizes] or advise.default_batch_sizes(count)
        goal = f"{self.examples} examples" if self.target is None else f"{tuning.parse_target(self.target, problem)}"
        pieces = tuning.microbatch_sizes(problem, sizes, memory=self.memory and 1e9 * self.memory)
        whole = [size for size in sizes if pieces[size] is None]
        split = ", ".join(f"{size} in pieces of {piece}" for size, piece in pieces.items() if piece is not None)
        lines = [
            f"Advice for {problem.name}, N = {count}, {goal}, in {self.budget:g} s at most:",
            f"- tune the learning rate at about three of B = {', '.join(map(str, sizes))}, at most five, from 32 on;",
            "- time the training step at every one, and predict the rest;",
            "- run the fastest, its neighbours and the ends with three fresh seeds, at most seven batch sizes;",
            "- tune what may be the fastest again, and confirm it with ten seeds.",
            f"Largest gradient in one piece: B = {max(whole, default=0)}" + (f"; {split}." if split else "."),
        ]
        return "\n".join(lines)

    def _price(self, found: "Advice") -> str:
        seconds = found[found.batch_size].expected_seconds
        if self.cost is None:
            return ""
        return f"\nAt {self.cost:g} an hour a run costs {self.cost * seconds / 3600:.3g}: the fastest is the cheapest."


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _report(found: "Advice") -> str:
    """Return a table, one row for each batch size, what could not be established, and the advice."""
    spent = hasattr(found.goal, "num_examples")
    head = ("updates", "loss: predicted", "run", "ms") if spent else ("updates: predicted", "run", "ms: predicted")
    rows = [("B", "rate", "ms/update", *head, "run"), *(_row(choice, spent) for choice in found.choices)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    notes: list[str] = []
    if found.refitted:
        notes += ["* outside its predicted interval (90 %): the laws were fitted again, to what was run as well."]
    if any(choice.speed.extrapolated for choice in found.choices):
        notes += ["? not timed: in proportion to the examples."]
    pieces = [f"{choice.batch_size}" for choice in found.choices if choice.speed.microbatch_size]
    if pieces:
        notes += [f"Gradients of B = {', '.join(pieces)} are added up in pieces that fit into memory."]
    notes += ["", *(f"Noise scale after {updates} updates: {scale}" for updates, scale in found.noise_scales)]
    fewest = "" if spent else f"Fewest examples: B = {found.fewest_examples}. "
    whole = [choice.batch_size for choice in found.choices if choice.fits and not choice.speed.microbatch_size]
    most = f" Largest gradient in one piece: B = {max(whole)}." if whole else ""
    notes += [f"{fewest}Least memory: B = {found.least_memory}.{most}"]
    notes += [f"Not established: {what}." for what in found.unknown]
    width = max(60, shutil.get_terminal_size().columns)
    return "\n".join([*lines, *(textwrap.fill(note, width) for note in (*notes, "", found.sentence()))])


def _row(choice: "Choice", spent: bool) -> tuple[str, ...]:
    if not choice.fits:
        return (f"{choice.batch_size}", "does not fit", *[""] * (6 if spent else 5))
    run, mark = choice.verified is not None, "" if choice.inside else " *"
    speed = f"{1e3 * choice.speed.seconds_per_update:.3g}" + ("?" if choice.speed.extrapolated else "")
    milliseconds = [1e3 * x for x in choice.seconds]
    if spent:
        loss = f"{choice.expected:.3g}{mark}" if run else ""
        cells = f"{choice.updates[1]:.0f}", _range(choice.predicted), loss, f"{milliseconds[1]:.3g}"
    else:
        updates = f"{choice.measured_updates:.3g}{mark}" if run else ""
        cells = _range(choice.updates), updates, _range(milliseconds)
    seconds = f"{1e3 * choice.measured_seconds:.3g}" if run else ""
    return (f"{choice.batch_size}", f"{choice.learning_rate:.2g}", speed, *cells, seconds)


def _range(values: Sequence[float]) -> str:
    """Return 'middle (low-high)', without exponents below a million."""
    low, middle, high = (f"{x:.0f}" if 100 <= x < 1e6 else f"{x:.2g}" for x in values)
    return f"{middle} ({low}-{high})"
