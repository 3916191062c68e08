"""Checkpoints of a run: whole or not there, checked when they are read, the newest few kept. Stored by orbax.

>>> import tempfile
>>> folder = tempfile.mkdtemp()
>>> with opened(folder, {"batch_size": 8}) as checkpoints:
...     checkpoints.save(1000, {"weights": np.asarray([1.0, 2.0])})
>>> with opened(folder, {"batch_size": 8}) as checkpoints:
...     checkpoints.newest()
(1000, {'weights': array([1., 2.])})
>>> with opened(folder, {"batch_size": 4}) as checkpoints:
...     checkpoints.newest()  # doctest: +ELLIPSIS
Traceback (most recent call last):
ValueError: folder='...' holds another run: batch_size was 8 and is 4. Give this run a folder of its own

Orbax writes beside and renames, so a checkpoint that is there was finished. It does not notice when the disk changes
one later: each therefore carries a checksum of its arrays and identity, and one that does not match is passed over.
"""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from gdjax import _files

KEPT = 2  # the newest, and the one to go back to where the newest is damaged

Arrays = dict[str, np.ndarray]
Identity = Mapping[str, int | str]
"""What makes a run this run and no other: {name: value}, compared when it is resumed."""


class Checkpoints(NamedTuple):
    """The checkpoints in a folder.

    Attributes:
        manager: orbax's `CheckpointManager`.
        folder: where they are.
        identity: of the run that reads and writes them.
        like: arrays on devices that are written shard by shard, and read to where these lie.
    """

    manager: Any
    folder: Path
    identity: Identity
    like: Mapping[str, jax.Array] = MappingProxyType({})

    def save(self, num_updates: int, arrays: Arrays) -> None:
        """Begin to write `arrays` as the checkpoint of this update; they must not change until it is written.

        Raises:
            OSError: where this one cannot be written, or the one before could not.
        """
        import orbax.checkpoint as ocp

        # Orbax refuses arrays without entries; nothing is lost with them.
        arrays = {name: array for name, array in arrays.items() if array.size}
        about = {"checksum": _of_all(arrays, self.identity), "identity": dict(self.identity)}
        with self._named_in_errors():
            self.manager.save(
                num_updates,
                args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)),
            )

    def finish(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            OSError: where it could not be written.
        """
        with self._named_in_errors():
            self.manager.wait_until_finished()

    def newest(self) -> tuple[int, Arrays] | None:
        """Return (updates, arrays) of the newest checkpoint that is whole, or None where there is no checkpoint.

        Newer ones that are damaged are removed, with a warning.

        Raises:
            ValueError: for checkpoints of another run, saying what differs, and where all are damaged.
        """
        damaged = []
        for num_updates in sorted(self.manager.all_steps(), reverse=True):
            try:
                about, arrays = self._read(num_updates)
            except Exception as error:  # orbax and tensorstore raise many kinds, none of them documented
                damaged.append(num_updates)
                reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
                warnings.warn(
                    f"the checkpoint of update {num_updates} in {self.folder} is damaged ({reason}); the one before is "
                    "used",
                    RuntimeWarning,
                    stacklevel=2,
                )
                continue
            self._check_identity(about["identity"])
            for step in damaged:  # their places are wanted for the same updates, made again
                self.manager.delete(step)
            return num_updates, arrays
        if damaged:
            time.sleep(0.5)  # while `_quiet_orbax` listens, the reads that orbax has left behind come to their end
            raise ValueError(
                f"folder={str(self.folder)!r}: all its checkpoints are damaged (updates {damaged}). Remove them to "
                "begin again"
            )
        return None

    def _read(self, num_updates: int) -> tuple[dict[str, Any], Arrays]:
        import orbax.checkpoint as ocp

        template = self._template(num_updates) if self.like else None
        names = ocp.args.Composite(arrays=ocp.args.StandardRestore(template), about=ocp.args.JsonRestore())
        with warnings.catch_warnings():  # about restoring without a template: every leaf is a NumPy array
            warnings.simplefilter("ignore")
            found = self.manager.restore(num_updates, args=names)
        arrays = {name: x if name in self.like else np.asarray(x) for name, x in found.arrays.items()}
        if _of_all(arrays, found.about["identity"]) != found.about["checksum"]:
            raise ValueError("its contents do not match their checksum")
        return found.about, arrays

    def _template(self, num_updates: int) -> dict[str, Any]:
        """Return where each array of a checkpoint is wanted: as in `like`, where that is of its shape, or in NumPy."""

        def place(name: str, x: Any):
            wanted = self.like.get(name)
            if wanted is None or wanted.shape != tuple(x.shape):
                return np.empty(x.shape, x.dtype)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=wanted.sharding)

        return {name: place(name, x) for name, x in self.manager.item_metadata(num_updates).arrays.items()}

    def _check_identity(self, found: Identity) -> None:
        if changes := _files.differences(found, {**dict.fromkeys(found), **self.identity}):
            raise ValueError(
                f"folder={str(self.folder)!r} holds another run: {changes}. Give this run a folder of its own"
            )

    @contextlib.contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise OSError(
                f"a checkpoint could not be written to {self.folder}: {reason}. Those written before are intact"
            ) from error


@contextlib.contextmanager
def opened(
    folder: str | os.PathLike, identity: Identity, like: Mapping[str, jax.Array] = MappingProxyType({})
) -> Iterator[Checkpoints]:
    """Open a folder of checkpoints, made where it is missing; what was saved is on the disk when the block ends.

    One run at a time has it open, see `store`: the lock of a process that was killed is taken over with a warning.

    Raises:
        ValueError: where the folder cannot be written, or a run that is alive has it open.
        ModuleNotFoundError: without orbax-checkpoint.
    """
    check_installed()
    import orbax.checkpoint as ocp

    path = _files.writable_folder(folder, "folder").resolve()
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT,
        cleanup_tmp_directories=True,  # of a process that was killed while it wrote
        # Where that fails, threads that are not daemons wait for it, and the process does not end for minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}),
        create=False,
    )
    with _files.alone(path, "folder"), _quiet_orbax():
        handlers = {"arrays": ocp.StandardCheckpointHandler(), "about": ocp.JsonCheckpointHandler()}
        manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)
        checkpoints = Checkpoints(manager, path, identity, like)
        try:
            yield checkpoints
            checkpoints.finish()
        finally:
            with contextlib.suppress(Exception):  # a failed save is raised by `finish`, or the block has failed already
                checkpoints.manager.close()


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keep orbax from printing, one traceback a thread, what it raises as well.

    Where one of many reads fails, it leaves the others to end after their event loop is closed, and each says so.
    """

    def others(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    def unless_left_alone(dropped: Any) -> None:
        if str(dropped.exc_value) != "Event loop is closed":
            before(dropped)

    logger = logging.getLogger("absl")
    logger.addFilter(others)
    before, sys.unraisablehook = sys.unraisablehook, unless_left_alone
    try:
        yield
    finally:
        logger.removeFilter(others)
        sys.unraisablehook = before


def check_installed() -> None:
    """Raise ModuleNotFoundError with the command that installs it, unless orbax-checkpoint is there."""
    try:
        import orbax.checkpoint  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "checkpoints are written by orbax-checkpoint: pip install 'gdjax[experiments]'"
        ) from error


def _of_all(arrays: Mapping[str, np.ndarray], identity: Identity) -> str:
    return _files.digest(checksum(arrays).encode(), repr(sorted(identity.items())).encode())[:16]


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Return a digest of names, shapes, dtypes and contents, 16 hexadecimal digits."""
    parts = [part for name, array in sorted(arrays.items()) for part in (name.encode(), np.asarray(array))]
    return _files.digest(*parts)[:16]
