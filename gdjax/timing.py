"""Time apart: compilation and run, what a program needs, and what the device could do.

>>> import jax.numpy as jnp
>>> x = jnp.ones((8, 8))
>>> program = compiled(lambda x: x @ x, x)
>>> program.flops
1024.0
>>> [times] = measured_in_turn([program], [[(x,), (2 * x,)]], budget=0.01)
>>> len(times) >= MIN_RUNS
True
>>> spread([5.0, 1.0, 2.0, 4.0, 3.0, 3.0, 3.0, 9.0])
Spread(median=3.0, low=1.0, high=9.0, num_runs=8)
>>> Peaks(flops_per_second=2e9, bytes_per_second=1e9).least_seconds(flops=1e9, bytes_accessed=1e9)
1.0
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from scipy import special

from gdjax import _files

CONFIDENCE = 0.95
MIN_RUNS = 6  # the least for which the range covers the median with 95 %: 1 - 2^(1 - 6)
PATIENCE = 10  # budgets that so many runs may take
PRODUCT_SIZE = {"cpu": 2048}  # rows of the square matrices that a peak is measured by
COPY_SIZE = {"cpu": 2**26}  # numbers, more than any cache holds
ACCELERATOR_PRODUCT_SIZE, ACCELERATOR_COPY_SIZE = 8192, 2**28


class Compiled(NamedTuple):
    """A compiled program, called as the function it was made from.

    Attributes:
        program: jax's own compiled object.
        compile_seconds: tracing, lowering and compilation.
    """

    program: jax.stages.Compiled
    compile_seconds: float

    def __call__(self, *args) -> Any:
        return self.program(*args)

    @property
    def flops(self) -> float | None:
        """Floating-point operations by the compiler's count, or None. The body of a loop counts once."""
        return _counted(self.program, "flops")

    @property
    def bytes_accessed(self) -> float | None:
        """Bytes read and written by the compiler's count, or None. The body of a loop counts once.

        The compiler counts as if nothing stayed in a cache between one operation and the next.
        """
        return _counted(self.program, "bytes accessed")

    @property
    def temporary_bytes(self) -> int | None:
        """Memory beside arguments and results by the compiler's count, or None."""
        return getattr(self.program.memory_analysis(), "temp_size_in_bytes", None)


class Spread(NamedTuple):
    """The median of several runs and its 95% interval: order statistics, the whole range below MIN_RUNS runs."""

    median: float
    low: float
    high: float
    num_runs: int


class Peaks(NamedTuple):
    """What a device does at best, measured.

    Attributes:
        flops_per_second: of a large matrix product in float32, at jax's default precision or that asked for.
        bytes_per_second: read and written by a large copy.
    """

    flops_per_second: float
    bytes_per_second: float

    def least_seconds(self, flops: float | None, bytes_accessed: float | None) -> float | None:
        """Return max(flops / flops_per_second, bytes_accessed / bytes_per_second), None where a count is missing.

        That is the time that the roofline allows (Williams, Waterman & Patterson 2009, CACM 52, 65).
        """
        if flops is None or bytes_accessed is None:
            return None
        return max(flops / self.flops_per_second, bytes_accessed / self.bytes_per_second)


def compiled(function: Callable, *args) -> Compiled:
    """Compile `function` for arguments of these shapes, and say how long that took."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return Compiled(program, time.perf_counter() - start)


def timed(function: Callable, *args) -> tuple[Any, float]:
    """Return (`function(*args)`, seconds until its result was ready)."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start


def seconds(function: Callable, *args, budget: float = 1.0, repeats: int = 3) -> float:
    """Return the median run time of `function(*args)` in seconds, each run waited for.

    One run warms up. Then up to `repeats` are counted, fewer where `budget` seconds end first, and at least one.
    """
    jax.block_until_ready(function(*args))
    times: list[float] = []
    while not times or (len(times) < repeats and sum(times) < budget):
        times.append(timed(function, *args)[1])
    return statistics.median(times)


def measured_in_turn(
    functions: Sequence[Callable],
    inputs: Sequence[Sequence[tuple]],
    *,
    budget: float = 1.0,
    within: float = 0.02,
    rest: float = 0.0,
) -> list[list[float]]:
    """Return the run times of each function in seconds, all run in turn, each until its median is known.

    The turns go forwards and backwards, as in `in_turn`, and a first one warms up. The first function is what the
    others are compared with: it runs in every turn, and `series[i][t]` and `series[0][t]` are of the same turn t.

    Args:
        functions: what is timed; each run is waited for.
        inputs: for each function tuples of arguments, taken in turn, so that no run finds the results of the one
            before.
        budget: seconds of counted runs for each function; MIN_RUNS runs may take up to PATIENCE times as long, and one
            is always made. All end when the first has used up the budgets of all.
        within: the relative half-width of the median's interval at which a function is known, from MIN_RUNS runs on.
        rest: seconds to wait before each run, out of the budget: threads of another library may keep a core busy after
            its own run.

    Raises:
        ValueError: for no functions, or one without inputs.
    """
    if not functions or not all(inputs):
        raise ValueError("functions and inputs must hold at least one function, and for each at least one tuple")
    times: list[list[float]] = [[] for _ in functions]
    running, warm, turn = list(range(len(functions))), False, 0
    while running:
        for i in sorted({0, *running}, reverse=bool(turn % 2)):
            time.sleep(rest)
            elapsed = timed(functions[i], *inputs[i][turn % len(inputs[i])])[1]
            if warm:
                times[i].append(elapsed)
        if warm:
            running = [i for i in running if not _known(times[i], budget - rest * len(times[i]), within)]
            if sum(times[0]) >= budget * len(functions) and len(times[0]) >= MIN_RUNS:
                break
        warm, turn = True, turn + 1
    return times


