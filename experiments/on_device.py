"""What does an accelerator make of these programs, and is what it computes what a CPU computes?

Question    On a GPU or TPU: are updates, norms, noise scales and eigenvalues those of the CPU; what do whole-loop CUDA
            graphs (`kernels.LOOPS_IN_GRAPHS`), unrolling and lanes give at small batches; what do ghost norms cost; how
            near do large batches come to the measured peak; and is the advice on a batch size the same?
Prediction  At highest precision all quantities within 1e-3 of float64 on the CPU. On a GPU, as ratios in one run:
            graphs >= 1.5 times as fast at B = 1; 4096 lanes >= 200 times the examples per second of one run; ghost
            norms <= 1.2 times a mean gradient; `descent.run` of the large network at B = 1024 >= 50 % of the product
            peak. None of this had been run on an accelerator when it was written.
Cost        --budget seconds, 540 by default: sections end by the clock, the most important come first, and each is
            printed, and written to --partial, as soon as it is done. On a CPU it measures that CPU.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import backend

from gdjax import (
    advise,
    batching,
    bench,
    curvature,
    descent,
    ghost,
    gradients,
    kernels,
    noise,
    problems,
    report,
    timing,
    tuning,
)
from gdjax.commands import experiment
from gdjax.problem import Problem

TOLERANCE = 1e-3
AIMS = {"graphs": 1.5, "lanes": 200.0, "ghost": 1.2, "peak": 0.5}
SMALL = {"product_size": 128, "copy_size": 2**16, "budget": 0.01}
TESTS = ("test_descent.py", "batching", "gradients", "ghost/test_ghost.py", "noise", "test_curvature.py")


@dataclasses.dataclass(frozen=True)
class Options(experiment.Options):
    """What this experiment can be asked."""

    budget: float = 540.0
    """Seconds that all of it may take."""
    partial: str | None = None
    """File of what was found so far, written after every section."""


class Clock:
    """What is left of a section's seconds, and of all."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def relative_error(found: Any, expected: Any) -> float:
    """Return the largest |found - expected| / |expected| over the leaves of floating point."""
    errors = [0.0]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(jnp.result_type(b), jnp.floating):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            errors.append(float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-30)))
    return max(errors)


def seconds_of(function: Callable, *args, options: dict | None = None) -> float:
    """Return the median run time of a compiled program."""
    program = jax.jit(function, compiler_options=options).lower(*args).compile()
    return timing.seconds(program, *args, budget=1.0, repeats=7)


def run_of(problem: Problem, batch_size: int, num_updates: int, *, optimizer=None, unroll: int = 1):
    """Return (`descent.run` without records, its state, data and batches)."""
    method = descent.method(gradients.mean(problem.loss), optimizer or optax.sgd(0.01))
    stream = batching.reshuffled(jax.random.key(1), problem.num_examples, length=num_updates * batch_size)
    loop = partial(descent.run, method, record=lambda state, info: (), every=num_updates, unroll=unroll)
    state = method.init(problem.init(jax.random.key(0)))
    return loop, (state, problem.train, batching.batches(stream, batch_size))


def device(smoke: bool, clock: Clock) -> Iterator[dict]:
    """The device itself: peaks at both precisions, and what XLA knows of it, to be compared with ours."""
    small: dict[str, Any] = SMALL if smoke else {"budget": 0.5}
    for precision in ("default", "highest"):
        yield {"precision": precision} | timing.peaks(precision=precision, **small)._asdict()
    with contextlib.suppress(Exception):  # of this jax alone
        topology: Any = backend.get_backend().get_topology()
        yield {"target_config": str(topology.target_config)}


def correctness(smoke: bool, clock: Clock) -> Iterator[dict]:
    """Updates, norms, noise and eigenvalues against the CPU in float32 and float64."""
    host = jax.devices("cpu")[0]
    for name in ("mlp-small",) if smoke else bench.MODELS:
        problem = bench.MODELS[name]()
        params, batch = problem.init(jax.random.key(0)), batching.take(problem.train, jnp.arange(32))
        start = curvature.random_vectors(jax.random.key(2), params, num_vectors=2)
        loop, (state, data, batches) = run_of(problem, 32, 20)
        norms, pairs = ghost.sq_norms(problem.loss), curvature.top_eigenpairs(problem.loss, num_iterations=6)
        scale = partial(noise.measure, problem.loss, key=jax.random.key(3), num_examples=64)
        quantities: dict[str, tuple[Callable, tuple]] = {
            "20 updates": (loop, (state, data, batches)),
            "lanes": (_lanes(loop, 4), (state, data, batches)),
            "norms": (norms, (params, batch)),
            "noise": (lambda params, data, scale=scale: scale(params, data).b_simple, (params, data)),
            "eigenvalues": (lambda *args, pairs=pairs: pairs(*args).values, (params, batch, start)),
        }
        for quantity, (function, arguments) in quantities.items():
            if clock.left() < 0:
                return
            row: dict[str, Any] = {"model": name, "quantity": quantity}
            exact = _in_float64(function, jax.device_put(arguments, host))
            row["cpu float32"] = relative_error(jax.jit(function)(*jax.device_put(arguments, host)), exact)
            for precision in ("default", "highest"):
                with jax.default_matmul_precision(precision):
                    row[precision] = relative_error(jax.jit(function)(*arguments), exact)
            yield row


