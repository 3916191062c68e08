"""How far is the compiled loop from hand-written C, where an update sees one example?

Question    MLP 64-128-10 and 784-512-512-10, B = 1, SGD in float32: how long does `descent.run` take beside C
            (experiments/baselines, -O3 -march=native -ffast-math, one thread), the same updates of the same data, and
            what do unrolling, one kernel for the whole loop, wider vectors, taking all examples before the loop, and
            updating after the whole gradient each give?
Prediction  At most 1.6 times C for the small network and 1.3 for the large one, each by its best way.
Cost        40 s on two CPU cores; needs a C compiler, `cc` or what the environment variable CC names.

What the compiled update of the small network consists of: 18 fused kernels, 4 products of a vector and a matrix, 3
copies and the condition of the loop, some 25 kernels started one after the other, most of which touch ten numbers
(the softmax). In one kernel nothing is started. What is left is the arithmetic: C reads the weights once on the way
back, where XLA reads them for the gradient and once more for the update. In the large network XLA copies the weights in
every update, because it may write them before the backward pass has read them.
"""

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gdjax import batching, bench, descent, gradients, kernels, report, timing
from gdjax.commands import experiment
from gdjax.descent import Method
from gdjax.problem import Problem

BASELINES = Path(__file__).parent / "baselines"
MODELS = {"mlp_small": ((64, 128, 10), 4000, 1.6), "mlp_large": ((784, 512, 512, 10), 60, 1.3)}
"""{name of the C program: (sizes, updates in a run, aim)}."""
RATE, TOLERANCE = 0.01, 1e-4
WIDE = {"xla_cpu_prefer_vector_width": 512}  # the default is 256, for processors that slow down in wider vectors


def compiled_c(name: str, folder: Path) -> Callable:
    """Compile a C program as its header says, and return its function `descend`."""
    library = folder / f"{name}.so"
    flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
    command = [os.environ.get("CC", "cc"), *flags, "-o", str(library), str(BASELINES / f"{name}.c"), "-lm"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(f"CC={command[0]!r} is no C compiler here: install one, or name one in CC") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"CC={command[0]!r} cannot compile {name}.c: {error.stderr.strip()}") from error
    return ctypes.CDLL(str(library)).descend


def c_loop(descend: Callable, params, data, order: np.ndarray) -> Callable[[], list[np.ndarray]]:
    """Return a function that runs C from `params` and returns the leaves of its parameters."""
    x, labels, order = (np.array(leaf).reshape(-1) for leaf in (*data, order))
    start = [np.array(layer[name]).reshape(-1) for layer in params for name in ("weight", "bias")]
    arguments = [np.ctypeslib.as_ctypes(order), np.ctypeslib.as_ctypes(x), np.ctypeslib.as_ctypes(labels)]

    def run():
        leaves = [leaf.copy() for leaf in start]
        descend(len(order), *arguments, ctypes.c_float(RATE), *map(np.ctypeslib.as_ctypes, leaves))
        return leaves

    return run


def ordered(method: Method, gradient, optimizer) -> Method:
    """Return a method whose update waits for the whole gradient, so that no weight is changed while it is still read.

    A compiler that may update a weight before the backward pass has read it copies all weights in every iteration. A
    number that is always 0, but that the compiler must take from every leaf's gradient, makes it wait.
    """

    def step(state, batch):
        estimate = gradient(state.params, batch)
        firsts = jnp.stack([leaf.reshape(-1)[0] for leaf in jax.tree.leaves(estimate.grad)])
        zero = firsts @ jnp.where(state.num_examples.high > 0, jnp.ones_like(firsts), jnp.zeros_like(firsts))
        late = estimate._replace(grad=jax.tree.map(lambda g: g + zero, estimate.grad))
        return descent.method(lambda params, batch: late, optimizer).step(state, batch)

    return Method(method.init, step)


