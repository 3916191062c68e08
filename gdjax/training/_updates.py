"""What is compiled of a run: so many updates, what is recorded of them, the rules that end it, the average.

A `Program` is `(carry, inputs, cut) -> (carry, (losses, records, made))`, the carry donated. It stands on
`descent.run`. Where there are rules, a whole block of updates, from one record to the next, is a step of the loop, and
a step after a rule has held does nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gdjax import batching, descent
from gdjax.descent import Info, Method, Record, Rule, State
from gdjax.problem import Batch
from gdjax.training import _layout
from gdjax.training import average as averages
from gdjax.training._feeding import Cut

Program = Callable[..., tuple["Carry", "Output"]]
RecordOf = Callable[[Any], Record]
"""examples, which enter a program as arguments -> record."""


class Carry(NamedTuple):
    """What a run carries from program to program, and what a checkpoint holds.

    Attributes:
        state: of the method, that of the averaged method where there is an average.
        memories: what each rule carries.
        rule: int32 scalar, the position of the first rule that held, or the number of rules.
    """

    state: State
    memories: tuple[Any, ...]
    rule: jax.Array


class Output(NamedTuple):
    """What a cut of n blocks leaves behind.

    Attributes:
        losses: [n], of the last batch of each block.
        records: [n, ...], or () where nothing is recorded.
        rules: int32[n], as `Carry.rule` after each block. A block after the one where a rule held was not made.
    """

    losses: jax.Array
    records: Any
    rules: jax.Array


class Records(NamedTuple):
    """What is recorded of one state: `record` of it, and of it with the average in the place of its parameters."""

    last: Any
    average: Any


class Parts(NamedTuple):
    """What a run is made of.

    Attributes:
        method: that of the averaged method, where there is an average.
        record_of: see `training.run`; it is given the examples that it is about.
        rules: in their order.
        averages: whether there is an average.
        mesh: devices that share a batch, or None.
        layout: of the state on them, or None where each holds it whole.
        unroll: as in `descent.run`.
        fed: inputs are (batches [K, B, ...], examples), and else (data, window of a stream, place in it, examples).
    """

    method: Method
    record_of: RecordOf
    rules: tuple[Rule, ...]
    averages: bool
    mesh: Mesh | None
    layout: _layout.Layout | None
    unroll: int
    fed: bool


class Updates(NamedTuple):
    """The compiled parts of a run.

    Attributes:
        begin: state -> Carry.
        describe: (carry, batch, examples) -> (records, carry after the rules): one update, only ever traced.
        program: a `Program`.
    """

    begin: Callable[[State], Carry]
    describe: Any
    program: Program


def updates(parts: Parts, half_life: float | None) -> Updates:
    """Return what runs; the step is traced once for the shapes of a run.

    Args:
        parts: with the method itself, not the averaged one.
        half_life: of the average in examples, or None.
    """
    method = parts.method if half_life is None else averages.averaged(parts.method, half_life)
    parts = parts._replace(method=Method(method.init, jax.jit(method.step, inline=True)))
    options, of_program = {}, parts
    if parts.mesh is not None:
        options["out_shardings"] = NamedSharding(parts.mesh, PartitionSpec())
    if parts.layout is not None:
        options["out_shardings"] = (None, options["out_shardings"])
        of_program = parts._replace(method=_layout.kept_in(parts.layout, parts.method))
    compiled = jax.jit(partial(_program, of_program), static_argnames="cut", donate_argnums=0, **options)

    def program(carry: Carry, inputs: Any, cut: Cut) -> tuple[Carry, Output]:
        return compiled(carry, inputs, cut=cut._replace(first=0))  # one program serves every place

    return Updates(jax.jit(partial(_begin, parts)), jax.jit(partial(_describe, parts)), program)


def _begin(parts: Parts, state: State) -> Carry:
    state = averages.begun(state) if parts.averages else state
    state = state if parts.layout is None else lax.with_sharding_constraint(state, parts.layout(state))
    return Carry(state, tuple(rule.init() for rule in parts.rules), jnp.int32(len(parts.rules)))


def _describe(parts: Parts, carry: Carry, batch: Batch, examples: Any) -> tuple[Records, Carry]:
    state, info = parts.method.step(carry.state, batch)
    records = _records(parts, parts.record_of(examples), state, info)
    return records, _judged(parts, carry._replace(state=state), info)


def _program(parts: Parts, carry: Carry, inputs: Any, *, cut: Cut) -> tuple[Carry, Output]:
    *inputs, examples = inputs
    data, batches, fetch = _fed(parts, *inputs) if parts.fed else _taken(parts, cut, *inputs)
    record = parts.record_of(examples)

    def recorded(state: State, info: Info) -> tuple[jax.Array, Any, Info]:
        return info.loss, _records(parts, record, state, info) if cut.recorded else (), info

    def run(state: State, batches: Any, record: Record) -> tuple[State, Any]:
        return descent.run(
            parts.method, state, data, batches, record, every=cut.length, unroll=parts.unroll, fetch=fetch
        )

    if not parts.rules:
        state, (losses, records) = run(carry.state, batches, lambda state, info: recorded(state, info)[:2])
        return carry._replace(state=state), Output(losses, records, jnp.zeros(cut.blocks, jnp.int32))

    def block(carry: Carry, batches: Any) -> tuple[Carry, Output]:
        state, seen = run(carry.state, batches, recorded)
        loss, records, info = jax.tree.map(lambda x: x[0], seen)
        carry = carry._replace(state=state)
        carry = _judged(parts, carry, info) if cut.judged else carry
        return carry, Output(loss, records, carry.rule)

    block = jax.jit(block, inline=True)  # traced once, for its shapes and for the branch

    def step(carry: Carry, batches: Any) -> tuple[Carry, Output]:
        def rest(carry: Carry, batches: Any) -> tuple[Carry, Output]:
            shapes = jax.eval_shape(block, carry, batches)[1]
            blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return carry, blank._replace(rules=carry.rule)

        return lax.cond(carry.rule == len(parts.rules), block, rest, carry, batches)

    blocks = jax.tree.map(lambda x: x.reshape(cut.blocks, cut.length, *x.shape[1:]), batches)
    loop = Method(parts.method.init, cast(Any, step))
    found: Any = descent.run(loop, cast(Any, carry), blocks, blocks, lambda _, out: out, fetch=lambda _, entry: entry)
    return found


def _records(parts: Parts, record: Record, state: State, info: Info) -> Records:
    if not parts.averages:
        return Records(record(state, info), ())
    state, average = averages.split(state)
    averaged = state._replace(params=averages.in_place(average, state.params))
    return Records(record(state, info), record(averaged, info))


def _judged(parts: Parts, carry: Carry, info: Info) -> Carry:
    """Ask the rules about the state and the info."""
    state = averages.split(carry.state)[0] if parts.averages else carry.state
    steps = [rule.step(memory, state, info) for rule, memory in zip(parts.rules, carry.memories, strict=True)]
    stops = jnp.asarray([*(stop for _, stop in steps), True])
    return Carry(carry.state, tuple(memory for memory, _ in steps), jnp.argmax(stops).astype(jnp.int32))


def _taken(parts: Parts, cut: Cut, data: Batch, window: jax.Array, first: jax.Array):
    """Return data on the device, the indices of the batches [K, B], and how a batch is taken."""
    entries = lax.dynamic_slice_in_dim(window, first, cut.blocks * cut.length * cut.batch_size)
    batches = batching.batches(entries, cut.batch_size)
    return data, batches, lambda data, indices: _shared(parts, batching.take(data, indices))


def _fed(parts: Parts, batches: Batch):
    """Return the batches [K, B, ...] twice, and that one of them is itself what a step is given."""
    return batches, batches, lambda _, batch: _shared(parts, batch)


def _shared(parts: Parts, batch: Batch) -> Batch:
    """Share a batch among the devices of the mesh. The compiler adds the sums over devices."""
    if parts.mesh is None:
        return batch
    return lax.with_sharding_constraint(batch, NamedSharding(parts.mesh, PartitionSpec(parts.mesh.axis_names)))
