import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from jax.sharding import AxisType

from gdjax import _files, batching, descent, gradients, training
from gdjax.training import _checkpoint as checkpoint
from gdjax.training import _feeding

NUM_EXAMPLES = 12
WEIGHTS = {"w": jnp.asarray([1.0, -2.0, 0.5])}


def loss(params, example):
    x, y = example
    return 0.5 * (params["w"] @ x - y) ** 2


METHOD = descent.method(gradients.mean(loss), optax.sgd(0.01, momentum=0.9))
START = METHOD.init(WEIGHTS)


def uneven(key, num_examples, *, start, length):
    """A stream that repeats itself only after five epochs, and compiles in no time."""
    position = start + jnp.arange(length, dtype=jnp.int32)
    return position * position // 5 % num_examples


@pytest.fixture(scope="module")
def data():
    x_key, y_key = jax.random.split(jax.random.key(1))
    return jax.random.normal(x_key, (NUM_EXAMPLES, 3)), jax.random.normal(y_key, (NUM_EXAMPLES,))


@pytest.fixture(scope="module")
def run(data):
    """Training with every argument given, any of which a test can change: three chunks."""

    def call(**changed):
        arguments = {"method": METHOD, "state": START, "data": data, "key": jax.random.key(0), "stream": uneven}
        return training.run(**arguments | {"batch_size": 4, "num_updates": 12, "chunk_updates": 4} | changed)

    return call


@pytest.fixture(scope="module")
def straight(run):
    """What that training returns."""
    return run()


def assert_equal(a, b):
    a, b = (jax.tree.map(np.asarray, tree) for tree in (a, b))
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def at_update(num_updates, monkeypatch, action):
    """Call `action` when the host begins the chunk after so many updates."""
    lengths = _feeding.Plan.lengths

    def acting(plan, done):
        for length in lengths(plan, done):
            if done == num_updates:
                action()
            yield length
            done += length

    monkeypatch.setattr(_feeding.Plan, "lengths", acting)


def power_cut():
    raise RuntimeError("power cut")


def steps(folder):
    return sorted(int(path.name) for path in Path(folder).iterdir() if path.name.isdecimal())


@pytest.mark.parametrize(("every", "num_updates", "stream"), [(1, 10, batching.reshuffled), (2, 12, uneven)])
def test_a_run_in_chunks_is_the_loop_of_descent(run, data, key, every, num_updates, stream):
    """With a tail chunk and without one; the caller's own state is still there afterwards."""

    def record(state, info):
        return {"loss": info.loss, "seen": state.num_examples}

    batches = batching.batches(stream(key, NUM_EXAMPLES, start=0, length=4 * num_updates), 4)
    loop = jax.jit(lambda state: descent.run(METHOD, state, data, batches, record, every=every))
    assert_equal(run(record=record, every=every, num_updates=num_updates, stream=stream), loop(START))
    assert int(START.num_examples) == 0


def test_the_state_of_a_finished_run_goes_on_where_it_ended(run, straight):
    state, losses = run(num_updates=4)
    state, more = run(num_updates=8, state=state)
    assert_equal((state, np.concatenate([losses, more])), straight)


@pytest.mark.parametrize("first", [2**31 - 20, 2**32 - 20])
def test_a_run_goes_on_past_what_32_bits_count(run, data, first, tmp_path):
    """On the device, from host memory, and resumed, against the loop over windows by hand."""
    pytest.importorskip("grain")
    start = START._replace(num_examples=batching.Count.of(first))
    window = batching.reshuffled(jax.random.key(0), NUM_EXAMPLES, start=first, length=4 * 12)
    loop = jax.jit(lambda state: descent.run(METHOD, state, data, batching.batches(window, 4)))
    expected = loop(start)
    assert int(expected[0].num_examples) == first + 48
    common = {"state": start, "stream": batching.reshuffled}
    assert_equal(run(**common), expected)
    assert_equal(run(**common, data=jax.tree.map(np.asarray, data)), expected)
    run(**common, num_updates=8, folder=tmp_path)
    assert_equal(run(**common, folder=tmp_path), expected)