def ways(problem: Problem) -> dict[str, tuple[Callable, dict]]:
    """Return {name: ((params, data, batches) -> params, options of the compiler)}."""
    gradient, optimizer = gradients.mean(problem.loss), optax.sgd(RATE)
    plain = descent.method(gradient, optimizer)
    waiting = ordered(plain, gradient, optimizer)

    def run(method, unroll, params, data, batches):
        start, every = method.init(params), len(batches)
        return descent.run(method, start, data, batches, lambda *_: (), every=every, unroll=unroll)[0].params

    def taken_before(params, data, batches):
        examples = batching.take(data, batches)
        return lax.scan(lambda s, batch: (plain.step(s, batch)[0], None), plain.init(params), examples)[0].params

    once, four = partial(run, plain, 1), partial(run, plain, 4)
    last, last_four = partial(run, waiting, 1), partial(run, waiting, 4)
    return {
        "descent.run": (once, {}),
        "examples taken before": (taken_before, {}),
        "unrolled by 4": (four, {}),
        "ordered": (last, {}),
        "ordered, unrolled by 4": (last_four, {}),
        "chosen by kernels.for_cpu": (kernels.for_cpu(once), {}),
        "chosen by kernels.for_cpu, 512 bits": (kernels.for_cpu(once), WIDE),
        "one kernel": (kernels.one_kernel(once), {}),
        "one kernel, unrolled by 4": (kernels.one_kernel(four), {}),
        "one kernel, 512 bits": (kernels.one_kernel(once), WIDE),
        "one kernel, unrolled by 4, 512 bits": (kernels.one_kernel(four), WIDE),
        "one kernel, ordered, 512 bits": (kernels.one_kernel(last), WIDE),
    }


def race(name: str, folder: Path, num_updates: int, repeats: int, key: jax.Array) -> list[dict]:
    """Return a row for each way: its time over that of C, the ratios of runs in turn."""
    problem = bench.mlp(*MODELS[name][0])
    init_key, stream_key = jax.random.split(key)
    params, data = problem.init(init_key), problem.train
    batches = batching.batches(batching.reshuffled(stream_key, problem.num_examples, length=num_updates), 1)
    by_c = c_loop(compiled_c(name, folder), params, data, np.asarray(batches).reshape(-1))
    programs, compile_seconds, differences = {}, {}, {}
    for way, (run, options) in ways(problem).items():
        began = time.perf_counter()
        programs[way] = jax.jit(run, compiler_options=options).lower(params, data, batches).compile()
        compile_seconds[way] = time.perf_counter() - began
    expected = by_c()
    for way, program in programs.items():
        found = program(params, data, batches)
        leaves = [np.asarray(layer[leaf]).reshape(-1) for layer in found for leaf in ("weight", "bias")]
        differences[way] = max(float(np.abs(a - b).max()) for a, b in zip(leaves, expected, strict=True))
        if not differences[way] <= TOLERANCE:
            raise ValueError(f"{name}: {way} ends {differences[way]:.1e} from C, more than {TOLERANCE}")
    runs = [partial(program, params, data, batches) for program in programs.values()]
    ratios = timing.ratios_in_turn([*runs, by_c], repeats=repeats)
    c_seconds = timing.seconds(by_c, repeats=repeats) / num_updates
    return [
        {"model": name, "way": way, "difference": differences[way], "c_microseconds": 1e6 * c_seconds}
        | {"compile_seconds": compile_seconds[way], "over_c": ratio._asdict()}
        for way, ratio in zip(programs, ratios, strict=True)
    ]


def main(options: experiment.Options) -> experiment.Result:
    if jax.config.read("jax_enable_x64"):
        raise ValueError("x64=True: the C programs compute in float32; leave out --x64")
    rows, verdicts = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, num_updates, aim) in list(MODELS.items())[: 1 if options.smoke else None]:
            few = options.smoke
            found = race(name, Path(folder), 20 if few else num_updates, 3 if few else 41, jax.random.key(options.seed))
            rows += found
            first, best = found[0]["over_c"], min(found, key=lambda row: row["over_c"]["median"])
            low, median, high = (best["over_c"][name] for name in ("low", "median", "high"))
            met = "met" if high <= aim else "missed" if low > aim else "neither met nor missed by the interval"
            verdicts.append(
                f"{name}: descent.run takes {first['median']:.2f} times C, {best['way']} {median:.2f} [{low:.2f}, "
                f"{high:.2f}]; the aim of {aim} is {met}"
            )
    verdict = "; ".join(verdicts) + "."
    return experiment.Result(rows, verdict, figure(rows, verdict))


def figure(rows: list[dict], title: str):
    names = list(dict.fromkeys(row["model"] for row in rows))
    drawn, axes = report.panels(len(names), title=title, width=7)
    for axis, name in zip(axes, names, strict=True):
        sizes, _, aim = MODELS[name]
        report.bars(axis, {row["way"]: row["over_c"] for row in rows if row["model"] == name})
        axis.axvline(1, color="black", linewidth=1, label="C")
        axis.axvline(aim, color=report.COLOURS[1], linestyle="--", label=f"aim, {aim}")
        axis.set(xlabel="time over that of C, with 95% intervals", title=f"MLP {'-'.join(map(str, sizes))}, B = 1")
        axis.legend(frameon=True)
    return drawn


if __name__ == "__main__":
    experiment.run(main)
