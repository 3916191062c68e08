"""A folder of finished chunks that survives a crash: who made it, what is in it, and who computes what is missing.

    store.json                     the identity of the work, what must be equal for results to be mixed; its checksum
    chunk-00003-5f0c83b2....npz    the arrays of one chunk; the name carries their checksum
    chunk-00003.lock               while somebody computes that chunk
    lock, lock.holder              while somebody opens the store, and who

Every file appears whole or not at all. A chunk is read only if its bytes have the checksum of its name, which covers
the identity and the chunk's position too: a file that was cut short, changed, or carried here from another folder is
dropped with a warning, and computed again.

>>> import tempfile, numpy as np
>>> with tempfile.TemporaryDirectory() as place, locked(place + "/store") as folder:
...     key = claim(folder, {"jax": "0.10.2", "chunk_size": 8})
...     write(folder, key, 0, [np.arange(3.0)])
...     print(read(key, 0, listed(folder)), read(key, 1, listed(folder)))
...     claim(folder, {"jax": "0.12.0", "chunk_size": 8})  # doctest: +ELLIPSIS
Traceback (most recent call last):
ValueError: store='...' holds results of another sweep: jax was '0.10.2' and is '0.12.0'. Use a folder of its own for \
each sweep, or repeat what the first was given

Any number of processes work on a store, each on chunks of which it holds the lock. A lock ends with its process,
however that ends. Over NFS Linux keeps it on the server, so that it holds between machines. On file systems that do not
share locks between machines (some Lustre mounts, FUSE, object stores) two may compute the same chunk: that costs time,
and changes nothing, for they write the same bytes under the same name.
"""

import contextlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gdjax import _files

LOCK = ("lock", "lock.holder")
TEMPORARY = (".chunk-", ".store.json.", ".lock.holder.")
Identity = Mapping[str, str | int | bool]
"""What must be equal for results to be mixed, each entry under the name that an error calls it."""


OPENING = 60.0  # seconds that somebody else may take to open the same store


@contextlib.contextmanager
def locked(path: str | os.PathLike, *, wait: float = OPENING) -> Iterator[Path]:
    """Create the folder if there is none, keep all others from opening it, and yield it.

    The lock of a process that died is taken over with a warning, and what that process was writing is removed.

    Raises:
        ValueError: where the folder cannot be written, is no store and not empty, or is in use.
    """
    folder = _files.writable_folder(path, "store").absolute()
    names = [file.name for file in folder.iterdir()]
    others = sorted(name for name in names if name not in LOCK and not name.startswith(TEMPORARY))
    if others and "store.json" not in others:
        raise ValueError(f"store={str(path)!r} is no store, but a folder with other files ({others[0]}): use another")
    with _files.alone(folder, "store", wait=wait):
        for file in [*folder.glob(".store.json.*"), *folder.glob(".lock.holder.*")]:
            file.unlink()
        yield folder


@contextlib.contextmanager
def claimed(folder: Path, index: int) -> Iterator[bool]:
    """Keep all others from chunk `index`, and yield whether that was possible: not while another process computes it.

    What a process that died was writing of it is removed.
    """
    import filelock  # `locked` has said so where it is not installed

    path = folder / f"{_prefix(index)}.lock"
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        yield False
        return
    try:
        for file in folder.glob(f".{_prefix(index)}-*"):
            file.unlink()
        yield True
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever opened it before finds the chunk done, or makes it too
        lock.release()


def tidied(folder: Path) -> None:
    """Remove the locks of processes that died, once no chunk is missing."""
    for file in [*folder.glob("chunk-*.lock"), *folder.glob(".chunk-*")]:
        file.unlink(missing_ok=True)


def recorded(folder: Path) -> dict[str, Any]:
    """Return the identity that the store was made with, empty for a new store."""
    path = folder / "store.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        identity = dict(content["identity"])
        if content["checksum"] != _key(identity):
            raise ValueError("it does not match its checksum")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"store={str(folder)!r}: store.json cannot be read ({error}): use another folder") from error
    return identity


def check(folder: Path, identity: Identity) -> None:
    """Raise ValueError, saying what differs, unless these entries of the identity are those of the store, if any."""
    before = recorded(folder)
    if before and (changes := _files.differences(before, identity)):
        raise ValueError(
            f"store={str(folder)!r} holds results of another sweep: {changes}. Use a folder of its own for each sweep, "
            "or repeat what the first was given"
        )


def claim(folder: Path, identity: Identity, **notes: Any) -> str:
    """Record the identity in a new store, or check it against an old one; return the key of its chunks.

    `notes` are written beside the identity of a new store, and never compared.
    """
    identity = dict(identity)
    check(folder, identity)
    key = _key(identity)
    if not recorded(folder):
        with _explained(folder, "store.json"):
            _files.write_json(folder / "store.json", {"identity": identity, "checksum": key, **notes})
    return key


def write(folder: Path, key: str, index: int, arrays: Sequence[np.ndarray]) -> None:
    """Write the arrays of chunk `index`, whole or not at all.

    Raises:
        OSError: with the chunk's number, for instance where the disk is full. Chunks written before are intact.
    """
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    content = buffer.getvalue()
    path = folder / _name(key, index, content)
    with _explained(folder, f"chunk {index}, {len(content):,} bytes,"), _files.atomic(path) as file:
        file.write(content)


def listed(folder: Path, index: int | None = None) -> dict[int, list[Path]]:
    """Return the files of every chunk, or of one, by its number: looked up once, for a folder can hold very many."""
    files: dict[int, list[Path]] = {}
    for path in folder.glob("chunk-*-*.npz" if index is None else f"{_prefix(index)}-*.npz"):
        number = path.name.split("-")[1]
        if number.isdecimal():
            files.setdefault(int(number), []).append(path)
    return files


def read(key: str, index: int, files: Mapping[int, Sequence[Path]]) -> list[np.ndarray] | None:
    """Return the arrays of chunk `index`, or None where `listed` found none, or none that are intact."""
    for path in files.get(index, []):
        content = path.read_bytes()
        if path.name == _name(key, index, content):
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return [arrays[name] for name in arrays.files]
        warnings.warn(f"{path} is damaged, or of another store: it is removed and computed again", stacklevel=2)
        path.unlink(missing_ok=True)
    return None


def _key(identity: dict[str, Any]) -> str:
    return _files.digest(json.dumps(identity, sort_keys=True).encode())


def _name(key: str, index: int, content: bytes) -> str:
    return f"{_prefix(index)}-{_files.digest(key.encode(), str(index).encode(), content)}.npz"


def _prefix(index: int) -> str:
    return f"chunk-{index:05d}"


@contextlib.contextmanager
def _explained(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{what} could not be written into store={str(folder)!r} ({error.strerror}): make room and run again"
        raise OSError(error.errno, f"{message}. The chunks there are intact") from error
