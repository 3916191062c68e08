"""`gdjax bench`: ways to run gradient descent, timed against one another and against what the device could do.

>>> rows, peaks = bench(["mlp-small"], ["scan", "sharded"], [2], budget=0.01, peaks=timing.Peaks(1e11, 1e10))
>>> [(row["variant"], row["num_runs"], row.get("over_scan", {}).get("median")) for row in rows]
[('scan', 1, 1.0), ('sharded', 1, None)]
>>> rows[1]["skipped"]
'one device only (a CPU is split by --devices 2)'
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdjax import batching, timing
from gdjax.bench import _variants
from gdjax.bench._models import MODELS
from gdjax.problem import Problem
from gdjax.timing import Peaks

LEARNING_RATE = 0.01
BATCH_SIZES = (1, 32, 256)
FLOPS_PER_RUN, MAX_UPDATES = 2e9, 1024  # a run is long beside its call and filling caches, short beside the budget
RUN_SECONDS = {"cpu": 0.0}
ACCELERATOR_RUN_SECONDS = 0.05  # below that the time of a call is counted too; what a flop takes says little there
NUM_INPUTS = 2
BUDGET = 0.3  # seconds of timed runs for each program

Row = dict[str, Any]
Progress = Callable[[str, float], None]
"""(what is being done, fraction of all that is done)."""


def bench(
    models: Sequence[str] | Mapping[str, Problem] = tuple(MODELS),
    variants: Sequence[str] | Mapping[str, _variants.Variant | None] = (*_variants.VARIANTS, "lanes"),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    budget: float = BUDGET,
    peaks: Peaks | None = None,
    progress: Progress = lambda stage, fraction: None,
) -> tuple[list[Row], Peaks]:
    """Time every variant of every model at every batch size; `lanes` once for all batch sizes.

    Args:
        models: names of `MODELS`, or {name: problem}.
        variants: names of `VARIANTS` and 'lanes', or {name: variant}, where 'lanes' needs none.
        batch_sizes: examples per update.
        budget: seconds of timed runs for each program.
        peaks: of the device; measured where not given.
        progress: called with what is being done and the fraction that is done.

    Returns:
        (rows as `measure` makes them, with the "model"; peaks). `lanes` is compared with `variants.scans`, and its
        batch size is the microbatch of a tick.

    Raises:
        ValueError: before anything is timed, for an unknown name, one given twice, none, or a batch size outside
            1 ... N.
    """
    loaded, chosen = asked(models, variants, batch_sizes)
    with_lanes = "lanes" in chosen
    chosen = {name: variant for name, variant in chosen.items() if variant is not None and name != "lanes"}
    progress("peaks of the device", 0.0)
    peaks = peaks or timing.peaks()
    num_groups = len(loaded) * (len(batch_sizes) * bool(chosen) + with_lanes)
    rows: list[Row] = []
    done = itertools.count()

    def group(model: str, size: int, some: Mapping[str, _variants.Variant], **rest) -> list[Row]:
        number = next(done)

        def show(stage: str, fraction: float) -> None:
            progress(f"{model}, B = {size}: {stage}", (number + fraction) / num_groups)

        found = measure(loaded[model], some, size, budget=budget, peaks=peaks, progress=show, **rest)
        return [{"model": model} | row for row in found]

    for model in loaded:
        for size in batch_sizes if chosen else ():
            rows += group(model, size, chosen)
        if with_lanes:
            both = {"scan": _variants.scans, "lanes": _variants.lanes}
            rows += group(
                model,
                _variants.microbatch_size(batch_sizes),
                {name: partial(variant, batch_sizes=batch_sizes) for name, variant in both.items()},
                num_runs=dict.fromkeys(both, len(batch_sizes)),
                min_examples=max(batch_sizes),
            )[1:]
    return rows, peaks


def asked(
    models: Sequence[str] | Mapping[str, Problem],
    variants: Sequence[str] | Mapping[str, _variants.Variant | None],
    batch_sizes: Sequence[int],
) -> tuple[dict[str, Problem], dict[str, _variants.Variant | None]]:
    """Return ({name: problem}, {name: variant}), checked as `bench` says."""
    _check_distinct(models=models, variants=variants, batch_sizes=batch_sizes)
    loaded = _found("models", models, MODELS)
    loaded = {name: x if isinstance(x, Problem) else x() for name, x in loaded.items()}
    chosen = _found("variants", variants, {**_variants.VARIANTS, "lanes": None})
    _check_sizes(batch_sizes, loaded)
    return loaded, chosen


def measure(
    problem: Problem,
    chosen: Mapping[str, _variants.Variant],
    batch_size: int,
    *,
    budget: float,
    peaks: Peaks,
    num_runs: Mapping[str, int] | None = None,
    min_examples: int = 1,
    progress: Progress = lambda stage, fraction: None,
) -> list[Row]:
    """Compile variants of one batch size, time them in turn, and compare them with "scan" and the device's peaks.

    Work is counted on a mean gradient and its update compiled alone, times the updates that were made: the least that
    descent needs, whatever else a variant computes, and independent of how the compiler counts loops.

    Args:
        problem, chosen, batch_size: what is run. "python-loop" is called as it is, the others are compiled.
        budget: seconds of timed runs for each, see `timing.measured_in_turn`.
        peaks: of the device.
        num_runs: {name: runs of descent that a call makes} where more than one; default that of vmapped-seeds.
        min_examples: that each of them sees.
        progress: called with what is being done and the fraction that is done.

    Returns:
        A row for each: variant, batch_size, num_runs and, of vmapped-seeds, runs_at_once, how many of them run side by
        side; seconds (an update of one run: the median time of the program over T num_runs) and its 95% interval low,
        high; over_scan, the median and interval of the ratios to "scan" within turns; num_updates T, num_repeats,
        compile_seconds; examples_per_second over all runs; flops and
        bytes_accessed of an update; fraction_of_product and fraction_of_roofline; temporary_bytes of the program. None
        is 'no analysis', or no scan to compare with. What cannot be run is a row that says so in "skipped".
    """
    num_runs = {"vmapped-seeds": _variants.num_seeds()} if num_runs is None else num_runs
    step = _step(problem, batch_size)
    rows: dict[str, Row] = {}
    programs: dict[str, Program] = {}
    for i, (name, variant) in enumerate(chosen.items()):
        progress(f"compiling {name}", 0.5 * i / len(chosen))
        runs = num_runs.get(name, 1)
        rows[name] = {"variant": name, "batch_size": batch_size, "num_runs": runs}
        if variant is _variants.vmapped_seeds:
            rows[name]["runs_at_once"] = _variants.seeds_at_once(problem, LEARNING_RATE, batch_size)
        num_updates = max(_num_updates(step.flops), -(-min_examples // batch_size))
        try:
            programs[name] = _long_enough(problem, name, variant, batch_size, num_updates, step)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            rows[name] |= {"skipped": str(error).splitlines()[0]}
        except (Exception, SystemExit) as error:  # of a function that is no variant
            raise ValueError(f"variant={name!r} is not (problem, learning_rate) -> run: it raised {error!r}") from error
    progress(f"timing {len(programs)} ways in turn", 0.5)
    names = sorted(programs, key=lambda name: name != "scan")  # the first is what the others are compared with
    functions, inputs = [programs[name].run for name in names], [programs[name].inputs for name in names]
    series = timing.measured_in_turn(functions, inputs, budget=budget) if names else []
    updates = {name: rows[name]["num_runs"] * len(programs[name].inputs[0][2]) for name in names}
    times = {name: [t / updates[name] for t in series[i]] for i, name in enumerate(names)}
    for name, program in programs.items():
        rows[name] |= _costs(program, times[name], times.get("scan"), step, peaks, batch_size)
    return list(rows.values())


def compared(rows: Sequence[Row], earlier: Sequence[Row]) -> list[Row]:
    """Return, for every row that an earlier result has too, its time over the earlier one, and whether it changed.

    It changed where the two intervals of the medians do not meet: "changed" is 'slower', 'faster' or ''; and 'too few
    runs' where one of them has no interval of 95%.
    """

    def key(row: Row):
        return row["model"], row["variant"], row["batch_size"]

    before = {key(row): row for row in earlier if row.get("seconds")}
    found = []
    for row in rows:
        old = before.get(key(row))
        if old and row.get("seconds"):
            slower, faster = row["low"] > old["high"], row["high"] < old["low"]
            changed = "slower" if slower else "faster" if faster else ""
            if min(row["num_repeats"], old["num_repeats"]) < timing.MIN_RUNS:
                changed = "too few runs"
            names = ("model", "variant", "batch_size")
            found.append({n: row[n] for n in names} | {"ratio": row["seconds"] / old["seconds"], "changed": changed})
    return found


def _found(argument: str, given: Sequence[str] | Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return {name: what it is}, names without one from those that are known."""
    if isinstance(given, Mapping):
        return dict(given)
    for name in given:
        if name not in known:
            raise ValueError(f"{argument}: {name!r} is not one of {', '.join(known)}; your own go in by a mapping")
    return {name: known[name] for name in given}


