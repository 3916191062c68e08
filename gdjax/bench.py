"""`gdjax bench`: ways to run gradient descent, timed against one another and against what the device could do.

>>> rows, ceilings = bench(["mlp-small"], ["scan", "sharded"], [2], budget=0.01, ceilings=timing.Ceilings(1e11, 1e10))
>>> [(row["variant"], row["num_runs"], row["over_scan"]) for row in rows]
[('scan', 1, 1.0), ('sharded', 1, None)]
>>> rows[1]["skipped"]
'one device only'
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gdjax import batching, models, problems, timing, variants
from gdjax.datasets import Split
from gdjax.problem import Problem
from gdjax.timing import Ceilings

NUM_EXAMPLES = 1024
NUM_TOKENS, SEQUENCE = 65, 16
LEARNING_RATE = 0.01
BATCH_SIZES = (1, 32, 256)
FLOPS_PER_RUN, MAX_UPDATES = 5e8, 1024  # a run is long beside the call of a program, and short beside the budget
NUM_INPUTS = 2
BUDGET = 0.3  # seconds of timed runs for each program

Row = dict[str, Any]
Progress = Callable[[str, float], None]
"""(what is being done, fraction of all that is done)."""


def mlp(*sizes: int) -> Problem:
    """Return a classifier of random vectors."""
    return _classification(models.mlp(sizes), (sizes[0],))


def cnn() -> Problem:
    """Return a classifier of random 28 x 28 images."""
    return _classification(models.cnn((28, 28, 1)), (28, 28, 1))


def transformer() -> Problem:
    """Return a language model of random sequences."""
    tokens = jax.random.randint(jax.random.key(0), (NUM_EXAMPLES, SEQUENCE + 1), 0, NUM_TOKENS)
    return problems.language_model(
        models.transformer(num_tokens=NUM_TOKENS), Split(tokens, None), num_tokens=NUM_TOKENS
    )


MODELS: dict[str, Callable[[], Problem]] = {
    "mlp-small": partial(mlp, 64, 128, 10),
    "mlp-large": partial(mlp, 784, 512, 512, 10),
    "cnn": cnn,
    "transformer": transformer,
}


def bench(
    model_names: Sequence[str] = tuple(MODELS),
    variant_names: Sequence[str] = (*variants.VARIANTS, "lanes"),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    budget: float = BUDGET,
    ceilings: Ceilings | None = None,
    progress: Progress = lambda stage, fraction: None,
) -> tuple[list[Row], Ceilings]:
    """Time every variant of every model at every batch size; `lanes` once for all batch sizes.

    Args:
        model_names: of `MODELS`, or problems as `problems.named` takes them.
        variant_names: of `variants.VARIANTS`, 'lanes', or 'module:function'.
        batch_sizes: examples per update.
        budget: seconds of timed runs for each program.
        ceilings: of the device; measured where not given.
        progress: called with what is being done and the fraction that is done.

    Returns:
        (rows as `measure` makes them with "over_scan", the time over that of `scan` of the same model and batch size;
        ceilings). What cannot be run is a row that says so in "skipped".

    Raises:
        ValueError: before anything is timed, for an unknown name, one given twice, none, or a batch size outside
            1 ... N.
    """
    _check_distinct(models=model_names, variants=variant_names, batch_sizes=batch_sizes)
    chosen = {name: variants.named(name) for name in variant_names if name != "lanes"}
    loaded = {name: MODELS[name]() if name in MODELS else _problem(name) for name in model_names}
    _check_sizes(batch_sizes, loaded)
    plan = [
        (model, variant, size)
        for model in loaded
        for variant in variant_names
        for size in ([variants.microbatch_size(batch_sizes)] if variant == "lanes" else batch_sizes)
    ]
    progress("ceilings of the device", 0.0)
    ceilings = ceilings or timing.ceilings()
    rows = []
    for i, (model, variant, size) in enumerate(plan):
        progress(f"{model}, {variant}, B = {size}", i / len(plan))
        build = partial(variants.lanes, batch_sizes=batch_sizes) if variant == "lanes" else chosen[variant]
        num_runs = {"lanes": len(batch_sizes), "vmapped-seeds": variants.num_seeds()}.get(variant, 1)
        row = {"model": model, "variant": variant, "batch_size": size, "num_runs": num_runs}
        try:
            rows.append(row | measure(loaded[model], build, size, num_runs=num_runs, budget=budget, ceilings=ceilings))
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            rows.append(row | {"skipped": str(error).splitlines()[0]})
    scans = {(row["model"], row["batch_size"]): row.get("seconds") for row in rows if row["variant"] == "scan"}
    return [row | {"over_scan": _over(row, scans.get((row["model"], row["batch_size"])))} for row in rows], ceilings


def measure(
    problem: Problem, variant: variants.Variant, batch_size: int, *, num_runs: int, budget: float, ceilings: Ceilings
) -> Row:
    """Compile one variant, time it, and compare it with the device's ceilings.

    Work is counted on a mean gradient and its update compiled alone, times the updates that were made: the least that
    descent needs, whatever else a variant computes, and independent of how the compiler counts loops.

    Returns:
        seconds (an update of one run: the median time of the program over T num_runs) and its 95% interval low, high;
        num_updates T, num_repeats, compile_seconds; examples_per_second over all runs; flops and bytes_accessed of an
        update; fraction_of_product and fraction_of_roofline; temporary_bytes of the program. None is 'no analysis'.
    """
    method = variants.plain_method(problem, LEARNING_RATE)
    state = jax.eval_shape(lambda key: method.init(problem.init(key)), jax.random.key(0))
    step = timing.compiled(lambda state, batch: method.step(state, batch)[0], state, _first(problem.train, batch_size))
    flops, bytes_accessed = step.flops, step.bytes_accessed
    num_updates = _num_updates(flops, num_runs)
    inputs = [_input(problem, batch_size, num_updates, jax.random.key(seed)) for seed in range(NUM_INPUTS)]
    run = variant(problem, LEARNING_RATE)
    if variant is variants.python_loop:
        params, data, batches = inputs[0]
        program, temporary_bytes = run, step.temporary_bytes
        compile_seconds = timing.timed(run, params, data, batches[:1])[1]
    else:
        program = timing.compiled(run, *inputs[0])
        compile_seconds, temporary_bytes = program.compile_seconds, program.temporary_bytes
    time = timing.measured(program, inputs, budget=budget)
    seconds, low, high = (x / (num_updates * num_runs) for x in (time.median, time.low, time.high))
    least = ceilings.least_seconds(flops, bytes_accessed)
    return {
        "num_updates": num_updates,
        "seconds": seconds,
        "low": low,
        "high": high,
        "num_repeats": time.num_runs,
        "compile_seconds": compile_seconds,
        "examples_per_second": batch_size / seconds,
        "flops": flops,
        "bytes_accessed": bytes_accessed,
        "fraction_of_product": None if flops is None else flops / ceilings.flops_per_second / seconds,
        "fraction_of_roofline": None if least is None else least / seconds,
        "temporary_bytes": temporary_bytes,
    }


def compared(rows: Sequence[Row], earlier: Sequence[Row]) -> list[Row]:
    """Return, for every row that an earlier result has too, its time over the earlier one, and whether it changed.

    It changed where the two intervals of the medians do not meet: "changed" is 'slower', 'faster' or ''.
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
            names = ("model", "variant", "batch_size")
            found.append({n: row[n] for n in names} | {"ratio": row["seconds"] / old["seconds"], "changed": changed})
    return found


