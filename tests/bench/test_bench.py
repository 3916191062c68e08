"""Every variant makes the same updates; what is reported of them follows from what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdjax import batching, commands, timing
from gdjax.bench import _bench as bench
from gdjax.bench import _variants as variants
from gdjax.bench import mlp
from gdjax.commands import bench as bench_report
from gdjax.commands._session import Common
from gdjax.problem import Problem
from gdjax.problems import models

N, B, T, RATE = 24, 4, 9, 0.05


def tiny(dtype, weight=None):
    model = models.mlp((3, 4, 2))
    x = jax.random.normal(jax.random.key(1), (N, 3), dtype)
    y = jax.random.normal(jax.random.key(2), (N, 2), dtype)

    def init(key):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), model.init(key))

    return Problem(
        init, lambda params, e: ((model.apply(params, e[0]) - e[1]) ** 2).sum(), (x, y), name="tiny", weight=weight
    )


@pytest.fixture(scope="module")
def problem():
    return tiny(float)


def by_hand(problem, params, batches):
    """Return the parameters after plain gradient descent on sum w l / sum w, one numpy update for each batch."""

    def mean_loss(params, batch):
        weights = jnp.ones_like(batch[0][:, 0]) if problem.weight is None else jax.vmap(problem.weight)(batch)
        return jnp.average(jax.vmap(problem.loss, (None, 0))(params, batch), weights=weights)

    gradient = jax.jit(jax.grad(mean_loss))
    for indices in np.asarray(batches):
        grad = gradient(params, jax.tree.map(lambda x, i=indices: x[i], problem.train))
        params = jax.tree.map(lambda p, g: np.asarray(p) - np.asarray(RATE * np.asarray(g), p.dtype), params, grad)
    return params


def inputs(problem, batch_size, num_updates):
    stream = batching.reshuffled(jax.random.key(3), N, length=batch_size * num_updates)
    return problem.init(jax.random.key(0)), problem.train, batching.batches(stream, batch_size)


def assert_equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 if a.dtype == np.float64 else 1e-5)


@pytest.mark.parametrize("name", variants.VARIANTS)
@pytest.mark.slow
def test_every_variant_makes_the_updates_of_descent(name):
    problem = tiny(float, weight=lambda example: 0.5 + example[1][0] ** 2)
    params, data, batches = inputs(problem, B, T)
    run = variants.VARIANTS[name](problem, RATE)
    found, records = (run if name == "python-loop" else jax.jit(run))(params, data, batches)
    if name == "vmapped-seeds":
        assert_equal(jax.tree.map(lambda x: x[2], found), by_hand(problem, params, np.roll(batches, 2, axis=0)))
        found = jax.tree.map(lambda x: x[0], found)
    expected = by_hand(problem, params, batches)
    assert_equal(found, expected)
    moved = max(float(abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True))
    assert moved > 0.05  # else nothing was tested
    if name.startswith("per-example"):
        batch = jax.tree.map(lambda x: x[batches[0]], data)
        grads = jax.vmap(jax.grad(problem.loss), (None, 0))(params, batch)
        norms = sum(np.square(g).reshape(B, -1).sum(1) for g in jax.tree.leaves(grads))
        assert records.shape == (T, B)
        np.testing.assert_allclose(records[0], norms, rtol=1e-5)


@pytest.mark.parametrize("dtype", [float, jnp.float32])
@pytest.mark.slow
def test_every_lane_makes_the_updates_of_its_own_batch_size(dtype):
    """12 ticks of 2 examples: 12, 6 and 3 updates; for B = 10 there are 2, and the last 4 examples make none."""
    problem, sizes = tiny(dtype), (2, 4, 8, 10)
    params, data, ticks = inputs(problem, variants.microbatch_size(sizes), 12)
    found = jax.jit(variants.lanes(problem, RATE, sizes))(params, data, ticks)[0]
    for i, size in enumerate(sizes):
        batches = batching.batches(ticks.reshape(-1), size, drop_remainder=True)
        assert_equal(jax.tree.map(lambda x, i=i: x[i], found), by_hand(problem, params, batches))


def test_lanes_refuse_a_microbatch_that_does_not_divide():
    with pytest.raises(ValueError, match=r"microbatch of 3 must divide every batch size of \(3, 4\)"):
        variants.lanes(mlp(4, 2), RATE, (3, 4))(None, None, jnp.zeros((2, 3), jnp.int32))


def test_scans_make_the_updates_of_every_batch_size(problem):
    params, data, ticks = inputs(problem, 2, 12)
    found = jax.jit(variants.scans(problem, RATE, (2, 10)))(params, data, ticks)[0]
    for size, one in zip((2, 10), found, strict=True):
        assert_equal(one, by_hand(problem, params, batching.batches(ticks.reshape(-1), size, drop_remainder=True)))


TURNS = {"scan": [6.0, 4.0, 4.0, 4.0, 4.0, 3.0, 4.0], "lanes": [9.0, 8.0, 8.0, 8.0, 8.0, 9.0], "other": [1.0, 2.0]}


def clocked(monkeypatch, names):
    """Let the clock say what TURNS says, and return the functions and inputs that were to be timed."""
    seen = []

    def measured_in_turn(functions, inputs, *, budget):
        seen.extend(zip(functions, inputs, strict=True))
        return [TURNS[name] for name in names]

    monkeypatch.setattr(timing, "measured_in_turn", measured_in_turn)
    return seen


@pytest.mark.slow
def test_rows_follow_from_what_was_measured(monkeypatch):
    """The first way is a run twice as long in updates, the second is scan: it leads, and ratios are of an update."""
    seen = clocked(monkeypatch, ["scan", "other"])
    linear = Problem(
        lambda key: jnp.zeros(1000), lambda w, x: (x @ w) ** 2, jax.random.normal(jax.random.key(0), (16, 1000))
    )
    peaks = timing.Peaks(flops_per_second=1e6, bytes_per_second=1e4)

    def refused(problem, learning_rate):
        raise ValueError("not today")

    chosen = {"other": variants.unrolled, "scan": variants.scan, "refused": refused}
    other, scan, skipped = bench.measure(
        linear, chosen, 8, budget=0.0, peaks=peaks, num_runs={"other": 5}, min_examples=10_000
    )
    updates = scan["num_updates"]
    assert updates == other["num_updates"] == 10_000 / 8  # more than the 1024 that work so small would get
    assert skipped == {"variant": "refused", "batch_size": 8, "num_runs": 1, "skipped": "not today"}
    for (_, given), run in zip(seen, (scan, other), strict=True):
        assert len(given) == bench.NUM_INPUTS
        assert not np.array_equal(given[0][2], given[1][2])
        assert given[0][2].shape == (run["num_updates"], 8)
    assert (scan["seconds"], scan["low"], scan["high"]) == (4.0 / updates, 3.0 / updates, 6.0 / updates)
    each = 5 * updates
    assert [other[name] for name in ("seconds", "low", "high")] == pytest.approx([1.5 / each, 1 / each, 2 / each])
    assert (scan["num_repeats"], other["num_repeats"]) == (7, 2)
    assert other["over_scan"] == pytest.approx(
        {"median": (1 / 6 + 2 / 4) / 2 / 5, "low": 1 / 30, "high": 0.1, "num_runs": 2}
    )
    assert other["examples_per_second"] == pytest.approx(8 / other["seconds"])
    # A product for the losses and one for the gradient: 2 x 2 x 8 x 1000 operations, then 2 x 1000 for the update.
    assert scan["flops"] == pytest.approx(34_000, rel=0.02)
    assert scan["fraction_of_product"] == pytest.approx(scan["flops"] / 1e6 / scan["seconds"])
    assert scan["bytes_accessed"] >= 8 * 10_000  # the batch, the old and the new parameters
    assert scan["fraction_of_roofline"] == pytest.approx(scan["bytes_accessed"] / 1e4 / scan["seconds"])
    assert scan["compile_seconds"] > 0


@pytest.mark.slow
def test_a_run_beside_others_makes_as_many_updates_as_one_alone(monkeypatch):
    """What a run costs besides, its parameters to be copied, would else count for more in the shorter ones."""
    clocked(monkeypatch, ["scan", "other"])
    problem, chosen, peaks = mlp(4, 2), {"scan": variants.scan, "other": variants.scan}, timing.Peaks(1.0, 1.0)
    flops = bench.measure(problem, {"scan": variants.scan}, 2, budget=0.0, peaks=peaks)[0]["flops"]
    monkeypatch.setattr(bench, "FLOPS_PER_RUN", 40 * flops)
    rows = bench.measure(problem, chosen, 2, budget=0.0, peaks=peaks, num_runs={"other": 5})
    assert [row["num_updates"] for row in rows] == [40, 40]


@pytest.mark.slow
def test_runs_are_as_long_as_an_accelerator_needs(monkeypatch):
    """A run of a hundredth of the seconds wanted gets a hundred times the updates, and one that is long enough none."""
    clocked(monkeypatch, ["scan"])
    monkeypatch.setattr(bench, "RUN_SECONDS", {"cpu": 4.0})
    problem, least = mlp(4, 2), bench.MAX_UPDATES
    for seconds, updates in ((0.04, 100 * least), (5.0, least)):
        monkeypatch.setattr(timing, "timed", lambda run, *args, seconds=seconds: (run(*args), seconds))
        [row] = bench.measure(problem, {"scan": variants.scan}, 1, budget=0.0, peaks=timing.Peaks(1.0, 1.0))
        assert updates <= row["num_updates"] <= updates + 4


@pytest.mark.slow
def test_lanes_are_compared_with_the_scans_one_after_another(monkeypatch):
    """Both run 2 batch sizes over the same examples, at least one batch of the largest, by a microbatch of 2."""
    seen = clocked(monkeypatch, ["scan", "lanes"])
    [lanes], _ = bench.bench(["mlp-small"], ["lanes"], [2, 600], peaks=timing.Peaks(1.0, 1.0))
    assert (lanes["variant"], lanes["batch_size"], lanes["num_runs"]) == ("lanes", 2, 2)
    assert lanes["num_updates"] >= 300
    assert lanes["over_scan"]["median"] == 2.0
    (scans, its_inputs), (_, same) = seen
    assert_equal(its_inputs, same)
    two, six_hundred = scans(*same[0])[0]
    batches = same[0][2]
    for found, size in ((two, 2), (six_hundred, 600)):
        run = variants.scan(mlp(64, 128, 10), bench.LEARNING_RATE)
        cut = batching.batches(batches.reshape(-1), size, drop_remainder=True)
        assert_equal(found, jax.jit(run)(*same[0][:2], cut)[0])


@pytest.mark.slow
def test_where_nothing_is_known_the_table_says_so(monkeypatch):
    """No analysis; fewer repeats than an interval needs; no scan to compare with; faster than memory is: cached."""
    monkeypatch.setattr(timing, "_counted", lambda program, name: None)
    clocked(monkeypatch, ["other"])
    rows, peaks = bench.bench(["mlp-small"], ["scan-unrolled"], [1], peaks=timing.Peaks(1.0, 1.0))
    assert (rows[0]["flops"], rows[0]["fraction_of_product"], rows[0]["fraction_of_roofline"]) == (None, None, None)
    cells = bench_report.table(rows, peaks._asdict()).splitlines()[-1].split()
    assert [cells[i] for i in (3, 5, 6, 7)] == ["n/a"] * 4
    fast = rows[0] | {"fraction_of_roofline": 1.5, "num_repeats": 6, "over_scan": {"median": 2, "low": 1, "high": 3}}
    cells = bench_report.table([fast], peaks._asdict()).splitlines()[-1].split()
    assert cells[3:8] == ["33", cells[4], "2.00", "(1.00-3.00)", "n/a"]
    assert cells[8] == "cached"


def row(variant, median, low, high, batch_size=1, num_repeats=6):
    times = {"seconds": median, "low": low, "high": high, "num_repeats": num_repeats}
    return {"model": "m", "variant": variant, "batch_size": batch_size} | times


def test_a_change_is_flagged_beyond_the_noise_of_both():
    earlier = [row(name, 2.0, 1.8, 2.2) for name in "abce"] + [row("d", 2.0, 1.8, 2.2, 8)]
    now = [row("a", 3.0, 2.1, 3.1), row("b", 3.0, 2.3, 3.1), row("c", 1.0, 0.9, 1.7), row("d", 9.0, 9.0, 9.0, 1)]
    now += [row("e", 3.0, 3.0, 3.0, num_repeats=5)]  # five have no interval of 95 %
    changes = bench.compared([*now, {"model": "m", "variant": "a", "batch_size": 2, "skipped": "why"}], earlier)
    assert [(c["variant"], c["ratio"], c["changed"]) for c in changes] == [
        ("a", 1.5, ""),
        ("b", 1.5, "slower"),
        ("c", 0.5, "faster"),
        ("e", 1.5, "too few runs"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["mlp-medium"], ["scan"], [1]), "models: 'mlp-medium' is not one of mlp-small, mlp-large, .*; your own"),
        ((["mlp-small"], ["scam"], [1]), "variants: 'scam' is not one of python-loop, scan, .*, lanes; your own"),
        ((["mlp-small"], ["scan"], [0]), "batch_size=0 must be between 1 and the 1024 examples of mlp-small"),
        ((["mlp-small"], ["scan"], [1, 2000]), "batch_size=2000 must be between 1 and the 1024"),
        ((["mlp-small"], ["scan"], []), r"batch_sizes=\(\) must be different, and at least one"),
        ((["mlp-small"], ["scan", "scan"], [1]), r"variants=\('scan', 'scan'\) must be different"),
    ],
)
def test_bad_input_is_named_before_anything_is_timed(monkeypatch, arguments, message):
    monkeypatch.setattr(timing, "peaks", lambda: pytest.fail("something was timed"))
    with pytest.raises(ValueError, match=message):
        bench.bench(*arguments)


MINE = """
import jax, jax.numpy as jnp
from gdjax.bench import _variants as variants
from gdjax.bench import mlp
from gdjax.commands._session import Common
from gdjax.problem import Problem
data = jax.random.normal(jax.random.key(0), (8, 3))
problem = Problem(lambda key: jnp.zeros(3), lambda w, x: ((x - w) ** 2).sum(), data)
def mine(problem, learning_rate):
    return variants.scan(problem, learning_rate)
