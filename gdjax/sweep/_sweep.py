"""Many runs in one program: the points of a grid, chunks, devices, and a store that survives a crash.

`map` computes a function of one point at all of them: chunks, one after the other through one compiled program, whose
points are spread over the devices and run side by side there, on a CPU in groups as by `vmap`.

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
from gdjax.sweep._chunks import Chunk, Store, Work, alone, shared
from gdjax.sweep._grid import Grid, functions, named, num_points_of

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
        fn: one point -> pytree of arrays. A point of a grid is a dict with an entry for each axis. For axes of programs
            it is traced and compiled for each of their combinations, and must return the same shapes.
        grid: from `grid`; or, for points that are no product, any pytree of arrays and typed keys [P, ...].
        store: folder of finished chunks, made where there is none, and shared by all processes that make this call.
            Where it holds all chunks nothing is compiled, and where `fn` was mapped before in this process, nothing is
            traced. A new function is: the program of what is stored is compared with its own. Each of several programs
            has a folder in it: a longer axis of them computes what is new.
        chunk_size: points computed together, a multiple of the number of devices. By default that of the store, else
            chosen by the compiler's own count of the program's memory. The last chunk is filled up by repeating its
            last point.
        mesh: devices of this process, by default all. What its axes are called and how they are typed does not matter.

    Returns:
        The results, every leaf [A1, A2, ..., ...] for a grid and [P, ...] for other points; typed keys as key data.

    Raises:
        ValueError: before anything is compiled, for no points, leaves that disagree about P, a chunk size that is not a
            multiple of the devices, programs that disagree about what they return, and a store that cannot be written,
            or was made by another sweep.
        OSError: where a chunk cannot be written, for instance on a full disk.
        ModuleNotFoundError: for a store, without filelock.
    """
    points = grid.points if isinstance(grid, Grid) else grid
    num_points = num_points_of(points, "points")
    data = jax.tree_util.tree_map_with_path(lambda path, x: programs.numbers(x, f"points{named(path)}"), points)
    mesh = _checked_mesh(mesh)
    chunk_size = _checked_size(chunk_size, num_points, mesh.size)
    parts = functions(grid, fn) if isinstance(grid, Grid) else {"": fn}
    begun = {} if store is None else _begun(store, parts, data, points, mesh, chunk_size)
    works, shapes = [], {}
    for name, part in parts.items():
        function = programs.traced(part, points)
        shapes[name] = function.results
        place = begun.get(name)
        if place:
            place = place._replace(identity=place.identity | _identity_of(part, function, jax.tree.leaves(data)))
            stores.check(place.folder, place.identity)
        compiled = partial(programs.compiled, part, function, jax.tree.leaves(data), mesh)
        works.append(Work(compiled, jax.tree.leaves(data), chunk_size, place))
    results = _gathered(shared(works) if begun else alone(works), _same(shapes), len(works), num_points)
    shape = grid.shape if isinstance(grid, Grid) else (num_points,)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), results)


def _gathered(chunks: Iterator[Chunk], shapes: Any, num_programs: int, num_points: int) -> Any:
    """Return the results of all points of all programs, one program after the other."""
    leaves, tree = jax.tree.flatten(shapes)
    results = [np.empty((num_programs * num_points, *leaf.shape), leaf.dtype) for leaf in leaves]
    with report.progress_bar(total=num_programs * num_points, unit=" points") as bar:
        for number, rows, arrays, was_there in chunks:
            first, count = number * num_points + rows.start, rows.stop - rows.start
            if was_there and not bar.disable:
                bar.initial += count  # what was read does not count for the rate
            for result, part in zip(results, arrays, strict=True):
                result[first : first + count] = part.view(result.dtype)  # NumPy's files do not know bfloat16
            bar.update(count)
    return tree.unflatten(results)


def _begun(store, parts, data: Points, points: Points, mesh: Mesh, chunk_size: int | None) -> dict[str, Store]:
    """Return the store of every program, once what is known before anything is traced was found to agree with it."""
    made = report.provenance(arguments={}, seed=0, wall_seconds=0)
    notes = {name: made[name] for name in ("versions", "device", "commit", "gdjax_commit", "command")}
    identity = _identity(data, points, mesh, made) | ({"chunk_size": chunk_size} if chunk_size else {})
    root = _files.writable_folder(store, "store") if store == "" or parts.keys() != {""} else Path(store)
    if parts.keys() != {""} and (root / "store.json").exists():
        raise ValueError(f"store={str(store)!r} holds a sweep without axes of programs: use another folder")
    found = {}
    for name in parts:
        of_program = {"programs": name} if name else {}
        with stores.locked(root / name) as folder:
            stores.check(folder, identity | of_program)
        found[name] = Store(folder, identity | of_program, {"made_by": notes})
    return found


def _same(shapes: dict[str, Any]) -> Any:
    """Return what all programs return."""
    (first, expected), *others = shapes.items()
    for name, found in others:
        if found != expected:
            raise ValueError(
                f"fn must return the same shapes for all programs of a grid, but returns {_all_shown(expected)} for "
                f"{first} and {_all_shown(found)} for {name}"
            )
    return expected


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
    program, arrays = programs.fingerprint(fn, function, leaves)
    return {"results of fn": _all_shown(function.results), "program of fn": program, "arrays in fn": arrays}


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


def _all_shown(shapes: Any) -> str:
    return ", ".join(f"{named(path)} {_shown(x)}" for path, x in jax.tree_util.tree_leaves_with_path(shapes))
