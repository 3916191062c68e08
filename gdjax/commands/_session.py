"""What every command is asked, and how it ends. Nothing heavy is imported before a command runs.

>>> with ended():  # and one line on standard error
...     raise ValueError("num_seeds=0 must be at least 1")
Traceback (most recent call last):
SystemExit: 2
"""

import _thread
import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any

from gdjax.commands._hosts import Hosts, joined

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Common:
    """What every command and experiment can be asked."""

    out: Path | None = None
    """Folder for result.json and figure.png. Default: runs/NAME-DATE-TIME."""
    json: str | None = None
    """Write the result to this file too; '-' is standard output, with nothing else on it."""
    data: Path | None = None
    """Folder of the data sets that built-in problems and --full read. Default: the environment variable GDJAX_DATA."""
    x64: bool = False
    """Compute in float64."""
    debug: bool = False
    """Show the traceback of an error."""
    hosts: Hosts = Hosts()


@contextlib.contextmanager
def ended(*, debug: bool = False) -> Iterator[None]:
    """Turn an exception into one line on standard error and an exit status: bad input 2, interrupted 130, others 1.

    A reader of standard output who has seen enough (`| head`) is no error.
    """
    try:
        try:
            with _interruptions_kept():
                yield
        finally:
            print(end="", flush=True)  # for `print`, unlike `sys.stdout`, a closed standard output is none
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail when Python ends
        sys.exit(0)
    except KeyboardInterrupt:
        _complain("interrupted", 130)
        sys.stderr.flush()
        os._exit(130)  # at once: the device still computes, and may call back into a Python that is being taken down
    except (ValueError, ModuleNotFoundError) as error:
        if debug:
            raise
        sys.exit(_complain(" ".join(f"{error}".split()), 2))
    except Exception as error:
        if debug:
            raise
        first, *_ = f"{error}".strip().splitlines() or [""]
        what = ": ".join(filter(None, (type(error).__name__, first)))
        sys.exit(_complain(f"{what} (--debug shows where)", 1))


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
    """Interrupt again where Ctrl-C comes in a callback whose errors Python drops.

    jax has one for the garbage collector.
    """

    def again(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            threading.Thread(target=_interrupt_outside, args=(again.__code__,), daemon=True).start()
        else:
            before(dropped)

    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before, sys.unraisablehook = sys.unraisablehook, again
    try:
        yield
    finally:
        sys.unraisablehook = before


def _interrupt_outside(code: CodeType) -> None:
    """Interrupt the main thread when it has left `code`, where it would be dropped once more."""
    main = threading.main_thread().ident
    frame: FrameType | None
    while True:
        time.sleep(0.01)
        frame = sys._current_frames().get(main or 0)
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back
        if frame is None:
            break
    _thread.interrupt_main()


def run(command: Any, do: Callable[[Any], None]) -> None:
    """Call `do(command)` with the precision, data and processes it asks for; the first alone keeps what it found."""
    common = command.common
    with ended(debug=common.debug):
        if common.x64:
            import jax

            jax.config.update("jax_enable_x64", True)
        if common.data:
            from gdjax.problems import _sources as sources

            sources.read_from(common.data)
        with joined(common.hosts) as aside:
            if aside:
                command = dataclasses.replace(command, common=dataclasses.replace(common, out=aside, json=None))
            do(command)


@contextlib.contextmanager
def saving(name: str, command: Any, *, seed: int) -> Iterator[Callable[..., None]]:
    """Make the run folder and yield the function that keeps and then prints what was found.

    That is save(result, text, draw, files={}): result.json with provenance, figure.png as `draw()` returns it, and
    further files by their names. Whatever can fail for want of a package or a place to write does so at the start.
    """
    from gdjax import _files, report

    start = time.perf_counter()
    common, stdout = command.common, sys.stdout
    report.check_installed()
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed} must have 64 bits: from {-(2**63)} to {2**63 - 1}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(report.run_folder(common.out or report.timestamped(name)))
        if common.json == "-":  # a user's own problem may print
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        elif common.json is not None:
            _files.check_replaceable(Path(common.json), "json")

        def save(
            result: dict[str, Any],
            text: str,
            draw: Callable[[], "Figure"],
            files: Mapping[str, bytes] = MappingProxyType({}),
        ) -> None:
            took = time.perf_counter() - start
            about = report.provenance(arguments=dataclasses.asdict(command), seed=seed, wall_seconds=took)
            result = result | {"provenance": about}
            _files.write_json(folder / "result.json", result)
            report.save(draw(), folder / "figure.png")
            for file_name, content in files.items():
                with _files.atomic(folder / file_name) as file:
                    file.write(content)
            if common.json not in (None, "-"):
                _files.write_json(Path(common.json), result)
            # Nobody may be listening any more: all that was to be kept has been.
            print(text)
            print(f"Saved {folder / 'result.json'} and {', '.join(['figure.png', *files])}")
            if common.json == "-":
                stdout.write(_files.to_json(result))

        yield save


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """Show a progress bar on standard error, where that is a terminal; yield a function (stage, fraction done)."""
    from tqdm import tqdm

    form = "{percentage:3.0f}%|{bar}| {elapsed} {desc}"
    with tqdm(total=1.0, disable=None, leave=False, file=sys.stderr, bar_format=form) as bar:

        def show(stage: str, fraction: float) -> None:
            bar.update(max(0.0, fraction - bar.n))  # a grid that grows begins again
            bar.set_description_str(stage)

        yield show


def _complain(message: str, status: int) -> int:
    print(f"gdjax: {message}", file=sys.stderr)
    return status
