"""The chunks of a sweep, of one program or of several: computed here alone, or shared with others through a store."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gdjax.sweep import _store as stores
from gdjax.sweep._programs import Program

SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds between two looks for chunks that other processes are at


class Store(NamedTuple):
    """Where the chunks of one program are kept.

    Attributes:
        folder: that was found to be of this sweep, or empty.
        identity: but for the chunk size.
        notes: written beside it.
    """

    folder: Path
    identity: dict[str, Any]
    notes: dict[str, Any]


class Work(NamedTuple):
    """One program, and what it is to be run for.

    Attributes:
        compiled: chunk size, or None for what fits -> the program.
        leaves: of the points, [P, ...].
        chunk_size: that was asked for, or None.
        store: or None.
    """

    compiled: Callable[[int | None], Program]
    leaves: list[np.ndarray]
    chunk_size: int | None
    store: Store | None


class Chunk(NamedTuple):
    """What is found of one program.

    Attributes:
        work: number of the program.
        rows: of the points, first and last but one.
        arrays: of the results at these points.
        was_there: whether it was read from a store.
    """

    work: int
    rows: slice
    arrays: list[np.ndarray]
    was_there: bool


class _Open(NamedTuple):
    size: int
    computed: Callable[[int], list[np.ndarray]]
    folder: Path = Path()
    key: str = ""


def alone(works: Sequence[Work]) -> Iterator[Chunk]:
    """Compute all chunks of all programs, one after the other. The next one is begun before the last is fetched."""
    begun = None
    for number, work in enumerate(works):
        program = work.compiled(work.chunk_size)
        for rows in _rows(work, program.size):
            last, begun = begun, (number, rows, _begun(program, work, rows))
            if last:
                yield Chunk(*last[:2], _fetched(*last[1:]), False)
    if begun:
        yield Chunk(*begun[:2], _fetched(*begun[1:]), False)


def shared(works: Sequence[Work]) -> Iterator[Chunk]:
    """Read the chunks that are there, compute those that nobody is at, and wait for the others.

    The processes of a `jax.distributed` group begin at different programs, and at different chunks of each, so that
    they do not ask for the same ones.
    """
    part = jax.process_index() / jax.process_count()
    missing: dict[int, list[int] | None] = dict.fromkeys(_from(part, len(works)))  # of the programs, None: all
    open_, pause = functools.cache(lambda number: _opened(works[number])), SHORTEST_PAUSE
    while missing:
        found = False
        for number in list(missing):
            size, computed, folder, key = open_(number)
            rows, files, left = _rows(works[number], size), stores.listed(folder), []
            for index in missing[number] or _from(part, len(rows)):
                chunk, was_there = stores.read(key, index, files), True
                if chunk is None:
                    with stores.claimed(folder, index) as mine:
                        if mine and (chunk := stores.read(key, index, stores.listed(folder, index))) is None:
                            chunk, was_there = computed(index), False
                            stores.write(folder, key, index, chunk)
                if chunk is None:
                    left.append(index)
                else:
                    found = True
                    yield Chunk(number, rows[index], chunk, was_there)
            missing[number] = left
            if not left:
                del missing[number]
                stores.tidied(folder)
        pause = SHORTEST_PAUSE if found else min(2 * pause, LONGEST_PAUSE)
        if missing:
            time.sleep(pause)


def _opened(work: Work) -> _Open:
    """Claim the store of a program, which is compiled for that only where no chunk size is known."""
    assert work.store is not None
    folder, identity, notes = work.store
    asked = stores.recorded(folder).get("chunk_size", work.chunk_size)
    size = asked or work.compiled(None).size
    with stores.locked(folder):
        recorded = stores.recorded(folder).get("chunk_size", size)  # another may have been faster
        key = stores.claim(folder, identity | {"chunk_size": recorded}, **notes)
    program = functools.cache(partial(work.compiled, asked if recorded == size else recorded))
    return _Open(recorded, partial(_computed, program, work, recorded), folder, key)


def _computed(program: Callable[[], Program], work: Work, size: int, index: int) -> list[np.ndarray]:
    """Run chunk `index`."""
    rows = _rows(work, size)[index]
    return _fetched(rows, _begun(program(), work, rows))


def _begun(program: Program, work: Work, rows: slice) -> Sequence[jax.Array]:
    """Start the program at some points; the last chunk is filled up by repeating the last point."""
    places = np.minimum(np.arange(rows.start, rows.start + program.size), rows.stop - 1)
    return program([leaf[places] for leaf in work.leaves])


def _fetched(rows: slice, results: Sequence[jax.Array]) -> list[np.ndarray]:
    # jax 0.10 cannot fetch an array without entries that is spread over devices.
    found = (np.asarray(x) if x.size else np.empty(x.shape, x.dtype) for x in results)
    return [x[: rows.stop - rows.start] for x in found]


def _rows(work: Work, size: int) -> list[slice]:
    """Return the points of every chunk."""
    num_points = len(work.leaves[0])
    return [slice(first, min(first + size, num_points)) for first in range(0, num_points, size)]


def _from(part: float, count: int) -> list[int]:
    """Return 0 to count - 1, beginning at this part of them."""
    first = math.floor(part * count)
    return [*range(first, count), *range(first)]
