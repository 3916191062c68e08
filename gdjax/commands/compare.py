"""`gdjax compare`. Nothing heavy is imported before it runs, so that --help answers at once."""

import dataclasses
import shutil
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from gdjax.commands import _specs
from gdjax.commands._optimizer import Descent, half_life
from gdjax.commands._session import Common, progress, saving, say

if TYPE_CHECKING:
    import numpy as np

    from gdjax.compare import Claim, Plan, Row
    from gdjax.problem import Problem

ROWS = "rows.jsonl"
"""In the run folder: the plan, and a row for every batch size that is done, until the run is."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare stochastic, mini-batch and batch gradient descent: same model, same stream, same number of examples.

    Trains at every batch size, each at its own best learning rate, prints a table, says what the run has to say about
    the textbook's claims, and saves result.json and figure.png. It first measures a few updates at every batch size,
    and then says what it will do, and how long that takes.
    """

    problem: str = "digits-mlp"
    """A built-in name, or package.module:attribute naming a gdjax Problem or a function that returns one.
    The current folder is searched first. Built in are digits-mlp, least-squares, logistic, noisy-quadratic;
    with --data, mnist-mlp, fashion-mnist-cnn, cifar10-cnn, a9a-logistic, power-plant, tiny-shakespeare."""
    batch_sizes: tuple[int | Literal["full"], ...] = ()
    """Examples per update, 'full' for all of them. Default: 1 32 full."""
    descent: Descent = Descent()
    ema: str | None = None
    """Half-life, in examples, of an average of the parameters along each run, or 'mean': it is evaluated beside the
    last parameters. Default: none."""
    learning_rate: float | None = None
    """One learning rate for all batch sizes. Default: tuned for each on a logarithmic grid, by final training loss."""
    num_epochs: int | None = None
    """Examples that every batch size sees, in epochs (passes over the training data). Default: what fits into the
    budget, at most 64."""
    num_seeds: int | None = None
    """Initial parameters and streams drawn; each is used at every batch size and learning rate.
    Default: what fits into the budget, at most 3."""
    budget: float = 60.0
    """Seconds that all of it should take; --num-epochs and --num-seeds go before it."""
    memory: float | None = None
    """Gigabytes that one gradient may need; larger batches are added up in pieces.
    Default: a quarter of what is free."""
    seed: int = 0
    """Seed that they are drawn from."""
    cache: str | None = None
    """Folder of compiled programs to read and to add to, so that a second run compiles less."""
    common: Common = Common()

    def run(self) -> None:
        """Compare, print and save."""
        from gdjax import compare, report, timing, tuning

        with saving("compare", self, seed=self.seed) as save:
            if self.cache is not None:
                timing.keep_compiled(self.cache)
            problem = _specs.problem(self.problem)
            optimizer = self.descent.factory()
            kept = report.journal(save.folder / ROWS, self._identity())
            with progress() as show:
                if kept.rows:
                    plan = compare.Plan.of(kept.rows[0], tuning.named(optimizer)[0])
                else:
                    plan = self._plan(problem, optimizer, show)
                    kept.keep(plan.fields())
                done = [compare.Row.of(row) for row in kept.rows[1:]]
                said = f"{problem.name}: {plan}."
                if done:
                    names = ", ".join(f"{row.batch_size}" for row in done)
                    said += f" Of an interrupted run in {save.folder}, B = {names} is there already."
                print(f"{textwrap.fill(said, max(60, shutil.get_terminal_size().columns))}\n", flush=True)
                finished = len(done)

                def keep(row: "Row") -> None:
                    nonlocal finished
                    kept.keep(dataclasses.asdict(row))
                    finished += 1

                try:
                    rows = compare.batch_sizes(
                        problem, planned=plan, seed=self.seed, done=done, keep=keep, progress=show
                    )
                except KeyboardInterrupt:
                    if finished:
                        where = f"--out {save.folder} goes on from them"
                        say(f"gdjax: {finished} of {len(plan.speeds)} batch sizes are kept: {where}")
                    raise
            judged = compare.judge(rows)
            result = {
                "problem": problem.name,
                "plan": f"{plan}",
                "skipped": plan.skipped,
                "rows": [row.summary() for row in rows],
                "claims": [claim._asdict() for claim in judged],
            }
            stream = f"one stream of {plan.num_examples} examples"
            title = f"{problem.name}: {stream}, cut at each batch size"
            skipped = [f"B = {size} was left out: {why}." for size, why in plan.skipped.items()]
            text = "\n".join([_table(rows), *_notes(rows), *skipped, *map(_paragraph, judged), ""])
            save(result, text, lambda: compare.comparison(rows, title))
            kept.path.unlink()  # result.json holds them

    def _plan(self, problem: "Problem", optimizer: Any, show: Callable[[str, float], None]) -> "Plan":
        from gdjax import compare

        sizes = self.batch_sizes or compare.default_batch_sizes(problem.num_examples)
        return compare.plan(
            problem,
            [problem.num_examples if size == "full" else size for size in sizes],
            optimizer=optimizer,
            learning_rate=self.learning_rate,
            num_epochs=self.num_epochs,
            num_seeds=self.num_seeds,
            budget=self.budget,
            memory=self.memory and 1e9 * self.memory,
            average=half_life(self.ema),
            progress=lambda stage: show(stage, 0.0),
        )

    def _identity(self) -> dict[str, str]:
        """Return what rows kept by an interrupted run must have in common with this one."""
        import jax

        asked = {field.name: f"{getattr(self, field.name)}" for field in dataclasses.fields(self)}
        asked = {name: value for name, value in asked.items() if name not in ("common", "cache")}
        return asked | {"x64": f"{self.common.x64}", "jax": jax.__version__, "gdjax": version("gdjax")}


