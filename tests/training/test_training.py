import shutil
import signal
import sys
import threading
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from jax.sharding import AxisType

from gdjax import batching, descent, gradients, training
from gdjax.problem import Problem
from gdjax.training import _signals

NUM_EXAMPLES = 12
WEIGHTS = {"w": jnp.asarray([1.0, -2.0, 0.5])}


def loss(params, example):
    x, y = example
    return 0.5 * (params["w"] @ x - y) ** 2


METHOD = descent.method(gradients.mean(loss), optax.sgd(0.01, momentum=0.9))
START = METHOD.init(WEIGHTS)
AFTER = {}  # {examples seen: what is done then, once}


def told(state, info):
    """Record the loss of the batch, and do what `AFTER` asks for."""
    jax.debug.callback(lambda seen: AFTER.pop(int(seen), lambda: None)(), state.num_examples)
    return info.loss


@pytest.fixture(autouse=True)
def _nothing_is_left_to_do():
    yield
    AFTER.clear()


def uneven(key, num_examples, *, start=0, length):
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
        parts = [changed.pop(name, part) for name, part in (("method", METHOD), ("state", START), ("data", data))]
        arguments = {"key": jax.random.key(0), "stream": uneven, "record": told}
        return training.run(*parts, **arguments | {"batch_size": 4, "num_updates": 12, "chunk_updates": 4} | changed)

    return call


@pytest.fixture(scope="module")
def straight(run):
    """What that training returns."""
    return run()


def assert_equal(a, b):
    a, b = (jax.tree.map(np.asarray, tuple(pair)) for pair in (a, b))
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def power_cut():
    raise RuntimeError("power cut")


def steps(folder):
    return sorted(int(path.name) for path in Path(folder).iterdir() if path.name.isdecimal())


@pytest.mark.parametrize(
    ("every", "num_updates", "chunk_updates", "stream"),
    [(1, 10, 4, batching.reshuffled), (2, 12, 4, uneven), (3, 11, 7, uneven), (5, 13, 3, uneven)],
)
def test_a_run_in_chunks_is_the_loop_of_descent(run, data, key, every, num_updates, chunk_updates, stream):
    """With and without a tail, with chunks of several records and a record of several chunks."""

    def record(state, info):
        return {"loss": info.loss, "seen": state.num_examples}

    batches = batching.batches(stream(key, NUM_EXAMPLES, start=0, length=4 * num_updates), 4)
    loop = jax.jit(lambda state: descent.run(METHOD, state, data, batches, record, every=every))
    options = {"every": every, "num_updates": num_updates, "chunk_updates": chunk_updates, "stream": stream}
    assert_equal(run(record=record, **options), loop(START))
    assert int(START.num_examples) == 0  # the caller's own state is still there


@pytest.fixture(scope="module")
def problem(data):
    """Least squares whose second half of the data are test examples."""
    parts = [jax.tree.map(lambda x: x[part], data) for part in (slice(0, 8), slice(8, None))]  # noqa: B023
    return Problem(
        lambda key: {"w": jax.random.normal(key, (3,))}, loss, *parts, {"twice": lambda w, x: 2 * loss(w, x)}
    )


SGD = optax.sgd(0.05)


@pytest.mark.parametrize(
    "options", [{"num_epochs": 3, "batch_size": 3}, {"num_updates": 5, "batch_size": 4, "every": 2}]
)
def test_a_problem_is_trained_as_by_descent(problem, key, options):
    options |= {"key": key, "stream": uneven}
    assert_equal(training.run(problem, SGD, **options), descent.train(problem, SGD, **options))


def no_better(problem):
    return descent.no_improvement(
        2, lambda state, info: problem.evaluate(state.params, on="test", names=("loss",))["loss"]
    )


