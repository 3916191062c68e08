"""How a run is cut into programs, and what they are fed: from the device or from host memory, on one or many devices.

>>> phases = batching.Phases.of(2)
>>> plan = Plan(phases=phases, num_updates=11, every=4, chunk_updates=9, first_example=0, mesh=None)
>>> for cut in plan.cuts(done=0):
...     print(cut)
Cut(first=0, blocks=2, length=4, batch_size=2, recorded=True, judged=True)
Cut(first=8, blocks=1, length=3, batch_size=2, recorded=True, judged=False)
>>> list(plan._replace(chunk_updates=3).cuts(done=6))[0]  # less than a block at a time
Cut(first=6, blocks=1, length=2, batch_size=2, recorded=True, judged=True)
>>> ramp = plan._replace(phases=batching.Phases.of([(5, 2), (6, 8)]))
>>> [(cut.first, cut.end, cut.batch_size) for cut in ramp.cuts(done=0)]
[(0, 4, 2), (4, 5, 2), (5, 8, 8), (8, 11, 8)]
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gdjax import batching, problem
from gdjax._trees import is_key, kept
from gdjax.descent import State, Stream
from gdjax.problem import Batch

MAX_POSITION = 2**63  # of a stream
NARROW = 2**31  # positions that int32 holds
# A small stream sorts each epoch that a window touches: 8 epochs cost an eighth more than the epochs themselves.
WINDOW_EPOCHS = 8
MAX_WINDOW = WINDOW_EPOCHS * 2**13  # entries, unless a chunk takes more; a longer order is looked up, not sorted


class Cut(NamedTuple):
    """The updates of one call of a program.

    Attributes:
        first: updates before it.
        blocks: their number.
        length: updates of a block, from one record to the next, or a part of that.
        batch_size: B of all of them.
        recorded: whether there is a record at the end of a block.
        judged: whether rules are asked there. They are not at a record that only the end of the run makes, so that a
            run of more updates is the same up to there.
    """

    first: int
    blocks: int
    length: int
    batch_size: int
    recorded: bool
    judged: bool

    @property
    def end(self) -> int:
        """Updates after it."""
        return self.first + self.blocks * self.length


class Plan(NamedTuple):
    """How the updates are cut and where they run."""

    phases: batching.Phases
    num_updates: int
    every: int
    chunk_updates: int
    first_example: int  # of the stream, at the start of the run
    mesh: Mesh | None

    def sharding(self, *axes: Any) -> NamedSharding | None:
        """Return the sharding of an array over the mesh, replicated where no axes are given."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*axes))

    def position(self, done: int) -> int:
        """Return where in the stream a run is after `done` updates."""
        return self.first_example + self.phases.examples(done)

    def cuts(self, done: int) -> Iterator[Cut]:
        """Yield what is left after `done` updates: as many blocks as a chunk and a phase hold, or a part of a block."""
        while done < self.num_updates:
            size, _, end = self.phases.at(done)
            most = min(self.chunk_updates, (end or self.num_updates) - done, self.num_updates - done)
            to_record, whole = self.every - done % self.every, most // self.every
            if to_record == self.every and whole:
                cut = Cut(done, whole, self.every, size, recorded=True, judged=True)
            else:
                left = min(to_record, self.num_updates - done)
                length = min(left, most)
                cut = Cut(done, 1, length, size, recorded=length == left, judged=length == to_record)
            yield cut
            done = cut.end

    def num_records(self, done: int) -> int:
        """Return how many records the first `done` updates have in this run."""
        return -(-done // self.every) if done == self.num_updates else done // self.every


def planned(
    state: State, data: Batch, mesh: Mesh | None, phases: batching.Phases, num_updates: int, **numbers: int
) -> Plan:
    """Check the numbers and put them together.

    Raises:
        ValueError: as `training.run` says.
    """
    for name, number in {"num_updates": num_updates, **numbers}.items():
        if operator.index(number) < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    problem.num_examples(data)
    plan = Plan(phases, num_updates, first_example=int(state.num_examples), mesh=mesh, **numbers)
    last = phases.parts[-1][1]
    if (beyond := plan.position(num_updates) - MAX_POSITION) >= 0:
        raise ValueError(
            f"num_updates={num_updates} of batch_size={last} after {plan.first_example} examples go past position "
            f"2^63 of the stream: at most {num_updates - 1 - beyond // last} updates"
        )
    if mesh is not None and set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"mesh must have Auto axes, but has {mesh.axis_types}: make_mesh(..., axis_types=(AxisType.Auto,))"
        )
    for size in phases.sizes:
        if mesh is not None and size % mesh.size:
            raise ValueError(
                f"batch_size={size} cannot be shared equally by the {mesh.size} devices of the mesh: the next that "
                f"can is {-(-size // mesh.size) * mesh.size}"
            )
    return plan


