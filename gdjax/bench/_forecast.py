"""The table of `bench` for a device that is not there: what can be known before anything runs."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gdjax import batching, timing
from gdjax.bench import _aot as aot
from gdjax.bench import _bench as bench
from gdjax.bench import _targets as targets
from gdjax.bench import _variants as variants
from gdjax.bench._bench import Progress, Row
from gdjax.bench._targets import Device, Target
from gdjax.problem import Problem

NUM_UPDATES = 64  # of a compiled loop: what one of them needs does not depend on their number
TOLERANCE = 1 / 32  # of the largest batch size, relative


def compile_for(
    target: str | Target,
    models: Sequence[str] | Mapping[str, Problem] = tuple(bench.MODELS),
    chosen: Sequence[str] | Mapping[str, variants.Variant | None] = (*variants.VARIANTS, "lanes"),
    batch_sizes: Sequence[int] = bench.BATCH_SIZES,
    *,
    num_devices: int = 1,
    progress: Progress = lambda stage, fraction: None,
) -> tuple[list[Row], list[Row]]:
    """Compile every variant of every model at every batch size for a device that need not be there.

    Nothing is run, and no time is predicted but the least that the published peaks allow.

    Args:
        target: 'h100', 'v5e', 'v5p', 'v6e', or a file that describes a device in the same form.
        models, chosen, batch_sizes: as in `bench`.
        num_devices: devices that `sharded` shares a batch by; the other variants take one.
        progress: as in `bench`.

    Returns:
        (rows, largest). A row: model, variant, batch_size, num_runs; `kernels` and `collectives` that an update of all
        those runs together starts; `loops` of the program, and `host_loops`, those that the host starts again for every
        iteration even with `kernels.LOOPS_IN_GRAPHS`; argument_bytes (with the data), temporary_bytes and total_bytes,
        and whether that `fits`; `flops` and bytes_accessed of a mean gradient and its update, counted_by the compiler
        or before it; least_seconds of them by the published peaks; has_float64; compile_seconds. What cannot be
        compiled is a row that says why in "skipped". For largest see `largest_batch`, a row for each model.

    Raises:
        ValueError: before anything is compiled, as `bench`; for an unknown target, and for devices that it has not.
        ModuleNotFoundError: where the compiler of the target is not installed.
    """
    target = target if isinstance(target, Target) else targets.find(target)
    loaded, named = bench.asked(models, chosen, batch_sizes)
    devices = targets.devices(target, num_devices)
    tasks = [(model, *task) for model in loaded for task in _tasks(target, named, batch_sizes, devices)]
    rows: list[Row] = []
    works: dict[tuple[str, int], Row] = {}
    for number, (model, size, name, variant) in enumerate(tasks):
        progress(f"compiling {model}, B = {size}: {name}", number / (len(tasks) + len(loaded)))
        if (model, size) not in works:
            works[model, size] = _work(target, loaded[model], size, devices[:1])
        num_runs = {"vmapped-seeds": variants.ACCELERATOR_NUM_SEEDS, "lanes": len(batch_sizes)}.get(name, 1)
        row = {"model": model, "variant": name, "batch_size": size, "num_runs": num_runs}
        made = _made(target, loaded[model], size, variant, devices if name == "sharded" else devices[:1])
        rows.append(row | made | ({} if "skipped" in made else works[model, size]))
    largest: list[Row] = []
    for number, (model, problem) in enumerate(loaded.items()):
        progress(f"the largest batch of {model} that fits", (len(tasks) + number) / (len(tasks) + len(loaded)))
        sizes = [row for row in rows if (row["model"], row["variant"]) == (model, "scan") and "total_bytes" in row]
        known = {row["batch_size"]: row["total_bytes"] for row in sizes}
        largest.append({"model": model} | largest_batch(target, problem, devices[:1], known=known))
    return rows, largest


def largest_batch(
    target: Target, problem: Problem, devices: Sequence[Device], *, known: Mapping[int, float] = {}
) -> Row:
    """Return the largest batch size of `scan` that fits into the device beside the data, by bisection.

    Args:
        target, problem, devices: what is compiled.
        known: {batch size: bytes} that was compiled already.

    Returns:
        batch_size, compiled and found to fit, and 0 where not even one example does; total_bytes there (of one example
        where it is 0); limit: 'memory' or 'examples' where all N fit; usable_bytes. A size TOLERANCE above it was
        found not to fit, where memory is the limit.
    """
    needs = dict(known)

    def need(size: int) -> float:
        if size not in needs:
            made = _made(target, problem, size, variants.scan, devices)
            if "skipped" in made and not made.get("out_of_memory"):
                raise ValueError(f"target={target.name!r}, B = {size}: {made['skipped']}")
            needs[size] = made.get("total_bytes", float("inf"))
        return needs[size]

    def found(size: int, limit: str) -> Row:
        shown = max(size, 1)
        total = None if needs[shown] == float("inf") else needs[shown]
        return {"batch_size": size, "total_bytes": total, "limit": limit, "usable_bytes": usable}

    usable, low, high = target.usable_bytes, 1, problem.num_examples
    if need(high) <= usable:
        return found(high, "examples")
    if need(low) > usable:
        return found(0, "memory")
    low = max(size for size in needs if needs[size] <= usable)
    while high - low > max(1, TOLERANCE * low):
        size = round((low * high) ** 0.5)
        if needs[high] < float("inf"):  # memory is nearly linear in B: a little below where the line meets the limit
            size = int(low + (high - low) * (usable - needs[low]) / (needs[high] - needs[low]) * (1 - TOLERANCE / 4))
        size = min(max(size, low + 1), high - 1)
        low, high = (size, high) if need(size) <= usable else (low, size)
    return found(low, "memory")


def _tasks(
    target: Target,
    named: Mapping[str, variants.Variant | None],
    batch_sizes: Sequence[int],
    devices: Sequence[Device],
) -> Iterator[tuple[int, str, variants.Variant]]:
    """Yield (batch size, name, variant) of all that is to be compiled, as the target's devices would have it."""
    unroll = variants.GPU_UNROLL if target.platform == "cuda" else variants.UNROLL
    there: dict[str, variants.Variant] = {
        "python-loop": _one_update,
        "scan-unrolled": partial(variants.unrolled, unroll=unroll),
        "one-kernel": _for_a_cpu,
        "vmapped-seeds": partial(variants.vmapped_seeds, lanes=variants.ACCELERATOR_NUM_SEEDS),
        "sharded": partial(variants.sharded, devices=devices),
    }
    for size in batch_sizes:
        for name, variant in named.items():
            if name != "lanes" and variant is not None:
                built_in = variants.VARIANTS.get(name) is variant
                yield size, name, there.get(name, variant) if built_in else variant
    if "lanes" in named:
        size = variants.microbatch_size(batch_sizes)
        yield size, "lanes", partial(variants.lanes, batch_sizes=batch_sizes)


