"""What every command is asked, and how it ends. Nothing heavy is imported before a command runs.

>>> with ended():  # and one line on standard error
...     raise ValueError("num_seeds=0 must be at least 1")
Traceback (most recent call last):
SystemExit: 2
"""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from gdjax.commands._arguments import called
from gdjax.commands._hosts import Hosts, joined
from gdjax.commands._output import Aside, say, silenced

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Common:
    """What every command and experiment can be asked."""

    out: str | None = None
    """Folder for result.json and figure.png. Default: runs/NAME-DATE-TIME."""
    json: str | None = None
    """Write the result to this file too; '-' is standard output, with nothing else on it."""
    data: str | None = None
    """Folder of the data sets that built-in problems and --full read. Default: the environment variable GDJAX_DATA."""
    x64: bool = False
    """Compute in float64."""
    debug: bool = False
    """Show the traceback of an error."""
    quiet: Annotated[bool, called("quiet", "-q")] = False
    """Print errors alone: no progress, no table."""
    hosts: Hosts = Hosts()


@contextlib.contextmanager
def ended(*, debug: bool = False) -> Iterator[None]:
    """Turn an exception into one line on standard error and an exit status: bad input 2, interrupted 130, others 1.

    A reader of standard output who has seen enough (`| head`) is no error.
    """
    if sys.stderr is None:  # closed: what is opened next would get its number, and what others write to that
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        try:
            with _interruptions_kept():
                yield
        finally:
            print(end="", flush=True)  # for `print`, unlike `sys.stdout`, a closed standard output is none
    except BrokenPipeError:
        silenced(sys.stdout)
        sys.exit(0)
    except KeyboardInterrupt:
        say("gdjax: interrupted")
        os._exit(130)  # at once: the device still computes, and may call back into a Python that is being taken down
    except (ValueError, ModuleNotFoundError) as error:
        if debug:
            raise
        say("gdjax: " + " ".join(f"{error}".split()))
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        first, *_ = f"{error}".strip().splitlines() or [""]
        what = ": ".join(filter(None, (type(error).__name__, first)))
        say(f"gdjax: {what} (--debug shows where)")
        sys.exit(1)


def end_at_interruption() -> None:
    """Let Ctrl-C end the process at once until `ended` listens: for a script that imports jax before that.

    There it would be a traceback, or be lost in a callback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)


def _end_at_once(signum: int, frame: Any) -> None:
    os.write(2, b"gdjax: interrupted\n")
    os._exit(130)


@contextlib.contextmanager
def _interruptions_kept() -> Iterator[None]:
    """End the process where Ctrl-C comes in a callback whose errors Python drops.

    jax has one for the garbage collector.
    """

    def dropped(what: Any) -> None:
        if what.exc_type is KeyboardInterrupt:
            _end_at_once(signal.SIGINT, None)
        before(what)

    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        yield
    finally:
        sys.unraisablehook = before


def run(command: Any, do: Callable[[Any], None]) -> None:
    """Call `do(command)` with the precision, data and processes it asks for; the first alone keeps what it found."""
    common = command.common
    with ended(debug=common.debug):
        if common.quiet:
            os.environ["TQDM_DISABLE"] = "1"  # what tqdm and `report.progress_bar` ask
        if common.x64:
            import jax

            jax.config.update("jax_enable_x64", True)
        if common.data is not None:
            from gdjax import problems

            problems.read_from(common.data)
        with joined(common.hosts) as aside:
            if aside:
                command = dataclasses.replace(command, common=dataclasses.replace(common, out=str(aside), json=None))
            do(command)


class Save(NamedTuple):
    """The run folder, and what is called with what was found: save(result, text, draw, files={})."""

    folder: Path
    write: Callable[..., None]

    def __call__(self, *args: Any) -> None:
        """Keep result.json with provenance, figure.png as `draw()` returns it and `files` by name; print `text`."""
        self.write(*args)


@contextlib.contextmanager
def saving(name: str, command: Any, *, seed: int) -> Iterator[Save]:
    """Make the run folder and yield what keeps and then prints the result.

    Whatever can fail for want of a package or a place to write does so at the start.
    """
    from gdjax import _files, report

    start = time.perf_counter()
    common, stdout = command.common, sys.stdout
    report.check_installed()
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed} must have 64 bits: from {-(2**63)} to {2**63 - 1}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(report.run_folder(report.timestamped(name) if common.out is None else common.out))
        if common.json == "-":  # a user's own problem may print
            stack.enter_context(contextlib.redirect_stdout(Aside()))
        elif common.json is not None:
            _files.check_replaceable(Path(common.json), "json")
        if common.quiet:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))

        def save(
            result: dict[str, Any],
            text: str,
            draw: Callable[[], "Figure"],
            files: Mapping[str, bytes] = MappingProxyType({}),
        ) -> None:
            took = time.perf_counter() - start
            about = report.provenance(arguments=dataclasses.asdict(command), seed=seed, wall_seconds=took)
            result = result | {"provenance": about}
            try:
                _files.write_json(folder / "result.json", result)
                report.save(draw(), folder / "figure.png")
                for file_name, content in files.items():
                    with _files.atomic(folder / file_name) as file:
                        file.write(content)
                if common.json not in (None, "-"):
                    _files.write_json(Path(common.json), result)
            finally:
                # After the files, for nobody may be listening any more; but a full disk is not to lose the answer.
                print(text)
                if common.json == "-" and stdout is not None:
                    stdout.write(_files.to_json(result))
            print(f"Saved {folder / 'result.json'} and {', '.join(['figure.png', *files])}")

        yield Save(folder, save)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """Show a progress bar on standard error, where that is a terminal; yield a function (stage, fraction done)."""
    from gdjax import report

    form = "{percentage:3.0f}%|{bar}| {elapsed} {desc}"
    with report.progress_bar(total=1.0, leave=False, bar_format=form) as bar:

        def show(stage: str, fraction: float) -> None:
            bar.update(max(0.0, fraction - bar.n))  # a grid that grows begins again
            bar.set_description_str(stage)

        yield show
