"""Compiled chunks of updates and what they are fed, for data on the device and in host memory, on one device or many.

A program is `(state, inputs, *, length) -> (state, (losses, records))`: `length` updates, then the loss and the record
of those that are recorded.

>>> import jax, optax
>>> from gdjax import gradients
>>> sgd = descent.method(gradients.mean(lambda mean, x: 0.5 * (mean - x) ** 2), optax.sgd(0.5))
>>> plan = Plan(batch_size=2, num_updates=5, every=1, chunk_updates=3, first_example=0, mesh=None)
>>> program, inputs = on_device(
...     sgd, jnp.asarray([1.0, 2.0, 6.0]), jax.random.key(0), plan, batching.cyclic, descent.batch_loss, 0
... )
>>> state = placed(sgd.init(0.0), plan.sharding())
>>> for length in plan.lengths(done=0):
...     state, (losses, _) = program(state, next(inputs), length=length)
...     print(losses)
[1.25      6.90625   3.7578125]
[1.3457031 3.8676758]
"""

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gdjax import batching, descent, problem
from gdjax._trees import is_key
from gdjax.descent import Info, Method, Record, State
from gdjax.problem import Batch

MAX_POSITION = 2**63  # of a stream
NARROW = 2**31  # positions that int32 holds
# A small stream sorts each epoch that a window touches: 8 epochs cost an eighth more than the epochs themselves.
WINDOW_EPOCHS = 8
MAX_WINDOW = WINDOW_EPOCHS * 2**13  # entries, unless a chunk takes more; a longer order is looked up, not sorted

Stream = Callable[..., jax.Array]
"""`stream(key, num_examples, start=..., length=...) -> int32[length]`, from `gdjax.batching`.

`start` is an int32 in a run that ends below position 2^31 of its stream, and a `batching.Count` in a longer one.
"""
Step = Callable[[State, Batch], tuple[State, Info]]
Program = Callable[..., tuple[State, tuple[jax.Array, Any]]]
"""`(state, inputs, *, length) -> (state, (losses, records))`, `state` donated."""
Fed = tuple[Program, Iterator[Any]]
"""A program, and the inputs of its calls one after the other."""


