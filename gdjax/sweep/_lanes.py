"""Many lanes of one function: side by side, or, on a CPU, side by side in groups, one group after another.

Side by side, lanes share what it costs to start an operation, which is most of the time where there is little to do in
one. Where there is much, nothing is left to share, and products with an axis of lanes are slower ones: a CPU runs one
lane after another up to three times as fast. Where the two meet is known from the shapes.

>>> import jax
>>> small, large = (jax.ShapeDtypeStruct((n,), "float32") for n in (2**8, 2**15))
>>> at_once(jax.numpy.sin, small), at_once(jax.numpy.sin, large)
(128, 1)
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core

GROUP_WORK = 2**17
"""Work of one operation of all lanes of a group, see `at_once`, on two cores of an Emerald Rapids. At B = 1, four lanes
of a dense network of 64 x 128, with four fifths of it, take 0.7 times as long as one after another; those of a
transformer of 16 tokens, with 4.5 times as much, 1.3 times."""
WHILE = 16  # times that a loop of unknown length is taken to run
RARE = 8  # what runs that many times less often than something else does not count


def vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` for arguments with a leading axis, as `jax.vmap`; on a CPU in groups, about as fast as can be.

    How many lanes a group has depends on the shapes in `function` alone, see `at_once`. Results are those of `jax.vmap`
    but for the order of sums. The form is chosen when the program is lowered, for the platform that it is lowered for.

    Args:
        function: pytrees of arrays and typed keys -> pytree of arrays.
    """

    def mapped(*args):
        leaves, tree = jax.tree.flatten(args)
        one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in leaves]
        closed, shapes = jax.make_jaxpr(lambda *leaves: function(*tree.unflatten(leaves)), return_shape=True)(*one)
        each = core.jaxpr_as_fun(closed)
        in_groups = grouped(each, lanes_of(closed.jaxpr))
        found = lax.platform_dependent(*leaves, cpu=in_groups, default=jax.vmap(each))
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return mapped


def at_once(function: Callable[..., Any], *args: Any) -> int:
    """Return how many lanes `vmap` runs side by side on a CPU, for the arguments, or their shapes, of one lane.

    The work of an operation is the bytes of its result or, of a product of matrices, the multiplications where they are
    more: 16 bytes of results take a CPU about as long as 32 flops. Of what is computed most often, in the innermost of
    its loops, an average byte is part of so much work that this power of two, at least one, of it is GROUP_WORK.
    """
    return lanes_of(jax.make_jaxpr(function)(*args).jaxpr)


def lanes_of(jaxpr: core.Jaxpr) -> int:
    """Return how many lanes of a jaxpr a CPU should run side by side: see `at_once`."""
    work, times = np.asarray([*_works(jaxpr), (1, 1)], float).T
    total = times * work * (times * RARE > times.max())
    return 2 ** max(0, round(math.log2(GROUP_WORK * total.sum() / (total @ work))))


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


def _works(jaxpr: Any, times: int = 1) -> Iterator[tuple[float, int]]:
    """Yield (work, times that it is done) of every operation in a jaxpr and in all that it calls."""
    for equation in jaxpr.eqns:
        inner = list(core.jaxprs_in_params(equation.params))
        platforms = equation.params.get("branches_platforms") or ()  # of `lax.platform_dependent`
        if platforms:
            inner = [inner[next((i for i, of in enumerate(platforms) if of is None or "cpu" in of), 0)]]
        repeats = {"scan": equation.params.get("length", 1), "while": WHILE}.get(equation.primitive.name, 1)
        for each in inner:
            yield from _works(each, times * repeats)
        if not inner:
            for array in (v.aval for v in equation.outvars if hasattr(v.aval, "dtype")):
                yield array.size * max(_terms(equation), array.dtype.itemsize), times


def _terms(equation: Any) -> float:
    """Return how many products are added up in a number of the result."""
    if equation.primitive.name == "dot_general":
        (contracting, _), _ = equation.params["dimension_numbers"]
        return math.prod(equation.invars[0].aval.shape[axis] for axis in contracting)
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        return math.prod(kernel) // max(1, kernel[equation.params["dimension_numbers"].rhs_spec[0]])
    return 0