def _table(rows: Sequence["Row"]) -> str:
    """Return one column for each batch size, as many side by side as the terminal is wide."""
    cells = [_cells(row) for row in rows]
    labels = list(dict.fromkeys(label for column in cells for label in column))
    width = max(len(label) for column in cells for label in (*column.values(), "mini-batch"))
    margin = max(map(len, labels))
    fitting = max(1, (shutil.get_terminal_size().columns - margin) // (width + 2))
    lines = []
    for i in range(0, len(cells), fitting):
        for label in labels:
            shown = (column.get(label, "") for column in cells[i : i + fitting])
            lines.append(label.ljust(margin) + "".join("  " + cell.rjust(width) for cell in shown))
        lines.append("")
    return "\n".join(lines)


def _cells(row: "Row") -> dict[str, str]:
    summary = row.summary()
    cells = {
        "": row.name,
        "batch size": f"{row.batch_size}",
        **({"gradient in pieces of": f"{row.microbatch_size}"} if row.microbatch_size else {}),
        "updates": f"{row.num_updates}",
        "examples": f"{row.num_examples}",
        "learning rate": f"{row.learning_rate:.3g}" + ("  (edge)" if row.at_edge else ""),
        "final train loss": "diverged" if row.num_diverged else _spread(row.losses[:, -1]),
    }
    for name, values in row.metrics.items():
        cells[f"{row.metrics_on} {name}"] = "diverged" if row.num_diverged else _spread(values[:, -1])
    guessed = "?" if row.extrapolated else ""
    return cells | {
        "gradient noise": "0" if row.gradient_noise < 1e-9 else f"{row.gradient_noise:.3g}",
        "seconds": f"{row.seconds:.3g}{guessed}",
        "microseconds/update": f"{summary['microseconds_per_update']:.3g}{guessed}",
        "examples/second": f"{summary['examples_per_second']:.3g}{guessed}",
        "compile seconds": f"{row.compile_seconds:.2g}",
    }


def _notes(rows: Sequence["Row"]) -> list[str]:
    """Return what the marks in the table mean."""
    return ["? not timed: in proportion to the examples."] * any(row.extrapolated for row in rows)


def _spread(values: "np.ndarray") -> str:
    """Return 'mean ± standard deviation' over seeds."""
    return f"{values.mean():.3g}" + (f" ± {values.std(ddof=1):.1g}" if len(values) > 1 else "")


def _paragraph(claim: "Claim") -> str:
    """Return the verdict in a column of its own, then the claim and its numbers, folded to the terminal's width."""
    margin = " " * len("cannot tell  ")
    text = f"{claim.verdict:<11}  {claim.claim}: {claim.evidence}."
    return textwrap.fill(text, max(60, shutil.get_terminal_size().columns), subsequent_indent=margin)
