"""A function of one grid point, compiled for many: what `sweep` runs a chunk with.

>>> import jax.numpy as jnp
>>> mesh = Mesh(np.asarray(jax.devices()[:1]), ("points",))
>>> scale = jnp.asarray([1.0, 10.0])
>>> def fn(point):
...     return scale * point["x"]
>>> function = traced(fn, {"x": np.arange(8.0)})
>>> [constant.shape for constant in function.constants]  # what it closes over is an argument of the program
[(2,)]
>>> program = compiled(fn, function, [np.zeros(8, np.float32)], mesh, 4)
>>> program.size, program([np.arange(4, dtype=np.float32)])[0][3]
(4, Array([ 3., 30.], dtype=float32))
"""

import contextlib
import math
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gdjax import _files
from gdjax._trees import is_key, kept
from gdjax.sweep import _lanes

POINTS_PER_DEVICE = 256
"""Points in a chunk at most, unless a size is asked for: a crash costs a chunk."""
MEMORY_FRACTION = 0.5
"""Of the device's free memory, what a chunk may need by the compiler's count."""
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_debug_nans")
"""Of JAX, that change what a function is traced to."""


class Function(NamedTuple):
    """A traced function of one point, its arrays apart.

    Attributes:
        one: constants -> (leaves of one point -> list of results), both in the order of the trees' leaves.
        lanes: points that a CPU should compute side by side.
        constants: the arrays that the function closes over.
        results: the pytree of shapes and types that one point returns.
        key: what it was traced for, beside the function itself.
    """

    one: Callable[[Sequence[Any]], Callable[..., list[jax.Array]]]
    lanes: int
    constants: list[Any]
    results: Any
    key: Hashable


class Program(NamedTuple):
    """A function compiled for chunks of `size` points: leaves [size, ...] -> results [size, ...]."""

    compiled: jax.stages.Compiled
    constants: list[jax.Array]
    size: int
    spread: NamedSharding

    def __call__(self, leaves: Sequence[np.ndarray]) -> list[jax.Array]:
        return self.compiled(self.constants, jax.device_put(list(leaves), self.spread))


def traced(fn: Callable[[Any], Any], points: Any) -> Function:
    """Return `fn`, point -> pytree of arrays, traced: once for all points of these shapes and types, as `jax.jit` does.

    Typed keys enter and leave the `Function` as their key data. The arrays that `fn` closes over become arguments, for
    otherwise every program holds a copy of each, folds constants in it, and is at most 2 GB. Those that a jitted
    function inside it closes over stay where they are.
    """
    leaves, tree = jax.tree.flatten(points)
    kinds = [jax.random.key_impl(leaf) if is_key(leaf) else None for leaf in leaves]
    shapes = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (numbers(leaf, "points") for leaf in leaves)]
    settings = tuple(getattr(jax.config, name) for name in SETTINGS)
    key = ("traced", tree, *map(str, kinds), *((x.shape, x.dtype) for x in shapes), *settings)

    def one(*data):
        wrapped = [
            x if kind is None else jax.random.wrap_key_data(x, impl=kind) for x, kind in zip(data, kinds, strict=True)
        ]
        return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, fn(tree.unflatten(wrapped)))

    def make() -> Function:
        closed, results = jax.make_jaxpr(one, return_shape=True)(*shapes)
        if not jax.tree.leaves(results):
            raise ValueError("fn returns no arrays: let it return a pytree of what is to be kept of each point")

        def of(constants):
            return core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, constants))

        return Function(of, _lanes.lanes_of(closed.jaxpr), list(closed.consts), results, key)

    return kept(fn, key, make)


def fingerprint(fn: Callable[[Any], Any], function: Function, leaves: Sequence[np.ndarray]) -> tuple[str, str]:
    """Return digests of the program, for two points so that rules of vmap show, and of the arrays in it."""

    def batched(constants, leaves):
        return jax.vmap(function.one(constants))(*leaves)

    make = partial(_files.fingerprint, batched, function.constants, _shapes(leaves, 2))
    return kept(fn, ("fingerprint", function.key), make)


def compiled(
    fn: Callable[[Any], Any],
    function: Function,
    leaves: Sequence[np.ndarray],
    mesh: Mesh,
    size: int | None,
) -> Program:
    """Return `function` compiled for chunks of `size` points; where that is None, for as many as are run and fit.

    The first program tried is for all points, or POINTS_PER_DEVICE on each device. Where the compiler counts more bytes
    than MEMORY_FRACTION of what a device has free, one for proportionally fewer is compiled, down to one a device. It
    is kept with `fn`, the function that was traced.
    """
    asked, devices = size is not None, tuple(mesh.devices.flat)
    first = size or mesh.size * min(POINTS_PER_DEVICE, math.ceil(len(leaves[0]) / mesh.size))

    def make() -> Program:
        everywhere, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("points"))
        lanes = function.lanes if devices[0].platform == "cpu" else first
        specs = {"in_specs": (PartitionSpec(), PartitionSpec("points")), "out_specs": PartitionSpec("points")}

        def batched(constants, leaves):
            return _lanes.grouped(function.one(constants), lanes)(*leaves)

        # Each device has a loop of its own, and none waits for another.
        shared = jax.shard_map(batched, mesh=mesh, check_vma=False, **specs) if mesh.size > 1 else batched
        program = jax.jit(shared, in_shardings=(everywhere, spread), out_shardings=spread)
        constants = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in function.constants]
        size, budget = first, MEMORY_FRACTION * free_bytes(mesh)
        while True:
            found = program.lower(constants, _shapes(leaves, size)).compile()
            needed = needed_bytes(found)
            if asked or needed <= budget or size == mesh.size:
                return Program(found, jax.device_put(function.constants, everywhere), size, spread)
            size = max(1, min(int(size * budget / needed), size - 1) // mesh.size) * mesh.size

    return kept(fn, ("compiled", function.key, first, asked, devices), make)


def numbers(leaf: Any, name: str) -> np.ndarray:
    """Return a leaf in NumPy, in the type that a device gives it; the key data of typed keys.

    Raises:
        ValueError: calling the leaf by `name`, where it is no array of numbers.
    """
    found = ""
    try:
        array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        found = f", but is {array.dtype}"
        return np.asarray(array, jnp.result_type(array))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers or typed keys{found or f': {error}'}") from error


def needed_bytes(program: jax.stages.Compiled) -> int:
    """Return what a program needs on each device, by the compiler's own count: 0 where it does not count."""
    memory = program.memory_analysis()
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return sum(getattr(memory, part, 0) for part in parts)


def free_bytes(mesh: Mesh | None = None) -> float:
    """Return the free memory of a device: of CPU devices, each a share of what the machine or its cgroup has left.

    Without a mesh it is that of the default device.
    """
    mesh = mesh or Mesh(np.asarray(jax.local_devices()[:1]), ("points",))
    stats = [device.memory_stats() for device in mesh.devices.flat]
    if all(stats):
        return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
    return min(_host_bytes()) / mesh.size


def _host_bytes() -> Iterator[float]:
    with contextlib.suppress(ModuleNotFoundError):
        import psutil

        yield psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # of a container, which psutil does not see; 'max' is no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        yield limit - used
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not on Windows
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield math.inf


def _shapes(leaves: Sequence[np.ndarray], size: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for x in leaves]
