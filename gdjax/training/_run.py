"""One long run from the host: compiled chunks of updates, a progress bar, checkpoints, exact resume, many devices.

>>> import jax, jax.numpy as jnp, optax
>>> from gdjax import descent, gradients
>>> data = jnp.asarray([1.0, 2.0, 6.0, 7.0])
>>> sgd = descent.method(gradients.mean(lambda mean, x: 0.5 * (mean - x) ** 2), optax.sgd(0.5))
>>> state, losses = run(
...     sgd, sgd.init(0.0), data, key=jax.random.key(0), batch_size=2, num_updates=6, stream=batching.cyclic
... )
>>> float(state.params), losses.shape
(4.7578125, (6,))

Position t of the stream is a pure function of (key, t), and the state holds the number of examples seen. So the state
and the history so far are all that a checkpoint needs for a resume bit for bit.
"""

import collections
import contextlib
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.extend import core
from jax.sharding import Mesh

from gdjax import _files, batching, descent, problem, report
from gdjax.descent import Method, Record, State
from gdjax.problem import Batch
from gdjax.training import _checkpoint as checkpoint
from gdjax.training import _feeding as feeding
from gdjax.training._feeding import Plan

POLL_SECONDS = 1e-3
# Of Ctrl-C, of `kill` and schedulers, of a terminal that is closed: the last does not exist on Windows.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
NUM_SAMPLED = 1024  # examples that a data set is recognised by


def run(
    method: Method,
    state: State,
    data: Batch,
    *,
    key: jax.Array,
    batch_size: int,
    num_updates: int,
    stream: feeding.Stream = batching.reshuffled,
    record: Record = descent.batch_loss,
    every: int = 1,
    chunk_updates: int = 1000,
    mesh: Mesh | None = None,
    folder: str | os.PathLike | None = None,
    checkpoint_seconds: float = 60.0,
) -> tuple[State, Any]:
    """Make `num_updates` updates on batches of a stream; what `descent.run` does, for hours and through crashes.

    With a `folder`, a call after a crash or an interruption goes on from the newest checkpoint and returns what the run
    in one piece returns, bit for bit for the same `chunk_updates` and devices. With more updates than before it makes
    the further ones. SIGINT (Ctrl-C), SIGTERM and SIGHUP end the run after the chunk under way with a checkpoint and
    `SystemExit(128 + signal)`; a second one ends the process at once. Without a folder they do what they always do.

    Args:
        method: from `descent.method`.
        state: where to start. The stream is entered at `state.num_examples`: the state of a finished run goes on.
        data: examples, every leaf [N, ...]. Arrays of jax are put on every device whole. NumPy arrays, memory-mapped
            ones among them, stay in host memory: the batches of the next two chunks are gathered while the device
            works on this one. The result is the same bit for bit.
        key: typed PRNG key of the stream.
        batch_size: B, examples per update.
        num_updates: T, updates of the whole run, those before a resume included.
        stream: from `batching`.
        record: (state after the update, info of the update) -> pytree of arrays.
        every: updates between records; it divides `num_updates` and `chunk_updates`.
        chunk_updates: updates that are compiled as one program and run between two looks at the clock and at signals.
        mesh: devices that share each batch: it is sharded over all axes of the mesh, the parameters are replicated.
            With several processes (`jax.distributed`), all call `run` with the same arguments. Process 0 alone writes
            and prints, so that only it needs the folder.
        folder: where checkpoints are kept, the newest two. Each holds the state and the whole history.
        checkpoint_seconds: seconds between checkpoints, at least 0. There is one at the end in any case.

    Returns:
        (state after T updates, records as NumPy arrays stacked along a new axis 0 of length T / every).

    Raises:
        ValueError: for numbers that do not fit each other, a batch that the devices cannot share equally (naming one
            that they can), a stream longer than 2^63, and a folder that cannot be written, is in use by a run that is
            alive, or holds another run.
        ModuleNotFoundError: with a folder, without orbax-checkpoint or filelock; with data in NumPy arrays, without
            grain.
        OSError: where a checkpoint cannot be written, as on a full disk. Those before it are intact.
    """
    numbers = {"batch_size": batch_size, "num_updates": num_updates, "every": every, "chunk_updates": chunk_updates}
    plan = feeding.planned(state, data, key, mesh, **numbers)
    if not checkpoint_seconds >= 0:  # NaN is not either
        raise ValueError(f"checkpoint_seconds={checkpoint_seconds} must be at least 0 seconds")
    on_host = any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(data))
    _check_installed(saves=folder is not None, feeds=on_host)
    step = jax.jit(method.step, inline=True)  # traced once, for its shapes here and for every program below
    history, identity = _described(step, state, data, plan, key, stream, record)
    method = Method(method.init, feeding.sharded(step, plan))
    feed = feeding.from_host if on_host else feeding.on_device
    with contextlib.ExitStack() as stack:
        checkpoints, received = None, []
        if folder is not None:
            received = stack.enter_context(_signals())
            if jax.process_index() == 0:
                checkpoints = stack.enter_context(checkpoint.opened(folder, identity))
        done, state = _resumed(checkpoints, state, history, plan)
        options = {"total": plan.num_updates, "initial": done, "unit": "update"}
        bar = stack.enter_context(report.progress_bar(**options))
        program, inputs = feed(method, data, key, plan, stream, record, done)
        state = feeding.placed(state, plan.sharding())
        state = _loop(program, inputs, state, history, plan, done, checkpoints, checkpoint_seconds, received, bar)
    return state, history


