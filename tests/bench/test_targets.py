"""What is read from a compiled program is what stands in it; a device need not be there, a compiler must."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from gdjax import bench
from gdjax.bench import _aot as aot
from gdjax.bench import _forecast as forecast
from gdjax.bench import _targets as targets
from gdjax.commands import _compiled as shown
from gdjax.commands.bench import Bench
from gdjax.problem import Problem

# Two kernels and an inner loop of three that starts one kernel and the dearer of two branches (two and one), by a
# call: 2 + 3 (1 + 2) = 11 in each of 4 iterations. Outside of it a copy, and a loop that starts less.
PROGRAM = """
HloModule jit_run

%branch_a (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %a = f32[2]{0} fusion(%p), kind=kLoop, calls=%fused
  ROOT %b = f32[2]{0} all-reduce(%a), replica_groups={}
}

%branch_b (p.1: f32[2]) -> f32[2] {
  %p.1 = f32[2]{0} parameter(0)
  ROOT %d = f32[2]{0} copy(%p.1)
}

%called (p.2: f32[2]) -> f32[2] {
  %i = s32[] constant(0)
  ROOT %c = f32[2]{0} conditional(%i, %p.2, %p.2), branch_computations={%branch_a, %branch_b}
}

%inner (t: (s32[], f32[2])) -> (s32[], f32[2]) {
  %x = f32[2]{0} get-tuple-element(%t), index=1
  %e = f32[2]{0} custom-call(%x), custom_call_target="AllocateBuffer"
  %y = f32[2]{0} dot(%e, %e)
  %z = f32[2]{0} call(%y), to_apply=%called
  ROOT %r = (s32[], f32[2]{0}) tuple(%x, %z)
}

%condition (t.1: (s32[], f32[2])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %n = s32[] get-tuple-element(%t.1), index=0
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}

%outer (t.2: (s32[], f32[2])) -> (s32[], f32[2]) {
  %f = (f32[2]{0}, f32[]) fusion(%t.2), kind=kInput, calls=%fused
  %w = (s32[], f32[2]{0}) while(%f), condition=%condition, body=%inner
  %g = f32[2]{0} fusion(%w), kind=kLoop, calls=%fused
  ROOT %r.1 = (s32[], f32[2]{0}) tuple(%g)
}

%small (t.3: (s32[], f32[2])) -> (s32[], f32[2]) {
  ROOT %h = (s32[], f32[2]{0}) fusion(%t.3), kind=kLoop, calls=%fused
}