def _classification(model: models.Model, shape: tuple[int, ...]) -> Problem:
    x_key, label_key = jax.random.split(jax.random.key(0))
    labels = jax.random.randint(label_key, (NUM_EXAMPLES,), 0, 10)
    return problems.classification(
        model, Split((jax.random.normal(x_key, (NUM_EXAMPLES, *shape)), labels), None), num_classes=10
    )


def _problem(name: str) -> Problem:
    try:
        return problems.named(name)
    except ValueError as error:
        raise ValueError(f"models: {error}; or of {', '.join(MODELS)}") from error


def _input(problem: Problem, batch_size: int, num_updates: int, key: jax.Array):
    """Return (params, data, batches int32[T, B]) drawn from `key`."""
    init_key, stream_key = jax.random.split(key)
    stream = batching.reshuffled(stream_key, problem.num_examples, length=num_updates * batch_size)
    return problem.init(init_key), problem.train, batching.cut(stream, batch_size)


def _num_updates(flops: float | None, num_runs: int) -> int:
    wanted = MAX_UPDATES if not flops else FLOPS_PER_RUN / flops / num_runs
    return min(MAX_UPDATES, max(variants.UNROLL, variants.UNROLL * round(wanted / variants.UNROLL)))


def _first(data, batch_size: int):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), jnp.asarray(x).dtype), data)


def _over(row: Row, scan: float | None) -> float | None:
    return row["seconds"] / scan if scan and row.get("seconds") else None


def _check_distinct(**arguments: Sequence) -> None:
    for name, given in arguments.items():
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{name}={tuple(given)} must be different, and at least one")


def _check_sizes(batch_sizes: Sequence[int], loaded: dict[str, Problem]) -> None:
    for name, problem in loaded.items():
        for size in batch_sizes:
            if not 1 <= size <= problem.num_examples:
                limit = f"the {problem.num_examples} examples of {name}"
                raise ValueError(f"batch_size={size} must be between 1 and {limit}")