def from_device(data, key, plan: Plan, stream: Stream, done: int, examples: Any) -> Iterator[Any]:
    """Return an iterator of the inputs after `done` updates, the data on every device: programs take batches there.

    `examples`, which a record is given, are added to each.
    """
    window_of = _windows(stream, key, problem.num_examples(data), plan, done)
    data, examples = (_everywhere(tree, plan) for tree in (data, examples))
    return ((data, *window_of(cut), examples) for cut in plan.cuts(done))


def from_host(data, key, plan: Plan, stream: Stream, done: int, examples: Any) -> Iterator[Any]:
    """Return an iterator of the inputs after `done` updates, the data in host memory: programs are given batches.

    They are [K, B, ...] for K updates, gathered by a thread for up to two programs ahead. A process gathers only what
    its own devices need.
    """
    import grain  # pyright: ignore[reportMissingImports]

    window_of = _windows(stream, key, problem.num_examples(data), plan, done)
    cuts = list(plan.cuts(done))
    examples = _everywhere(examples, plan)

    def gathered(index: int):
        cut = cuts[index]
        window, first = window_of(cut)
        end = first + (cut.end - cut.first) * cut.batch_size
        indices = np.asarray(window)[first:end].reshape(-1, cut.batch_size)
        return jax.tree.map(partial(_batches, indices=indices, plan=plan), data)

    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    batches = iter(grain.MapDataset.range(len(cuts)).map(gathered).to_iter_dataset(ahead))
    return ((batch, examples) for batch in batches)


def _windows(stream: Stream, key, num_examples: int, plan: Plan, done: int) -> Callable[[Cut], tuple[jax.Array, Any]]:
    """Return `(cut) -> (window of the stream int32[S], position in it where the cut begins)`, for cuts in their order.

    It holds several epochs of a small data set, or one chunk, whichever is more.
    """
    total = plan.phases.examples(plan.num_updates)
    longest = min(total, plan.chunk_updates * plan.phases.sizes[-1])
    entries = max(longest, min(WINDOW_EPOCHS * num_examples, MAX_WINDOW, total))
    key = placed(key, plan.sharding())
    make = partial(jax.jit, partial(stream, num_examples=num_examples, length=entries))
    drawn = kept(stream, ("training", num_examples, entries), make)
    last = plan.first_example + total + entries
    held: list[Any] = [-entries, None]  # its first position, and the window

    def window_of(cut: Cut):
        first, end = plan.position(cut.first), plan.position(cut.end)
        if end > held[0] + entries:
            held[:] = first, drawn(key, start=np.int32(first) if last <= NARROW else batching.Count.of(first))
        return held[1], np.int32(first - held[0])

    return window_of


def _everywhere(tree, plan: Plan):
    """Return arrays on the device, or copies on all devices of the mesh."""
    return jax.tree.map(jnp.asarray, tree) if plan.mesh is None else placed(tree, plan.sharding())


def _batches(x: np.ndarray, *, indices: np.ndarray, plan: Plan) -> jax.Array:
    """Return x[indices] on the device or, the batch axis shared, on the devices of the mesh."""
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    if plan.mesh is None:
        return jax.device_put(np.asarray(x[indices], dtype))
    sharding = NamedSharding(plan.mesh, PartitionSpec(None, plan.mesh.axis_names))

    def rows(part):
        return np.asarray(x[indices[part[:2]]], dtype)

    return jax.make_array_from_callback(indices.shape + x.shape[1:], sharding, rows)


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
    return np.array(as_data(x))


def as_data(x: jax.Array) -> jax.Array:
    """Return an array where it is, or the numbers inside an array of keys."""
    return jax.random.key_data(x) if is_key(x) else x


def to_names(name: str, tree, *, to: Callable[[Any], Any] = to_host) -> dict[str, Any]:
    """Return the leaves of `tree` by their paths, beginning with `name`: copies in host memory, or what `to` makes."""
    return {name + jax.tree_util.keystr(path): to(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


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
