"""Training in processes of their own: on eight devices, on two processes of two devices, killed, and hung up on.

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

pytestmark = pytest.mark.slow

NUM_UPDATES = 200  # four chunks
STREAMS = {"float32": batching.cyclic, "float64": batching.reshuffled}  # the second costs more to compile
ATOL = {"float32": 1e-5, "float64": 1e-12}
SECONDS = 120  # after which a process is taken to hang


def loss(params, example):
    x, y = example
    return (jnp.tanh(params @ x) - y) ** 2


AFTER = {}  # {examples seen: what is done then}


def told(state, info):
    """Record the loss of the batch, and do what `AFTER` asks for."""
    jax.debug.callback(lambda seen: AFTER.get(int(seen), lambda: None)(), state.num_examples)
    return info.loss


def run(dtype, **changed):
    """Call `training.run` with what is the same in all processes, drawn by NumPy."""
    rng = np.random.default_rng(0)
    data = tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in ((50, 3), (50,)))
    method = descent.method(gradients.mean(loss), optax.sgd(0.02, momentum=0.5))
    state = method.init(jnp.asarray(rng.normal(size=3), dtype))
    options = {"key": jax.random.key(1), "batch_size": 8, "num_updates": NUM_UPDATES, "chunk_updates": 50}
    return training.run(method, state, data, **options | {"stream": STREAMS[dtype]} | changed)


def train(out, num_devices, folder=None, coordinator=None, process_id=0):
    """Train over all devices there are and keep the parameters; with a folder, in two halves in x64."""
    jax.config.update("jax_num_cpu_devices", num_devices)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    if coordinator:
        jax.distributed.initialize(coordinator, num_processes=2, process_id=process_id)
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    for dtype in ATOL:
        common = {"mesh": mesh, "until": {"never": descent.diverged()}, "ema": 100.0}
        if folder and dtype == "float64":
            common["folder"] = folder
            run(dtype, **common, num_updates=NUM_UPDATES // 2)
        state, losses = run(dtype, **common)
        np.savez(f"{out}-{dtype}.npz", *jax.tree.leaves(state.params), losses)


def train_and_go_on(out, folder):
    """Train on eight devices, then on one, slowly, with a checkpoint after every chunk: until killed."""
    train(out, num_devices=8)
    print("trained", flush=True)

    def slowly(last):
        print("chunk", flush=True)
        time.sleep(SECONDS if last else 0)

    AFTER.update({8 * done + 8: partial(slowly, done == 150) for done in (50, 100, 150)})
    run("float32", folder=folder, checkpoint_seconds=0, record=told)


def train_until_told(folder):
    """Train for long, and say when it has begun."""
    AFTER[8 * 60] = lambda: print("begun", flush=True)
    run("float32", folder=folder, record=told, num_updates=10**7)


def process(what, *, shell="", **options):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, __file__, json.dumps({"what": what} | options)]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
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
        state, losses = run(dtype, record=told)
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
    go_on = partial(run, "float32", folder=place / "run", record=told)
    with pytest.raises(ValueError, match=rf"folder='.*run' is in use by process {running.pid} on .*: wait for it"):
        go_on()
    progress = training.progress(place / "run")
    assert (progress.num_updates, progress.total, progress.ended) == (150, NUM_UPDATES, None)
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


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM])
def test_a_process_that_is_told_to_end_saves_without_a_standard_error(tmp_path, signum, listening):
    with process("train_until_told", shell="2>&-", folder=str(tmp_path)) as running:
        wait_for("begun", running)
        running.send_signal(signum)
        output, _ = running.communicate(timeout=SECONDS)
    assert (running.returncode, output) == (128 + signum, "")
    progress = training.progress(tmp_path)
    assert progress.ended == signum.name
    assert progress.num_saved == progress.num_updates >= 50


def test_progress_is_read_without_a_device(tmp_path):
    run("float32", folder=tmp_path, num_updates=50)
    read = "import sys; from gdjax import training; print(training.progress(sys.argv[1]).num_updates)"
    environment = os.environ | {"JAX_PLATFORMS": "none_such"}  # an error where it is asked for
    command = [sys.executable, "-c", read, str(tmp_path)]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "50\n"


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    doings = {"train": train, "train_and_go_on": train_and_go_on, "train_until_told": train_until_told}
    doings[options.pop("what")](**options)