def ratio(times: Sequence[float], reference: Sequence[float]) -> Spread:
    """Return the median of the ratios within turns; those of the reference go on at least as long."""
    return spread([a / b for a, b in zip(times, reference, strict=False)])


def spread(values: Sequence[float]) -> Spread:
    """Return the median and its interval, from the order statistics r and n + 1 - r of n values.

    r is the largest with P(Binomial(n, 1/2) < r) <= 2.5% (David & Nagaraja 2003, Order Statistics, section 7.1).

    Raises:
        ValueError: for no values.
    """
    if not values:
        raise ValueError("values is empty: a median needs at least one")
    ordered, tail = sorted(values), (1 - CONFIDENCE) / 2
    r = 1
    while 2 * (r + 1) <= len(ordered) and special.bdtr(r, len(ordered), 0.5) <= tail:
        r += 1
    return Spread(statistics.median(ordered), ordered[r - 1], ordered[-r], len(ordered))


def in_turn(functions: Sequence[Callable[[], Any]], *, repeats: int = 7) -> list[float]:
    """Return the median run time of each function in seconds, all run in turn, forwards and backwards.

    Whatever else the machine does meets all of them alike, so that their ratios can be trusted before their times.
    A first turn warms up and does not count.
    """
    return [statistics.median(series) for series in _turns(functions, repeats)]


def ratios_in_turn(functions: Sequence[Callable[[], Any]], *, repeats: int = 7) -> list[Spread]:
    """Return the time of each function but the last over that of the last, by the ratios in each turn of `in_turn`."""
    *series, last = _turns(functions, repeats)
    return [ratio(times, last) for times in series]


def peaks(
    *,
    product_size: int | None = None,
    copy_size: int | None = None,
    budget: float = 1.0,
    precision: jax.lax.PrecisionLike = None,
) -> Peaks:
    """Measure what the default device does at best, each by its fastest run, on random numbers.

    Ones take a GPU less power than numbers that mean something, and it runs the faster for it.

    Args:
        product_size: rows of two square matrices; default 2048 on a CPU, 8192 elsewhere.
        copy_size: numbers that are read, negated and written; default 2^26 on a CPU, 2^28 elsewhere.
        budget: seconds for each of the two.
        precision: of the product, as `jax.numpy.matmul` takes it: "highest" is float32 in full on any device.
    """
    device = jax.default_backend()
    n = product_size or PRODUCT_SIZE.get(device, ACCELERATOR_PRODUCT_SIZE)
    m = copy_size or COPY_SIZE.get(device, ACCELERATOR_COPY_SIZE)
    keys = jax.random.split(jax.random.key(0), 3)
    left, right = (jax.random.normal(key, (n, n), jnp.float32) for key in keys[:2])
    numbers = jax.random.normal(keys[2], (m,), jnp.float32)
    product = _fastest(partial(jnp.matmul, precision=precision), left, right, budget=budget)
    return Peaks(2 * n**3 / product, 8 * m / _fastest(jnp.negative, numbers, budget=budget))


def keep_compiled(folder: str | os.PathLike) -> None:
    """Keep compiled programs in `folder` and read them from there: jax's persistent compilation cache.

    Every program is kept, however small. One with a callback to Python is not: jax cannot keep it. The folder may be
    shared by processes and removed at any time.

    Raises:
        ValueError: where the folder cannot be written.
    """
    jax.config.update("jax_compilation_cache_dir", str(_files.writable_folder(folder, "cache").resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def profiled(folder: str | os.PathLike) -> Iterator[None]:
    """Write a trace of what runs inside to `folder`: perfetto_trace.json.gz, under plugins/profile/DATE.

    Raises:
        ValueError: where the folder cannot be written.
    """
    with jax.profiler.trace(str(_files.writable_folder(folder, "profile")), create_perfetto_trace=True):
        yield


def _known(times: Sequence[float], budget: float, within: float) -> bool:
    """Return whether a function has been timed long enough, looking at its interval ever more rarely."""
    count, total = len(times), sum(times)
    if count < MIN_RUNS:
        return total >= PATIENCE * budget
    if total >= budget:
        return True
    if count % (1 + count // 8):  # short runs are many: looking at all of them costs more than they do
        return False
    median, low, high, _ = spread(times)
    return high - low <= 2 * within * median


def _turns(functions: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for i in range(len(functions))[:: 1 if turn % 2 else -1]:
            times[i].append(timed(functions[i])[1])
    return [series[1:] for series in times]


def _fastest(function: Callable, *args, budget: float) -> float:
    program = compiled(function, *args)
    jax.block_until_ready(program(*args))
    times: list[float] = []
    while not times or sum(times) < budget:
        times.append(timed(program, *args)[1])
    return min(times)


def _counted(program: jax.stages.Compiled, name: str) -> float | None:
    """Return an entry of the compiler's cost analysis; None where there is no analysis, or it knows nothing (-1)."""
    try:
        value = (program.cost_analysis() or {}).get(name)
    except NotImplementedError:
        return None
    return None if value is None or value < 0 else value