def _lanes(loop: Callable, number: int) -> Callable:
    """Return the parameters of so many runs side by side, each from the batches shifted by one."""

    def run(state, data, batches):
        shifted = jax.vmap(lambda shift: jnp.roll(batches, shift, axis=0))(jnp.arange(number, dtype=jnp.int32))
        return jax.vmap(lambda own: loop(state, data, own)[0].params)(shifted)

    return run


def _in_float64(function: Callable, arguments):
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, arguments)
        return jax.tree.map(np.asarray, jax.jit(function)(*wide))


def loops(smoke: bool, clock: Clock) -> Iterator[dict]:
    """Small batches: one launch for an iteration, for the loop, and unrolled."""
    num_updates = 32 if smoke else 2048
    for name in ("mlp-small",) if smoke else ("mlp-small", "mlp-large", "transformer"):
        for batch_size in (1, 32):
            ways = {"plain": (1, None), "graphs": (1, kernels.LOOPS_IN_GRAPHS)}
            ways |= {"unrolled": (8, None), "unrolled graphs": (8, kernels.LOOPS_IN_GRAPHS)}
            found = {}
            for way, (unroll, options) in ways.items():
                if clock.left() < 0:
                    return
                loop, arguments = run_of(bench.MODELS[name](), batch_size, num_updates, unroll=unroll)
                program = jax.jit(loop, compiler_options=options).lower(*arguments).compile()
                found[way] = program(*arguments)[0].params
                seconds = timing.seconds(program, *arguments, budget=1.0, repeats=7)
                row = {"model": name, "batch_size": batch_size, "way": way, "microseconds": 1e6 * seconds / num_updates}
                yield row | {"from_plain": relative_error(found[way], found["plain"])}


def lanes(smoke: bool, clock: Clock) -> Iterator[dict]:
    """Runs side by side at B = 1."""
    num_updates = 16 if smoke else 512
    loop, arguments = run_of(bench.MODELS["mlp-small"](), 1, num_updates)
    for number in (1, 8) if smoke else (1, 16, 256, 1024, 4096):
        if clock.left() < 0:
            return
        seconds = seconds_of(_lanes(loop, number), *arguments, options=kernels.LOOPS_IN_GRAPHS)
        yield {"lanes": number, "examples_per_second": number * num_updates / seconds}


def ghosts(smoke: bool, clock: Clock) -> Iterator[dict]:
    """Norms of every example's gradient, against a mean gradient."""
    for name in ("mlp-small",) if smoke else ("mlp-large", "cnn", "transformer"):
        problem = bench.MODELS[name]()
        params = problem.init(jax.random.key(0))
        for batch_size in (8,) if smoke else (64, 256):
            if clock.left() < 0:
                return
            batch = batching.take(problem.train, jnp.arange(batch_size))
            of = {"mean": gradients.mean, "norms": ghost.sq_norms, "second moments": ghost.second_moments}
            times = {way: seconds_of(make(problem.loss), params, batch) for way, make in of.items()}
            yield {"model": name, "batch_size": batch_size} | times


def peak(smoke: bool, clock: Clock) -> Iterator[dict]:
    """The table of `gdjax bench`, beside the peaks."""
    small: dict[str, Any] = SMALL if smoke else {"budget": 0.3}
    peaks = timing.peaks(**small)
    for name in ("mlp-small",) if smoke else ("mlp-large", "mlp-small", "cnn", "transformer"):
        for size in (32,) if smoke else (1024, 256, 32, 1):
            if clock.left() < 0:
                return
            ways = {way: bench.VARIANTS[way] for way in ("scan", "scan-unrolled", "vmapped-seeds")}
            budget = 0.02 if smoke else 0.3
            yield from (
                {"model": name} | row
                for row in bench.measure(bench.MODELS[name](), ways, size, budget=budget, peaks=peaks)
            )


def advice(smoke: bool, clock: Clock) -> Iterator[dict]:
    """The advice for one problem, here and on the CPU of the same machine."""
    goal, seconds = (tuning.Budget(512), 5.0) if smoke else ("loss<=0.01", max(10.0, clock.left() / 2))
    for where in dict.fromkeys((jax.devices()[0], jax.devices("cpu")[0])):
        with jax.default_device(where):
            found = advise.batch_size(problems.least_squares(), goal, seconds=seconds)
        yield {"device": str(where), "batch_size": found.batch_size, "learning_rate": found.learning_rate}


