"""The command line. Nothing heavy is imported before the arguments are parsed, so that --help answers at once."""

import contextlib
import dataclasses
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

try:
    import tyro
except ModuleNotFoundError:
    sys.exit("gdjax: the command line needs more packages: pip install 'gdjax[experiments]'")

from gdjax.bench_report import Bench
from gdjax.hosts import Hosts, joined

if TYPE_CHECKING:
    import numpy as np

    from gdjax.choices import Advice
    from gdjax.claims import Claim
    from gdjax.compare import Row


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare stochastic, mini-batch and batch gradient descent: same model, same stream, same number of examples.

    Trains at every batch size, each at its own best learning rate, prints a table, says what the run has to say about
    the textbook's claims, and saves result.json and figure.png.
    """

    problem: str = "digits-mlp"
    """A built-in name (digits-mlp, least-squares, logistic, noisy-quadratic; with --data, mnist-mlp,
    fashion-mnist-cnn, cifar10-cnn, a9a-logistic, power-plant, tiny-shakespeare), or package.module:attribute naming a
    gdjax Problem or a function that returns one; the current folder is searched first."""
    batch_sizes: tuple[int | Literal["full"], ...] | None = None
    """Examples per update, 'full' for all of them. Default: 1 32 full."""
    learning_rate: float | None = None
    """One learning rate for all batch sizes. Default: tuned for each on a logarithmic grid, by final training loss."""
    num_epochs: int = 64
    """Examples that every batch size sees, in epochs (passes over the training data)."""
    num_seeds: int = 3
    """Initial parameters and streams drawn; each is used at every batch size and learning rate."""
    seed: int = 0
    """Seed that they are drawn from."""
    data: Path | None = None
    """Folder of the data sets that built-in problems read. Default: the environment variable GDJAX_DATA."""
    cache: Path | None = None
    """Folder of compiled programs to read and to add to, so that a second run compiles less."""
    out: Path | None = None
    """Folder for result.json and figure.png. Default: runs/compare-DATE-TIME."""
    json: str | None = None
    """Write the result to this file too; '-' is standard output, with nothing else on it."""
    hosts: Hosts = Hosts()
    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> None:
        from gdjax import claims, compare, plots, problems, records, timing

        start = time.perf_counter()
        plots.check_installed()
        messages = sys.stderr if self.json == "-" else sys.stdout
        with records.run_folder(self.out or records.timestamped("compare")) as folder:
            if self.json not in (None, "-"):
                records.check_writable(Path(self.json), "json")
            if self.cache:
                timing.keep_compiled(self.cache)
            problem = problems.named(self.problem)
            sizes = self.batch_sizes or compare.default_batch_sizes(problem.num_examples)
            with _progress() as progress:
                rows = compare.compare(
                    problem,
                    batch_sizes=[problem.num_examples if size == "full" else size for size in sizes],
                    learning_rate=self.learning_rate,
                    num_epochs=self.num_epochs,
                    num_seeds=self.num_seeds,
                    seed=self.seed,
                    progress=progress,
                )
            judged = claims.judge(rows)
            result = {
                "problem": problem.name,
                "rows": [row.summary() for row in rows],
                "claims": [claim._asdict() for claim in judged],
                "provenance": records.provenance(
                    arguments=dataclasses.asdict(self), seed=self.seed, wall_seconds=time.perf_counter() - start
                ),
            }
            records.write_json(folder / "result.json", result)
            if self.json == "-":
                sys.stdout.write(records.to_json(result))
            elif self.json:
                records.write_json(Path(self.json), result)
            print(_table(rows), *map(_paragraph, judged), sep="\n", end="\n\n", file=messages)
            stream = f"one stream of {problem.num_examples * self.num_epochs} examples"
            figure = plots.comparison(rows, f"{problem.name}: {stream}, cut at each batch size")
            plots.save(figure, folder / "figure.png")
        print(f"Saved {folder / 'result.json'} and figure.png", file=messages)


@dataclasses.dataclass(frozen=True)
class Advise:
    """Advise which batch size reaches a target first on this device: predict from a few pilots, then verify by running.

    Times the training step at every batch size, tunes the learning rate at a few, fits how many updates each takes,
    runs the best and others with fresh seeds, and prints predicted beside measured. Saves result.json and figure.png.
    """

    target: str
    """What to reach: 'loss<=0.05' or 'accuracy>=0.95'. The loss is that of the training examples, other metrics are
    those of the test examples, unless train_ or test_ goes before the name; of more than 2048 examples, 2048 are
    drawn to judge it on."""
    problem: str = "digits-mlp"
    """A built-in name (`gdjax compare --help` lists them), or package.module:attribute naming a gdjax Problem or a
    function that returns one; the current folder is searched first."""
    optimizer: str = "sgd"
    """sgd, momentum, adam, or package.module:factory, a function learning_rate -> optax transformation."""
    batch_sizes: tuple[int | Literal["full"], ...] | None = None
    """Batch sizes to choose from. Default: the powers of two below N, and N."""
    budget: float = 120.0
    """Seconds that all of it may take."""
    seed: int = 0
    """Seed of parameters and streams."""
    data: Path | None = None
    """Folder of the data sets that built-in problems read. Default: the environment variable GDJAX_DATA."""
    out: Path | None = None
    """Folder for result.json and figure.png. Default: runs/advise-DATE-TIME."""
    json: str | None = None
    """Write the result to this file too; '-' is standard output, with nothing else on it."""
    hosts: Hosts = Hosts()
    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> None:
        from gdjax import advise, plots, problems, records, targets

        start = time.perf_counter()
        plots.check_installed()
        messages = sys.stderr if self.json == "-" else sys.stdout
        with records.run_folder(self.out or records.timestamped("advise")) as folder:
            if self.json not in (None, "-"):
                records.check_writable(Path(self.json), "json")
            problem = problems.named(self.problem)
            sizes = [problem.num_examples if size == "full" else size for size in self.batch_sizes or ()]
            with _progress() as progress:
                found = advise.advise(
                    problem,
                    targets.parse_target(self.target, problem),
                    optimizer=advise.load_optimizer(self.optimizer),
                    batch_sizes=sizes or None,
                    budget=self.budget,
                    seed=self.seed,
                    progress=progress,
                )
            result = found.summary() | {
                "problem": problem.name,
                "provenance": records.provenance(
                    arguments=dataclasses.asdict(self), seed=self.seed, wall_seconds=time.perf_counter() - start
                ),
            }
            records.write_json(folder / "result.json", result)
            if self.json == "-":
                sys.stdout.write(records.to_json(result))
            elif self.json:
                records.write_json(Path(self.json), result)
            print(_advice(found), file=messages)
            plots.save(plots.advice(found, f"{problem.name}, {found.target}"), folder / "figure.png")
        print(f"Saved {folder / 'result.json'} and figure.png", file=messages)


def main() -> None:
    """Run `gdjax`; exit status 0 done, 1 failure, 2 bad input, 130 interrupted."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"compare": Compare, "advise": Advise, "bench": Bench},
        prog="gdjax",
        description="Gradient descent, and how many examples each update should see.",
        config=(tyro.conf.HelptextFromCommentsOff, tyro.conf.OmitArgPrefixes),
    )
    try:
        if command.data:
            from gdjax import sources

            sources.read_from(command.data)
        with joined(command.hosts) as aside:
            (dataclasses.replace(command, out=aside, json=None) if aside else command).run()
    except (ValueError, ModuleNotFoundError) as error:
        if command.debug:
            raise
        sys.exit(complain(f"{error}", 2))
    except KeyboardInterrupt:
        sys.exit(complain("interrupted", 130))


