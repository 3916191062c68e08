"""Compile central programs for a device that is not here, and hold what the compiler made of them to a table.

python .ci/aot.py cuda|tpu [--write]

    kernels     that an update starts, or a whole run on the chip: at most those of aot.json and 10 %
    temporary   memory of the program: at most that of aot.json and 10 %
    host loops  of `descent.run` and `descent.until`: none, with kernels.LOOPS_IN_GRAPHS
    collectives one for an update that devices share
    donation    the state given is overwritten
    float64     nowhere

Without the compiler's wheels it says so and ends with status 0: they cannot be had everywhere. Numbers are held for the
jax of the table alone. --write makes the table.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import jax  # noqa: E402
import optax  # noqa: E402
import programs  # noqa: E402

from gdjax import bench, descent, gradients, kernels  # noqa: E402
from gdjax.problems import models  # noqa: E402

TABLE = HERE / "aot.json"
TARGETS = {"cuda": "h100", "tpu": "v5e"}
SLACK = 1.1
NUM_DEVICES = 4


def chosen():
    """Yield (name, function, arguments): loops of all models, and the statistics of one."""
    models = {name: make() for name, make in bench.MODELS.items()}
    for name, problem in models.items():
        for batch_size in (1, 32, 1024) if name.startswith("mlp") else (1, 32):
            yield f"run {name} B={batch_size}", *programs.run(problem, batch_size)
    small = models["mlp-small"]
    yield "run unrolled mlp-small B=1", *programs.run(small, 1, unroll=16)
    yield "run adam mlp-small B=32", *programs.run(small, 32, optax.adam(0.1))
    yield "until mlp-small B=32", *programs.until(small, 32)
    of_loops = {name: rest for name, *rest in programs.of_loops("mlp-small", small)}
    yield "lanes mlp-small B=1", *of_loops["lanes mlp-small"]
    for name, *rest in programs.of_gradients("cnn", models["cnn"]):
        if name.split()[0] in ("sq_norms", "second_moments", "clipped", "noise", "eigenpairs"):
            yield name, *rest


def on_chip():
    """Yield (name, function, arguments) of runs that are one kernel of a TPU, their labels chosen by a gather."""
    model, data = models.mlp((64, 128, 10)), programs.shapes(bench.MODELS["mlp-small"]().train)

    def loss(params, example):
        x, label = example
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), label)

    clipped, mean = gradients.clipped(loss, 1.0), gradients.mean(loss)
    cases = {"momentum": (mean, optax.sgd(0.1, 0.9), 1), "adam": (mean, optax.adam(0.1), 8)}
    for name, (gradient, optimizer, batch_size) in (cases | {"clipped": (clipped, optax.sgd(0.1), 8)}).items():
        method = descent.method(gradient, optimizer)
        state = jax.eval_shape(lambda key, method=method: method.init(model.init(key)), jax.random.key(0))
        arguments = state, data, programs.indices(programs.UPDATES, batch_size)
        yield f"on_chip {name} mlp-small B={batch_size}", kernels.on_chip(method.step), arguments


def shared(target: str):
    """Return the sharded updates of the small network, compiled for four devices."""
    problem, batch_size = bench.MODELS["mlp-small"](), 32
    [row], _ = bench.compile_for(target, {"mlp": problem}, ["sharded"], [batch_size], num_devices=NUM_DEVICES)
    return row


def donated(target: str):
    """Return the memory of one update that may overwrite the state, and of one that may not, and the state's."""
    problem = bench.MODELS["mlp-large"]()
    method = descent.method(gradients.mean(problem.loss), optax.adam(0.1))
    state = jax.eval_shape(lambda key: method.init(problem.init(key)), jax.random.key(0))
    loop, (_, data, batches) = programs.run(problem, 32, optax.adam(0.1))
    both = [bench.program_for(target, loop, state, data, batches, donate=positions) for positions in ((0,), ())]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return both[0].total_bytes, both[1].total_bytes, size


def complaints_of(name: str, program, numbers: dict, limits: dict | None):
    """Yield what is wrong with a compiled program; numbers are held to `limits` where there are any."""
    for what, value in numbers.items():
        if limits is not None and value is not None and value > SLACK * (limits.get(what) or 0):
            yield f"{name}: {what} {value}, in the table {limits.get(what)}"
    if program.host_loops and name.split()[0] in ("run", "until"):
        yield f"{name}: {program.host_loops} loops stay on the host"
    if name.startswith("on_chip") and (program.loops or program.text.count('"tpu_custom_call"') != 1):
        yield f"{name}: is not one kernel of Pallas without a loop around it"
    if program.has_float64:
        yield f"{name}: computes in float64"


def complaints_of_sharing_and_donation(target: str):
    """Yield what is wrong where devices share an update, and where the state is given away."""
    row = shared(target)
    if row.get("collectives") != 1:
        yield f"an update shared by {NUM_DEVICES} devices sends {row.get('collectives', row)}, not once"
    overwritten, kept, size = donated(target)
    if kept - overwritten < 0.9 * size:
        yield f"a state of {size} bytes given away saves {kept - overwritten}"


def main(platform: str, *, write: bool) -> int:
    target, complaints, found = TARGETS[platform], [], {}
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    limits = table.get(platform, {})
    held = not write and limits.get("jax") == jax.__version__
    if not held:
        print(f"{platform}: the table is of jax {limits.get('jax')}, this is {jax.__version__}: numbers are not held")
    start = time.perf_counter()
    for name, function, arguments in (*chosen(), *(on_chip() if platform == "tpu" else ())):
        updates = programs.UPDATES if name.split()[0] in ("run", "until", "lanes") else 1
        try:
            program = bench.program_for(target, function, *arguments)
        except ModuleNotFoundError as error:
            print(f"{platform}: skipped: {error}")
            return 0
        except Exception as error:
            complaints.append(f"{name}: does not compile: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        started = None if program.kernels is None else program.kernels / updates
        found[name] = {"kernels": started, "temporary_bytes": program.temporary_bytes}
        print(f"{name:32} {found[name]} host loops {program.host_loops}, {program.compile_seconds:.1f} s", flush=True)
        complaints += complaints_of(name, program, found[name], limits.get(name, {}) if held else None)
    complaints += complaints_of_sharing_and_donation(target)
    if write:
        TABLE.write_text(json.dumps(table | {platform: {"jax": jax.__version__} | found}, indent=1) + "\n")
    print("\n".join(complaints) or f"{platform}: {len(found)} programs as they should be")
    print(f"{time.perf_counter() - start:.0f} s")
    return bool(complaints)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in TARGETS:
        sys.exit(__doc__)
    sys.exit(main(arguments[0], write="--write" in arguments[1:]))