@pytest.mark.parametrize(("every", "chunk_updates"), [(2, 5), (3, 2)])
@pytest.mark.slow
def test_a_rule_ends_a_run_where_its_history_says_and_a_resumed_one_too(problem, key, tmp_path, every, chunk_updates):
    """The test loss of steps that are too long rises again and again."""

    def record(state, info):
        told(state, info)
        return {"w": state.params["w"], "test": problem.evaluate(state.params, on="test", names=("loss",))["loss"]}

    options = {"key": key, "batch_size": 1, "every": every, "chunk_updates": chunk_updates, "stream": uneven}
    options |= {"num_updates": 41, "record": record}
    until = {"diverged": descent.diverged(), "no better": no_better(problem)}
    optimizer = optax.sgd(0.3)
    whole = training.run(problem, optimizer, **options)
    assert whole.ended == "budget"
    best, since, expected = np.inf, 0, 0
    while since < 2:  # the rule, by hand
        value = whole.history["test"][expected]
        best, since, expected = min(best, value), 0 if value < best else since + 1, expected + 1
    assert 2 < expected < len(whole.history["test"]) - 3
    found = training.run(problem, optimizer, **options, until=until)
    assert found.ended == "no better"
    assert_equal((found.history,), (jax.tree.map(lambda x: x[:expected], whole.history),))
    np.testing.assert_array_equal(found.state.params["w"], found.history["w"][-1])
    assert int(found.state.num_examples) == expected * every

    AFTER[expected * every] = power_cut  # when the value before has been counted
    with pytest.raises(jax.errors.JaxRuntimeError, match="power cut"):
        training.run(problem, optimizer, **options, until=until, folder=tmp_path, checkpoint_seconds=0)
    assert 0 < max(steps(tmp_path)) < expected * every
    for num_updates in (41, 60):  # what a rule has ended stays ended
        options |= {"num_updates": num_updates}
        again = training.run(problem, optimizer, **options, until=until, folder=tmp_path)
        assert again.ended == training.progress(tmp_path).ended == "no better"
        assert_equal(again, found)


@pytest.mark.slow
def test_the_average_is_the_weighted_mean_of_the_iterates_resumed_too(problem, key, tmp_path):
    half_life = 5.0

    def record(state, info):
        told(state, info)
        return {"params": state.params["w"], "loss": problem.evaluate(state.params, names=("loss",))["loss"]}

    options = {"key": key, "batch_size": 2, "num_updates": 10, "every": 1, "record": record, "chunk_updates": 3}
    options |= {"ema": half_life, "stream": uneven}
    found = training.run(problem, SGD, **options)
    thetas = found.history["params"]
    weights = [0.5 ** (2 * np.arange(t)[::-1] / half_life) for t in range(1, 11)]
    means = np.stack([w @ thetas[: len(w)] / w.sum() for w in weights])
    tolerance = {"rtol": 0, "atol": 64 * precision.EPS}
    np.testing.assert_allclose(found.ema.history["params"], means, **tolerance)
    np.testing.assert_allclose(found.ema.params["w"], means[-1], **tolerance)
    losses = jax.vmap(lambda w: problem.evaluate({"w": w})["loss"])(jnp.asarray(means))
    np.testing.assert_allclose(found.ema.history["loss"], losses, **tolerance)
    assert_equal(training.run(problem, SGD, **options | {"ema": None}), found)  # which is only looked at

    AFTER[2 * 8] = power_cut
    with pytest.raises(jax.errors.JaxRuntimeError, match="power cut"):
        training.run(problem, SGD, **options, folder=tmp_path, checkpoint_seconds=0)
    assert steps(tmp_path) == [3, 6]
    resumed = training.run(problem, SGD, **options, folder=tmp_path)
    assert_equal(resumed, found)
    assert_equal(resumed.ema, found.ema)


def test_an_average_of_a_long_half_life_does_not_stand_still():
    """Every step is one unit in the last place, and half of one for the mean, which a plain sum would lose."""
    ulp = float(np.finfo(np.float32).eps)
    walk = Problem(lambda key: jnp.ones(2, jnp.float32), lambda w, x: -(w * x).sum(), jnp.ones((4, 2), jnp.float32))
    options = {"key": jax.random.key(0), "batch_size": 1, "num_updates": 4000, "ema": np.inf, "stream": batching.cyclic}
    found = training.run(walk, optax.sgd(ulp), **options)
    np.testing.assert_array_equal(found.state.params, np.float32(1 + 4000 * ulp))
    np.testing.assert_allclose(found.ema.params, 1 + 4001 / 2 * ulp, rtol=0, atol=2 * ulp)


def test_the_state_of_a_finished_run_goes_on_where_it_ended(run, straight):
    state, losses = run(num_updates=4)
    state, more = run(num_updates=8, state=state)
    assert_equal((state, np.concatenate([losses, more])), straight)


def compiled(caplog):
    found = [text for text in caplog.messages if text.startswith("Finished XLA compilation")]
    caplog.clear()
    return found


