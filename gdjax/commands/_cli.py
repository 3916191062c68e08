"""The command line. Nothing heavy is imported before the arguments are parsed, so that --help answers at once."""

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from gdjax.commands import _arguments as arguments
from gdjax.commands import _session as command
from gdjax.commands import _specs as specs
from gdjax.commands._session import Common, progress, saving
from gdjax.commands.bench import Bench

if TYPE_CHECKING:
    import numpy as np

    from gdjax.advise import Advice
    from gdjax.compare import Claim, Row


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare stochastic, mini-batch and batch gradient descent: same model, same stream, same number of examples.

    Trains at every batch size, each at its own best learning rate, prints a table, says what the run has to say about
    the textbook's claims, and saves result.json and figure.png.
    """

    problem: str = "digits-mlp"
    """A built-in name, or package.module:attribute naming a gdjax Problem or a function that returns one.
    The current folder is searched first. Built in are digits-mlp, least-squares, logistic, noisy-quadratic;
    with --data, mnist-mlp, fashion-mnist-cnn, cifar10-cnn, a9a-logistic, power-plant, tiny-shakespeare."""
    batch_sizes: tuple[int | Literal["full"], ...] = ()
    """Examples per update, 'full' for all of them. Default: 1 32 full."""
    learning_rate: float | None = None
    """One learning rate for all batch sizes. Default: tuned for each on a logarithmic grid, by final training loss."""
    num_epochs: int = 64
    """Examples that every batch size sees, in epochs (passes over the training data)."""
    num_seeds: int = 3
    """Initial parameters and streams drawn; each is used at every batch size and learning rate."""
    seed: int = 0
    """Seed that they are drawn from."""
    cache: str | None = None
    """Folder of compiled programs to read and to add to, so that a second run compiles less."""
    common: Common = Common()

    def run(self) -> None:
        from gdjax import compare, timing

        with saving("compare", self, seed=self.seed) as save:
            if self.cache is not None:
                timing.keep_compiled(self.cache)
            problem = specs.problem(self.problem)
            sizes = self.batch_sizes or compare.default_batch_sizes(problem.num_examples)
            with progress() as show:
                rows = compare.compare(
                    problem,
                    batch_sizes=[problem.num_examples if size == "full" else size for size in sizes],
                    learning_rate=self.learning_rate,
                    num_epochs=self.num_epochs,
                    num_seeds=self.num_seeds,
                    seed=self.seed,
                    progress=show,
                )
            judged = compare.judge(rows)
            result = {
                "problem": problem.name,
                "rows": [row.summary() for row in rows],
                "claims": [claim._asdict() for claim in judged],
            }
            stream = f"one stream of {problem.num_examples * self.num_epochs} examples"
            title = f"{problem.name}: {stream}, cut at each batch size"
            report = "\n".join([_table(rows), *map(_paragraph, judged), ""])
            save(result, report, lambda: compare.comparison(rows, title))


@dataclasses.dataclass(frozen=True)
class Advise:
    """Advise which batch size reaches a target first on this device: predict from a few pilots, then verify by running.

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
    optimizer: str = "sgd"
    """sgd, momentum, adam, or package.module:factory, a function learning_rate -> optax transformation."""
    batch_sizes: tuple[int | Literal["full"], ...] = ()
    """Batch sizes to choose from. Default: the powers of two below N, and N."""
    budget: float = 120.0
    """Seconds that all of it may take."""
    seed: int = 0
    """Seed of parameters and streams."""
    common: Common = Common()

    def run(self) -> None:
        from gdjax import advise, tuning

        if (self.target is None) == (self.examples is None):
            raise ValueError("give exactly one of --target 'loss<=0.05', to reach, and --examples 8192, to spend")
        with saving("advise", self, seed=self.seed) as save:
            problem = specs.problem(self.problem)
            if self.target is None:
                goal = tuning.Budget(self.examples or 0)
            else:
                goal = tuning.parse_target(self.target, problem)
            sizes = [problem.num_examples if size == "full" else size for size in self.batch_sizes or ()]
            with progress() as show:
                found = advise.advise(
                    problem,
                    goal,
                    optimizer=specs.optimizer(self.optimizer),
                    batch_sizes=sizes or None,
                    budget=self.budget,
                    seed=self.seed,
                    progress=show,
                )
            title = f"{problem.name}, {found.goal}"
            save(found.summary() | {"problem": problem.name}, _advice(found), lambda: advise.advice(found, title))


def main() -> None:
    """Run `gdjax`; exit status 0 done, 1 failure, 2 bad input, 130 interrupted."""
    with command.ended():
        asked = arguments.parse(
            {"compare": Compare, "advise": Advise, "bench": Bench},
            prog="gdjax",
            description="Gradient descent, and how many examples each update should see.",
        )
    command.run(asked, lambda asked: asked.run())


