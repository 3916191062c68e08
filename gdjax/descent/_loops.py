"""The two loops over batches: `run`, a scan of fixed length, and `until`, ended by a rule or a traced count."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdjax import batching, kernels
from gdjax._trees import kept, traced
from gdjax.descent._method import Fetch, Method, Record, State, batch_loss
from gdjax.descent._rules import Rule
from gdjax.problem import Batch, num_examples


def run(
    method: Method,
    state: State,
    data: Batch,
    batches: Any,
    record: Record = batch_loss,
    *,
    every: int = 1,
    unroll: int = 1,
    fetch: Fetch = batching.take,
) -> tuple[State, Any]:
    """Make one update for each batch, as one compiled loop.

    Called outside `jax.jit`, it compiles the loop once for the same functions and shapes, and keeps it with the method.

    Args:
        method: from `method`.
        state: where to start, `method.init(params)` or the state of an earlier run.
        data: examples, every leaf [N, ...].
        batches: int32[T, B], indices in [0, N), from `batching.batches`. They are not checked against N. Or a list of
            such arrays, phases of different B one after the other, as `batching.Phases.batches` cuts them: each is a
            loop of its own, compiled once for its B, whose last update is recorded. With another `fetch`, any pytree
            whose leaves have T entries on axis 0.
        record: (state after the update, info of the update) -> pytree.
        every: updates between records. The last update is always recorded, whether or not `every` divides T.
        unroll: updates in one iteration of the compiled loop: more take longer to compile, and may run faster where
            an update is small.
        fetch: (data, one entry of batches) -> the batch that `method.step` is given.

    Returns:
        (state after T updates, records stacked along a new axis 0 of length ceil(T / every)).

    Raises:
        ValueError: for `every` or `unroll` < 1 and for data with no or unequal numbers of examples.
    """
    for name, number in (("every", every), ("unroll", unroll)):
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1 update")
    if fetch is batching.take and isinstance(batches, list) and {getattr(part, "ndim", 0) for part in batches} == {2}:
        options: dict[str, Any] = {"every": every, "unroll": unroll}
        histories = []
        for part in batches:
            state, history = run(method, state, data, part, record, **options)
            histories.append(history)
        return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *histories)
    batches = _checked(data, batches, fetch)

    def make():
        return kernels.for_cpu(partial(_run, method, record, every, unroll, fetch))

    if traced(state, data, batches):
        return make()(state, data, batches)
    program = kept(method.step, ("run", record, every, unroll, fetch), lambda: jax.jit(make()))
    return program(state, data, batches)


def _run(method, record, every, unroll, fetch, state, data, batches):
    block = _block(method, data, fetch, unroll=min(unroll, every))

    def recorded_block(state, batches):
        state, info = block(state, batches)
        return state, record(state, info)

    num_updates = num_examples(batches, "batches")
    num_blocks, tail = divmod(num_updates, every)
    whole = jax.tree.map(lambda x: x[: num_blocks * every].reshape(num_blocks, every, *x.shape[1:]), batches)
    state, history = lax.scan(recorded_block, state, whole, unroll=max(1, unroll // every))
    if not tail:
        return state, history
    state, last = recorded_block(state, jax.tree.map(lambda x: x[num_blocks * every :], batches))
    return state, jax.tree.map(lambda blocks, x: jnp.concatenate([blocks, jnp.asarray(x)[None]]), history, last)


class Ending(NamedTuple):
    """How a run ended.

    Attributes:
        rule: int32 scalar, the position in `rules` of the first rule that held, or len(rules) for the budget.
        num_updates: int32 scalar, updates made.
    """

    rule: jax.Array
    num_updates: jax.Array


def until(
    method: Method,
    state: State,
    data: Batch,
    batches: Any,
    rules: Mapping[str, Rule] = MappingProxyType({}),
    *,
    every: int = 1,
    first: int | jax.Array = 0,
    num_updates: int | jax.Array | None = None,
    fetch: Fetch = batching.take,
) -> tuple[State, Ending]:
    """Make updates until a rule holds or the budget is used up, as one `lax.while_loop`.

    Under `jax.vmap` each run ends by its own rule at its own time and keeps the state it ended with. The budget may be
    traced, so that one compiled program serves any number of updates.

    Args:
        method, state, data, batches, fetch: as in `run`.
        rules: {name: Rule}. `(*rules, "budget")[ending.rule]` is the name of what ended the run.
        every: updates between evaluations of the rules; it must divide `num_updates`.
        first: the batch to begin with, from 0.
        num_updates: the budget, from `first` on; default all batches. A traced budget comes with every=1.

    Returns:
        (state at the end, Ending).

    Raises:
        ValueError: where `every` does not divide the budget, or cannot be compared with it; for no update.
    """
    batches = _checked(data, batches, fetch)
    if num_updates is None:
        num_updates = num_examples(batches, "batches")
    if traced(num_updates):
        if every != 1:
            raise ValueError(f"every={every} must be 1 where num_updates is traced: it may not divide it")
    elif every < 1 or int(num_updates) < 1 or int(num_updates) % every:
        raise ValueError(f"every={every} must divide the budget of {num_updates} updates, at least one")

    def make():
        return kernels.for_cpu(partial(_until, method, tuple(rules.values()), every, fetch))

    if traced(state, data, batches, first, num_updates):
        return make()(state, data, batches, first, num_updates)
    program = kept(method.step, ("until", tuple(rules.values()), every, fetch), lambda: jax.jit(make()))
    return program(state, data, batches, first, num_updates)


def _until(method, rules, every, fetch, state, data, batches, first, num_updates):
    block = _block(method, data, fetch)

    def proceed(carry):
        _, _, ending = carry
        return (ending.rule == len(rules)) & (ending.num_updates < num_updates)

    def advance(carry):
        state, memories, ending = carry
        here = first + ending.num_updates
        state, info = block(state, jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, here, every), batches))
        steps = [rule.step(memory, state, info) for rule, memory in zip(rules, memories, strict=True)]
        stops = jnp.asarray([stop for _, stop in steps] + [True])
        return state, [memory for memory, _ in steps], Ending(_first(stops), ending.num_updates + every)

    carry = (state, [rule.init() for rule in rules], Ending(jnp.int32(len(rules)), jnp.int32(0)))
    state, _, ending = lax.while_loop(proceed, advance, carry)
    return state, ending


def _first(stops: jax.Array) -> jax.Array:
    return jnp.argmax(stops).astype(jnp.int32)


def _checked(data: Batch, batches: Any, fetch: Fetch) -> Any:
    """Return the batches as arrays."""
    num_examples(data)
    if fetch is not batching.take:
        batches = jax.tree.map(jnp.asarray, batches)
    else:
        try:
            batches = jnp.asarray(batches)  # of a list too, which is an array of indices here, not a pytree
            found = f"{batches.dtype} {batches.shape}"
        except (TypeError, ValueError):
            found = f"a {type(batches).__name__}"
        if not isinstance(batches, jax.Array) or batches.ndim != 2 or not jnp.issubdtype(batches.dtype, jnp.integer):
            raise ValueError(f"batches must be int[T, B], indices of examples from batching.batches, but is {found}")
    num_examples(batches, "batches")
    return batches


def _block(method: Method, data: Batch, fetch: Fetch, *, unroll: int = 1) -> Callable:
    """Return `(state, batches [K, ...]) -> (state, info of the last update)`."""
    data = jax.tree.map(jnp.asarray, data)

    def update(state, batch):
        return method.step(state, fetch(data, batch))

    update = jax.jit(update, inline=True)  # traced once for the shapes below and for the loop

    def block(state, batches):
        # The info travels in the carry, so that only the last one is kept and the step is compiled once; what
        # nobody records of it is removed by the compiler.
        one = jax.tree.map(lambda x: x[0], batches)
        if num_examples(batches, "batches") == 1:
            return update(state, one)
        shape = jax.eval_shape(update, state, one)[1]
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)

        def advance(carry, batch):
            return update(carry[0], batch), None

        return lax.scan(advance, (state, blank), batches, unroll=unroll)[0]

    return block
