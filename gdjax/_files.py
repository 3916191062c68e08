"""Files that appear whole or not at all, folders with one writer at a time, and digests of what is in them.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     write_json(Path(folder, "result.json"), {"loss": float("nan"), "learning_rates": np.asarray([0.5, 1.0])})
...     print(Path(folder, "result.json").read_text(), end="")
{
  "loss": null,
  "learning_rates": [0.5, 1.0]
}
"""

import contextlib
import datetime
import errno
import hashlib
import json
import math
import os
import re
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np


def writable_folder(path: str | os.PathLike, name: str) -> Path:
    """Return the folder at `path`, made with its parents where there is none, once a file could be made in it.

    Raises:
        ValueError: names the argument, where that fails, and the reason.
    """
    with named_in_errors(name, path):
        folder = Path(path).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


def check_writable(path: Path, name: str) -> None:
    """Raise ValueError, naming the argument, unless `path` can become a file in a folder that exists."""
    with named_in_errors(name, path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is a device or a pipe, and a file would take its place")
        with tempfile.TemporaryFile(dir=path.parent):
            pass


@contextlib.contextmanager
def alone(folder: Path, argument: str) -> Iterator[None]:
    """Keep other processes out of a folder by a locked file in it, which holds the name of this process.

    An empty file means that the last one ended well; after one that did not, the lock is taken over with a warning.

    Args:
        folder: it must be there.
        argument: what the caller's argument for the folder is called, for errors.

    Raises:
        ValueError: where another process, or another part of this one, is in it, and for a file system without locks.
    """
    import fcntl  # not on Windows

    named = f"{argument}={str(folder)!r}"
    with (folder / "lock").open("a+", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{named} is in use by {_holder(file)}: wait for it, or end it") from None
        except OSError as error:
            raise ValueError(f"{named} is on a file system without locks ({error.strerror})") from error
        if left := _holder(file):
            warnings.warn(f"{named}: taken over from {left}, which ended without finishing", stacklevel=5)
        file.truncate(0)
        now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
        file.write(f"process {os.getpid()} on {socket.gethostname()}, begun {now}")
        file.flush()
        try:
            yield
        finally:  # while the lock is held: it ends when the file is closed
            file.truncate(0)


def write_json(path: Path, value: Any) -> None:
    """Write `to_json(value)` to `path`, whole or not at all."""
    with atomic(path) as file:
        file.write(to_json(value).encode())


def to_json(value: Any) -> str:
    """Return strict JSON: NaN and infinity, which it cannot hold, become null; arrays become lists, one to a line."""
    text = json.dumps(_plain(value), indent=2, allow_nan=False)
    return re.sub(r"\[\n[^][{}\"]*\]", lambda numbers: "[" + " ".join(numbers[0][1:-1].split()) + "]", text) + "\n"


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


def digest(*parts: bytes | np.ndarray) -> str:
    """Return the SHA-256, in hexadecimal, of byte strings and arrays (their types, shapes and values)."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha.update(f"{part.dtype}{part.shape}".encode())
            part = part.tobytes()
        sha.update(f"{len(part)};".encode())
        sha.update(part)
    return sha.hexdigest()


@contextlib.contextmanager
def named_in_errors(name: str, path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter for a home folder of nobody's
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name}={str(path)!r} cannot be written: {reason}") from error


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