ENTRY %main.1 (x.1: f32[2]) -> f32[2] {
  %x.1 = f32[2]{0} parameter(0)
  %y.1 = f32[2]{0} copy(%x.1)
  %w.1 = (s32[], f32[2]{0}) while(%y.1), condition=%other, body=%outer, backend_config={"known_trip_count":{"n":"4"}}
  %w.2 = (s32[], f32[2]{0}) while(%w.1), condition=%condition, body=%small
  ROOT %z.1 = f32[2]{0} get-tuple-element(%w.2), index=1
}
"""


def test_loops_in_loops_are_multiplied_and_of_two_branches_the_dearer_counts():
    assert aot.counted(PROGRAM, aot.KERNELS) == (44, 1, 2)
    assert aot.counted(PROGRAM, aot.COLLECTIVES) == (12, 0, 2)
    unknown = PROGRAM.replace("direction=LT", "direction=NE")
    assert aot.counted(unknown, aot.KERNELS) == (None, 1, 2)


def test_a_loop_inside_a_command_buffer_is_none_of_the_host(tmp_path):
    buffer = "000: kCommandBuffer [source | sink]\n    001: kWhile [source]\ncondition:\n        002: kCustomKernel x\n"
    loops = "003: kWhile [prev=000]\nbody:\n    004: kCommandBuffer [x]\n        005: kWhile [x]\n    006: kWhile [x]\n"
    (tmp_path / "module.thunk_sequence_after_thunk_passes.txt").write_text(buffer + loops)
    assert aot._host_loops(tmp_path) == 2
    assert aot._host_loops(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", targets.KNOWN)
def test_known_devices_are_described_in_full(name):
    found = targets.find(name)
    assert found.name == name
    assert 1e14 < found.flops_per_second < 1e15
    assert 5e11 < found.bytes_per_second < 1e13
    assert 1e10 < found.usable_bytes <= found.memory_bytes < 2e11
    assert "driver_version" in found.config if found.platform == "cuda" else len(found.topologies) > 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("platform = ", "cannot be read as a device: .*line 1"),
        ('platform = "cuda"', "cannot be read as a device: .*flops_per_second"),
        ('colour = "red"', "cannot be read as a device: .*colour"),
        ('platform = "abacus"', "platform='abacus' must be one of cuda, tpu"),
        ('platform = "tpu"', "platform 'tpu' needs topologies"),
        ('platform = "cuda"\nmemory_bytes = 0', "memory_bytes=0 must be a number above 0"),
    ],
)
def test_a_file_that_describes_no_device_is_refused(tmp_path, content, message):
    path, peaks = tmp_path / "mine.toml", "\nflops_per_second = 1\nbytes_per_second = 1\n"
    given = content if "flops" in message else content + peaks
    path.write_text(given if "memory" in content or "flops" in message else given + "memory_bytes = 1")
    with pytest.raises(ValueError, match=message):
        targets.find(str(path))


def test_an_unknown_target_and_a_missing_compiler_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="target='h1000' is not one of h100, v5e, v5p, v6e, nor a file"):
        bench.compile_for("h1000")
    monkeypatch.setattr(targets, "_is_installed", lambda name: False)
    for name, extra in (("h100", "aot-cuda"), ("v5e", "aot-tpu")):
        with pytest.raises(ModuleNotFoundError, match=rf"target='{name}' .* pip install 'gdjax\[{extra}\]'"):
            bench.compile_for(name, ["mlp-small"], ["scan"])
    monkeypatch.setattr(targets, "_is_installed", lambda name: True)
    with pytest.raises(ValueError, match="num_devices=9 must be at most 8 of v5e"):
        bench.compile_for("v5e", ["mlp-small"], ["scan"], num_devices=9)
    with pytest.raises(ValueError, match="num_devices=0 must be at least 1"):
        bench.compile_for("h100", ["mlp-small"], ["scan"], num_devices=0)


@pytest.mark.parametrize("out_of_memory", [False, True])
@pytest.mark.parametrize(
    ("fixed", "each"), [(10.0, 1.0), (0.0, 0.013), (95.0, 0.5), (101.0, 1.0), (99.9, 1.0), (1.0, 1e-9)]
)
def test_the_largest_batch_that_fits_is_found_by_compiling_few(monkeypatch, fixed, each, out_of_memory):
    """With bytes a + b B and 100 of them: the largest is min(N, (100 - a) / b); a compiler may only say 'too much'."""
    compiled = []

    def made(target, problem, size, variant, devices):
        compiled.append(size)
        total = fixed + each * size
        fits = total <= 100
        return {"total_bytes": total} if fits or not out_of_memory else {"skipped": "", "out_of_memory": True}

    monkeypatch.setattr(forecast, "_made", made)
    target = targets.Target("mine", "tpu", 1.0, 1.0, 100.0)
    problem = Problem(lambda key: jnp.zeros(()), lambda w, x: w * x, jnp.zeros(60_000))
    found = forecast.largest_batch(target, problem, [])
    most = min(60_000, int((100 - fixed) / each)) if fixed + each <= 100 else 0
    assert most * (1 - forecast.TOLERANCE) - 1 <= found["batch_size"] <= most
    assert found["limit"] == ("examples" if most == 60_000 else "memory")
    assert len(compiled) <= 12


def unknown_to_the_compiler(problem, learning_rate):
    primitive = core.Primitive("abacus")
    primitive.def_abstract_eval(lambda x: x)
    return lambda params, data, batches: (jax.tree.map(primitive.bind, params), ())


@pytest.fixture
def this_machine(monkeypatch):
    """A device that is there, so that no compiler has to be installed."""
    monkeypatch.setattr(targets, "devices", lambda target, num_devices=1: jax.devices()[:num_devices])
    return targets.Target("this", "tpu", 1e6, 1e3, 1e9)


@pytest.mark.slow
def test_a_row_says_what_was_compiled_and_the_others_go_on(this_machine):
    weights = jnp.zeros(1000)
    linear = Problem(lambda key: weights, lambda w, x: (x @ w) ** 2, jnp.zeros((16, 1000)))
    chosen = {name: bench.VARIANTS[name] for name in ("python-loop", "scan", "one-kernel", "microbatched")}
    chosen["mine"] = unknown_to_the_compiler
    rows, [largest] = bench.compile_for(this_machine, {"linear": linear}, chosen, [1, 8])
    by = {(row["variant"], row["batch_size"]): row for row in rows}
    assert len(rows) == 10
    assert (by["scan", 8]["loops"], by["python-loop", 8]["loops"], by["python-loop", 8]["host_loops"]) == (1, 0, 1)
    assert by["scan", 8]["argument_bytes"] == 1000 * 8 + 16 * 1000 * 8 + 64 * 8 * 4
    # A product for the losses and one for the gradient: 2 x 2 x 8 x 1000 operations, then 2 x 1000 for the update.
    assert by["scan", 8]["flops"] == pytest.approx(34_000, rel=0.02)
    assert by["scan", 8]["least_seconds"] == max(by["scan", 8]["flops"] / 1e6, by["scan", 8]["bytes_accessed"] / 1e3)
    assert by["scan", 8]["fits"]
    assert by["scan", 8]["has_float64"] == (weights.dtype == jnp.float64)
    assert by["one-kernel", 1]["skipped"] == "for a CPU only"
    assert by["microbatched", 1]["skipped"] == "one example has no pieces"
    assert by["mine", 1]["skipped"].startswith("does not compile for this: ")
    assert "abacus" in by["mine", 1]["skipped"]
    assert (largest["batch_size"], largest["limit"]) == (16, "examples")
    text = shown.text("this", rows, [largest], [])
    assert "linear: all B = 16 examples fit" in text
    assert [axes.get_xlabel() for axes in shown.figure("this", rows).axes][1] == "batch size B (examples)"


def test_a_device_too_small_for_one_example_is_said(this_machine):
    problem = Problem(lambda key: jnp.zeros(()), lambda w, x: (w * x) ** 2, jnp.zeros(16))
    small = this_machine._replace(memory_bytes=100.0)
    [row], [largest] = bench.compile_for(small, {"tiny": problem}, ["scan"], [4])
    assert not row["fits"]
    assert largest["batch_size"] == 0
    assert shown.fitting(largest).startswith("tiny: not even B = 1 fits with the data: it needs ")


def test_changes_are_ratios_of_what_both_have():
    row = {"model": "m", "variant": "scan", "batch_size": 1, "kernels": 9.0, "temporary_bytes": 4.0}
    old = [row | {"kernels": 10.0, "temporary_bytes": 2.0}, {"model": "m", "variant": "x", "batch_size": 1}]
    [change] = shown.changes([row, {"model": "m", "variant": "lanes", "batch_size": 1, "skipped": "no"}], old)
    assert (change["kernels"], change["temporary_bytes"], change["changed"]) == (0.9, 2.0, "fewer and more")
    assert shown.changes([row], [row])[0]["changed"] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"profile": "there"}, "exclude one another"), ({"compare": "old.json"}, "of target='v5e', not 'h100'")],
)
def test_what_goes_with_no_target_is_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("gdjax.commands.bench._earlier", lambda path: {"target": "v5e", "rows": []})
    with pytest.raises(ValueError, match=message):
        Bench(target="h100", **arguments).run()
