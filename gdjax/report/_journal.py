"""Rows of a result, kept as they are finished: a line of JSON each, so that an interruption costs at most one.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp(), "rows.jsonl")
>>> journal(path, {"seed": 0}).keep({"batch_size": 32, "loss": 0.5})
>>> journal(path, {"seed": 0}).rows
[{'batch_size': 32, 'loss': 0.5}]
>>> journal(path, {"seed": 1})  # doctest: +ELLIPSIS
Traceback (most recent call last):
ValueError: '.../rows.jsonl' holds rows of another run: seed was 0 and is 1. Use a folder of its own for each run
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gdjax import _files


class Journal(NamedTuple):
    """Rows that an earlier run finished, and the file that further ones are added to.

    Attributes:
        path: the file.
        rows: of the earlier run, in the order in which they were kept; arrays came back as lists.
        identity: what must be equal for rows to be those of one run; the first line.
    """

    path: Path
    rows: list[dict[str, Any]]
    identity: dict[str, Any]

    def keep(self, row: Mapping[str, Any]) -> None:
        """Add a row, on the disk when this returns. Arrays become lists; NaN and infinity stay what they are."""
        if not self.path.exists():
            _add(self.path, {"identity": self.identity})
        _add(self.path, row)


def journal(path: Path, identity: Mapping[str, str | int | float | bool | None]) -> Journal:
    """Open the journal of a run; where there is none, the file is made with the first row.

    A last line that was cut short is removed. One process at a time may have it open: see `run_folder`.

    Args:
        path: the file, in a folder that is there.
        identity: what must be equal for rows to be those of this run.

    Raises:
        ValueError: where the file holds rows of another run, or something else.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # what follows the last newline was cut short
    try:
        before, *rows = [json.loads(line) for line in lines] or [{"identity": dict(identity)}]
        changes = _files.differences(before["identity"], dict.fromkeys(before["identity"]) | dict(identity))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no journal of gdjax ({error}): remove it, or use another folder") from error
    if changes:
        raise ValueError(f"{str(path)!r} holds rows of another run: {changes}. Use a folder of its own for each run")
    if lines:
        os.truncate(path, sum(len(line) + 1 for line in lines))
    else:
        path.unlink(missing_ok=True)
    return Journal(path, rows, dict(identity))


def _add(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(_files.plain(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())