def test_the_step_is_traced_once_and_a_chunk_compiled_once(run, caplog):
    @chex.assert_max_traces(n=1)
    def traced(params, example):
        return loss(params, example)

    chex.clear_trace_counter()
    method = descent.method(gradients.mean(traced), optax.sgd(0.01))
    with jax.log_compiles():
        run(method=method, num_updates=22)  # five chunks of 4, and a tail of 2
    assert len([text for text in compiled(caplog) if "_program" in text]) == 2


@pytest.mark.slow
def test_a_second_call_with_the_same_functions_and_shapes_compiles_nothing(run, problem, key, data, caplog, tmp_path):
    rules = {"diverged": descent.diverged()}
    on_host = jax.tree.map(np.asarray, data)

    def everything(attempt):
        training.run(problem, SGD, key=key, batch_size=3, num_epochs=2, until=rules, ema=10.0, stream=uneven)
        run(folder=tmp_path / attempt)
        run(mesh=devices(2))
        run(data=on_host)

    everything("first")
    with jax.log_compiles():
        caplog.clear()
        everything("second")
        assert compiled(caplog) == []
        assert not [text for text in caplog.messages if text.startswith("Finished tracing")]
        run(batch_size=2)
        assert compiled(caplog)  # that it would be seen


def test_a_run_resumed_is_bit_for_bit_the_run_in_one_piece(run, straight, tmp_path):
    AFTER[4 * 9] = power_cut
    with pytest.raises(jax.errors.JaxRuntimeError, match="power cut"):
        run(folder=tmp_path, checkpoint_seconds=0)
    assert steps(tmp_path) == [4, 8]
    assert training.progress(tmp_path).ended is None
    assert_equal(run(folder=tmp_path, checkpoint_seconds=0), straight)
    assert steps(tmp_path) == [8, 12]  # the newest two are kept
    assert_equal(run(folder=tmp_path), straight)  # nothing is left to do
    assert_equal(run(folder=tmp_path, num_updates=16), run(num_updates=16))  # or some more
    with pytest.warns(
        UserWarning, match="num_updates=4 are fewer than the 16 that the run in .* has made: all of them"
    ):
        assert_equal(run(folder=tmp_path, num_updates=4), run(num_updates=16))


