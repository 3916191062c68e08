"""Training in processes of their own: on eight devices, on two processes of two devices, and killed.

As a script this file is such a process: `python test_distributed.py '{"folder": ..., ...}'`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from gdjax import batching, descent, gradients, training
from gdjax.training import _feeding

NUM_UPDATES = 200  # four chunks
STREAMS = {"float32": batching.cyclic, "float64": batching.reshuffled}  # the second costs more to compile
ATOL = {"float32": 1e-5, "float64": 1e-12}
SECONDS = 120  # after which a process is taken to hang


def loss(params, example):
    x, y = example
    return (jnp.tanh(params @ x) - y) ** 2


def arguments(dtype):
    """Return what all processes call `training.run` with: the same everywhere, drawn by NumPy."""
    rng = np.random.default_rng(0)
    data = tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in ((50, 3), (50,)))
    method = descent.method(gradients.mean(loss), optax.sgd(0.02, momentum=0.5))
    return {
        "method": method,
        "state": method.init(jnp.asarray(rng.normal(size=3), dtype)),
        "data": data,
        "key": jax.random.key(1),
        "batch_size": 8,
        "chunk_updates": 50,
        "stream": STREAMS[dtype],
    }


def train(out, num_devices, folder=None, coordinator=None, process_id=0):
    """Train over all devices there are and keep the parameters; with a folder, in two halves in x64."""
    jax.config.update("jax_num_cpu_devices", num_devices)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    if coordinator:
        jax.distributed.initialize(coordinator, num_processes=2, process_id=process_id)
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    for dtype in ATOL:
        common = arguments(dtype) | {"mesh": mesh}
        if folder and dtype == "float64":
            common["folder"] = folder
            training.run(**common, num_updates=NUM_UPDATES // 2)
        state, losses = training.run(**common, num_updates=NUM_UPDATES)
        np.savez(f"{out}-{dtype}.npz", *jax.tree.leaves(state.params), losses)


def train_and_go_on(out, folder):
    """Train on eight devices, then on one, slowly, with a checkpoint after every chunk: until killed."""
    train(out, num_devices=8)
    print("trained", flush=True)
    lengths = _feeding.Plan.lengths

    def slowly(plan, done):
        for length in lengths(plan, done):
            yield length
            done += length
            print("chunk", flush=True)
            time.sleep(SECONDS if done == 150 else 0)

    _feeding.Plan.lengths = slowly
    training.run(**arguments("float32"), num_updates=NUM_UPDATES, folder=folder, checkpoint_seconds=0)


def process(what, **options):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, __file__, json.dumps({"what": what} | options)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs


def assert_close(path, expected, atol):
    arrays = np.load(path)
    for name, array in zip(arrays, expected, strict=True):
        np.testing.assert_allclose(arrays[name], array, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def expected():
    """Parameters and losses on one device."""
    if not jax.config.read("jax_enable_x64"):
        pytest.skip("trains in float64 too")
    results = {}
    for dtype in ATOL:
        state, losses = training.run(**arguments(dtype), num_updates=NUM_UPDATES)
        results[dtype] = [*jax.tree.leaves(state.params), losses]
    return results


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """A process that trains on eight devices, then slowly into a folder. Yields it and its place."""
    place = tmp_path_factory.mktemp("another")
    with process("train_and_go_on", out=str(place / "8"), folder=str(place / "run")) as running:
        try:
            wait_for("trained", running)
            yield running, place
        finally:
            running.kill()


def wait_for(line, running, times=1):
    for found in running.stdout:
        times -= found == f"{line}\n"
        if not times:
            return
    raise AssertionError(running.communicate())


def test_eight_devices_train_as_one(another, expected):
    _, place = another
    for dtype, atol in ATOL.items():
        assert_close(place / f"8-{dtype}.npz", expected[dtype], atol)


def test_a_folder_is_refused_while_a_run_in_it_lives_and_goes_on_bit_for_bit_when_that_was_killed(another, expected):
    running, place = another
    wait_for("chunk", running, times=3)
    go_on = partial(training.run, **arguments("float32"), num_updates=NUM_UPDATES, folder=place / "run")
    with pytest.raises(ValueError, match=rf"folder='.*run' is in use by process {running.pid} on .*: wait for it"):
        go_on()
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert any(path.name.isdecimal() for path in (place / "run").iterdir())
    with pytest.warns(UserWarning, match=f"taken over from process {running.pid} on"):
        state, losses = go_on()
    for a, b in zip([*jax.tree.leaves(state.params), losses], expected["float32"], strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_processes_of_two_devices_train_as_one_and_the_first_alone_writes(tmp_path, expected):
    """They stop halfway and go on from the checkpoint of process 0."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    finish(
        *(
            process(
                "train",
                out=str(tmp_path / f"{i}"),
                folder=str(tmp_path / f"folder-{i}"),
                num_devices=2,
                coordinator=coordinator,
                process_id=i,
            )
            for i in range(2)
        )
    )
    for dtype, atol in ATOL.items():
        for i in range(2):
            assert_close(tmp_path / f"{i}-{dtype}.npz", expected[dtype], atol)
    assert (tmp_path / "folder-0" / f"{NUM_UPDATES}").is_dir()
    assert not (tmp_path / "folder-1").exists()


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    {"train": train, "train_and_go_on": train_and_go_on}[options.pop("what")](**options)
