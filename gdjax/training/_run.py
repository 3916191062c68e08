"""One long run from the host: compiled chunks of updates, a progress bar, checkpoints, exact resume, many devices.

>>> import jax.numpy as jnp
>>> from gdjax import descent
>>> numbers = Problem(
...     init=lambda key: jnp.zeros(()),
...     loss=lambda mean, x: 0.5 * (mean - x) ** 2,
...     train=jnp.asarray([1.0, 2.0, 6.0, 7.0]),
... )
>>> options = {"key": jax.random.key(0), "batch_size": 2, "num_epochs": 3, "stream": batching.cyclic}
>>> state, history = run(numbers, optax.sgd(0.5), **options)
>>> float(state.params), history["loss"]
(4.7578125, array([3.3203125, 3.3911133, 3.53714  ], dtype=float32))
>>> low = descent.loss_at_most(3.5, lambda state, info: numbers.evaluate(state.params)["loss"])
>>> run(numbers, optax.sgd(0.5), **options, until={"low": low}).ended  # after the first epoch
'low'
>>> run(numbers, optax.sgd(0.5), **options, ema=float("inf")).ema.params  # the mean over the updates
Array(3.2070312, dtype=float32)

Position t of the stream is a pure function of (key, t), and the state holds the number of examples seen. So the state
and the history so far are all that a checkpoint needs for a resume bit for bit.
"""

import contextlib
import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gdjax import batching
from gdjax._trees import kept
from gdjax.descent import Method, Record, Rule, State, Stream
from gdjax.gradients import Gradient
from gdjax.problem import Batch, Params, Problem, num_examples
from gdjax.training import _checkpoint, _feeding, _identity, _layout, _signals, _updates
from gdjax.training import _tasks as tasks
from gdjax.training import average as averages
from gdjax.training._feeding import Plan
from gdjax.training._journal import Journal, loop
from gdjax.training._updates import Carry, Records

BUDGET = "budget"  # what has ended a run that no rule ended


class Averaged(NamedTuple):
    """The averaged parameters, and what `record` says of the state that has them in place of its own."""

    params: Params
    history: Any


@dataclasses.dataclass(frozen=True)
class Trained:
    """What `training.run` returns. It unpacks as the pair (state, history), what `descent.train` returns.

    Attributes:
        state: after the last update.
        history: records as NumPy arrays, stacked along a new axis 0.
        ended: the name of the rule that ended the run, or 'budget'.
        ema: the average of the parameters and its history; None where `run` was not asked for one.
    """

    state: State
    history: Any
    ended: str = BUDGET
    ema: Averaged | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.state, self.history))


