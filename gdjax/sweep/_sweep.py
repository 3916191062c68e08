"""Many runs in one program: the points of a grid, chunks, devices, and a store that survives a crash.

`map` computes a function of one point at all of them: `jax.vmap` within a chunk, one chunk after the other through one
compiled program, the points of a chunk spread over the devices.

>>> from gdjax.sweep import grid
>>> def descend(point):  # three updates on x^2 / 2
...     return {"end": point["start"] * (1 - point["rate"]) ** 3}
>>> rates_and_starts = grid(rate=[0.1, 0.5], start=[1.0, 2.0, 3.0])
>>> map(descend, rates_and_starts, chunk_size=4)["end"].round(3)
array([[0.729, 1.458, 2.187],
       [0.125, 0.25 , 0.375]], dtype=float32)

With `store`, a folder, every finished chunk is kept there. The same call again computes what is missing, and the end
is bit for bit that of a sweep that was never interrupted. Processes that make the same call at the same time, the
hosts of a `jax.distributed` group, the tasks of a cluster's array, or two terminals, share the chunks: each computes
those that no other has or is at, and returns all results. They talk by the folder alone. Whoever is slow or dies delays
only what it was at, for others take over what it leaves.

What could change a bit is recorded and compared: points, program, the arrays it closes over, chunk size, number and
kind of devices, versions, x64. A sweep is resumed by any number of processes, each on as many devices as it began on,
since the compiler may sum in another order for another number of points on each (seen on a CPU: 256 points like 32, but
1024 unlike them). Not recorded, for it cannot be seen: what functions called back on the host do, XLA's flags, and the
model of a CPU.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gdjax import _files, report
from gdjax.sweep import _programs as programs
from gdjax.sweep import _store as stores
from gdjax.sweep._grid import Grid, named, num_points_of

SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds between two looks for chunks that other processes are at

Points = Any
"""A pytree of arrays and typed PRNG keys with a leading axis P on every leaf, one entry a point."""


def map(  # noqa: A001
    fn: Callable[[Any], Any],
    grid: Grid | Points,
    *,
    store: str | os.PathLike | None = None,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Return what `fn` returns at every point of a grid, as NumPy arrays, computed in chunks by one compiled program.

    As by `jax.jit`, `fn` is traced once for points of the same shapes and types, and what it closes over is read then;
    its programs are kept as long as the function lives. Arrays that it closes over become arguments of the program, one
    copy on each device. A point whose run diverges leaves the others as they are. On a terminal, points done, their
    rate and the time left are shown (with tqdm installed). Ctrl-C is heard when the chunk under way is done, and leaves
    those before it in the store.

    All results are held in the host's memory: for more than fits there, let `fn` return a summary, or call `map` for
    parts of the grid. Several hosts share a `store` in a folder that all of them see; without one, each computes
    everything. Keys of the implementations 'rbg' and 'unsafe_rbg' draw otherwise under `vmap` than alone (so does jax),
    hence in other chunks.

    Args:
        fn: one point -> pytree of arrays. A point of a grid is a dict with an entry for every axis.
        grid: from `grid`; or, for points that are no product, any pytree of arrays and typed keys [P, ...].
        store: folder of finished chunks, made where there is none, and shared by all processes that make this call.
            Where it holds all chunks nothing is compiled, and where `fn` was mapped before in this process, nothing is
            traced. A new function is: the program of what is stored is compared with its own.
        chunk_size: points computed together, a multiple of the number of devices. By default that of the store, else
            chosen by the compiler's own count of the program's memory. The last chunk is filled up by repeating its
            last point.
        mesh: devices of this process, by default all. What its axes are called and how they are typed does not matter.

    Returns:
        The results, every leaf [A1, A2, ..., ...] for a grid and [P, ...] for other points; typed keys as key data.

    Raises:
        ValueError: before anything is compiled, for no points, leaves that disagree about P, a chunk size that is not a
            multiple of the devices, and a store that cannot be written, or was made by another sweep.
        OSError: where a chunk cannot be written, for instance on a full disk.
        ModuleNotFoundError: for a store, without filelock.
    """
    points = grid.points if isinstance(grid, Grid) else grid
    num_points = num_points_of(points, "points")
    data = jax.tree_util.tree_map_with_path(lambda path, x: programs.numbers(x, f"points{named(path)}"), points)
    leaves = jax.tree.leaves(data)
    mesh = _checked_mesh(mesh)
    chunk_size = _checked_size(chunk_size, num_points, mesh.size)
    if store is None:
        function = programs.traced(fn, points)
        program = programs.compiled(fn, function, leaves, chunk_size, num_points, mesh)
        results = _all_chunks(lambda: program, program.size, function.results, leaves)
    else:
        results = _stored(fn, points, data, chunk_size, mesh, store)
    if not isinstance(grid, Grid):
        return results
    return jax.tree.map(lambda x: x.reshape(*grid.shape, *x.shape[1:]), results)


