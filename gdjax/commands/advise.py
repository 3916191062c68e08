"""`gdjax advise`. Nothing heavy is imported before it runs, so that --help answers at once."""

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from gdjax.commands import _specs
from gdjax.commands._optimizer import Descent, half_life
from gdjax.commands._session import Common, progress, saving

if TYPE_CHECKING:
    from gdjax.advise import Advice, Choice


@dataclasses.dataclass(frozen=True)
class Advise:
    """Advise which batch size reaches a target first on this device: predict from a few tunings, then verify.

    Times the training step at every batch size, tunes the learning rate at a few, fits how many updates each takes,
    runs the best and others with fresh seeds, and prints predicted beside measured. Saves result.json and figure.png.
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
    seed: int = 0
    """Seed of parameters and streams."""
    common: Common = Common()

    def run(self) -> None:
        """Advise, print and save."""
        from gdjax import advise, tuning

        if (self.target is None) == (self.examples is None):
            raise ValueError("give exactly one of --target 'loss<=0.05', to reach, and --examples 8192, to spend")
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
            save(found.summary() | {"problem": problem.name}, _report(found), lambda: advise.advice(found, title))


def _report(found: "Advice") -> str:
    """Return a table, one row for each batch size, what could not be established, and the advice."""
    spent = hasattr(found.goal, "num_examples")
    head = ("updates", "loss: predicted", "run", "ms") if spent else ("updates: predicted", "run", "ms: predicted")
    rows = [("B", "rate", "ms/update", *head, "run"), *(_row(choice, spent) for choice in found.choices)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if found.refitted:
        lines += ["* outside its predicted interval (90 %): the laws were fitted again, to what was run as well."]
    if any(choice.speed.extrapolated for choice in found.choices):
        lines += ["? not timed: in proportion to the examples."]
    pieces = [f"{choice.batch_size}" for choice in found.choices if choice.speed.microbatch_size]
    if pieces:
        lines += [f"Gradients of B = {', '.join(pieces)} are added up in pieces that fit into memory."]
    lines += ["", *(f"Noise scale after {updates} updates: {scale}" for updates, scale in found.noise_scales)]
    fewest = "" if spent else f"Fewest examples: B = {found.fewest_examples}. "
    lines += [f"{fewest}Least memory: B = {found.least_memory}."]
    lines += [f"Not established: {what}." for what in found.unknown]
    sentence = textwrap.fill(found.sentence(), max(60, shutil.get_terminal_size().columns))
    return "\n".join([*lines, "", sentence])


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