def _input(problem: Problem, batch_size: int, num_updates: int, key: jax.Array):
    """Return (params, data, batches int32[T, B]) drawn from `key`."""
    init_key, stream_key = jax.random.split(key)
    stream = batching.reshuffled(stream_key, problem.num_examples, length=num_updates * batch_size)
    return problem.init(init_key), problem.train, batching.batches(stream, batch_size)


class Program(NamedTuple):
    """A variant ready to be timed: the function, the arguments it is given in turn, and what its compiler said."""

    run: Callable
    inputs: list[tuple]
    compile_seconds: float
    temporary_bytes: int | None


def _step(problem: Problem, batch_size: int) -> timing.Compiled:
    method = _variants.plain_method(problem, LEARNING_RATE)
    state = jax.eval_shape(lambda key: method.init(problem.init(key)), jax.random.key(0))
    return timing.compiled(lambda state, batch: method.step(state, batch)[0], state, _first(problem.train, batch_size))


def _long_enough(
    problem: Problem, name: str, variant: _variants.Variant, batch_size: int, num_updates: int, step: timing.Compiled
) -> Program:
    """Return a variant whose run takes RUN_SECONDS at least: where it does not, with more updates."""

    def program(num_updates: int) -> Program:
        inputs = [_input(problem, batch_size, num_updates, jax.random.key(seed)) for seed in range(NUM_INPUTS)]
        return _program(variant(problem, LEARNING_RATE), inputs, step, alone=name == "python-loop")

    found = program(num_updates)
    wanted = RUN_SECONDS.get(jax.default_backend(), ACCELERATOR_RUN_SECONDS)
    if not wanted:
        return found
    missing = wanted / timing.timed(found.run, *found.inputs[0])[1]
    return found if missing <= 1 else program(_variants.UNROLL * round(num_updates * missing / _variants.UNROLL + 0.5))