def _table(rows: Sequence["Row"]) -> str:
    """Return one column for each batch size, as many side by side as the terminal is wide."""
    cells = [_cells(row) for row in rows]
    labels = list(cells[0])
    width = max(len(label) for column in cells for label in (*column.values(), "mini-batch"))
    margin = max(map(len, labels))
    fitting = max(1, (shutil.get_terminal_size().columns - margin) // (width + 2))
    lines = []
    for i in range(0, len(cells), fitting):
        for label in labels:
            lines.append(
                label.ljust(margin) + "".join("  " + column[label].rjust(width) for column in cells[i : i + fitting])
            )
        lines.append("")
    return "\n".join(lines)


def _cells(row: "Row") -> dict[str, str]:
    summary = row.summary()
    cells = {
        "": row.name,
        "batch size": f"{row.batch_size}",
        "updates": f"{row.num_updates}",
        "examples": f"{row.num_examples}",
        "learning rate": f"{row.learning_rate:.3g}" + ("  (edge)" if row.at_edge else ""),
        "final train loss": "diverged" if row.num_diverged else _spread(row.losses[:, -1]),
    }
    for name, values in row.metrics.items():
        cells[f"{row.metrics_on} {name}"] = "diverged" if row.num_diverged else _spread(values[:, -1])
    return cells | {
        "gradient noise": "0" if row.gradient_noise < 1e-9 else f"{row.gradient_noise:.3g}",
        "seconds": f"{row.seconds:.3g}",
        "microseconds/update": f"{summary['microseconds_per_update']:.3g}",
        "examples/second": f"{summary['examples_per_second']:.3g}",
        "compile seconds": f"{row.compile_seconds:.2g}",
    }


def _advice(found: "Advice") -> str:
    """Return a table, one row for each batch size, what could not be established, and the advice."""
    spent = hasattr(found.goal, "num_examples")
    head = ("updates", "loss: predicted", "run", "ms") if spent else ("updates: predicted", "run", "ms: predicted")
    rows: list[tuple[str, ...]] = [("B", "rate", "ms/update", *head, "run")]
    for choice in found.choices:
        if not choice.fits:
            rows.append((f"{choice.batch_size}", "does not fit", *[""] * (len(rows[0]) - 2)))
            continue
        run, mark = choice.measured is not None, "" if choice.inside else " *"
        speed = f"{1e3 * choice.seconds_per_update:.3g}" + ("?" if choice.extrapolated else "")
        milliseconds = [1e3 * x for x in choice.seconds]
        if spent:
            loss = f"{choice.expected_loss:.3g}{mark}" if run else ""
            cells = f"{choice.updates[1]:.0f}", _range(choice.loss), loss, f"{milliseconds[1]:.3g}"
        else:
            updates = f"{choice.measured_updates:.3g}{mark}" if run else ""
            cells = _range(choice.updates), updates, _range(milliseconds)
        seconds = f"{1e3 * choice.measured_seconds:.3g}" if run else ""
        rows.append((f"{choice.batch_size}", f"{choice.learning_rate:.2g}", speed, *cells, seconds))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if found.refitted:
        lines += ["* outside its predicted interval (90 %): the laws were fitted again, to what was run as well."]
    if any(choice.extrapolated for choice in found.choices):
        lines += ["? not timed: in proportion to the examples."]
    lines += ["", *(f"Noise scale after {updates} updates: {scale}" for updates, scale in found.noise_scales)]
    fewest = "" if spent else f"Fewest examples: B = {found.fewest_examples}. "
    lines += [f"{fewest}Least memory: B = {found.least_memory}."]
    lines += [f"Not established: {what}." for what in found.unknown]
    sentence = textwrap.fill(found.sentence(), max(60, shutil.get_terminal_size().columns))
    return "\n".join([*lines, "", sentence])


def _range(values: Sequence[float]) -> str:
    """Return 'middle (low-high)', without exponents below a million."""
    low, middle, high = (f"{x:.0f}" if 100 <= x < 1e6 else f"{x:.2g}" for x in values)
    return f"{middle} ({low}-{high})"


def _spread(values: "np.ndarray") -> str:
    """Return 'mean ± standard deviation' over seeds."""
    return f"{values.mean():.3g}" + (f" ± {values.std(ddof=1):.1g}" if len(values) > 1 else "")


def _paragraph(claim: "Claim") -> str:
    """Return the verdict in a column of its own, then the claim and its numbers, folded to the terminal's width."""
    margin = " " * len("cannot tell  ")
    text = f"{claim.verdict:<11}  {claim.claim}: {claim.evidence}."
    return textwrap.fill(text, max(60, shutil.get_terminal_size().columns), subsequent_indent=margin)


if __name__ == "__main__":
    main()
