import functools
import gc
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import psutil
import pytest
from jax.sharding import AxisType

from gdjax import batching, descent, gradients, sweep
from gdjax.sweep import _chunks as chunks
from gdjax.sweep import _programs as programs
from gdjax.sweep import _store as stores

X = np.linspace(-1, 1, 15).reshape(5, 3)
Y = np.asarray([1.0, -1.0, 0.5, 2.0, 0.0])


def train(point):
    """Eight updates of least squares from the point's start, at its rate."""
    loss = lambda w, example: 0.5 * (example[0] @ w - example[1]) ** 2  # noqa: E731
    method = descent.method(gradients.mean(loss), optax.sgd(point["rate"]))
    batches = batching.batches(batching.cyclic(None, 5, length=8), 1)
    state, losses = descent.run(method, method.init(point["start"]), (jnp.asarray(X), jnp.asarray(Y)), batches)
    return {"w": state.params, "losses": losses}


def trained(rate, start):
    """The same in NumPy: w <- w - rate (x.w - y) x."""
    w, losses = np.asarray(start, float), []
    for i in np.arange(8) % 5:
        error = X[i] @ w - Y[i]
        losses.append(0.5 * error**2)
        w = w - rate * error * X[i]
    return w, np.asarray(losses)


POINTS = {"rate": np.linspace(0.01, 0.5, 21), "start": np.linspace(-1, 1, 63).reshape(21, 3)}


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (x.dtype, x.tobytes()) == (y.dtype, y.tobytes())


def test_a_grid_is_the_full_product_with_the_last_axis_fastest():
    keys = jax.random.split(jax.random.key(0), 2)
    grid = sweep.grid(rate=[0.125, 0.25, 0.5], key=keys, pair={"a": np.arange(2), "b": jnp.ones((2, 4))})
    points = grid.points
    expected = list(itertools.product([0.125, 0.25, 0.5], jax.random.key_data(keys).tolist(), [0, 1]))
    found = zip(
        points["rate"].tolist(), jax.random.key_data(points["key"]).tolist(), points["pair"]["a"].tolist(), strict=True
    )
    assert list(found) == expected
    assert grid.shape == (3, 2, 2)
    assert len(grid) == 12
    assert points["pair"]["b"].shape == (12, 4)
    assert jnp.issubdtype(points["key"].dtype, jax.dtypes.prng_key)


def test_results_have_the_grid_s_axes_in_the_order_they_were_named():
    grid = sweep.grid(b=[1.0, 2.0], a=[10.0, 20.0, 30.0])
    found = sweep.map(lambda point: {"sum": point["a"] + point["b"], "pair": point["a"] * jnp.ones(4)}, grid)
    np.testing.assert_array_equal(found["sum"], np.add.outer([1.0, 2.0], [10.0, 20.0, 30.0]))
    assert found["pair"].shape == (2, 3, 4)


@pytest.mark.parametrize("chunk_size", [2, 8, 20, 22, 1000, None])
def test_every_point_is_the_run_written_by_hand(chunk_size):
    """21 points: 2, 8 and 20 leave a chunk to be filled up, 22 holds all."""
    result = sweep.map(train, POINTS, chunk_size=chunk_size)
    for i in range(21):
        w, losses = trained(POINTS["rate"][i], POINTS["start"][i])
        precision.assert_close(result["w"][i], w, rtol=1e-12, atol=1e-14)
        precision.assert_close(result["losses"][i], losses, rtol=1e-12, atol=1e-14)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(result))


class Drawn(NamedTuple):
    x: jax.Array
    few: jax.Array
    key: jax.Array
    number: jax.Array