def _stored(fn, points: Points, data: Points, chunk_size: int | None, mesh: Mesh, store: str | os.PathLike) -> Any:
    """Return the results of all points with the chunks of a store, which others may work on at the same time."""
    leaves = jax.tree.leaves(data)
    made = report.provenance(arguments={}, seed=0, wall_seconds=0)
    known = _identity(data, points, mesh, made) | ({"chunk_size": chunk_size} if chunk_size else {})
    with stores.locked(store) as folder:
        stores.check(folder, known)
    function = programs.traced(fn, points)
    known |= _identity_of(fn, function, leaves)
    stores.check(folder, known)
    compiled = partial(programs.compiled, fn, function, leaves, num_points=len(leaves[0]), mesh=mesh)
    asked = stores.recorded(folder).get("chunk_size", chunk_size)
    size = asked or compiled(asked).size
    notes = {name: made[name] for name in ("versions", "device", "commit", "gdjax_commit", "command")}
    with stores.locked(store):
        recorded = stores.recorded(folder).get("chunk_size", size)  # another may have been faster
        key = stores.claim(folder, known | {"chunk_size": recorded}, made_by=notes)
    make = partial(compiled, asked if recorded == size else recorded)
    return _all_chunks(make, recorded, function.results, leaves, (folder, key))


def _all_chunks(
    compiled: Callable[[], programs.Program],
    size: int,
    shapes: Any,
    data: list[np.ndarray],
    store: tuple[Path, str] | None = None,
) -> Any:
    """Return the results of all points, reading the chunks that the store has and writing those that it lacks."""
    num_points = len(data[0])
    leaves, tree = jax.tree.flatten(shapes)
    results = [np.empty((num_points, *leaf.shape), leaf.dtype) for leaf in leaves]
    programs_made: list[programs.Program] = []

    def computed(index: int) -> list[np.ndarray]:
        if not programs_made:
            programs_made.append(compiled())
        rows = np.minimum(np.arange(index * size, (index + 1) * size), num_points - 1)
        count = min(size, num_points - index * size)
        return [_fetched(x)[:count] for x in programs_made[0]([leaf[rows] for leaf in data])]

    num_chunks = math.ceil(num_points / size)
    with report.progress_bar(total=num_points, unit=" points") as bar:
        for index, chunk, was_there in _shared(num_chunks, computed, *store) if store else _alone(num_chunks, computed):
            rows = slice(index * size, min((index + 1) * size, num_points))
            if was_there and not bar.disable:
                bar.initial += rows.stop - rows.start  # what was read does not count for the rate
            for result, part in zip(results, chunk, strict=True):
                result[rows] = part.view(result.dtype)  # NumPy's files do not know bfloat16 and its like
            bar.update(rows.stop - rows.start)
    return tree.unflatten(results)


Chunks = Iterator[tuple[int, list[np.ndarray], bool]]
"""(number, arrays, whether it was read from a store) of every chunk once, in any order."""


def _alone(num_chunks: int, computed: Callable[[int], list[np.ndarray]]) -> Chunks:
    for index in range(num_chunks):
        yield index, computed(index), False


