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
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from gdjax._trees import is_key


def writable_folder(path: str | os.PathLike, name: str) -> Path:
    """Return the folder at `path`, made with its parents where there is none, once a file could be made in it.

    Raises:
        ValueError: names the argument, where that fails, and the reason; and for '', which Python takes for '.'.
    """
    if path == "":
        raise ValueError(f"{name}='' names no folder: leave it out, or name one; '.' is the current folder")
    with named_in_errors(name, path):
        folder = Path(path).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


def check_replaceable(path: Path, name: str) -> None:
    """Raise ValueError, naming the argument, unless a result can be written to `path`, over an earlier result at most.

    The folder must be there. An earlier result is a JSON object with a "provenance".
    """
    with named_in_errors(name, path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is a device or a pipe, and a file would take its place")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists() and path.stat().st_size and not _is_result(path):
            raise FileExistsError(errno.EEXIST, "the file there is no result of gdjax; name another, or remove it")


@contextlib.contextmanager
def alone(folder: Path, argument: str, *, wait: float = 0.0) -> Iterator[None]:
    """Keep other processes out of a folder by `filelock`, which the system releases when the process ends, however.

    Beside the file `lock` lies `lock.holder`, the name of the process, while it works there. Found by the next one, it
    says that its owner ended without finishing: the folder is taken over with a warning.

    Args:
        folder: it must be there.
        argument: what the caller's argument for the folder is called, for errors.
        wait: seconds, for another process to leave it.

    Raises:
        ValueError: where another process, or another part of this one, is in it, and where it cannot be locked.
        ModuleNotFoundError: without filelock.
    """
    try:
        import filelock
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("folders are locked by filelock: pip install 'gdjax[experiments]'") from error
    named = f"{argument}={str(folder)!r}"
    lock, holder = filelock.FileLock(folder / "lock", timeout=wait), folder / "lock.holder"
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock)
        except filelock.Timeout:
            raise ValueError(f"{named} is in use by {_read(holder) or 'a process'}: wait for it, or end it") from None
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{named} cannot be locked by its file 'lock' ({reason}): use another folder") from error
        held.callback(_removed, folder / "lock")  # while the lock is held: whoever opened it before opens a new one
        if left := _read(holder):
            warnings.warn(f"{named}: taken over from {left}, which ended without finishing", stacklevel=5)
        now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
        with atomic(holder) as file:  # which replaces a symbolic link, and writes through none
            file.write(f"process {os.getpid()} on {socket.gethostname()}, begun {now}".encode())
        held.callback(_removed, holder)
        yield


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words how the entries of one identity differ from those of an earlier one, '' where none does.

    >>> differences({"seed": 0, "jax": "0.10.2"}, {"seed": 1, "jax": "0.10.2", "x64": True})
    'seed was 0 and is 1, x64 was None and is True'
    """
    changed = [name for name, value in now.items() if before.get(name) != value]
    return ", ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in changed)


def fingerprint(function: Callable[..., Any], constants: Sequence[Any], *shapes: Any) -> tuple[str, str]:
    """Return two short digests that tell a computation from others in any process: of its program, and of its arrays.

    Args:
        function: (constants, *arguments) -> results. It is lowered, not compiled.
        constants: the arrays that the program closes over.
        shapes: of the other arguments, pytrees of `jax.ShapeDtypeStruct`.
    """
    arrays = [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in constants]
    program = jax.jit(function).lower([jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) for x in constants], *shapes)
    return digest(program.as_text().encode())[:16], digest(*arrays)[:16]


def write_json(path: Path, value: Any) -> None:
    """Write `to_json(value)` to `path`, whole or not at all."""
    with atomic(path) as file:
        file.write(to_json(value).encode())


def to_json(value: Any) -> str:
    """Return strict JSON: NaN and infinity, which it cannot hold, become null; arrays become lists, one to a line."""
    text = json.dumps(_finite(plain(value)), indent=2, allow_nan=False)
    return re.sub(r"\[\n[^][{}\"]*\]", lambda numbers: "[" + " ".join(numbers[0][1:-1].split()) + "]", text) + "\n"


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that takes its place when the block ends, and is removed when it fails.

    A file that it replaces hands on its permissions.

    Raises:
        OSError: naming `path`, where it cannot be written, as on a full disk.
    """
    path = Path(path)
    file = None
    try:
        file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)  # noqa: SIM115
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, _mode(path))
        os.replace(file.name, path)
    except BaseException as error:
        if file is not None:
            os.unlink(file.name)
        if isinstance(error, OSError) and error.filename in (None, file and file.name):
            error.filename = str(path)
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


def _is_result(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "provenance" in content


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _removed(path: Path) -> None:
    with contextlib.suppress(OSError):  # Windows removes no file that is open
        path.unlink()


def plain(value: Any) -> Any:
    """Return what JSON can hold: arrays as lists, numbers of NumPy as Python's, all else as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mode(path: Path) -> int:
    """Return the permissions of a file, or those that a new one gets."""
    if path.is_file():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
