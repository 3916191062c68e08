"""Programs for a CPU: loops as one kernel, and products of two dimensions."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core
from jax.interpreters import batching, mlir

from gdjax.kernels._jaxprs import equations, rewritten

LOOPS_IN_GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
}
"""Compiler options by which a whole loop is one launch of a CUDA graph, where XLA's default launches one for every
iteration: `jax.jit(function, compiler_options=LOOPS_IN_GRAPHS)`, without effect elsewhere. For all programs of a
process it is XLA_FLAGS=--xla_gpu_enable_command_buffer=... . XLA leaves WHILE out by default, and that the results are
the same has not been confirmed on a device: hence it has to be asked for."""


def one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` of arrays, to be compiled for a CPU as one kernel; elsewhere as it is.

    Which of the two is decided when the program is lowered, for the platform that it is lowered for. It makes no use of
    more than one core. What it computes is what `function` does, but for the order of sums.

    Where something inside is left to a library, compilation ends in a `jax.errors.JaxRuntimeError`: "Fusion kind not
    implemented on CPU", or "Failed to materialize symbols".

    Source: the mark that XLA's own SmallWhileLoopHoistingPass puts on loops that touch little memory.
    """
    return lambda *args: lax.platform_dependent(*args, cpu=_marked(function), default=function)


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    def marked(*args):
        # A call that is not inlined, so that there is something to mark; the mark must not reach the calls inside.
        result = jax.jit(function, inline=False)(*args)
        return set_xla_metadata(result, inlineable="false", xla_cpu_small_call="true")

    return marked


def for_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` of pytrees of arrays, its products written as a CPU computes them fastest.

    Products that sum over several axes become products of two matrices, in all that the function loops over, chooses
    from and calls; those that sum over one XLA writes so itself. What is computed is the same, but for the order of
    sums. The form is chosen when the program is lowered, after every `vmap` and `grad` around it and for the platform
    that it is lowered for, so nothing changes elsewhere.

    Left as they are: functions with effects, such as callbacks; those with a part that is `one_kernel`; those traced
    under a mesh or inside `shard_map`, or given arrays that are sharded over explicit axes; and derivatives of
    `function`, which are those of the program as it was written.
    """

    def run(*args):
        leaves, structure = jax.tree.flatten(args)
        explicit = any(axis is not None for leaf in leaves for axis in jax.typeof(leaf).sharding.spec)
        if explicit or not jax.sharding.get_abstract_mesh().empty:
            return function(*args)
        closed, shape = jax.make_jaxpr(lambda *leaves: function(*structure.unflatten(leaves)), return_shape=True)(
            *leaves
        )
        if getattr(closed.jaxpr, "is_high", False):  # jax has yet to lower it to the types that a primitive takes
            return function(*args)
        found = list(equations(closed.jaxpr))
        marked = "xla_metadata_value" in {e.primitive.name for e in found}
        if closed.effects or marked or not any(map(_is_over_several_axes, found)):
            outs = core.jaxpr_as_fun(closed)(*leaves)
        else:
            hoisted = closed.jaxpr.replace(constvars=[], invars=[*closed.jaxpr.constvars, *closed.jaxpr.invars])
            outs = _differentiable(core.ClosedJaxpr(hoisted, []))(*closed.consts, *leaves)
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return run


def _differentiable(closed: core.ClosedJaxpr) -> Callable[..., list[jax.Array]]:
    plain = core.jaxpr_as_fun(closed)
    chosen = jax.custom_jvp(lambda *args: for_cpu_p.bind(*args, closed=closed))
    chosen.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return chosen


for_cpu_p = core.Primitive("for_cpu")  # a call whose form waits for the lowering
for_cpu_p.multiple_results = True
for_cpu_p.def_impl(lambda *args, closed: jax.jit(lambda *args: for_cpu_p.bind(*args, closed=closed))(*args))
for_cpu_p.def_abstract_eval(lambda *avals, closed: closed.out_avals)


def _batch(args, axes, *, closed):
    mapped = jax.vmap(core.jaxpr_as_fun(closed), axes)
    outs = for_cpu_p.bind(*args, closed=jax.make_jaxpr(mapped)(*args))
    return outs, [0] * len(outs)


def _lower_for_cpu(context, *args, closed):
    function = core.jaxpr_as_fun(rewritten(closed, {"dot_general": _product}))
    return mlir.lower_fun(lambda *args, closed: function(*args))(context, *args, closed=closed)


batching.primitive_batchers[for_cpu_p] = _batch
mlir.register_lowering(for_cpu_p, mlir.lower_fun(lambda *args, closed: core.jaxpr_as_fun(closed)(*args)))
mlir.register_lowering(for_cpu_p, _lower_for_cpu, platform="cpu")


def _is_over_several_axes(equation) -> bool:
    return equation.primitive.name == "dot_general" and len(equation.params["dimension_numbers"][0][0]) > 1


def _product(x: jax.Array, y: jax.Array, *, dimension_numbers, out_sharding, **params) -> jax.Array:
    """Return a product of tensors, by one of matrices where the axes summed over lie first or last in both."""
    (contracting, shared) = dimension_numbers
    of_x, of_y = (_joined(v.ndim, axes) for v, axes in zip((x, y), contracting, strict=True))
    if shared[0] or of_x is None or of_y is None or len(contracting[0]) < 2:
        numbers = {"dimension_numbers": dimension_numbers, "out_sharding": out_sharding}
        return lax.dot_general(x, y, **numbers, **params)
    summed = math.prod(x.shape[i] for i in contracting[0])
    free = [[n for i, n in enumerate(v.shape) if i not in axes] for v, axes in zip((x, y), contracting, strict=True)]
    left, right = (
        v.reshape((summed, math.prod(sizes)) if axis == 0 else (math.prod(sizes), summed))
        for v, sizes, axis in zip((x, y), free, (of_x, of_y), strict=True)
    )
    product = lax.dot_general(left, right, (([of_x], [of_y]), ([], [])), **params)
    return product.reshape(*free[0], *free[1])


def _joined(ndim: int, axes) -> int | None:
    """Return where the joined axes lie in a matrix: 0 where they are the first, 1 the last, None elsewhere."""
    if not axes or len(axes) == ndim:
        return None
    return {tuple(range(len(axes))): 0, tuple(range(ndim - len(axes), ndim)): 1}.get(tuple(axes))
