"""Many runs in one program: lanes, chunks, devices, and a store that survives a crash.

A lane is one run. `run` maps a function of one lane over all of them: `jax.vmap` within a chunk, one chunk after the
other through one compiled program, the lanes of a chunk spread over the devices.

>>> def descend(lane):  # three updates on x^2 / 2
...     return {"end": lane["start"] * (1 - lane["rate"]) ** 3}
>>> lanes = grid(rate=[0.1, 0.5], start=[1.0, 2.0, 3.0])
>>> run(descend, lanes, chunk_size=4)["end"].reshape(2, 3).round(3)
array([[0.729, 1.458, 2.187],
       [0.125, 0.25 , 0.375]], dtype=float32)

With `store`, a folder, every finished chunk is kept there. The same call again computes what is missing, and the end
is bit for bit that of a sweep that was never interrupted. What could change a bit is recorded and compared: lanes,
program, the arrays it closes over, chunk size, number and kind of devices, versions, x64. A sweep is resumed on as many
devices as it began on, since the compiler may sum in another order for another number of lanes on each (seen on a CPU:
256 lanes like 32, but 1024 unlike them). Not recorded, for it cannot be seen: what functions called back on the host
do, XLA's flags, and the model of a CPU.
"""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gdjax import _files, report
from gdjax.sweep import _programs as programs
from gdjax.sweep import _store as stores

Lanes = Any
"""A pytree of arrays and typed PRNG keys with a leading axis L on every leaf, one entry a lane."""


def grid(**axes: Any) -> dict[str, Any]:
    """Return the lanes of a full product, a dict of arrays [L], row-major: the last axis varies fastest.

    Args:
        axes: sequences of numbers, arrays [n] or [n, ...], typed keys [n], or pytrees of arrays that share the axis n.

    Raises:
        ValueError: without an axis, and for an axis that is empty, a scalar or not numbers.
    """
    if not axes:
        raise ValueError("grid needs an axis, for instance grid(learning_rate=[0.1, 0.3])")
    arrays = {
        name: programs.numbers(axis, name) if type(axis) in (list, tuple, range, np.ndarray) else axis
        for name, axis in axes.items()
    }
    rows = np.indices([_num_lanes(array, name) for name, array in arrays.items()]).reshape(len(arrays), -1)
    return {
        name: jax.tree.map(lambda leaf, row=row: jnp.asarray(leaf)[row], array)
        for (name, array), row in zip(arrays.items(), rows, strict=True)
    }


def run(
    fn: Callable[[Any], Any],
    lanes: Lanes,
    *,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    store: str | os.PathLike | None = None,
) -> Any:
    """Return `jax.vmap(fn)(lanes)` as NumPy arrays, computed in chunks by one compiled program.

    Arrays that `fn` closes over become arguments of the program, one copy on each device. A lane that diverges leaves
    the others as they are. On a terminal, lanes done, their rate and the time left are shown (with tqdm installed).
    Ctrl-C is heard when the chunk under way is done, and leaves those before it in the store.

    All results are held in the host's memory: for more than fits there, let `fn` return a summary, or call `run` for
    slices of the lanes. Of several hosts, each runs its own part of the lanes, with a store of its own. Keys of the
    implementations 'rbg' and 'unsafe_rbg' draw otherwise under `vmap` than alone (so does jax), hence in other chunks.

    Args:
        fn: one lane -> pytree of arrays; traced once.
        lanes: pytree of arrays and typed keys [L, ...].
        chunk_size: lanes computed together, a multiple of the number of devices. By default that of the store, else
            chosen by the compiler's own count of the program's memory: see `programs.compiled`. The last one is filled
            up by repeating its last lane.
        mesh: devices of this process, by default all. What its axes are called and how they are typed does not matter.
        store: folder of finished chunks, made where there is none.

    Returns:
        The results, every leaf [L, ...]; typed keys as their key data.

    Raises:
        ValueError: before anything is compiled, for no lanes, leaves that disagree about L, a chunk size that is not a
            multiple of the devices, and a store that cannot be written, is in use, or was made by another sweep.
        OSError: where a chunk cannot be written, for instance on a full disk.
    """
    num_lanes = _num_lanes(lanes, "lanes")
    data = jax.tree_util.tree_map_with_path(lambda path, x: programs.numbers(x, f"lanes{_named(path)}"), lanes)
    leaves = jax.tree.leaves(data)
    mesh = _checked_mesh(mesh)
    chunk_size = _checked_size(chunk_size, num_lanes, mesh.size)
    if store is None:
        function = programs.trace(fn, lanes)
        program = programs.compiled(function, leaves, chunk_size, num_lanes, mesh)
        return _all_chunks(program, function.results, leaves)
    with stores.locked(store) as folder:
        made = report.provenance(arguments={}, seed=0, wall_seconds=0)
        known = _identity(data, lanes, mesh, made) | ({"chunk_size": chunk_size} if chunk_size else {})
        stores.check(folder, known)
        function = programs.trace(fn, lanes)
        known |= _identity_of(function, leaves)
        stores.check(folder, known)
        chunk_size = stores.recorded(folder).get("chunk_size", chunk_size)
        program = programs.compiled(function, leaves, chunk_size, num_lanes, mesh)
        notes = {name: made[name] for name in ("versions", "device", "commit", "gdjax_commit", "command")}
        key = stores.claim(folder, known | {"chunk_size": program.size}, made_by=notes)
        return _all_chunks(program, function.results, leaves, (folder, key))