def _program(run: Callable, inputs: list[tuple], step: timing.Compiled, *, alone: bool) -> Program:
    """Compile a variant, or let one that is `alone` compile itself, by a first update; run it, for memory may end."""
    if alone:
        params, data, batches = inputs[0]
        return Program(run, inputs, timing.timed(run, params, data, batches[:1])[1], step.temporary_bytes)
    program = timing.compiled(run, *inputs[0])
    jax.block_until_ready(program(*inputs[0]))
    return Program(program, inputs, program.compile_seconds, program.temporary_bytes)


def _costs(
    program: Program,
    times: Sequence[float],
    scan: Sequence[float] | None,
    step: timing.Compiled,
    peaks: Peaks,
    batch_size: int,
) -> Row:
    """Return what a row says beside its names; times and those of scan are seconds of an update of one run."""
    seconds, low, high, num_repeats = timing.spread(times)
    flops, bytes_accessed = step.flops, step.bytes_accessed
    least = peaks.least_seconds(flops, bytes_accessed)
    return {
        "num_updates": len(program.inputs[0][2]),
        "seconds": seconds,
        "low": low,
        "high": high,
        "num_repeats": num_repeats,
        "over_scan": scan and timing.ratio(times, scan)._asdict(),
        "compile_seconds": program.compile_seconds,
        "examples_per_second": batch_size / seconds,
        "flops": flops,
        "bytes_accessed": bytes_accessed,
        "fraction_of_product": None if flops is None else flops / peaks.flops_per_second / seconds,
        "fraction_of_roofline": None if least is None else least / seconds,
        "temporary_bytes": program.temporary_bytes,
    }


def _num_updates(flops: float | None) -> int:
    wanted = MAX_UPDATES if not flops else FLOPS_PER_RUN / flops
    return min(MAX_UPDATES, max(_variants.UNROLL, _variants.UNROLL * round(wanted / _variants.UNROLL)))


def _first(data, batch_size: int):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), jnp.asarray(x).dtype), data)


def _check_distinct(**arguments: Sequence | Mapping) -> None:
    for name, given in arguments.items():
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{name}={tuple(given)} must be different, and at least one")


def _check_sizes(batch_sizes: Sequence[int], loaded: dict[str, Problem]) -> None:
    for name, problem in loaded.items():
        for size in batch_sizes:
            if not 1 <= size <= problem.num_examples:
                limit = f"the {problem.num_examples} examples of {name}"
                raise ValueError(f"batch_size={size} must be between 1 and {limit}")
