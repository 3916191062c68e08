"""How far a run is, in a file beside its checkpoints that any process can read at any time.

>>> import tempfile
>>> folder = tempfile.mkdtemp()
>>> write(folder, num_updates=200, total=500, seconds=1.5, record={"loss": np.float32(0.25)}, ended=None)
>>> found = progress(folder)
>>> found.num_updates, found.num_saved, found.record, found.ended
(200, 0, {'loss': 0.25}, None)
"""

import contextlib
import datetime
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gdjax import _files

FILE = "progress.json"


class Progress(NamedTuple):
    """What a folder of `training.run` holds.

    Attributes:
        num_updates: updates made when this was written.
        num_saved: updates in the newest checkpoint, from where the run goes on when its process is killed; 0 for none.
        total: the num_updates that the run was last asked for.
        seconds: that all its calls have taken together.
        record: the last, arrays as lists and NaN and infinity as None; None before the first.
        ended: 'budget', the name of the rule that held, or the name of the signal that interrupted it; None while it
            runs, and after its process was killed or failed.
        written: when, in UTC as '2026-11-26T14:00:00+00:00'. A run that is alive writes every few seconds, or whenever
            a program ends, where those take longer.
    """

    num_updates: int
    num_saved: int
    total: int
    seconds: float
    record: Any
    ended: str | None
    written: str


def progress(folder: str | os.PathLike) -> Progress:
    """Return how far the run in `folder` is. Nothing is locked and no device used, and the run may be under way.

    Raises:
        ValueError: where the folder holds no run, or the file cannot be read.
    """
    path = Path(folder).expanduser() / FILE
    named = f"folder={str(folder)!r}"
    try:
        found = json.loads(path.read_bytes())
        fields = {name: found[name] for name in Progress._fields if name != "num_saved"}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{named} holds no run: {FILE} is not there") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{named}: {FILE} cannot be read ({error}); the run writes it anew when it goes on") from error
    steps = [int(entry.name) for entry in path.parent.iterdir() if entry.name.isdecimal()]
    return Progress(num_saved=max(steps, default=0), **fields)


def seconds(folder: str | os.PathLike) -> float:
    """Return the seconds of the calls before, 0 where nothing is known of any."""
    try:
        return progress(folder).seconds
    except ValueError:
        return 0.0


def write(folder: str | os.PathLike, *, num_updates, total, seconds, record, ended) -> None:
    """Write the file, whole or not at all. Where the disk is full, the next checkpoint says so."""
    record = jax.tree.map(np.asarray, record, is_leaf=lambda x: hasattr(x, "__array__"))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    fields = {"num_updates": num_updates, "total": total, "seconds": seconds, "record": record, "ended": ended}
    with contextlib.suppress(OSError):
        _files.write_json(Path(folder) / FILE, fields | {"written": now})
