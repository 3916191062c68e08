"""A folder of finished chunks that survives a crash: who made it, what is in it, and one writer at a time.

    store.json                     the identity of the work, what must be equal for results to be mixed; its checksum
    chunk-00003-5f0c83b2....npz    the arrays of one chunk; the name carries their checksum
    lock, lock.holder              while somebody writes, and who

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

One process at a time works on a store. Its lock ends with the process, however that ends. Over NFS Linux keeps it on
the server, so that it holds between machines; on file systems that do not share locks between machines (some Lustre
mounts, FUSE, object stores) it holds only within each of them.
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
Identity = Mapping[str, str | int | bool]
"""What must be equal for results to be mixed, each entry under the name that an error calls it."""


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[Path]:
    """Create the folder if there is none, keep all others out of it, and yield it.

    The lock of a process that died is taken over with a warning, and what that process was writing is removed.

    Raises:
        ValueError: where the folder cannot be written, is no store and not empty, or is in use.
    """
    folder = _files.writable_folder(path, "store").absolute()
    others = sorted(file.name for file in folder.iterdir() if file.name not in LOCK and not _is_temporary(file))
    if others and "store.json" not in others:
        raise ValueError(f"store={str(path)!r} is no store, but a folder with other files ({others[0]}): use another")
    with _files.alone(folder, "store"):
        for file in filter(_is_temporary, folder.iterdir()):
            file.unlink()
        yield folder


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


def listed(folder: Path) -> dict[int, list[Path]]:
    """Return the files of every chunk by its number: looked up once, for a folder can hold very many."""
    files: dict[int, list[Path]] = {}
    for path in folder.glob("chunk-*-*.npz"):
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
        path.unlink()
    return None


def _key(identity: dict[str, Any]) -> str:
    return _files.digest(json.dumps(identity, sort_keys=True).encode())


def _name(key: str, index: int, content: bytes) -> str:
    return f"chunk-{index:05d}-{_files.digest(key.encode(), str(index).encode(), content)}.npz"


@contextlib.contextmanager
def _explained(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{what} could not be written into store={str(folder)!r} ({error.strerror}): make room and run again"
        raise OSError(error.errno, f"{message}. The chunks there are intact") from error


def _is_temporary(file: Path) -> bool:
    return file.name.startswith((".chunk-", ".store.json.", ".lock.holder."))