def _shared(num_chunks: int, computed: Callable[[int], list[np.ndarray]], folder: Path, key: str) -> Chunks:
    """Read the chunks that are there, compute those that nobody is at, and wait for the others.

    The processes of a `jax.distributed` group begin at different chunks, and so do not ask for the same ones.
    """
    first = jax.process_index() * num_chunks // jax.process_count()
    missing, pause = [*range(first, num_chunks), *range(first)], SHORTEST_PAUSE
    while missing:
        files, left = stores.listed(folder), []
        for index in missing:
            chunk, was_there = stores.read(key, index, files), True
            if chunk is None:
                with stores.claimed(folder, index) as mine:
                    if mine and (chunk := stores.read(key, index, stores.listed(folder, index))) is None:
                        chunk, was_there = computed(index), False
                        stores.write(folder, key, index, chunk)
            if chunk is None:
                left.append(index)
            else:
                yield index, chunk, was_there
        pause = SHORTEST_PAUSE if len(left) < len(missing) else min(2 * pause, LONGEST_PAUSE)
        if missing := left:
            time.sleep(pause)
    stores.tidied(folder)


def _fetched(x: jax.Array) -> np.ndarray:
    # jax 0.10 cannot fetch an array without entries that is spread over devices.
    return np.asarray(x) if x.size else np.empty(x.shape, x.dtype)


def _identity(data: Points, points: Points, mesh: Mesh, made: dict[str, Any]) -> dict[str, str | int | bool]:
    """Return what identifies a sweep before anything is traced."""
    device = mesh.devices.flat[0]
    values = {f"points{named(path)}": x for path, x in jax.tree_util.tree_leaves_with_path(data)}
    return {
        **{name: made["versions"][name] for name in ("gdjax", "jax", "jaxlib")},
        "device": f"{device.platform} {device.device_kind}",
        "num_devices": mesh.size,
        "x64": made["x64"],
        "names of points": ", ".join(values),
        **{
            name: f"{_shown(leaf)} {_files.digest(x)[:16]}"
            for (name, x), leaf in zip(values.items(), jax.tree.leaves(points), strict=True)
        },
    }


def _identity_of(fn, function: programs.Function, leaves: list[np.ndarray]) -> dict[str, str]:
    """Return what identifies the function: its program, the arrays that it closes over, and its results."""
    results = [f"{named(path)} {_shown(x)}" for path, x in jax.tree_util.tree_leaves_with_path(function.results)]
    program, arrays = programs.fingerprint(fn, function, leaves)
    return {"results of fn": ", ".join(results), "program of fn": program, "arrays in fn": arrays}


def _checked_size(chunk_size: int | None, num_points: int, num_devices: int) -> int | None:
    """Return the chunk size, no larger than is needed to hold all points on these devices."""
    if chunk_size is None:
        return None
    if chunk_size < 1 or chunk_size % num_devices:
        sizes = [n * num_devices for n in (chunk_size // num_devices, chunk_size // num_devices + 1) if n > 0]
        advice = " or ".join(f"{size}" for size in sizes or [num_devices])
        raise ValueError(f"chunk_size={chunk_size} must be a multiple of the {num_devices} devices: use {advice}")
    return min(chunk_size, math.ceil(num_points / num_devices) * num_devices)


def _checked_mesh(mesh: Mesh | None) -> Mesh:
    """Return a mesh of one axis, 'points', over devices of this process."""
    devices = jax.local_devices() if mesh is None else list(mesh.devices.flat)
    if elsewhere := [device for device in devices if device.process_index != jax.process_index()]:
        raise ValueError(
            f"mesh has {len(elsewhere)} devices of other processes: give each process its own jax.local_devices(), and "
            "all of them one store, by which they share the points"
        )
    return Mesh(np.asarray(devices), ("points",))


def _shown(array: Any) -> str:
    array = array if hasattr(array, "dtype") else np.asarray(array)
    return f"{array.dtype}[{','.join(f'{n}' for n in array.shape)}]"