def test_keys_small_types_and_pytrees_go_in_and_out(tmp_path):
    def draw(point):
        count, key = point
        x = jax.random.normal(key)
        return Drawn(x, x.astype(jnp.bfloat16), jax.random.fold_in(key, 1), count + 1)

    keys = jax.random.split(jax.random.key(7), 5)
    points = (np.arange(5, dtype=np.int8), keys)
    result = sweep.map(draw, points, chunk_size=4, store=tmp_path)
    expected = [jax.random.normal(key) for key in keys]
    np.testing.assert_array_equal(result.x, expected)
    np.testing.assert_array_equal(result.few, np.asarray(expected).astype(jnp.bfloat16))
    np.testing.assert_array_equal(result.key, [jax.random.key_data(jax.random.fold_in(key, 1)) for key in keys])
    np.testing.assert_array_equal(result.number, np.arange(1, 6, dtype=np.int8))
    assert (result.few.dtype, result.number.dtype) == (jnp.bfloat16, np.int8)
    same(sweep.map(draw, points, store=tmp_path), result)  # read from the store


def counted_compilations(monkeypatch):
    compilations, compile_ = [], jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: compilations.append(0) or compile_(self))
    return compilations


@pytest.mark.parametrize("num_points", [8, 8000])
def test_one_trace_and_one_compilation_whatever_the_number_of_points(num_points, monkeypatch, tmp_path):
    chex.clear_trace_counter()
    compilations = counted_compilations(monkeypatch)
    square = chex.assert_max_traces(lambda x: {"square": x**2}, n=1)
    x = np.arange(float(num_points))
    for _ in range(2):
        np.testing.assert_array_equal(sweep.map(square, x, store=tmp_path)["square"], jnp.square(x))
    assert len(compilations) == 1
    assert len(list(tmp_path.glob("chunk-*"))) == -(-num_points // (2 * programs.POINTS_PER_DEVICE))


def test_the_same_function_is_traced_and_compiled_once_and_nothing_outlives_it(monkeypatch):
    chex.clear_trace_counter()
    compilations = counted_compilations(monkeypatch)
    square = chex.assert_max_traces(lambda point: point["x"] ** 2 + jnp.asarray(X)[0], n=1)
    for start in range(3):
        x = start + np.arange(4.0)
        found = sweep.map(square, sweep.grid(x=x, y=[1, 2]))
        precision.assert_close(found, np.broadcast_to((x**2)[:, None, None] + X[0], (4, 2, 3)), rtol=1e-12)
    assert len(compilations) == 1
    other = functools.wraps(square)(lambda point: point["x"])  # which copies its attributes
    np.testing.assert_array_equal(sweep.map(other, sweep.grid(x=x, y=[1, 2]))[:, 0], x)
    gone = weakref.ref(square)
    del square, other  # which has `__wrapped__`
    gc.collect()
    assert gone() is None


def test_a_store_that_is_complete_is_read_without_a_compilation(tmp_path, monkeypatch):
    """By another process, to which the function is new."""
    whole = sweep.map(lambda x: x**2, np.arange(10.0), chunk_size=4, store=tmp_path)
    monkeypatch.setattr(jax.stages.Lowered, "compile", never)
    same(sweep.map(lambda x: x**2, np.arange(10.0), store=tmp_path), whole)


@precision.float64_only  # counts bytes
def test_the_chunk_is_as_large_as_the_memory_that_is_free(monkeypatch, tmp_path):
    def size(free_bytes):
        def fn(x):  # 80 kB of results a point
            return x * jnp.ones(10_000)

        # Two devices of a CPU share what is free.
        free = psutil.virtual_memory()._replace(available=2 * free_bytes)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
        folder = tmp_path / f"{free_bytes}"
        np.testing.assert_array_equal(sweep.map(fn, np.arange(100.0), store=folder)[:, 0], np.arange(100.0))
        return json.loads((folder / "store.json").read_text())["identity"]["chunk_size"]

    assert size(1e9) == 100  # 50 on each of two devices
    compilations = counted_compilations(monkeypatch)
    assert size(2e6) == 24  # 12 on each device make 0.96 MB, 13 more than half of what is free
    assert len(compilations) == 2  # the second is in proportion to what the first needs
    assert size(1) == 2  # and never less than one on each


@pytest.mark.usefixtures("nans")
def test_a_point_that_diverges_leaves_the_others_bit_for_bit_as_they_are():
    wild = POINTS | {"rate": np.where(np.arange(21) % 4 == 1, 1e6, POINTS["rate"])}
    wild["rate"][9] = 1e308 if precision.X64 else 1e38
    calm, result = sweep.map(train, POINTS), sweep.map(train, wild)
    tame = np.arange(21) % 4 != 1
    same(jax.tree.map(lambda x: x[tame], result), jax.tree.map(lambda x: x[tame], calm))
    assert not np.isfinite(result["w"][9]).any()


def written(folder):
    """When each chunk was written: one that is computed again is a new file."""
    return {int(path.name.split("-")[1]): path.stat().st_mtime_ns for path in folder.glob("chunk-*.npz")}


def test_only_what_is_missing_or_damaged_is_computed_again(tmp_path):
    whole = sweep.map(train, POINTS, chunk_size=4)
    same(sweep.map(train, POINTS, chunk_size=4, store=tmp_path), whole)
    before, files = written(tmp_path), sorted(tmp_path.glob("chunk-*"))
    same(sweep.map(train, POINTS, store=tmp_path), whole)
    assert written(tmp_path) == before
    assert len(files) == 6
    files[1].unlink()
    files[4].write_bytes(files[4].read_bytes()[:-20])
    with pytest.warns(UserWarning, match="chunk-00004-.* is damaged"):
        same(sweep.map(train, POINTS, store=tmp_path), whole)
    after = written(tmp_path)
    assert [index for index in range(6) if after[index] != before[index]] == [1, 4]
    assert sorted(tmp_path.glob("chunk-*")) == files


@pytest.mark.usefixtures("listening")
def test_ctrl_c_keeps_what_is_finished(tmp_path, monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        if "chunk-00002" in str(target):
            signal.raise_signal(signal.SIGINT)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.map(train, POINTS, chunk_size=4, store=tmp_path)
    monkeypatch.undo()
    before = written(tmp_path)
    assert sorted(before) == [0, 1]
    same(sweep.map(train, POINTS, store=tmp_path), sweep.map(train, POINTS, chunk_size=4))
    assert {index: written(tmp_path)[index] for index in before} == before


def scaled(scale, offset, x, nested=None):
    """Close over arrays in branches, loops and calls."""
    inner = jax.jit(lambda x: x + jnp.asarray(SCALE if nested is None else nested)[1])
    loop = lambda x: jax.lax.scan(lambda c, _: (c * jnp.asarray(scale)[1], None), x, length=2)[0]  # noqa: E731
    return inner(jax.lax.cond(x > 0, loop, lambda x: x, x)) + offset


SCALE = np.arange(3.0)
OTHER = SCALE + np.asarray([0.0, 0.0, 1e-15])
CHANGES = {
    r"points was 'float64\[6\] .*' and is 'float64\[6\] ": {"grid": np.arange(6.0) + 1e-15},
    r"points was 'float64\[6\] .*' and is 'float64\[5\] ": {"grid": np.arange(5.0)},
    r"sweep: names of points was 'points' and is \"points\['x'\]\", points\['x'\] was None and is": {
        "grid": {"x": np.arange(6.0)},
        "fn": lambda point: point["x"],
    },
    r"chunk_size was 2 and is 4\.": {"chunk_size": 4},
    r"num_devices was 2 and is 1\.": {"mesh": jax.sharding.Mesh(np.asarray(jax.devices()[:1]), "d")},
    r"sweep: program of fn was": {"fn": partial(scaled, SCALE, 2.0)},
    r"sweep: arrays in fn was": {"fn": partial(scaled, OTHER, 1.0)},
    r"sweep: program of fn was '\w+' and": {"fn": partial(scaled, SCALE, 1.0, nested=OTHER)},
    r"sweep: results of fn was ' float64\[\]' and is '\[0\] float64\[\]'": {"fn": lambda x: [scaled(SCALE, 1.0, x)]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of an earlier sweep."""
    folder = tmp_path_factory.mktemp("store")
    sweep.map(partial(scaled, SCALE, 1.0), np.arange(6.0), chunk_size=2, store=folder)
    return folder


def never(*args):
    raise AssertionError("compiled before the refusal")


@precision.float64_only  # differences of 1e-15
@pytest.mark.parametrize("message", CHANGES)
def test_another_sweep_is_refused_before_it_is_compiled_and_told_what_differs(made, message, monkeypatch):
    given = {"fn": partial(scaled, SCALE, 1.0), "grid": np.arange(6.0), "store": made} | CHANGES[message]
    monkeypatch.setattr(jax.stages.Lowered, "compile", never)
    with pytest.raises(ValueError, match=message):
        sweep.map(**given)


@precision.float64_only  # that changes to float32
def test_other_versions_and_numbers_of_bits_are_refused_before_anything_is_traced(made, monkeypatch):
    again = partial(sweep.map, never, np.arange(6.0), store=made)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "__version__", "0.9.9")
        with pytest.raises(ValueError, match=r"jax was '\d.*' and is '0\.9\.9'\."):
            again()
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"x64 was True and is False, points was 'float64\[6\]"):
        again()


BAD = {
    r"points has 0 entries": ({"x": np.zeros(0)}, {}),
    r"same leading axis, but found points\['a'\]: 2, points\['b'\]: 3": ({"a": np.zeros(2), "b": np.zeros(3)}, {}),
    r"same leading axis, but found points\['a'\]: scalar": ({"a": 1.0}, {}),
    r"same leading axis, but found no array": ({}, {}),
    r"points\['a'\] must be an array of numbers or typed keys, but is <U1": ({"a": np.asarray(["x", "y"])}, {}),
    r"chunk_size=5 must be a multiple of the 2 devices: use 4 or 6": (np.zeros(9), {"chunk_size": 5}),
    r"chunk_size=1 must be a multiple of the 2 devices: use 2$": (np.zeros(9), {"chunk_size": 1}),
    r"chunk_size=0 must be a multiple of the 2 devices: use 2$": (np.zeros(9), {"chunk_size": 0}),
    r"chunk_size=-3 must be a multiple of the 2 devices: use 2$": (np.zeros(9), {"chunk_size": -3}),
    r"store='' names no folder": (np.zeros(9), {"store": ""}),
    r"store='/dev/null' cannot be written": (np.zeros(9), {"store": "/dev/null"}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_anything_is_traced(message):
    points, options = BAD[message]
    with pytest.raises(ValueError, match=message):
        sweep.map(never, points, **options)


def test_functions_and_axes_that_are_nothing_are_refused():
    with pytest.raises(ValueError, match="fn returns no arrays"):
        sweep.map(lambda x: {}, np.zeros(2))
    with pytest.raises(ValueError, match="grid needs an axis"):
        sweep.grid()
    with pytest.raises(ValueError, match="found rate: scalar"):
        sweep.grid(rate=0.1)
    with pytest.raises(ValueError, match="rate has 0 entries"):
        sweep.grid(rate=[], seed=[1])
    with pytest.raises(ValueError, match="optimizer must be an array of numbers"):
        sweep.grid(optimizer=["sgd", "adam"])


def test_progress_is_shown_on_a_terminal_and_not_elsewhere(tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    sweep.map(train, POINTS, chunk_size=4, store=tmp_path)
    assert capsys.readouterr() == ("", "")
    sorted(tmp_path.glob("chunk-*"))[2].unlink()
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    sweep.map(train, POINTS, store=tmp_path)
    shown = terminal.getvalue()
    assert "| 21/21 [" in shown
    assert "points/s]" in shown
    monkeypatch.setattr(sys, "stderr", None)  # closed
    sweep.map(train, POINTS, chunk_size=4)


def test_a_mesh_of_any_axes_holds_the_points():
    """Axes are Explicit unless jax.make_mesh is told otherwise."""
    explicit = jax.make_mesh((1, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    same(sweep.map(train, POINTS, mesh=explicit, chunk_size=4), sweep.map(train, POINTS, chunk_size=4))


CHILD = """
import os, signal, sys, threading
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
jax.config.update("jax_enable_x64", sys.argv[5] == "True")
jax.config.update("jax_disable_most_optimizations", True)
from gdjax import sweep
sys.path[:0] = ["tests", "tests/sweep"]
import test_sweep
death, replace, fsync = int(sys.argv[3]), os.replace, os.fsync
def dying(name, function):
    def call(*args):
        global death
        death -= name == sys.argv[4]
        if death < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call
os.replace, os.fsync = dying("replace", replace), dying("fsync", fsync)
result = sweep.map(test_sweep.train, test_sweep.POINTS, chunk_size=8, store=sys.argv[2])
np.savez(sys.argv[2] + ".npz", **result)
"""


def child(num_devices, place, death=1000, call=""):
    options = map(str, (num_devices, place, death, call, precision.X64))
    command = [sys.executable, "-W", "ignore", "-c", CHILD, *options]
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    return subprocess.run(command, cwd=root, timeout=120, check=False).returncode


@pytest.mark.slow
def test_killed_twice_and_resumed_on_eight_devices_as_one_that_was_not_and_as_on_two(tmp_path):
    """Killed once before a chunk is complete on disk, once before it has its name."""
    assert child(8, tmp_path / "killed", 3, "fsync") == -signal.SIGKILL
    assert len(list(tmp_path.glob("killed/chunk-*.npz"))) == 0
    assert len(list(tmp_path.glob("killed/.chunk-*"))) == 1
    assert child(8, tmp_path / "killed", 3, "replace") == -signal.SIGKILL
    assert len(list(tmp_path.glob("killed/chunk-*.npz"))) == 1
    assert len(list(tmp_path.glob("killed/.chunk-*"))) == 1
    assert child(8, tmp_path / "killed") == child(8, tmp_path / "whole") == 0
    with np.load(tmp_path / "killed.npz") as killed, np.load(tmp_path / "whole.npz") as whole:
        same(dict(killed), dict(whole))
        here = sweep.map(train, POINTS)
        for name in here:
            precision.assert_close(whole[name], here[name], rtol=1e-12, atol=1e-14)
    names = [sorted(path.name for path in tmp_path.glob(f"{sweep}/*")) for sweep in ("killed", "whole")]
    assert names[0] == names[1]  # of the chunks, their checksums


def test_a_table_has_a_row_for_every_point_and_the_best_is_finite():
    grid = sweep.grid(rate=[0.125, 0.5], start=np.ones((3, 2)), key=jax.random.split(jax.random.key(0), 2))
    results = {"loss": np.arange(12.0).reshape(2, 3, 2), "path": np.arange(24).reshape(2, 3, 2, 2)}
    rows = grid.table(results)
    assert len(rows) == 12
    assert rows[7] == {"rate": 0.5, "start": 0, "key": 1, "['loss']": 7.0, "['path']": [14, 15]}
    assert grid.table(results["loss"])[7]["result"] == 7.0
    losses = np.where(results["loss"] < 4, np.nan, results["loss"])
    losses[1, 2, 1] = -np.inf
    assert grid.best(losses) == (0, 2, 0)
    assert grid.best(losses, largest=True) == (1, 2, 0)
    assert np.argmin(losses) == 0  # the first that is no number
    with pytest.raises(ValueError, match=r"values have the shape \(2, 3\), but the grid has \(2, 3, 2\)"):
        grid.best(losses[:, :, 0])
    with pytest.raises(ValueError, match="none of the 12 values is finite"):
        grid.best(np.full((2, 3, 2), np.nan))


def powers(point):
    """Return a matrix product of a size and a function that a program is made for."""
    size, function = point["size"], point["function"]
    return {"sum": function(jnp.full(size, point["x"])).sum(), "size": jnp.float32(size)}


FUNCTIONS = {"square": jnp.square, "negative": jnp.negative}


@pytest.mark.parametrize("stored", [True, False])
def test_axes_of_programs_come_first_in_one_result(stored, tmp_path, monkeypatch):
    chex.clear_trace_counter()
    compilations = counted_compilations(monkeypatch)
    grid = sweep.grid({"size": [2, 3, 5], "function": FUNCTIONS}, x=[1.0, 2.0, 3.0, 4.0], y=[0.0, 1.0])
    assert grid.shape == (3, 2, 4, 2)
    counted, store = chex.assert_max_traces(powers, n=6), tmp_path if stored else None
    for _ in range(2):
        found = sweep.map(counted, grid, store=store, chunk_size=4)
    sizes, x = np.asarray([2, 3, 5]).reshape(-1, 1, 1), np.asarray([1.0, 2.0, 3.0, 4.0]).reshape(-1, 1)
    for i, one in enumerate((x**2, -x)):
        np.testing.assert_array_equal(found["sum"][:, i], sizes * np.repeat(one, 2, 1))
    np.testing.assert_array_equal(found["size"], np.broadcast_to(sizes[:, None], grid.shape))
    assert len(compilations) == 6
    row = {"size": 3, "function": "negative", "x": 2.0, "y": 1.0, "['size']": 3.0, "['sum']": -6.0}
    assert grid.table(found)[16 + 8 + 3] == row
    assert grid.best(found["sum"]) == (2, 1, 3, 0)
    if stored:  # a longer axis computes what is new
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/chunk-*")}
        assert {path.parent.name for path in before} == {f"size={n},function={f}" for n in (2, 3, 5) for f in FUNCTIONS}
        longer = sweep.grid({"size": [5, 7, 2, 3], "function": FUNCTIONS}, x=[1.0, 2.0, 3.0, 4.0], y=[0.0, 1.0])
        again = sweep.map(powers, longer, store=tmp_path)
        same(jax.tree.map(lambda x: x[[2, 3, 0]], again), found)
        assert len(compilations) == 8
        assert {path: path.stat().st_mtime_ns for path in before} == before


def test_programs_that_are_no_axis_of_a_grid_are_refused(tmp_path, monkeypatch):
    for axis in ([], ["a b"], [1, 1], [optax.sgd], {"a": np.zeros(2)}, 3):
        with pytest.raises(ValueError, match=r"programs\['p'\].* must be"):
            sweep.grid({"p": axis}, x=[1.0])
    with pytest.raises(ValueError, match="x is an axis of programs and one of numbers"):
        sweep.grid({"x": [1]}, x=[1.0])
    monkeypatch.setattr(jax.stages.Lowered, "compile", never)
    grid = sweep.grid({"size": [2, 3]}, x=[1.0])
    with pytest.raises(ValueError, match=r"same shapes.*returns  float.*\[2\] for size=2 and  float.*\[3\] for size=3"):
        sweep.map(lambda point: jnp.full(point["size"], point["x"]), grid)
    monkeypatch.undo()
    sweep.map(lambda x: x, np.arange(2.0), store=tmp_path / "plain")
    with pytest.raises(ValueError, match="holds a sweep without axes of programs"):
        sweep.map(lambda point: point["x"], grid, store=tmp_path / "plain")
    with pytest.raises(ValueError, match="store='' names no folder"):
        sweep.map(lambda point: point["x"], grid, store="")
    sweep.map(lambda point: point["x"], grid, store=tmp_path / "programs")
    with pytest.raises(ValueError, match="is no store, but a folder with other files"):
        sweep.map(lambda x: x, np.arange(2.0), store=tmp_path / "programs")
    with pytest.raises(ValueError, match="program of fn was"):
        sweep.map(lambda point: point["x"] + 1, grid, store=tmp_path / "programs")


@pytest.mark.parametrize("finished", [True, False])
def test_a_chunk_that_another_is_at_is_waited_for_and_computed_where_that_one_dies(finished, tmp_path, monkeypatch):
    whole = sweep.map(train, POINTS, chunk_size=4, store=tmp_path)
    [path] = tmp_path.glob("chunk-00002-*")
    content = path.read_bytes()
    path.unlink()
    other, waited = stores.claimed(tmp_path, 2), []

    def sleep(seconds):
        waited.append(written(tmp_path))
        if len(waited) == 3:
            if finished:
                path.write_bytes(content)
            other.__exit__(None, None, None)

    monkeypatch.setattr(chunks, "time", SimpleNamespace(sleep=sleep))
    if finished:
        monkeypatch.setattr(programs.Program, "__call__", never)
    assert other.__enter__()
    same(sweep.map(train, POINTS, store=tmp_path), whole)
    assert len(waited) == 3
    assert all(sorted(seen) == [0, 1, 3, 4, 5] for seen in waited)
    assert path.read_bytes() == content
    assert not list(tmp_path.glob("*.lock"))


def test_a_chunk_that_another_finished_since_the_folder_was_listed_is_read(tmp_path, monkeypatch):
    whole = sweep.map(train, POINTS, chunk_size=4, store=tmp_path)
    [path] = tmp_path.glob("chunk-00002-*")
    content, listed = path.read_bytes(), stores.listed
    path.unlink()

    def and_then_finished(folder, index=None):
        found = listed(folder, index)
        path.write_bytes(content)
        return found

    monkeypatch.setattr(stores, "listed", and_then_finished)
    monkeypatch.setattr(programs.Program, "__call__", never)
    same(sweep.map(train, POINTS, store=tmp_path), whole)


GROUP = """
import signal, sys, os
import jax, numpy as np
index, count, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[4]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", sys.argv[5] == "True")
joined = count > 1 and sys.argv[3] != "None"
if joined:
    jax.distributed.initialize(sys.argv[3], count, index, heartbeat_timeout_seconds=10)
from gdjax import sweep
from gdjax.sweep import _store
sys.path[:0] = ["tests", "tests/sweep"]
import test_sweep, time
write, wrote = _store.write, []
def slowly(folder, key, index, chunk):
    time.sleep(0.05)
    wrote.append(index)
    write(folder, key, index, chunk)
_store.write = slowly
result = sweep.map(test_sweep.train, test_sweep.POINTS, chunk_size=2, store=store)
np.savez(f"{store}-{index}-of-{count}.npz", wrote=wrote, **result)
if joined:
    jax.distributed.shutdown()  # waits for the other: with its coordinator a process ends
"""


def group(count, store, *, joined=True):
    """Start the processes of a group that share a store: of jax.distributed, or as the tasks of a cluster's array."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}" if joined else None
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    command = [sys.executable, "-W", "ignore", "-c", GROUP]
    return [
        subprocess.Popen([*command, *map(str, (i, count, coordinator, store, precision.X64))], cwd=root)
        for i in range(count)
    ]


@pytest.mark.slow
def test_two_processes_share_the_chunks_and_both_return_all_results(tmp_path):
    for process in group(2, tmp_path / "shared") + group(1, tmp_path / "alone"):
        assert process.wait(timeout=120) == 0
    parts = [np.load(tmp_path / f"{name}.npz") for name in ("shared-0-of-2", "shared-1-of-2", "alone-0-of-1")]
    results = [{name: part[name] for name in ("w", "losses")} for part in parts]
    same(results[0], results[2])
    same(results[1], results[2])
    wrote = [part["wrote"].tolist() for part in parts]
    assert sorted(wrote[0] + wrote[1]) == wrote[2] == list(range(11))
    assert min(map(len, wrote)) >= 2
    assert [path.name for path in sorted((tmp_path / "shared").iterdir())] == [
        path.name for path in sorted((tmp_path / "alone").iterdir())
    ]


@pytest.mark.slow
def test_where_one_of_two_processes_is_killed_a_later_call_of_one_computes_what_is_missing(tmp_path):
    first, second = group(2, tmp_path / "killed")
    while not list(tmp_path.glob("killed/chunk-*.npz")):
        assert first.poll() is None
    second.kill()
    first.kill()
    assert first.wait() == second.wait() == -signal.SIGKILL
    assert len(list(tmp_path.glob("killed/chunk-*.npz"))) < 11
    for process in group(1, tmp_path / "killed") + group(1, tmp_path / "alone"):
        assert process.wait(timeout=120) == 0
    with np.load(tmp_path / "killed-0-of-1.npz") as killed, np.load(tmp_path / "alone-0-of-1.npz") as alone:
        assert len(killed["wrote"]) < 11
        same({name: killed[name] for name in ("w", "losses")}, {name: alone[name] for name in ("w", "losses")})


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """Results of one process, as arrays, and the names of its chunks."""
    place = tmp_path_factory.mktemp("never_killed")
    [process] = group(1, place / "store")
    assert process.wait(timeout=120) == 0
    with np.load(place / "store-0-of-1.npz") as arrays:
        return {name: arrays[name] for name in ("w", "losses")}, sorted(
            path.name for path in (place / "store").iterdir()
        )


@pytest.mark.slow
@pytest.mark.parametrize("trial", [0, *(pytest.param(trial, marks=pytest.mark.nightly) for trial in range(1, 20))])
def test_where_one_task_of_three_is_killed_at_a_random_moment_the_others_end_with_the_bits_of_one(
    trial, tmp_path, never_killed
):
    """Without jax.distributed, so that nothing tells them of it."""
    rng, store = np.random.default_rng(trial), tmp_path / "store"
    processes = group(3, store, joined=False)
    while not store.exists():
        assert [process.poll() for process in processes] == [None] * 3
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.5))
    killed, *others = rng.permutation(3)
    processes[killed].kill()
    seen = len(list(store.glob("chunk-*.npz")))
    assert [processes[i].wait(timeout=120) for i in others] == [0, 0]
    print(f"trial {trial}: task {killed} ended {processes[killed].wait()} with {seen} of 11 chunks there")
    expected, names = never_killed
    for i in others:
        with np.load(f"{store}-{i}-of-3.npz") as arrays:
            same({name: arrays[name] for name in expected}, expected)
    chunks_there = [name for name in names if name.startswith("chunk")]
    assert sorted(path.name for path in store.glob("chunk-*")) == chunks_there


def test_the_next_chunk_is_begun_before_the_last_is_fetched():
    events = []

    class Result:
        size = 2

        def __init__(self, first):
            self.first = first

        def __array__(self, dtype=None, copy=None):
            events.append(f"fetched {self.first}")
            return np.asarray([self.first, self.first + 1])

    class Program:
        size = 2

        def __call__(self, leaves):
            events.append(f"begun {leaves[0][0]}")
            return [Result(leaves[0][0])]

    work = chunks.Work(lambda size: Program(), [np.arange(5)], None, None)
    found = [(chunk.rows, chunk.arrays[0].tolist()) for chunk in chunks.alone([work])]
    assert found == [(slice(0, 2), [0, 1]), (slice(2, 4), [2, 3]), (slice(4, 5), [4])]
    assert events == ["begun 0", "begun 2", "fetched 0", "begun 4", "fetched 2", "fetched 4"]