def _all_chunks(
    program: programs.Program, shapes: Any, data: list[np.ndarray], store: tuple[Path, str] | None = None
) -> Any:
    """Return the results of all lanes, reading the chunks that the store has and writing those that it lacks."""
    num_lanes = len(data[0])
    leaves, tree = jax.tree.flatten(shapes)
    results = [np.empty((num_lanes, *leaf.shape), leaf.dtype) for leaf in leaves]
    files = stores.listed(store[0]) if store else {}
    with _progress(num_lanes) as show:
        for index, start in enumerate(range(0, num_lanes, program.size)):
            stop = min(start + program.size, num_lanes)
            chunk = stored = stores.read(store[1], index, files) if store else None
            if chunk is None:
                rows = np.minimum(np.arange(start, start + program.size), num_lanes - 1)
                chunk = [_fetched(x)[: stop - start] for x in program([leaf[rows] for leaf in data])]
                if store:
                    stores.write(*store, index, chunk)
            for result, part in zip(results, chunk, strict=True):
                result[start:stop] = part.view(result.dtype)  # NumPy's files do not know bfloat16 and its like
            show(stop - start, stored is None)
    return tree.unflatten(results)


def _fetched(x: jax.Array) -> np.ndarray:
    # jax 0.10 cannot fetch an array without entries that is spread over devices.
    return np.asarray(x) if x.size else np.empty(x.shape, x.dtype)


@contextlib.contextmanager
def _progress(num_lanes: int) -> Iterator[Callable[[int, bool], None]]:
    """Show lanes done, rate and time left on standard error, where that is a terminal and tqdm is installed.

    Yields a function (lanes, whether they were computed now): those read from a store do not count for the rate.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield lambda lanes, computed: None
        return
    disable = None if jax.process_index() == 0 else True  # None: unless it is a terminal
    with tqdm(total=num_lanes, unit=" lanes", disable=disable, file=sys.stderr, dynamic_ncols=True) as bar:

        def show(lanes: int, computed: bool) -> None:
            if not computed and not bar.disable:
                bar.initial += lanes
            bar.update(lanes)

        yield show


def _identity(data: Lanes, lanes: Lanes, mesh: Mesh, made: dict[str, Any]) -> dict[str, str | int | bool]:
    """Return what identifies a sweep before anything is traced."""
    device = mesh.devices.flat[0]
    values = {f"lanes{_named(path)}": x for path, x in jax.tree_util.tree_leaves_with_path(data)}
    return {
        **{name: made["versions"][name] for name in ("gdjax", "jax", "jaxlib")},
        "device": f"{device.platform} {device.device_kind}",
        "num_devices": mesh.size,
        "x64": made["x64"],
        "names of lanes": ", ".join(values),
        **{
            name: f"{_shown(leaf)} {_files.digest(x)[:16]}"
            for (name, x), leaf in zip(values.items(), jax.tree.leaves(lanes), strict=True)
        },
    }


def _identity_of(function: programs.Function, leaves: list[np.ndarray]) -> dict[str, str]:
    """Return what identifies the function: its program, the arrays that it closes over, and its results."""
    results = [f"{_named(path)} {_shown(x)}" for path, x in jax.tree_util.tree_leaves_with_path(function.results)]
    return {
        "results of fn": ", ".join(results),
        "program of fn": _files.digest(function.text(leaves).encode())[:16],
        "arrays in fn": _files.digest(*(programs.numbers(x, "constant") for x in function.constants))[:16],
    }


def _num_lanes(lanes: Lanes, name: str) -> int:
    sizes = {f"{name}{_named(path)}": np.shape(x)[:1] for path, x in jax.tree_util.tree_leaves_with_path(lanes)}
    shown = ", ".join(f"{path}: {size[0] if size else 'scalar'}" for path, size in sizes.items())
    if not sizes or () in sizes.values() or len(set(sizes.values())) > 1:
        raise ValueError(
            f"every leaf of {name} must be an array with the same leading axis, but found {shown or 'no array'}"
        )
    [(num_lanes,)] = set(sizes.values())
    if num_lanes == 0:
        raise ValueError(f"{name} has 0 entries on its leading axis ({shown}): nothing to run")
    return num_lanes


def _checked_size(chunk_size: int | None, num_lanes: int, num_devices: int) -> int | None:
    """Return the chunk size, no larger than is needed to hold all lanes on these devices."""
    if chunk_size is None:
        return None
    if chunk_size < 1 or chunk_size % num_devices:
        sizes = [n * num_devices for n in (chunk_size // num_devices, chunk_size // num_devices + 1) if n > 0]
        advice = " or ".join(map(str, sizes or [num_devices]))
        raise ValueError(f"chunk_size={chunk_size} must be a multiple of the {num_devices} devices: use {advice}")
    return min(chunk_size, math.ceil(num_lanes / num_devices) * num_devices)


def _checked_mesh(mesh: Mesh | None) -> Mesh:
    """Return a mesh of one axis, 'lanes', over devices of this process."""
    devices = jax.local_devices() if mesh is None else list(mesh.devices.flat)
    if elsewhere := [device for device in devices if device.process_index != jax.process_index()]:
        raise ValueError(
            f"mesh has {len(elsewhere)} devices of other processes: let each process run its own part of the lanes on "
            "its jax.local_devices(), with a store of its own"
        )
    return Mesh(np.asarray(devices), ("lanes",))


def _named(path: Any) -> str:
    return jax.tree_util.keystr(path)


def _shown(array: Any) -> str:
    array = array if hasattr(array, "dtype") else np.asarray(array)
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"
