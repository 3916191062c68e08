"""Seconds per update at every batch size, by the real training loop.

>>> import optax
>>> from gdjax import problems
>>> choices = throughput(problems.least_squares(), optax.sgd, [1, 8], learning_rate=0.1)
>>> [(choice.batch_size, choice.fits, choice.seconds_per_update < 1) for choice in choices]
[(1, True, True), (8, True, True)]
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gdjax import descent, gradients, timing
from gdjax.advise._choices import Choice
from gdjax.problem import Problem
from gdjax.tuning._lanes import Optimizer

TIMED_EXAMPLES, TIMING_SECONDS = 1024, 0.1  # in one timed run of updates, and for all repeats of it


def throughput(
    problem: Problem,
    optimizer: Optimizer,
    sizes: Sequence[int],
    *,
    learning_rate: float,
    deadline: float = math.inf,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Choice]:
    """Time the real training loop at every batch size, ascending, until `deadline` (`time.perf_counter`).

    After that times are taken in proportion to the examples. Whatever else the machine does only adds to a time: all
    are measured twice, where `deadline` allows it, and the lower one counts. What is larger than a size that does not
    fit does not either.
    """
    choices: list[Choice] = []
    draw = np.random.default_rng(0)
    method = descent.method(gradients.mean(problem.loss), optimizer(learning_rate))
    state = method.init(jax.jit(problem.init)(jax.random.key(0)))
    for size in sizes:
        progress(f"timing batch size {size}")
        if choices and (not choices[-1].fits or time.perf_counter() > deadline):
            scale = size / choices[-1].batch_size
            fits = choices[-1].fits
            choices.append(Choice(size, choices[-1].seconds_per_update * scale, fits=fits, extrapolated=fits))
            continue
        num_updates = int(np.clip(TIMED_EXAMPLES // size, 4, 1024))
        batches = draw.integers(problem.num_examples, size=(num_updates, size), dtype=np.int32)
        arguments = state, problem.train, jnp.asarray(batches)
        try:
            program = timing.compiled(partial(descent.run, method, every=num_updates), *arguments)
            again = partial(_per_update, program, arguments, num_updates)
            choices.append(Choice(size, again(), program.compile_seconds, program.temporary_bytes, time_again=again))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            choices.append(Choice(size, math.inf, fits=False))
    for choice in choices:
        if choice.time_again and time.perf_counter() < deadline:
            choice.seconds_per_update = min(choice.seconds_per_update, choice.time_again())
    return choices


def _per_update(program, arguments, num_updates: int) -> float:
    return timing.seconds(program, *arguments, budget=TIMING_SECONDS, repeats=7) / num_updates