def complain(message: str, status: int) -> int:
    """Print one line on standard error and return the exit status."""
    print(f"gdjax: {message}", file=sys.stderr)
    return status


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Show a progress bar on standard error, where that is a terminal; yield a function (stage, fraction done)."""
    from tqdm import tqdm

    form = "{percentage:3.0f}%|{bar}| {elapsed} {desc}"
    with tqdm(total=1.0, disable=None, leave=False, file=sys.stderr, bar_format=form) as bar:

        def show(stage: str, fraction: float) -> None:
            bar.update(max(0.0, fraction - bar.n))  # a grid that grows begins again
            bar.set_description_str(stage)

        yield show


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
    rows: list[tuple[str, ...]] = [("B", "rate", "ms/update", "updates: predicted", "run", "ms: predicted", "run")]
    for choice in found.choices:
        size, run = f"{choice.batch_size}", choice.measured is not None
        if not choice.fits:
            rows.append((size, "does not fit", *[""] * 5))
            continue
        speed = f"{1e3 * choice.seconds_per_update:.3g}" + ("?" if choice.extrapolated else "")
        updates = f"{choice.measured_updates:.3g}" + ("" if choice.inside else " *") if run else ""
        seconds = f"{1e3 * choice.measured_seconds:.3g}" if run else ""
        milliseconds = [1e3 * x for x in choice.seconds]
        rows.append(
            (size, f"{choice.learning_rate:.2g}", speed, _range(choice.updates), updates, _range(milliseconds), seconds)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if found.refitted:
        lines += ["* outside its predicted interval (90 %): the laws were fitted again, to what was run as well."]
    if any(choice.extrapolated for choice in found.choices):
        lines += ["? not timed: in proportion to the examples."]
    lines += ["", *(f"Noise scale after {updates} updates: {scale}" for updates, scale in found.noise_scales)]
    lines += [f"Fewest examples: B = {found.fewest_examples}. Least memory: B = {found.least_memory}."]
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