class Plan(NamedTuple):
    """How the updates are cut and where they run."""

    batch_size: int
    num_updates: int
    every: int
    chunk_updates: int
    first_example: int  # of the stream, at the start of the run
    mesh: Mesh | None

    def sharding(self, *axes: Any) -> NamedSharding | None:
        """Return the sharding of an array over the mesh, replicated where no axes are given."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*axes))

    def lengths(self, done: int) -> Iterator[int]:
        """Yield the number of updates of each chunk after `done` updates."""
        while done < self.num_updates:
            length = min(self.chunk_updates, self.num_updates - done)
            yield length
            done += length


def planned(state: State, data: Batch, key: jax.Array, mesh: Mesh | None, **numbers: int) -> Plan:
    """Check the numbers and put them together.

    Raises:
        ValueError: as `training.run` says.
    """
    for name, number in numbers.items():
        if operator.index(number) < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    batch_size, num_updates, every = (numbers[name] for name in ("batch_size", "num_updates", "every"))
    for name in ("num_updates", "chunk_updates"):
        if numbers[name] % every:
            raise ValueError(
                f"every={every} must divide {name}={numbers[name]}: {max(1, numbers[name] // every) * every} would do"
            )
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ValueError(f"key={key} must be a typed key, from jax.random.key(seed)")
    problem.num_examples(data)
    first_example = int(state.num_examples)
    if first_example + batch_size * num_updates >= MAX_POSITION:
        raise ValueError(
            f"num_updates={num_updates} of batch_size={batch_size} after {first_example} examples go past position "
            f"2^63 of the stream: at most {(MAX_POSITION - 1 - first_example) // batch_size} updates"
        )
    if mesh is not None and set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"mesh must have Auto axes, but has {mesh.axis_types}: make_mesh(..., axis_types=(AxisType.Auto,))"
        )
    if mesh is not None and batch_size % mesh.size:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared equally by the {mesh.size} devices of the mesh: the next that "
            f"can is {-(-batch_size // mesh.size) * mesh.size}"
        )
    return Plan(first_example=first_example, mesh=mesh, **numbers)


def sharded(step: Step, plan: Plan) -> Step:
    """Return `step` with the batch shared by the devices of the mesh. The compiler adds the sums over devices."""
    if plan.mesh is None:
        return step
    rows = plan.sharding(plan.mesh.axis_names)
    return lambda state, batch: step(state, lax.with_sharding_constraint(batch, rows))


def on_device(method: Method, data, key, plan: Plan, stream: Stream, record: Record, done: int) -> Fed:
    """Return (program, its inputs after `done` updates), the data on every device: a chunk takes its batches there."""

    def chunk(state, inputs, *, length):
        data, window, first = inputs
        entries = lax.dynamic_slice_in_dim(window, first, length * plan.batch_size)
        batches = batching.batches(entries, plan.batch_size)
        return descent.run(method, state, data, batches, _with_loss(record), every=plan.every)

    window_of = _windows(stream, key, problem.num_examples(data), plan, done)
    if plan.mesh is not None:
        data = placed(data, plan.sharding())
    return _compiled(chunk, plan), ((data, *window_of(index)) for index in itertools.count())


def from_host(method: Method, data, key, plan: Plan, stream: Stream, record: Record, done: int) -> Fed:
    """Return (program, its inputs after `done` updates), the data in host memory: a chunk is given its batches.

    They are [K, B, ...] for K updates, gathered by a thread for up to two chunks ahead. A process gathers only what its
    own devices need.
    """
    import grain  # pyright: ignore[reportMissingImports]

    window_of = _windows(stream, key, problem.num_examples(data), plan, done)
    lengths = list(plan.lengths(done))

    def gathered(index: int):
        window, first = window_of(index)
        indices = np.asarray(window)[first : first + lengths[index] * plan.batch_size].reshape(-1, plan.batch_size)
        return jax.tree.map(partial(_batches, indices=indices, plan=plan), data)

    def step(state, batches):
        return method.step(state, jax.tree.map(lambda x: x[0], batches))

    def chunk(state, inputs, *, length):
        one_each = jnp.arange(length, dtype=jnp.int32)[:, None]  # a whole batch is an example of `inputs`
        return descent.run(Method(method.init, step), state, inputs, one_each, _with_loss(record), every=plan.every)

    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return _compiled(chunk, plan), iter(grain.MapDataset.range(len(lengths)).map(gathered).to_iter_dataset(ahead))


def _windows(stream: Stream, key, num_examples: int, plan: Plan, done: int) -> Callable:
    """Return `(chunk) -> (window of the stream int32[S], position in it where the chunk begins)`.

    It holds several epochs of a small data set, or one chunk, whichever is more.
    """
    chunk_entries = min(plan.chunk_updates, plan.num_updates) * plan.batch_size
    wanted = min(WINDOW_EPOCHS * num_examples, MAX_WINDOW)
    chunks = min(-(-wanted // chunk_entries), -(-plan.num_updates // plan.chunk_updates))
    entries = chunk_entries * chunks
    first = plan.first_example + done * plan.batch_size
    drawn = partial(_drawn, stream, num_examples, entries)
    key = placed(key, plan.sharding())
    end = plan.first_example + plan.num_updates * plan.batch_size

    @lru_cache(maxsize=2)
    def window(number: int):
        start = first + number * entries
        return drawn(key, np.int32(start) if end <= NARROW else batching.Count.of(start))

    def window_of(chunk: int):
        number, place = divmod(chunk, chunks)
        return window(number), np.int32(place * chunk_entries)

    return window_of


@partial(jax.jit, static_argnums=(0, 1, 2))  # here, so that another run of the same stream need not compile it
def _drawn(stream: Stream, num_examples: int, length: int, key, start) -> jax.Array:
    return stream(key, num_examples, start=start, length=length)


def _batches(x: np.ndarray, *, indices: np.ndarray, plan: Plan) -> jax.Array:
    """Return x[indices] on the device or, the batch axis shared, on the devices of the mesh."""
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    if plan.mesh is None:
        return jax.device_put(np.asarray(x[indices], dtype))
    sharding = NamedSharding(plan.mesh, PartitionSpec(None, plan.mesh.axis_names))

    def rows(part):
        return np.asarray(x[indices[part[:2]]], dtype)

    return jax.make_array_from_callback(indices.shape + x.shape[1:], sharding, rows)


def _compiled(chunk: Callable, plan: Plan) -> Program:
    if plan.mesh is None:
        return jax.jit(chunk, static_argnames="length", donate_argnums=0)
    return jax.jit(chunk, static_argnames="length", donate_argnums=0, out_shardings=plan.sharding())


def _with_loss(record: Record) -> Record:
    return lambda state, info: (info.loss, record(state, info))


def placed(tree, sharding: NamedSharding | None):
    """Put copies of the leaves onto the device, or onto all devices of the mesh."""

    def put(x):
        array = to_host(x)
        if sharding is None:
            return _as_key(x, jax.device_put(array))
        return _as_key(x, jax.make_array_from_process_local_data(sharding, array, array.shape))

    return jax.tree.map(put, tree)


def to_host(x) -> np.ndarray:
    """Copy an array, or the numbers inside an array of keys, into host memory."""
    return np.array(jax.random.key_data(x) if is_key(x) else x)


def to_names(name: str, tree) -> dict[str, np.ndarray]:
    """Return copies in host memory of the leaves of `tree` by their paths, which begin with `name`."""
    return {name + jax.tree_util.keystr(path): to_host(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def from_names(name: str, tree, arrays: Mapping[str, np.ndarray]):
    """Undo `to_names`, the structure being that of `tree`, and its leaves used where `arrays` has none."""

    def found(path, x):
        array = arrays.get(name + jax.tree_util.keystr(path))
        return x if array is None else _as_key(x, array)

    return jax.tree_util.tree_map_with_path(found, tree)


def _as_key(template, array):
    if not is_key(template):
        return array
    return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(template))
