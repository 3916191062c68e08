"""Many lanes of one function: side by side, or, on a CPU, side by side in groups, one group after another.

Side by side, lanes share what it costs to start an operation, which is most of the time where arrays are small. Where
they are not, nothing is left to share, and a CPU loses its caches: it runs one lane after another up to three times as
fast. Where the two meet is a matter of bytes.

>>> import jax
>>> small, large = (jax.ShapeDtypeStruct((n,), 'float32') for n in (2**8, 2**14))
>>> at_once(jnp.sin, small), at_once(jnp.sin, large)
(64, 1)
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core

GROUP_BYTES = 2**16
"""Of an array of all lanes of a group: on two cores of an Emerald Rapids, twice as many cost a transformer at B = 1 30 %
of its time and half as many a small dense network 10 %."""
WHILE = 16  # times that a loop of unknown length is taken to run
RARE = 8  # what runs that many times less often than something else does not count


def vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` for arguments with a leading axis, as `jax.vmap`; on a CPU in groups, as fast as it can.

    How many lanes a group has depends on the shapes in `function` alone, see `at_once`. Results are those of `jax.vmap`
    but for the order of sums. It is chosen when the program is lowered, for the platform that it is lowered for.

    Args:
        function: pytrees of arrays and typed keys -> pytree of arrays.
    """

    def mapped(*args):
        leaves, tree = jax.tree.flatten(args)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), leaves)
        closed, shapes = jax.make_jaxpr(lambda *leaves: function(*tree.unflatten(leaves)), return_shape=True)(*one)
        each = core.jaxpr_as_fun(closed)
        in_groups = grouped(each, lanes_of(closed.jaxpr))
        return jax.tree.unflatten(
            jax.tree.structure(shapes), lax.platform_dependent(*leaves, cpu=in_groups, default=jax.vmap(each))
        )

    return mapped


def at_once(function: Callable[..., Any], *args: Any) -> int:
    """Return how many lanes `vmap` runs side by side on a CPU, for the arguments, or their shapes, of one lane.

    An average byte of what is computed most often, in the innermost of its loops, lies in an array of so many bytes
    that a power of two of them, at least one, are GROUP_BYTES.
    """
    return lanes_of(jax.make_jaxpr(function)(*args).jaxpr)


def lanes_of(jaxpr: core.Jaxpr) -> int:
    """Return how many lanes of a jaxpr a CPU should run side by side: see `at_once`."""
    sizes, times = np.asarray([*_sizes(jaxpr)], float).reshape(-1, 2).T
    total = times * sizes * (times * RARE > times.max(initial=1))
    mean = (total @ sizes) / max(total.sum(), 1)
    return 2 ** int(np.log2(max(GROUP_BYTES / max(mean, 1), 1)))


def grouped(function: Callable[..., list[jax.Array]], lanes: int) -> Callable[..., list[jax.Array]]:
    """Return a function of arrays -> list of arrays mapped over axis 0, so many lanes at a time.

    The groups are equal, none larger than that, and the last one is filled up by the last lane.
    """

    def run(*args):
        number = len(args[0])
        count = -(-number // lanes)
        size = -(-number // count)
        if size == 1:  # without an axis of one lane, for that makes other products of it, slower by half
            return lax.map(lambda lane: function(*lane), args)
        if count == 1:
            return jax.vmap(function)(*args)
        rows = np.minimum(np.arange(count * size), number - 1).reshape(count, size)
        found = lax.map(lambda rows: jax.vmap(function)(*(x[rows] for x in args)), rows)
        return [x.reshape(count * size, *x.shape[2:])[:number] for x in found]

    return run


def _sizes(jaxpr: core.Jaxpr, times: int = 1) -> Iterator[tuple[int, int]]:
    """Yield (bytes, times that it is computed) of every array that a jaxpr and all that it calls compute."""
    for equation in jaxpr.eqns:
        inner = list(core.jaxprs_in_params(equation.params))
        repeats = {"scan": equation.params.get("length", 1), "while": WHILE}.get(equation.primitive.name, 1)
        for each in inner:
            yield from _sizes(each, times * repeats)
        if not inner:
            for array in (v.aval for v in equation.outvars):
                if hasattr(array, "dtype"):
                    yield array.size * array.dtype.itemsize, times