def run(
    problem_or_method: Problem | Method,
    optimizer_or_state: optax.GradientTransformation | State,
    data: Batch | None = None,
    *,
    key: jax.Array,
    batch_size: int | None = None,
    num_updates: int | None = None,
    num_epochs: int | None = None,
    schedule: Sequence[tuple[int, int]] | None = None,
    record: Record | None = None,
    every: int | None = None,
    gradient: Callable[..., Gradient] | None = None,
    stream: Stream = batching.reshuffled,
    unroll: int = 1,
    until: Mapping[str, Rule] = MappingProxyType({}),
    ema: float | None = None,
    chunk_updates: int = 1000,
    mesh: Mesh | None = None,
    sharded: str | _layout.Rule | None = None,
    folder: str | os.PathLike | None = None,
    checkpoint_seconds: float = 60.0,
) -> Trained:
    """Do what `descent.train` does, for hours and through crashes.

    Call it as `run(problem, optimizer, ...)`, or with the parts, as `run(method, state, data, ...)`.

    With a `folder`, a call after a crash or an interruption goes on from the newest checkpoint and returns what the run
    in one piece returns, bit for bit for the same `chunk_updates` and devices. With more updates than before it makes
    the further ones; with fewer it returns what there is, with a warning. SIGINT (Ctrl-C), SIGTERM and SIGHUP (a lost
    terminal, unless `nohup` has them ignored) end the run after the program under way with a checkpoint and
    `SystemExit(128 + signal)`; a second one ends the process at once. Without a folder they do what they always do.
    Meanwhile `training.progress(folder)` says in any other process how far the run is.

    A second call with the same functions (problem or method, optimizer, record, rules) and shapes compiles nothing.

    Args:
        problem_or_method: a `Problem`, or a method from `descent.method`.
        optimizer_or_state: an optax transformation for the problem; for a method the state to start from. The stream
            is entered at `state.num_examples`: the state of a finished run goes on.
        data: the examples for a method, every leaf [N, ...]; those of a problem are its own. Arrays of jax are put on
            every device whole. NumPy arrays, memory-mapped ones among them, stay in host memory: the batches of the
            next two programs are gathered while the device works on this one. The result is the same bit for bit.
        key: typed PRNG key: of the stream for a method; for a problem, parameters and stream are drawn from its two
            children.
        batch_size: B, examples per update.
        num_updates: T, updates of the whole run, those before a resume included; or
        num_epochs: passes over the N examples, T = N * num_epochs // B.
        schedule: in place of the three above, phases [(num_updates, B), ...] of the whole run, in one stream without a
            seam. What B compiles, it compiles once. A schedule of the rate given to optax counts updates, whatever
            their B; `batching.Phases.counted` makes examples of them. A resumed run may make its last phase longer.
        record: (state after the update, info of the update) -> pytree of arrays; default what `problem.evaluate` says
            of the state, with the examples seen beside it, and for a method the loss of the batch.
        every: updates between records; default N // B for a problem, an epoch (at the mean B of a schedule), and 1 for
            a method. The last update is always recorded.
        gradient: for a problem, an estimator's factory from `gradients`, loss -> estimator; default `gradients.mean`.
        stream: from `batching`.
        unroll: as in `descent.run`.
        until: {name: Rule} of rules from `descent` that end the run. They are asked every `every` updates, about the
            state and the info of that update. So `descent.no_improvement(5, evaluate=lambda state, info:
            problem.evaluate(state.params, on="test", names=("loss",))["loss"])` ends a run whose test loss has not
            fallen for five records. A run that a rule has ended stays ended, whatever num_updates is.
        ema: half-life in examples of an average of the parameters after every update, in float32 at least;
            `math.inf` for their plain mean.
        chunk_updates: updates that at most run as one program, between two looks at the clock and at signals.
        mesh: devices that share each batch: it is sharded over all axes of the mesh, the parameters are replicated.
            With several processes (`jax.distributed`), all call `run` with the same arguments. Process 0 alone writes
            and prints, so that only it needs the folder.
        sharded: for a state that one device cannot hold, how it lies on the mesh, and in checkpoints, which are resumed
            on any mesh. 'fsdp' shares the longest axis of every leaf that all devices can share equally. A function
            is given the path of a leaf, such as "params['w']" or "opt_state[0].mu['w']", and returns its PartitionSpec.
            Parameters are then drawn where they lie. The devices must be those of one process.
        folder: where checkpoints are kept, the newest two. Each holds the state and the whole history.
        checkpoint_seconds: seconds between checkpoints. There is one at the end in any case.

    Returns:
        `Trained`, which unpacks as (state, history).

    Raises:
        ValueError: for arguments that do not fit each other, a batch that the devices cannot share equally (naming one
            that they can), a stream longer than 2^63, and a folder that cannot be written, is in use by a run that is
            alive, or holds another run.
        ModuleNotFoundError: with a folder, without orbax-checkpoint or filelock; with data in NumPy arrays, without
            grain.
        OSError: where a checkpoint cannot be written, as on a full disk. Those before it are intact.
    """
    _check(until, ema, checkpoint_seconds)
    phases, layout = _phases(schedule, batch_size, num_updates, num_epochs), _layout.of(mesh, sharded)
    if isinstance(problem_or_method, Problem):
        task = tasks.of_problem(problem_or_method, optimizer_or_state, data, key, phases, gradient, record, layout)
    else:
        task = tasks.of_method(problem_or_method, optimizer_or_state, data, key, gradient, record)
    total = phases.num_updates if schedule is not None else None
    total = total or _count(num_updates, num_epochs, num_examples(task.data), phases.sizes[0])
    numbers = {"every": task.every if every is None else every, "chunk_updates": chunk_updates}
    plan = _feeding.planned(task.state, task.data, mesh, phases, total, **numbers)
    on_host = any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(task.data))
    _check_installed(saves=folder is not None, feeds=on_host)

    rules = tuple(until.values())
    parts = _updates.Parts(
        task.method, task.record_of, rules, ema is not None, mesh, layout, unroll=unroll, fed=on_host
    )
    same = ("training", task.of, rules, ema, mesh, sharded, unroll, on_host)
    updates = kept(task.method.step, same, lambda: _updates.updates(parts, ema))
    carry = updates.begin(task.state if layout is None else jax.device_put(task.state, layout(task.state)))
    carry = carry if layout else _feeding.placed(carry, plan.sharding())
    shapes = jax.eval_shape(lambda tree: tree, carry)  # without their mesh, which a resumed run may change
    described, *others = (
        updates.describe.trace(shapes, _batch_shapes(task.data, size), task.examples) for size in phases.sizes
    )
    if any(other.out_info != described.out_info for other in others):
        raise ValueError(f"record must return the same shapes at every batch size of schedule={schedule!r}")
    with contextlib.ExitStack() as stack:
        checkpoints, received = None, []
        if folder is not None:
            received = stack.enter_context(_signals.received())
            if jax.process_index() == 0:
                identity = _identity.of(described.jaxpr, task, plan, stream, until, ema, sharded)
                like = {} if layout is None else _feeding.to_names("run", carry, to=_feeding.as_data)
                checkpoints = stack.enter_context(_checkpoint.opened(folder, identity, like))
        place = (lambda tree: tree) if layout else partial(_feeding.placed, sharding=plan.sharding())
        journal, carry = _resumed(checkpoints, carry, described.out_info[0], plan, (*until, BUDGET), place)
        if not journal.stopped and journal.num_updates < plan.num_updates:
            feed = _feeding.from_host if on_host else _feeding.from_device
            inputs = feed(task.data, task.key, plan, stream, journal.num_updates, task.examples)
            carry = loop(updates.program, inputs, carry, journal, checkpoints, checkpoint_seconds, received)
    return _trained(carry, journal, ema)


