"""Seconds per update at every batch size, by the real training loop, in memory that is bounded.

>>> import optax
>>> from gdjax import problems
>>> found = speeds(problems.least_squares(), optax.sgd, [1, 8], learning_rate=0.1)
>>> [(speed.batch_size, speed.fits, speed.seconds_per_update < 1) for speed in found]
[(1, True, True), (8, True, True)]
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdjax import batching, descent, gradients, sweep, timing
from gdjax._trees import kept
from gdjax.gradients import Gradient
from gdjax.problem import Problem, merge, trainable
from gdjax.tuning._optimizers import Optimizer, made

TIMED_EXAMPLES, TIMING_SECONDS = 1024, 0.1  # in one timed run of updates, and for all repeats of it
SHORTEST = 1e-3  # seconds that such a run should take: to call a program costs tens of microseconds
LONGEST = 1.0  # seconds that one update may take to be timed; the time of a larger batch is taken in proportion
PROBED = 32, 256  # batch sizes that memory is extrapolated from
MEMORY_SHARE = 0.25  # of the free memory, what a gradient may need unless it is said
ENOUGH = 2**30  # bytes: on a CPU larger pieces are no faster


class Speed(NamedTuple):
    """What is known of the updates at one batch size.

    Attributes:
        batch_size: B.
        seconds_per_update, compile_seconds: measured, or, where `extrapolated`, taken in proportion to the examples.
        memory: bytes of one compiled run of updates beside arguments and results, or None.
        fits: whether the step compiled and ran.
        extrapolated: whether nothing was timed.
        microbatch_size: examples that the gradient holds at a time, or None for all B.
        time_again: times the compiled training loop once more, seconds per update; None where there is none.
    """

    batch_size: int
    seconds_per_update: float
    compile_seconds: float = math.nan
    memory: int | None = None
    fits: bool = True
    extrapolated: bool = False
    microbatch_size: int | None = None
    time_again: Callable[[], float] | None = None


def speeds(
    problem: Problem,
    optimizer: Optimizer,
    sizes: Sequence[int],
    *,
    learning_rate: float,
    gradient: Callable[[int], Gradient] | None = None,
    microbatch_size: Callable[[int], int | None] = lambda batch_size: None,
    deadline: float = math.inf,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Speed]:
    """Time the real training loop at every batch size, ascending, until `deadline` (`time.perf_counter`).

    After that, and where one update takes more than LONGEST seconds, times are taken in proportion to the examples.
    Whatever else the machine does only adds to a time: all are measured twice, where `deadline` allows it, and the
    lower one counts. If a size does not fit into memory, larger ones are not tried.

    Args:
        problem, optimizer: what is trained.
        sizes: batch sizes, ascending.
        learning_rate: of the updates that are timed.
        gradient: batch size -> estimator; default `gradients.mean`.
        microbatch_size: what it holds at a time, for the `Speed`.
        deadline: a time of `time.perf_counter`.
        progress: called with what is being done.
    """
    found: list[Speed] = []
    draw = np.random.default_rng(0)
    at = gradient or (lambda batch_size: gradients.mean(problem.loss, weight=problem.weight))
    init = kept(problem.init, "tuning", lambda: jax.jit(problem.init))
    transform = made(optimizer, learning_rate, TIMED_EXAMPLES)
    method = descent.method(gradients.mean(problem.loss, weight=problem.weight), transform)
    state = method.init(init(jax.random.key(0)))
    for size in sizes:
        progress(f"timing batch size {size}")
        known = Speed(size, math.inf, microbatch_size=microbatch_size(size))
        expected = found[-1].seconds_per_update * size / found[-1].batch_size if found else 0.0
        if found and (not found[-1].fits or time.perf_counter() > deadline or expected > LONGEST):
            fits = found[-1].fits
            found.append(known._replace(seconds_per_update=expected, fits=fits, extrapolated=fits))
            continue
        num_updates = int(np.clip(TIMED_EXAMPLES // size, 4, 1024))
        if expected:
            num_updates = min(num_updates, max(1, int(LONGEST / expected)))
            num_updates *= 4 ** max(0, math.ceil(math.log(SHORTEST / (expected * num_updates), 4)))
        shapes = state, problem.train, jax.ShapeDtypeStruct((num_updates, size), jnp.int32)
        try:
            program, num_updates = kept(
                problem,
                ("speed", optimizer, learning_rate, size, known.microbatch_size),
                partial(_compiled, at(size), transform, num_updates, shapes),
            )
            batches = draw.integers(problem.num_examples, size=(num_updates, size), dtype=np.int32)
            arguments = state, problem.train, jnp.asarray(batches)
            again = partial(_per_update, program, arguments, num_updates)
            measured = {"compile_seconds": program.compile_seconds, "memory": program.temporary_bytes}
            found.append(known._replace(seconds_per_update=again(), time_again=again, **measured))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found.append(known._replace(fits=False))
    for i, speed in enumerate(found):
        if speed.time_again and time.perf_counter() < deadline:
            found[i] = speed._replace(seconds_per_update=min(speed.seconds_per_update, speed.time_again()))
    return found


def microbatch_sizes(problem: Problem, sizes: Sequence[int], *, memory: float | None = None) -> dict[int, int | None]:
    """Return the microbatch size at which the gradient of each batch size fits into memory, None for the whole batch.

    The need of a batch is extrapolated from what the compiler counts at two small ones.

    Args:
        problem: what is to be trained.
        sizes: batch sizes.
        memory: bytes that one gradient may need beside its arguments; default MEMORY_SHARE of what
            is free, and on a CPU no more than ENOUGH.

    Raises:
        ValueError: where not even one example fits.
    """
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"memory={memory} must be positive and finite")
    limit = memory or MEMORY_SHARE * sweep.free_bytes()
    if memory is None and jax.default_backend() == "cpu":
        limit = min(limit, ENOUGH)
    whole: dict[int, int | None] = dict.fromkeys(sizes)
    probed = [size for size in PROBED if size <= problem.num_examples]
    if memory is None and max(sizes) <= 2 * PROBED[-1]:
        return whole
    needs = [_gradient_bytes(problem, size) for size in probed]
    if len(probed) < 2:
        each, fixed = needs[0] / probed[0], 0.0
    else:
        each = max(0.0, (needs[1] - needs[0]) / (probed[1] - probed[0]))
        fixed = max(0.0, needs[0] - each * probed[0])
    for size in sizes:
        if fixed + each * size > limit:
            most = int((limit - fixed) / each) if limit > fixed else 0
            if most < 1:
                raise ValueError(
                    f"memory={limit:.3g} bytes: the gradient of one example needs {fixed + each:.3g}: allow more"
                )
            whole[size] = most
    return whole


def estimator(problem: Problem, microbatches: dict[int, int | None]) -> Callable[[int], Gradient]:
    """Return `batch_size -> gradient estimator`, microbatched where `microbatches` says so."""

    def at(batch_size: int) -> Gradient:
        size = microbatches.get(batch_size)
        if size is None:
            return gradients.mean(problem.loss, weight=problem.weight)
        return gradients.microbatched(problem.loss, weight=problem.weight, microbatch_size=size)

    return at


def _gradient_bytes(problem: Problem, batch_size: int) -> int:
    """Return the temporary and result bytes of one gradient, by the compiler's count."""

    def gradient(train, frozen, data, indices):
        return gradients.mean(problem.loss, weight=problem.weight)(
            merge(train, frozen), batching.take(data, indices)
        ).grad

    params = jax.eval_shape(problem.init, jax.random.key(0))
    indices = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), problem.train)
    program = kept(
        problem, ("memory", batch_size), lambda: timing.compiled(gradient, *trainable(params), shapes, indices)
    )
    return program.temporary_bytes or 0


def _compiled(estimate: Gradient, optimizer, num_updates: int, shapes) -> tuple[timing.Compiled, int]:
    """Return the program and its updates: their number, too, is that of the first call."""
    run = partial(descent.run, descent.method(estimate, optimizer), every=num_updates)
    return timing.compiled(run, *shapes), num_updates


def _per_update(program, arguments, num_updates: int) -> float:
    return timing.seconds(program, *arguments, budget=TIMING_SECONDS, repeats=7) / num_updates