def _loop(program, inputs, state, history, plan, done, checkpoints, checkpoint_seconds, received, bar) -> State:
    """Run the chunks. One is queued behind the one under way, so that the device need not wait for the host."""
    under_way = collections.deque()
    saved_at = time.monotonic()
    for length in plan.lengths(done):
        state, output = program(state, next(inputs), length=length)
        done += length
        under_way.append((done, output))
        signum = _agreed(received)
        pauses = signum or done == plan.num_updates or time.monotonic() - saved_at >= checkpoint_seconds
        while len(under_way) > (0 if pauses else 1):
            end, output = under_way.popleft()
            loss = _collected(output, history, end // plan.every)
            bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
            bar.update(end - bar.n)
        if pauses and checkpoints:
            past = _until(history, done // plan.every)
            checkpoints.save(done, feeding.to_names("state", state) | feeding.to_names("history", past))
        if pauses:
            saved_at = time.monotonic()
        if signum:
            _stop(signum, done, plan, checkpoints)
    return state


def _check_installed(*, saves: bool, feeds: bool) -> None:
    if saves:
        checkpoint.check_installed()
    if feeds and importlib.util.find_spec("grain") is None:
        advice = "pip install 'gdjax[grain]', or put data that fits onto the device: jax.tree.map(jnp.asarray, data)"
        raise ModuleNotFoundError(f"data in NumPy arrays is fed by grain: {advice}")


def _described(step, state, data, plan: Plan, key, stream, record) -> tuple[Any, checkpoint.Identity]:
    """Return an empty history and the identity of the run."""
    num_examples = problem.num_examples(data)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((plan.batch_size, *x.shape[1:]), _dtype(x)), data)

    def update(state, batch):
        state, info = step(state, batch)
        return state, record(state, info)

    closed, (_, records) = jax.make_jaxpr(update, return_shape=True)(state, batch)
    length = plan.num_updates // plan.every
    history = jax.tree.map(lambda x: np.zeros((length, *x.shape), x.dtype), records)

    def program(constants, leaves):
        return core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, constants))(*leaves)

    leaves = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in closed.in_avals]
    text, arrays = _files.fingerprint(program, closed.consts, leaves)
    sample = np.linspace(0, num_examples - 1, min(num_examples, NUM_SAMPLED)).astype(int)
    shapes = {
        name + jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}"
        for name, tree in (("state", state), ("data", data))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    return history, shapes | {
        "key": f"{jax.random.key_impl(key)} {jax.random.key_data(key)}",
        "batch_size": plan.batch_size,
        "every": plan.every,
        "stream": getattr(stream, "__name__", repr(stream)),
        "jax": jax.__version__,
        "program of method and record": text,
        "arrays in method and record": arrays,
        "first state": checkpoint.checksum(feeding.to_names("", state)),
        "sample of data": checkpoint.checksum(feeding.to_names("", jax.tree.map(lambda x: x[sample], data))),
    }


def _resumed(checkpoints, state, history, plan: Plan) -> tuple[int, State]:
    """Return (updates done, state after them) and fill in their part of the history."""
    done, arrays = (checkpoints.newest() if checkpoints else None) or (0, {})
    if done > plan.num_updates:
        raise ValueError(
            f"num_updates={plan.num_updates} are fewer than the {done} that the run in {checkpoints.folder} has made"
        )
    if jax.process_count() > 1:
        done = int(multihost_utils.broadcast_one_to_all(batching.Count.of(done)))
    if not done:
        return 0, state
    past = _until(history, done // plan.every)

    if jax.process_count() > 1:
        blank = feeding.to_names("state", state) | feeding.to_names("history", past)
        arrays = jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all({**blank, **arrays}))
    jax.tree.map(np.copyto, past, feeding.from_names("history", past, arrays))
    return done, feeding.from_names("state", state, arrays)


def _collected(output, history, end: int) -> float:
    """Wait for a chunk, write its records into the history where they end, and return its last loss."""
    for leaf in jax.tree.leaves(output):
        while not leaf.is_ready():  # not `block_until_ready`, during which no signal would be seen
            time.sleep(POLL_SECONDS)
    losses, records = output

    def write(whole, piece):
        whole[end - len(piece) : end] = np.asarray(piece)

    jax.tree.map(write, history, records)
    return float(np.asarray(losses)[-1])  # `losses[-1]` would be a program of its own, queued behind the next chunk


def _agreed(received: list[int]) -> int:
    """Return the signal to stop for, or 0. Several processes must stop at the same update, whoever was told."""
    signum = received[0] if received else 0
    if jax.process_count() > 1:
        signum = int(multihost_utils.process_allgather(np.int32(signum)).max())
    return signum


def _stop(signum: int, done: int, plan: Plan, checkpoints) -> NoReturn:
    if checkpoints:
        checkpoints.finish()
    if checkpoints and sys.stderr is not None:
        print(
            f"gdjax: {signal.Signals(signum).name} after update {done} of {plan.num_updates}; saved in "
            f"{checkpoints.folder}, from where the same call goes on",
            file=sys.stderr,
        )
    raise SystemExit(128 + signum)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGNALS in a list, the first of them; another then ends the process as if nobody listened.

    Those that the process was started to ignore, as `nohup` does with SIGHUP, it goes on to ignore.
    """
    received: list[int] = []
    listened = [signum for signum in SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield received
        return

    def receive(signum, frame):
        received.append(signum)
        for other in listened:
            signal.signal(other, signal.SIG_DFL)

    before = {signum: signal.signal(signum, receive) for signum in listened}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _dtype(x):
    return x.dtype if isinstance(x, jax.Array) else jax.dtypes.canonicalize_dtype(x.dtype)


def _until(history, length: int):
    return jax.tree.map(lambda x: x[:length], history)
