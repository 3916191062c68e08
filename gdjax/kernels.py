"""A loop of small operations as one kernel of a CPU, instead of a queue of small kernels.

XLA compiles every operation of a loop to a kernel of its own, or a few together, and starts one after the other: at
batch size 1 a small network has some 25 of them in an update, and starting them takes a quarter of its time
(experiments/b1_race.py). A loop compiled as a whole has one. Operations that XLA leaves to a library cannot be inside:
products of two matrices (hence, in most models, batches of more than one example), convolutions, sorting (hence,
drawing a stream).

>>> import jax.numpy as jnp
>>> one = one_kernel(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x @ jnp.ones((2, 2)), x))
>>> jax.jit(one)(jnp.asarray([1.0, 2.0]))
Array([12., 12.], dtype=float32)
>>> "xla_cpu_small_call" in jax.jit(one).lower(jnp.ones(2)).as_text()
True
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` of arrays, to be compiled for a CPU as one kernel; elsewhere as it is.

    It makes no use of more than one core. What it computes is what `function` does, but for the order of sums.

    Where something inside is left to a library, compilation ends in a `jax.errors.JaxRuntimeError`: "Fusion kind not
    implemented on CPU", or "Failed to materialize symbols".

    Source: the mark that XLA's own SmallWhileLoopHoistingPass puts on loops that touch little memory.
    """

    def marked(*args):
        # A call that is not inlined, so that there is something to mark; the mark must not reach the calls inside.
        result = jax.jit(function, inline=False)(*args)
        return set_xla_metadata(result, inlineable="false", xla_cpu_small_call="true")

    return marked if jax.default_backend() == "cpu" else function
