"""A run folder with provenance. Files appear whole or not at all: written beside, then renamed.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as place, run_folder(place + "/run") as folder:
...     write_json(folder / "result.json", {"loss": float("nan"), "learning_rates": np.asarray([0.5, 1.0])})
...     print((folder / "result.json").read_text(), end="")
{
  "loss": null,
  "learning_rates": [0.5, 1.0]
}
"""

import contextlib
import datetime
import errno
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
import optax

import gdjax


@contextlib.contextmanager
def run_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Create a folder, with its parents, and make sure that files can be written into it.

    Where the block fails before it has written anything, the folders made here are removed again.

    Raises:
        ValueError: where the folder cannot be created or written, with the reason.
    """
    missing: list[Path] = []
    try:
        with _named_in_errors("out", path):
            folder = Path(path).expanduser()
            missing += [ancestor for ancestor in (folder, *folder.parents) if not ancestor.exists()]
        yield writable_folder(path, "out")
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: keep what was written
            for ancestor in missing:
                ancestor.rmdir()
        raise


def writable_folder(path: str | os.PathLike, name: str) -> Path:
    """Return the folder at `path`, made with its parents where there is none, once a file could be made in it.

    Raises:
        ValueError: names the argument, where that fails, and the reason.
    """
    with _named_in_errors(name, path):
        folder = Path(path).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


def check_writable(path: Path, name: str) -> None:
    """Raise ValueError, naming the argument, unless `path` can become a file in a folder that exists."""
    with _named_in_errors(name, path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is a device or a pipe, and a file would take its place")
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def timestamped(command: str) -> Path:
    """Return the default run folder of a command, 'runs/COMMAND-DATE-TIME-PROCESS', in UTC."""
    return Path("runs") / f"{command}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{os.getpid()}"


def provenance(*, arguments: dict[str, Any], seed: int, wall_seconds: float) -> dict[str, Any]:
    """Return what is needed to repeat a result: versions, device, seed, commits, arguments, time (seconds)."""
    device = jax.devices()[0]
    return {
        "versions": {
            "gdjax": gdjax.__version__,
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "optax": optax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "cpu_count": os.cpu_count(),
            "machine": platform.machine(),
        },
        "x64": bool(jax.config.read("jax_enable_x64")),
        "seed": seed,
        "commit": _commit(Path.cwd()),
        "gdjax_commit": _commit(Path(__file__).parent, tracks=Path(__file__).name),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "arguments": arguments,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "wall_seconds": wall_seconds,
    }


def to_json(value: Any) -> str:
    """Return strict JSON: NaN and infinity, which it cannot hold, become null; arrays become lists, one to a line."""
    text = json.dumps(_plain(value), indent=2, allow_nan=False)
    return re.sub(r"\[\n[^][{}\"]*\]", lambda numbers: "[" + " ".join(numbers[0][1:-1].split()) + "]", text) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `to_json(value)` to `path`, whole or not at all."""
    with atomic(path) as file:
        file.write(to_json(value).encode())


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that takes its place when the block ends, and is removed when it fails."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@contextlib.contextmanager
def _named_in_errors(name: str, path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter for a home folder of nobody's
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name}={str(path)!r} cannot be written: {reason}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def _commit(folder: Path, tracks: str = "") -> str | None:
    """Return the commit that `folder` is at, with '-dirty' where files differ from it.

    None outside a repository, and where the repository does not track the file named: an installed package may lie in
    somebody's checkout without being part of it.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if tracks:
            git("ls-files", "--error-unmatch", tracks)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--match=")
    except (OSError, subprocess.SubprocessError):
        return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