def test_the_step_is_traced_once_and_a_chunk_compiled_once(run, caplog):
    @chex.assert_max_traces(n=1)
    def traced(params, example):
        return loss(params, example)

    chex.clear_trace_counter()
    method = descent.method(gradients.mean(traced), optax.sgd(0.01))
    with jax.log_compiles():
        run(method=method, num_updates=22)  # five chunks of 4, and a tail of 2
    compiled = [text for text in caplog.messages if text.startswith("Finished XLA compilation of jit(chunk)")]
    assert len(compiled) == 2


def test_a_run_resumed_is_bit_for_bit_the_run_in_one_piece(run, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_update(8, patch, power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            run(folder=tmp_path, checkpoint_seconds=0)
    assert steps(tmp_path) == [4, 8]
    assert_equal(run(folder=tmp_path, checkpoint_seconds=0), straight)
    assert steps(tmp_path) == [8, 12]  # the newest two are kept
    assert_equal(run(folder=tmp_path), straight)  # nothing is left to do
    assert_equal(run(folder=tmp_path, num_updates=16), run(num_updates=16))  # or some more


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.usefixtures("listening")
def test_a_signal_saves_and_exits_and_the_handlers_are_restored(run, straight, tmp_path, monkeypatch, capsys, signum):
    def interrupt():
        signal.raise_signal(signum)
        during.extend(map(signal.getsignal, SIGNALS))

    during, before = [], list(map(signal.getsignal, SIGNALS))
    at_update(4, monkeypatch, interrupt)
    with pytest.raises(SystemExit) as end:
        run(folder=tmp_path)
    assert end.value.code == 128 + signum
    assert during == [signal.SIG_DFL] * 3  # another one would have ended the process at once
    assert list(map(signal.getsignal, SIGNALS)) == before
    assert f"{signum.name} after update 8 of 12; saved in {tmp_path}" in capsys.readouterr().err
    assert steps(tmp_path) == [8]
    monkeypatch.undo()
    assert_equal(run(folder=tmp_path), straight)


def test_a_signal_that_the_process_ignores_stays_ignored(run, straight, tmp_path, monkeypatch):
    """As `nohup` makes it ignore the end of its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_update(4, monkeypatch, lambda: signal.raise_signal(signal.SIGHUP))
        assert_equal(run(folder=tmp_path), straight)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_standard_error_is_no_reason_to_fail(run, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert_equal(run(folder=tmp_path / "a"), straight)
    at_update(4, monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(folder=tmp_path / "b")


def test_without_a_folder_ctrl_c_is_python_s_own(run, monkeypatch, listening):
    at_update(4, monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run()


def test_every_kind_of_leaf_survives_a_checkpoint(tmp_path, key):
    """Keys and noise in the optimiser's state, leaves without entries, bfloat16, integers."""
    optimizer = optax.chain(optax.add_noise(0.1, 0.55, key=jax.random.key(7)), optax.sgd(0.1, momentum=0.9))
    params = {"half": jnp.ones(3, jnp.bfloat16), "none": jnp.ones((0, 2)), "table": jnp.arange(3)}
    method = descent.method(
        gradients.mean(lambda p, x: (p["half"] * p["table"]).sum().astype(float) * x + p["none"].sum()), optimizer
    )
    arguments = {
        "method": method,
        "data": jnp.ones(4),
        "key": key,
        "batch_size": 2,
        "chunk_updates": 2,
        "stream": uneven,
    }
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        straight = training.run(state=method.init(params), **arguments, num_updates=4)
        for num_updates in (2, 4):
            resumed = training.run(state=method.init(params), **arguments, num_updates=num_updates, folder=tmp_path)
    key_data = [
        jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, run)
        for run in (resumed, straight)
    ]
    assert_equal(*key_data)
    assert float(resumed[0].params["half"][1]) != 1.0


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_the_one_before_stays_good(
    run, straight, tmp_path, monkeypatch
):
    before = set(threading.enumerate())
    folder, aside = tmp_path / "run", tmp_path / "aside"

    def lose_the_disk():
        folder.rename(aside)
        folder.write_text("not a folder")

    run(folder=folder, num_updates=4)
    at_update(4, monkeypatch, lose_the_disk)
    with pytest.raises(OSError, match=r"could not be written to .*run: .* Those written before are intact"):
        run(folder=folder)
    monkeypatch.undo()
    for thread in set(threading.enumerate()) - before:
        if type(thread) is not threading.Thread:  # not an idle thread of a pool, but one at work
            thread.join(timeout=5)
            assert not thread.is_alive()  # for it would keep the process from ending
    folder.unlink()
    aside.rename(folder)
    (folder / "lock.holder").unlink()  # which nobody could remove there
    assert_equal(run(folder=folder), straight)


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """The folder of a finished run, with the checkpoints of updates 8 and 12."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder=folder, checkpoint_seconds=0)
    assert steps(folder) == [8, 12]
    return folder


def damage(step, how):
    """Change the files that hold the arrays, or the identity, as a disk might."""
    for path in (step / "about").rglob("metadata") if how == "another identity" else (step / "arrays").rglob("d/*"):
        content = bytearray(path.read_bytes())
        if how == "another identity":
            path.write_bytes(content.replace(b'"batch_size":', b'"batch_sizf":'))
            continue
        if how == "truncated":
            content = content[: len(content) // 2]
        else:
            content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "flipped", "another identity", "wrong but readable"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run, straight, finished, tmp_path, monkeypatch, how):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    if how == "wrong but readable":
        monkeypatch.setattr(checkpoint, "checksum", lambda arrays, right=checkpoint.checksum: right(arrays)[::-1])
        with (
            pytest.raises(ValueError, match=r"all its checkpoints are damaged \(updates \[12, 8\]\)"),
            pytest.warns(RuntimeWarning, match="do not match their checksum"),
        ):
            run(folder=tmp_path)
        return
    damage(tmp_path / "12", how)
    with pytest.warns(RuntimeWarning, match=r"the checkpoint of update 12 in .* is damaged .* the one before is used"):
        assert_equal(run(folder=tmp_path), straight)
    assert steps(tmp_path) == [8, 12]
    assert_equal(run(folder=tmp_path), straight)


MANY_LEAVES = """
import sys
import jax.numpy as jnp, jax, optax
from gdjax import descent, gradients, training
method = descent.method(gradients.mean(lambda w, x: sum((v - x) ** 2 for v in w)), optax.sgd(0.01))
options = {"batch_size": 2, "num_updates": 4, "chunk_updates": 2, "folder": sys.argv[1], "checkpoint_seconds": 0}
training.run(method, method.init([jnp.zeros(())] * 25), jnp.arange(4.0), key=jax.random.key(0), **options)
"""


@pytest.mark.slow
def test_a_damaged_checkpoint_of_many_arrays_is_one_warning_and_no_traceback(tmp_path):
    """Orbax leaves its other reads to end when their event loop is closed, each with a traceback of its own."""

    def again():
        command = [sys.executable, "-c", MANY_LEAVES, tmp_path / "run"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stderr

    assert again() == ""
    damage(tmp_path / "run" / "4", "truncated")
    said = again()
    assert "the checkpoint of update 4 in" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": jax.random.key(5)}, r"key was 'threefry2x32 \[0 0\]' and is 'threefry2x32 \[0 5\]'"),
        ({"batch_size": 2}, "batch_size was 4 and is 2"),
        ({"stream": batching.cyclic}, "stream was 'uneven' and is 'cyclic'"),
        ({"every": 2}, "every was 1 and is 2"),
        ({"num_updates": 4}, "num_updates=4 are fewer than the 12"),
        (
            {"method": descent.method(gradients.mean(loss), optax.sgd(0.02, momentum=0.9))},
            r"program of method and record was '\w+' and is",
        ),
        ({"data": (jnp.ones((NUM_EXAMPLES, 3)), jnp.ones(NUM_EXAMPLES))}, "sample of data was"),
        (
            {"data": (jnp.ones((6, 3)), jnp.ones(6))},
            r"data\[0\] was 'float\d+\[12, 3\]' and is 'float\d+\[6, 3\]'",
        ),
        ({"state": METHOD.init({"w": jnp.ones(3)})}, "first state was"),
        (
            {
                "method": (adam := descent.method(gradients.mean(loss), optax.sgd(0.01))),
                "state": adam.init(WEIGHTS),
            },
            r"state.opt_state\[0\].trace\['w'\] was 'float\d+\[3\]' and is None",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_folder_of_another_run_is_refused(run, finished, changed, message):
    with pytest.raises(ValueError, match=message):
        run(folder=finished, **changed)


def devices(num_devices, axis_type=AxisType.Auto):
    return jax.make_mesh((num_devices,), ("batch",), axis_types=(axis_type,), devices=jax.devices()[:num_devices])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"every": 5}, "every=5 must divide num_updates=12: 10 would do"),
        ({"every": 6}, "every=6 must divide chunk_updates=4: 6 would do"),
        ({"key": jax.random.PRNGKey(0)}, r"must be a typed key, from jax.random.key\(seed\)"),
        ({"num_updates": 2**61}, "go past position 2.63 of the stream: at most 2305843009213693951 updates"),
        ({"data": ()}, "data has no arrays"),
        ({"batch_size": 3, "mesh": devices(2)}, "batch_size=3 cannot be shared equally by the 2 devices.* is 4"),
        ({"mesh": devices(2, AxisType.Explicit)}, "mesh must have Auto axes"),
        ({"checkpoint_seconds": float("nan")}, "checkpoint_seconds=nan must be at least 0 seconds"),
        ({"folder": ""}, "folder='' names no folder"),
        ({"folder": "/proc/run"}, "folder='/proc/run' cannot be written"),
        ({"folder": __file__}, "folder=.* cannot be written: File exists"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_anything_is_compiled(run, changed, message):
    with pytest.raises(ValueError, match=message):
        run(**changed)


def test_a_missing_package_is_named_with_the_command_that_installs_it(run, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gdjax\[grain\]'"):
        run(data=jax.tree.map(np.asarray, data))
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ModuleNotFoundError, match=r"orbax-checkpoint: pip install 'gdjax\[experiments\]'"):
        run(folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(run, finished):
    """By a run in another process: `test_distributed`."""
    with _files.alone(finished, "folder"), pytest.raises(ValueError, match=r"folder='.*' is in use by process \d+ on"):
        run(folder=finished)


def test_two_devices_train_as_one(run):
    state, losses = run(num_updates=200, chunk_updates=100)
    both, both_losses = run(num_updates=200, chunk_updates=100, mesh=devices(2))
    chex.assert_trees_all_close((both, both_losses), (state, losses), rtol=0, atol=max(1e-12, 32 * precision.EPS))
    assert all(leaf.sharding.num_devices == 2 for leaf in jax.tree.leaves(both))


def test_data_in_host_memory_is_fed_bit_for_bit_as_on_the_device(run, straight, data, tmp_path):
    """A memory-mapped file among it, on one device and two, with a tail and without one, begun and resumed."""
    pytest.importorskip("grain")
    np.save(tmp_path / "x.npy", data[0])
    on_host = (np.load(tmp_path / "x.npy", mmap_mode="r"), np.asarray(data[1]))
    assert isinstance(on_host[0], np.memmap)
    shuffled = {"stream": batching.reshuffled, "num_updates": 10}
    assert_equal(run(data=on_host, **shuffled), run(**shuffled))
    assert_equal(run(data=on_host, mesh=devices(2)), run(mesh=devices(2)))
    run(data=on_host, num_updates=4, folder=tmp_path / "run")
    assert_equal(run(data=on_host, folder=tmp_path / "run"), straight)