def _one_update(problem: Problem, learning_rate: float) -> variants.Run:
    """Make one update: what a loop in Python starts each time."""
    method = variants.plain_method(problem, learning_rate)

    def run(params, data, batches):
        return method.step(method.init(params), batching.take(data, batches[0]))[0].params, ()

    return run


def _for_a_cpu(problem: Problem, learning_rate: float) -> variants.Run:
    raise ValueError("for a CPU only")


def _made(
    target: Target, problem: Problem, batch_size: int, variant: variants.Variant, devices: Sequence[Device]
) -> Row:
    """Compile a variant and return what a row says of it beside the work."""
    num_updates = 1 if variant is _one_update else NUM_UPDATES
    params = jax.eval_shape(problem.init, jax.random.key(0))
    batches = jax.ShapeDtypeStruct((num_updates, batch_size), jnp.int32)
    try:
        run = variant(problem, bench.LEARNING_RATE)
        program = aot.program_for(target, run, params, problem.train, batches, devices=devices)
    except jax.errors.JaxRuntimeError as error:
        first, *_ = str(error).splitlines()
        if "RESOURCE_EXHAUSTED" in first:
            return {"skipped": f"does not fit: {first.partition(': ')[2]}", "out_of_memory": True}
        return {"skipped": f"does not compile for {target.name}: {first}"}
    except NotImplementedError as error:  # a primitive without a rule for the platform: its name is in the message
        return {"skipped": f"does not compile for {target.name}: {str(error).splitlines()[0]}"}
    except ValueError as error:
        return {"skipped": str(error).splitlines()[0]}
    alone = variant is _one_update
    row = {name: getattr(program, name) for name in ("argument_bytes", "temporary_bytes", "total_bytes")}
    return row | {
        "kernels": None if program.kernels is None else program.kernels / num_updates,
        "collectives": None if program.collectives is None else program.collectives / num_updates,
        "loops": program.loops,
        "host_loops": 1 if alone else program.host_loops,
        "fits": program.total_bytes <= target.usable_bytes,
        "has_float64": program.has_float64,
        "compile_seconds": program.compile_seconds,
    }


def _work(target: Target, problem: Problem, batch_size: int, devices: Sequence[Device]) -> Row:
    """Return flops, bytes_accessed and least_seconds of a mean gradient and its update.

    Where the compiler does not count, as for CUDA without a device, operations are counted before it optimises, and
    bytes are the arguments and the result: the least.
    """
    method = variants.plain_method(problem, bench.LEARNING_RATE)
    state = jax.eval_shape(lambda key: method.init(problem.init(key)), jax.random.key(0))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch_size, *jnp.shape(x)[1:]), jnp.result_type(x)), problem.train
    )

    def step(state, batch):
        return method.step(state, batch)[0]

    counted: dict[str, Any] = {"flops": None, "bytes_accessed": None, "counted_by": None}
    try:
        program = aot.program_for(target, step, state, batch, devices=devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError):
        return counted | {"least_seconds": None}
    counted = {"flops": program.flops, "bytes_accessed": program.bytes_accessed, "counted_by": "the compiler"}
    if program.flops is None or program.bytes_accessed is None:
        cost = jax.jit(step).lower(state, batch).cost_analysis() or {}
        counted = {
            "flops": cost.get("flops"),
            "bytes_accessed": float(program.argument_bytes + program.result_bytes),
            "counted_by": "before the compiler",
        }
    peaks = timing.Peaks(target.flops_per_second, target.bytes_per_second)
    return counted | {"least_seconds": peaks.least_seconds(counted["flops"], counted["bytes_accessed"])}