"""


@pytest.mark.slow
def test_the_command_keeps_its_result_and_compares_it_with_an_earlier_one(monkeypatch, tmp_path, capsys):
    (tmp_path / "my_bench.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "peaks", lambda: timing.Peaks(1e11, 1e10))
    monkeypatch.setattr(bench, "BUDGET", 0.0)
    command = ["gdjax", "bench", "--models", "my_bench:problem", "--variants", "scan", "microbatched", "my_bench:mine"]
    command += ["--batch-sizes", "1", "4", "--json", "-"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", "first"])
    commands.main()
    first = json.loads(capsys.readouterr().out)
    assert [(row["variant"], row["batch_size"], "skipped" in row) for row in first["rows"]] == [
        *(("scan", 1, False), ("microbatched", 1, True), ("my_bench:mine", 1, False)),
        *(("scan", 4, False), ("microbatched", 4, False), ("my_bench:mine", 4, False)),
    ]
    assert first["provenance"]["arguments"]["batch_sizes"] == [1, 4]
    assert (tmp_path / "first" / "figure.png").stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", [*command, "--out", "second", "--compare", "first/result.json"])
    commands.main()
    shown = capsys.readouterr()
    changes = json.loads(shown.out)["changes"]
    assert [(c["variant"], c["batch_size"]) for c in changes] == [
        (row["variant"], row["batch_size"]) for row in first["rows"] if "skipped" not in row
    ]
    assert f"{changes[0]['ratio']:>8.2f}" in shown.err
    assert "not the same" not in shown.err
    assert "skipped: one example has no pieces" in shown.err


def test_a_function_that_is_no_variant_is_named():
    with pytest.raises(ValueError, match=r"variant='os:getcwd' is not \(problem, .*\) -> run: it raised TypeError"):
        bench.bench(["mlp-small"], {"os:getcwd": os.getcwd}, [1], peaks=timing.Peaks(1.0, 1.0))


def test_a_device_is_not_read_as_a_result(tmp_path):
    """/dev/zero does not end."""
    with pytest.raises(ValueError, match=r"compare='/dev/zero' cannot be read as a result .*: .*it is not a file"):
        bench_report.Bench(compare=Path("/dev/zero"), common=Common(out=str(tmp_path / "out"))).run()


def test_what_else_changed_is_said():
    then = {"versions": {"jax": "0.10.0", "numpy": "2"}, "device": {"kind": "cpu"}}
    now = {"versions": {"jax": "0.10.2", "numpy": "2"}, "device": {"kind": "gpu"}}
    lines = bench_report.comparison_table([], now, then).splitlines()
    assert lines[1:] == ["not the same: jax 0.10.2 (was 0.10.0)", "not the same: kind gpu (was cpu)"]


SAVED = '{"provenance": {"versions": {"jax": "0"}, "device": {"kind": "cpu"}}, "rows": [{%s}]}'
ROW = '"model": "m", "variant": "scan", "batch_size": 1'


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        "[" * 100_000,
        SAVED % '"name": "stochastic"',
        SAVED % '"model": [], "variant": "scan", "batch_size": 1',
        SAVED % f'{ROW}, "seconds": 1.0',
        SAVED % f'{ROW}, "seconds": "1", "low": 1.0, "high": 1.0, "num_repeats": 9',
        SAVED % f'{ROW}, "seconds": 0.0, "low": 0.0, "high": 1.0, "num_repeats": 9',
        SAVED % f'{ROW}, "seconds": NaN, "low": 1.0, "high": 1.0, "num_repeats": 9',
        SAVED % f'{ROW}, "seconds": 1.0, "low": 1.0, "high": 1.0',
        SAVED % f'{ROW}, "seconds": 1.0, "low": 8.9, "high": 1.1, "num_repeats": 9',
        f'{{"rows": [{{{ROW}}}], "provenance": {{"versions": [1], "device": {{"kind": "cpu"}}}}}}',
    ],
)
def test_a_file_to_compare_with_must_be_a_result_of_bench(tmp_path, content):
    path = tmp_path / "earlier.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"compare='.*earlier.json' "):
        bench_report.Bench(compare=path, common=Common(out=str(tmp_path / "out"))).run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("devices", "message"),
    [(0, "must be at least 1"), (1_000_000, r"must be at least 1 and at most \d+: each has"), (3, "comes too late")],
)
def test_a_cpu_is_split_before_it_is_used_or_not_at_all(tmp_path, devices, message):
    jax.devices()
    with pytest.raises(ValueError, match=f"devices={devices} {message}"):
        bench_report.Bench(devices=devices, common=Common(out=str(tmp_path / "out"))).run()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_profile_is_a_trace_for_perfetto(tmp_path):
    with timing.profiled(tmp_path / "trace"):
        jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((8, 8))))
    [trace] = tmp_path.rglob("perfetto_trace.json.gz")
    assert trace.stat().st_size > 0
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"profile='.*file' cannot be written"), timing.profiled(tmp_path / "file"):
        pass


@pytest.mark.slow
def test_a_second_compilation_is_read_from_the_folder(tmp_path):
    code = f"""
import pathlib, jax
from gdjax import timing
timing.keep_compiled(pathlib.Path({str(tmp_path)!r}) / "cache")
hits = []
jax.monitoring.register_event_listener(lambda name, **rest: name.endswith("/cache_hits") and hits.append(name))
for _ in range(2):
    timing.compiled(lambda x: x @ x, jax.ShapeDtypeStruct((8, 8), "float32"))
    print(len(hits))
    jax.clear_caches()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["0", "1"]
