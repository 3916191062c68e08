"""Programs in the form that XLA compiles best: on a CPU products of two dimensions, and loops as one kernel.

The gradient of a dense layer over [B, T, D] is summed over two axes at once, which XLA does by copying a transpose,
three times as slow as the same sum over one axis of [B T, D]: `for_cpu` writes such products as products of matrices,
in the loops of `descent` by itself.

XLA compiles every operation of a loop to a kernel of its own, or a few together, and starts one after the other: at
batch size 1 a small network has some 25 of them in an update, and starting them takes a quarter of its time
(experiments/b1_race.py). `one_kernel` asks for one. Operations that XLA leaves to a library cannot be inside: products
of two matrices (hence, in most models, batches of more than one example), convolutions, sorting (hence, drawing a
stream). It is not done by itself: there are loops on which XLA's compiler does not refuse but ends the process, such
as one that carries a constant, and which these are is not known from their operations.

On a GPU `LOOPS_IN_GRAPHS` are compiler options that make a loop one launch.

>>> import jax.numpy as jnp
>>> one = one_kernel(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x @ jnp.ones((2, 2)), x))
>>> jax.jit(one)(jnp.asarray([1.0, 2.0]))
Array([12., 12.], dtype=float32)
>>> "xla_cpu_small_call" in jax.jit(one).lower(jnp.ones(2)).as_text()
True
>>> gradient = lambda x, g: jnp.einsum("btd,bto->do", x, g)
>>> text = jax.jit(for_cpu(gradient)).lower(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 5))).as_text()
>>> "(tensor<6x4xf32>, tensor<6x5xf32>) -> tensor<4x5xf32>" in text
True
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core
from jax.interpreters import batching, mlir

LOOPS = ("scan", "while")
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr"}
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
        equations = list(_equations(closed.jaxpr))
        marked = "xla_metadata_value" in {e.primitive.name for e in equations}
        if closed.effects or marked or not any(map(_is_over_several_axes, equations)):
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
    rewritten = core.jaxpr_as_fun(_rewritten(closed))
    return mlir.lower_fun(lambda *args, closed: rewritten(*args))(context, *args, closed=closed)


batching.primitive_batchers[for_cpu_p] = _batch
mlir.register_lowering(for_cpu_p, mlir.lower_fun(lambda *args, closed: core.jaxpr_as_fun(closed)(*args)))
mlir.register_lowering(for_cpu_p, _lower_for_cpu, platform="cpu")


def _equations(jaxpr: core.Jaxpr) -> Iterator[Any]:
    """Yield the equations of a jaxpr and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from _equations(inner)


def _struct(aval) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _rewritten(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Return a jaxpr that computes the same by products of two dimensions."""
    return jax.make_jaxpr(lambda *args: _evaluated(closed.jaxpr, closed.consts, args))(*map(_struct, closed.in_avals))


def _evaluated(jaxpr: core.Jaxpr, consts, args) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(variable):
        return variable.val if isinstance(variable, core.Literal) else env[variable]

    for equation in jaxpr.eqns:
        ins = [read(v) for v in equation.invars]
        if equation.primitive.name in CALLS:
            inner = equation.params[CALLS[equation.primitive.name]]
            outs = _evaluated(inner.jaxpr, inner.consts, ins)
        elif equation.primitive.name == "dot_general":
            outs = [_product(*ins, **equation.params)]
        else:
            outs = _bound(jaxpr, equation, ins)
        env.update(zip(equation.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _bound(jaxpr: core.Jaxpr, equation, ins) -> list[Any]:
    """Apply an equation, what it loops over or chooses from being rewritten too."""
    params = dict(equation.params)
    if equation.primitive.name in (*LOOPS, "cond"):
        for name, value in params.items():
            if isinstance(value, core.ClosedJaxpr):
                params[name] = _rewritten(value)
            elif name == "branches":
                params[name] = tuple(_rewritten(branch) for branch in value)
    one = jaxpr.replace(
        constvars=[],
        invars=list({v: None for v in equation.invars if not isinstance(v, core.Literal)}),
        outvars=equation.outvars,
        eqns=[equation.replace(params=params)],
        effects=equation.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    values = {v: x for v, x in zip(equation.invars, ins, strict=True) if not isinstance(v, core.Literal)}
    return core.jaxpr_as_fun(core.ClosedJaxpr(one, []))(*(values[v] for v in one.invars))


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