def _trained(carry: Carry, journal: Journal, ema: float | None) -> Trained:
    history, ended = journal.so_far(), journal.names[journal.rule]
    if ema is None:
        return Trained(carry.state, history.last, ended)
    state, average = averages.split(carry.state)
    return Trained(state, history.last, ended, Averaged(averages.in_place(average, state.params), history.average))


def _check(until: Mapping[str, Rule], ema: float | None, checkpoint_seconds: float) -> None:
    if BUDGET in until:
        raise ValueError(f"until={sorted(until)}: {BUDGET!r} is what num_updates is called; give the rule another name")
    if wrong := [name for name, rule in until.items() if not isinstance(rule, Rule)]:
        raise ValueError(f"until[{wrong[0]!r}]={until[wrong[0]]!r} must be a descent.Rule, as descent.diverged() is")
    if ema is not None and not ema > 0:
        raise ValueError(f"ema={ema} must be a half-life above 0, in examples, or None")
    if not checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint_seconds={checkpoint_seconds} must be at least 0")


def _phases(schedule, batch_size: int | None, num_updates: int | None, num_epochs: int | None) -> batching.Phases:
    """Return the batch sizes of the run, from one of the two ways to say them."""
    if (schedule is None) == (batch_size is None) or (schedule is not None and (num_updates or num_epochs)):
        raise ValueError(
            f"give batch_size={batch_size} with num_updates or num_epochs, or schedule={schedule!r}, one of the two"
        )
    if schedule is not None:
        return batching.Phases.of(schedule)
    if batch_size is None or batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    return batching.Phases.of(batch_size)


def _batch_shapes(data: Batch, batch_size: int) -> Batch:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), _dtype(x)), data)


def _count(num_updates: int | None, num_epochs: int | None, num_examples: int, batch_size: int) -> int:
    """Return T, from one of the two ways to say it."""
    if num_updates is not None and num_epochs is None:
        return num_updates
    if num_updates is not None or num_epochs is None:
        raise ValueError(f"give num_updates={num_updates} or num_epochs={num_epochs}, one of the two")
    count = num_epochs * num_examples // max(1, batch_size)
    if count < 1:
        raise ValueError(f"num_epochs={num_epochs} of {num_examples} examples are no update of {batch_size}")
    return count


def _check_installed(*, saves: bool, feeds: bool) -> None:
    if saves:
        _checkpoint.check_installed()
    if feeds and importlib.util.find_spec("grain") is None:
        advice = "pip install 'gdjax[grain]', or put data that fits onto the device: jax.tree.map(jnp.asarray, data)"
        raise ModuleNotFoundError(f"data in NumPy arrays is fed by grain: {advice}")


def _resumed(checkpoints, carry: Carry, records: Records, plan: Plan, names, place) -> tuple[Journal, Carry]:
    """Return what the folder holds of the run, all of it where that is more than was asked for."""
    done, arrays = (checkpoints.newest() if checkpoints else None) or (0, {})
    held = int(arrays.pop("num_records", 0))
    if jax.process_count() > 1:
        halves = np.asarray([done >> 32, done & 0xFFFFFFFF, held], np.uint32)  # without x64 there are no wider integers
        high, low, held = (int(x) for x in multihost_utils.broadcast_one_to_all(halves))
        done = (high << 32) + low
    if checkpoints and done > plan.num_updates:
        warnings.warn(
            f"num_updates={plan.num_updates} are fewer than the {done} that the run in {checkpoints.folder} has made: "
            "all of them are returned",
            stacklevel=3,
        )
    length = max(held, plan.num_records(plan.num_updates))
    history = jax.tree.map(lambda x: np.zeros((length, *x.shape), x.dtype), records)
    past = jax.tree.map(lambda x: x[:held], history)
    if done and jax.process_count() > 1:
        blank = _feeding.to_names("run", carry) | _feeding.to_names("history", past)
        arrays = jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all({**blank, **arrays}))
    jax.tree.map(np.copyto, past, _feeding.from_names("history", past, arrays))
    carry = place(_feeding.from_names("run", carry, arrays))
    # A record that only the end of a shorter run has made is none of a longer one.
    num_records = held if done >= plan.num_updates else min(held, plan.num_records(done))
    return Journal(plan, names, history, done=done, num_records=num_records, rule=int(carry.rule)), carry


def _dtype(x):
    return x.dtype if isinstance(x, jax.Array) else jax.dtypes.canonicalize_dtype(x.dtype)