@pytest.mark.slow
def test_the_record_that_ends_a_run_is_none_of_a_longer_one(run, tmp_path):
    for num_updates in (7, 9, 12):
        found = run(every=3, num_updates=num_updates, folder=tmp_path)
        assert_equal(found, run(every=3, num_updates=num_updates))
        assert len(found.history) == -(-num_updates // 3)


@pytest.mark.slow
def test_progress_says_what_a_folder_holds(run, problem, key, tmp_path):
    options = {"key": key, "batch_size": 4, "stream": uneven, "folder": tmp_path}
    training.run(problem, SGD, **options, num_epochs=2)
    first = training.progress(tmp_path)
    assert (first.num_updates, first.num_saved, first.total, first.ended) == (4, 4, 4, "budget")
    history = training.run(problem, SGD, **options, num_epochs=3).history
    found = training.progress(tmp_path)
    assert found.record == jax.tree.map(lambda x: x[-1].item(), history)
    assert (found.num_updates, found.total) == (6, 6)
    assert found.seconds > first.seconds > 0
    (tmp_path / "progress.json").write_text('{"num_updates": 3')
    with pytest.raises(ValueError, match=r"folder='.*': progress.json cannot be read"):
        training.progress(tmp_path)
    training.run(problem, SGD, **options, num_epochs=4)  # is not kept from going on
    assert training.progress(tmp_path).num_updates == 8
    for folder in (tmp_path / "none", __file__):
        with pytest.raises(ValueError, match=r"holds no run: progress\.json is not there"):
            training.progress(folder)


LISTENED = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("signum", LISTENED)
@pytest.mark.usefixtures("listening")
def test_a_signal_saves_and_exits_and_the_handlers_are_restored(run, tmp_path, capsys, signum):
    def interrupt():
        signal.raise_signal(signum)

    before = list(map(signal.getsignal, LISTENED))
    AFTER[4 * 5] = interrupt
    with pytest.raises(SystemExit) as end:
        run(folder=tmp_path, num_updates=100)
    assert end.value.code == 128 + signum
    assert list(map(signal.getsignal, LISTENED)) == before
    [done] = steps(tmp_path)
    assert 8 <= done <= 16  # the chunk under way then, or one of the two that had been begun
    assert f"{signum.name} after update {done} of 100; saved in {tmp_path}" in capsys.readouterr().err
    progress = training.progress(tmp_path)
    assert (progress.num_updates, progress.total, progress.ended) == (done, 100, signum.name)
    assert_equal(run(folder=tmp_path, num_updates=100), run(num_updates=100))


@pytest.mark.usefixtures("listening")
def test_a_second_signal_ends_the_process_at_once():
    with _signals.received() as first:
        signal.raise_signal(signal.SIGTERM)
        assert first == [signal.SIGTERM]
        assert [signal.getsignal(x) for x in LISTENED] == [signal.SIG_DFL] * 3
    assert signal.SIG_DFL not in [signal.getsignal(signal.SIGINT)]


def test_nohup_is_respected(run, straight, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        AFTER[4 * 5] = lambda: signal.raise_signal(signal.SIGHUP)
        assert_equal(run(folder=tmp_path), straight)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_without_a_folder_signals_do_what_they_always_do(run):
    before, during = list(map(signal.getsignal, LISTENED)), []
    AFTER[4 * 5] = lambda: during.extend(map(signal.getsignal, LISTENED))
    run()
    assert during == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an old tqdm, of its own
@pytest.mark.usefixtures("listening")
def test_a_standard_error_that_is_closed_or_lost_keeps_no_run_from_its_end(run, straight, tmp_path, monkeypatch):
    class Lost:
        def isatty(self):
            return True

        def write(self, text):
            raise OSError(5, "Input/output error")

        def flush(self):
            raise OSError(5, "Input/output error")

    for stderr in (None, Lost()):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            folder = tmp_path / type(stderr).__name__
            AFTER[4 * 5] = lambda: signal.raise_signal(signal.SIGHUP)
            with pytest.raises(SystemExit):
                run(folder=folder, num_updates=100)
            assert_equal(run(folder=folder, num_updates=100), run(num_updates=100))


@pytest.mark.slow
def test_every_kind_of_leaf_survives_a_checkpoint(tmp_path, key):
    """Keys and noise in the optimiser's state, leaves without entries, bfloat16, integers."""
    optimizer = optax.chain(optax.add_noise(0.1, 0.55, key=jax.random.key(7)), optax.sgd(0.1, momentum=0.9))
    params = {"half": jnp.ones(3, jnp.bfloat16), "none": jnp.ones((0, 2)), "table": jnp.arange(3)}
    method = descent.method(
        gradients.mean(lambda p, x: (p["half"] * p["table"]).sum().astype(float) * x + p["none"].sum()), optimizer
    )
    arguments = {
        "key": key,
        "batch_size": 2,
        "chunk_updates": 2,
        "stream": uneven,
    }
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        straight = training.run(method, method.init(params), jnp.ones(4), **arguments, num_updates=4)
        for num_updates in (2, 4):
            resumed = training.run(
                method, method.init(params), jnp.ones(4), **arguments, num_updates=num_updates, folder=tmp_path
            )
    key_data = [
        jax.tree.map(
            lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tuple(run)
        )
        for run in (resumed, straight)
    ]
    assert_equal(*key_data)
    assert float(resumed.state.params["half"][1]) != 1.0


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_is_an_error_and_the_one_before_stays_good(run, straight, tmp_path):
    before = set(threading.enumerate())
    folder, aside = tmp_path / "run", tmp_path / "aside"

    def lose_the_disk():
        folder.rename(aside)
        folder.write_text("not a folder")

    run(folder=folder, num_updates=4)
    AFTER[4 * 5] = lose_the_disk
    with pytest.raises(OSError, match=r"could not be written to .*run: .* Those written before are intact"):
        run(folder=folder)
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
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run, straight, finished, tmp_path, how):
    folder = shutil.copytree(finished, tmp_path / "run")
    if how == "wrong but readable":
        change(folder / "12" / "arrays", tmp_path / "changed")
    else:
        damage(folder / "12", how)
    with pytest.warns(RuntimeWarning, match=r"the checkpoint of update 12 in .* is damaged .* the one before is used"):
        assert_equal(run(folder=folder), straight)
    assert steps(folder) == [8, 12]
    assert_equal(run(folder=folder), straight)


def change(arrays, aside):
    """Change a number as a program would that writes a good file with it."""
    import orbax.checkpoint as ocp

    with warnings.catch_warnings(), ocp.StandardCheckpointer() as checkpointer:
        warnings.simplefilter("ignore")
        found = checkpointer.restore(arrays)
        name = next(name for name in found if name.endswith("params['w']"))
        checkpointer.save(aside, found | {name: found[name] + 1})
    shutil.rmtree(arrays)
    aside.rename(arrays)


def test_where_all_checkpoints_are_damaged_there_is_nothing_to_go_on_from(run, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    for step in (8, 12):
        damage(folder / str(step), "truncated")
    with (
        pytest.raises(ValueError, match=r"all its checkpoints are damaged \(updates \[12, 8\]\)"),
        pytest.warns(RuntimeWarning, match="is damaged"),
    ):
        run(folder=folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": jax.random.key(5)}, r"key was 'threefry2x32 \[0 0\]' and is 'threefry2x32 \[0 5\]'"),
        ({"batch_size": 2}, "batch_size was 4 and is 2"),
        ({"stream": batching.cyclic}, "stream was 'uneven' and is 'cyclic'"),
        ({"every": 2}, "every was 1 and is 2"),
        ({"until": {"diverged": descent.diverged()}}, "until was 'empty' and is 'diverged'"),
        ({"ema": 3.0}, "ema was 'None' and is '3.0'"),
        (
            {"method": descent.method(gradients.mean(loss), optax.sgd(0.02, momentum=0.9))},
            "program of method, record and until was .* and is",
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
        ({"every": 0}, "every=0 must be at least 1"),
        ({"num_epochs": 1}, "give num_updates=12 or num_epochs=1, one of the two"),
        ({"num_updates": None}, "give num_updates=None or num_epochs=None, one of the two"),
        ({"num_updates": None, "num_epochs": 0}, "num_epochs=0 of 12 examples are no update of 4"),
        ({"checkpoint_seconds": float("nan")}, "checkpoint_seconds=nan must be at least 0"),
        ({"ema": 0.0}, "ema=0.0 must be a half-life above 0, in examples"),
        ({"ema": float("nan")}, "ema=nan must be a half-life above 0"),
        ({"until": {"budget": descent.diverged()}}, "'budget' is what num_updates is called; give the rule another"),
        ({"until": {"bad": lambda state, info: True}}, r"until\['bad'\]=.* must be a descent.Rule"),
        (
            {"method": loss},
            "problem_or_method=.* must be a Problem, in run.problem, optimizer, key=.*, or a method from",
        ),
        ({"state": WEIGHTS}, "a method comes with a state and data: run.method, method.init.params., data"),
        ({"gradient": gradients.mean}, "gradient comes with a problem"),
        ({"key": jax.random.PRNGKey(0)}, r"must be a typed key, from jax.random.key\(seed\)"),
        ({"num_updates": 2**61}, "go past position 2.63 of the stream: at most 2305843009213693951 updates"),
        ({"data": ()}, "data has no arrays"),
        ({"batch_size": 3, "mesh": devices(2)}, "batch_size=3 cannot be shared equally by the 2 devices.* is 4"),
        ({"mesh": devices(2, AxisType.Explicit)}, "mesh must have Auto axes"),
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


def test_bad_input_with_a_problem_is_refused(problem, data, key, tmp_path):
    call = {"key": key, "batch_size": 4, "num_epochs": 1}
    with pytest.raises(ValueError, match="data comes with a method: a problem has its own"):
        training.run(problem, SGD, data, **call)
    with pytest.raises(ValueError, match=r"optimizer=.* must be an optax transformation"):
        training.run(problem, START, **call)
    with pytest.raises(ValueError, match="batch_size=9 must be between 1 and N=8"):
        training.run(problem, SGD, **call | {"batch_size": 9})
    np.save(tmp_path / "x.npy", np.ones((4, 3)))
    mapped = Problem(problem.init, lambda w, x: loss(w, (x, 1.0)), np.load(tmp_path / "x.npy", mmap_mode="r"))
    with pytest.raises(ValueError, match=r"record=None .* memory-mapped: give a record .* record=descent.batch_loss"):
        training.run(mapped, SGD, **call)


def test_two_devices_train_as_one(run):
    state, losses = run(num_updates=200, chunk_updates=100)
    both, both_losses = run(num_updates=200, chunk_updates=100, mesh=devices(2))
    chex.assert_trees_all_close((both, both_losses), (state, losses), rtol=0, atol=max(1e-12, 32 * precision.EPS))
    assert all(leaf.sharding.num_devices == 2 for leaf in jax.tree.leaves(both))


@pytest.mark.slow
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