def tests(smoke: bool, clock: Clock) -> Iterator[dict]:
    """The test files that make sense on a device; in a process of its own, which finds the device as it is."""
    if smoke:
        return
    folder = Path(__file__).parents[1] / "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(folder / name) for name in TESTS)]
    environment = os.environ | {"GDJAX_TEST_DEVICE": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(10.0, clock.left()), env=environment)
        yield {"status": done.returncode, "end": done.stdout[-3000:]}
    except subprocess.TimeoutExpired as error:
        yield {"status": None, "end": (error.stdout or b"")[-3000:].decode(errors="replace")}


SECTIONS = {device: 25, correctness: 110, loops: 90, lanes: 50, ghosts: 60, peak: 100, advice: 60, tests: 100}
"""{section: seconds at most}, the most important first."""


def main(options: Options) -> experiment.Result:
    rows: list[dict] = []
    clock = Clock(options.budget)
    for section, seconds in SECTIONS.items():
        name, before, began = section.__name__, len(rows), time.monotonic()
        if clock.left() < 15:
            rows.append({"section": name, "error": "no time was left"})
            continue
        try:
            for row in section(options.smoke, Clock(min(seconds, clock.left() - 10))):
                rows.append({"section": name} | row)
        except Exception as error:  # what a device cannot do is a finding, and the others go on
            rows.append({"section": name, "error": f"{type(error).__name__}: {str(error)[:300]}"})
        print(name, f"{time.monotonic() - began:.0f} s", json.dumps(rows[before:], default=float), flush=True)
        if options.partial is not None:
            Path(options.partial).write_text(json.dumps(rows, default=float))
    verdict = judged(rows)
    return experiment.Result(rows, verdict, figure(rows, verdict))


def judged(rows: list[dict]) -> str:
    """Return the verdict on the aims, of what there was time for."""

    def of(section, **rest):
        return [row for row in rows if {"section": section, **rest}.items() <= row.items() and "error" not in row]

    checks, numbers = {}, []

    def check(name: str, value: float, holds: bool) -> None:
        checks[name] = holds
        numbers.append(f"{name}: {value:.3g}")

    if found := of("correctness"):
        worst = max(row["highest"] for row in found)
        check(f"errors at highest precision <= {TOLERANCE}", worst, worst <= TOLERANCE)
    first = {row["way"]: row["microseconds"] for row in of("loops", model="mlp-small", batch_size=1)}
    if jax.default_backend() == "gpu" and {"plain", "graphs"} <= first.keys():
        gain = first["plain"] / first["graphs"]
        check(f"graphs at B = 1 >= {AIMS['graphs']}", gain, gain >= AIMS["graphs"])
    if (one := of("lanes", lanes=1)) and (many := of("lanes", lanes=4096)):
        gain = many[0]["examples_per_second"] / one[0]["examples_per_second"]
        check(f"4096 lanes over one >= {AIMS['lanes']:.0f}", gain, gain >= AIMS["lanes"])
    if found := [row for row in of("ghosts") if row["model"] != "cnn"]:
        worst = max(row["norms"] / row["mean"] for row in found)
        check(f"ghost norms over a mean gradient <= {AIMS['ghost']}", worst, worst <= AIMS["ghost"])
    if found := of("peak", model="mlp-large", variant="scan", batch_size=1024):
        share = found[0]["fraction_of_product"] or 0.0
        check(f"share of the peak >= {AIMS['peak']}", share, share >= AIMS["peak"])
    numbers += [f"{row['section']}: {row['error']}" for row in rows if "error" in row]
    return f"On {jax.devices()[0].device_kind}: " + experiment.verdict(checks, "; ".join(numbers) + ".")


def figure(rows: list[dict], title: str):
    """Draw microseconds of an update by each way, and examples per second of lanes."""
    drawn, (left, right) = report.panels(2, title=title, width=7)
    found = [row for row in rows if row["section"] == "loops" and "way" in row]
    left.barh(
        [f"{row['model']}, B = {row['batch_size']}, {row['way']}" for row in found],
        [row["microseconds"] for row in found],
    )
    left.invert_yaxis()
    left.set(xlabel="microseconds per update")
    found = [row for row in rows if row["section"] == "lanes" and "lanes" in row]
    right.plot([row["lanes"] for row in found], [row["examples_per_second"] for row in found], marker="o")
    right.set(xlabel="runs side by side, B = 1", ylabel="examples per second, of all runs")
    report.log_scales(right, "xy")
    return drawn


if __name__ == "__main__":
    experiment.run(main, Options)
