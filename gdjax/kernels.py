"""Programs in the form that XLA compiles best for a CPU: loops as one kernel, products of two dimensions.

XLA compiles every operation of a loop to a kernel of its own, or a few together, and starts one after the other: at
batch size 1 a small network has some 25 of them in an update, and starting them takes a quarter of its time
(experiments/b1_race.py). A loop compiled as a whole has one. Operations that XLA leaves to a library cannot be inside:
products of two matrices (hence, in most models, batches of more than one example), convolutions, sorting (hence,
drawing a stream). Where there are such, products of three dimensions are what costs: the gradient of a dense layer
over [B, T, D] is summed over two axes at once, which XLA does by copying a transpose, three times as slow as the same
sum over one axis of [B T, D].

`for_cpu` does both by itself; `one_kernel` asks for one kernel, whatever may come of it.

>>> import jax.numpy as jnp
>>> one = one_kernel(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x @ jnp.ones((2, 2)), x))
>>> jax.jit(one)(jnp.asarray([1.0, 2.0]))
Array([12., 12.], dtype=float32)
>>> "xla_cpu_small_call" in jax.jit(one).lower(jnp.ones(2)).as_text()
True
>>> loop = for_cpu(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jnp.sort(x) @ jnp.ones((2, 2)), x))
>>> jax.jit(loop)(jnp.asarray([1.0, 2.0]))
Array([12., 12.], dtype=float32)
>>> "xla_cpu_small_call" in jax.jit(loop).lower(jnp.ones(2)).as_text()  # sorting is done by a library
False
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
REDUCTIONS = ("reduce_sum", "reduce_prod", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin")
SIMPLE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type broadcast_in_dim cbrt ceil clamp
    concatenate convert_element_type copy copy_p cos cosh digamma div dynamic_slice dynamic_update_slice eq erf erf_inv
    exp exp2 expm1 floor gather ge gt integer_pow iota is_finite le lgamma log log1p logistic lt max min mul ne neg
    nextafter not or pad population_count pow random_bits random_fold_in random_seed random_split random_unwrap
    random_wrap reduce_precision rem reshape rev round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh slice split sqrt square squeeze stop_gradient sub tan tanh threefry2x32 transpose
    xor
""".split()  # noqa: SIM905
"""What XLA emits into any kernel, at any size."""
MAX_REDUCED = 1024  # numbers; more are summed by a library
MAX_WEIGHT = 2**20  # numbers in a matrix: a larger one comes from memory, where several cores read faster than one
UNROLL, UNROLLED_FROM = 4, 2**16  # updates in an iteration, where the loop carries so many numbers: they are copied
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
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
    """Return `function` of pytrees of arrays, to be compiled for a CPU in the form that is fastest there.

    What it computes is what `function` does, but for the order of sums. The form is chosen when the program is lowered,
    after every `vmap` and `grad` around it and for the platform that it is lowered for, so nothing changes elsewhere:

    1. a loop of small operations on one device becomes one kernel, unrolled where it carries many numbers. Whether it
       can is seen from its operations, and then tried, so that a compiler that will not is no error;
    2. in any other program products over several axes of operands of many dimensions become products of two matrices.

    Left as they are: functions with effects, such as callbacks; those traced under a mesh or inside `shard_map`, or
    given arrays that are sharded over explicit axes; and derivatives of `function`, which are those of the program as
    it was written.
    """

    def run(*args):
        leaves, structure = jax.tree.flatten(args)
        explicit = any(axis is not None for leaf in leaves for axis in jax.typeof(leaf).sharding.spec)
        if explicit or not jax.sharding.get_abstract_mesh().empty:
            return function(*args)
        closed, shape = jax.make_jaxpr(lambda *leaves: function(*structure.unflatten(leaves)), return_shape=True)(
            *leaves
        )
        if closed.effects or "xla_metadata_value" in {e.primitive.name for e in _equations(closed.jaxpr)}:
            return function(*args)
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
    # What devices send to one another is done by a library; a context that does not tell their number has one.
    alone = getattr(context.module_context.axis_context, "num_devices", 1) in (1, None)
    small = alone and _may_be_one_kernel(closed)
    if small and _compiles(_marked(core.jaxpr_as_fun(closed)), closed.in_avals):
        chosen = _marked(core.jaxpr_as_fun(_rewritten(closed, unroll=True)))
    else:
        chosen = core.jaxpr_as_fun(_rewritten(closed))
    return mlir.lower_fun(lambda *args, closed: chosen(*args))(context, *args, closed=closed)


batching.primitive_batchers[for_cpu_p] = _batch
mlir.register_lowering(for_cpu_p, mlir.lower_fun(lambda *args, closed: core.jaxpr_as_fun(closed)(*args)))
mlir.register_lowering(for_cpu_p, _lower_for_cpu, platform="cpu")


def _may_be_one_kernel(closed: core.ClosedJaxpr) -> bool:
    equations = list(_equations(closed.jaxpr))
    return any(_is_loop(e) for e in equations) and all(map(_is_small, equations))


def _is_loop(equation) -> bool:
    return equation.primitive.name in LOOPS and equation.params.get("length", 2) > 1


def _is_small(equation) -> bool:
    name = equation.primitive.name
    if name in REDUCTIONS:
        [operand], [out] = equation.invars, equation.outvars
        return operand.aval.size <= MAX_REDUCED or operand.aval.size == out.aval.size
    if name.startswith("scatter"):  # of one slice; more are a loop of the library
        indices = equation.invars[1].aval
        return indices.size == indices.shape[-1]
    if name == "dot_general":
        (contracting, _), (shared, _) = equation.params["dimension_numbers"]
        sizes = [v.aval.size for v in equation.invars]
        left = equation.invars[0].aval.shape
        summed, batch = (math.prod(left[i] for i in axes) for axes in (contracting, shared))
        vector = summed == 1 or min(sizes) == summed
        return batch == 1 and vector and max(*sizes, equation.outvars[0].aval.size) <= MAX_WEIGHT
    return name in (*SIMPLE, *LOOPS, *CALLS, "cond")


def _equations(jaxpr: core.Jaxpr) -> Iterator[Any]:
    """Yield the equations of a jaxpr and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from _equations(inner)


def _compiles(function: Callable[..., Any], avals) -> bool:
    """Return whether the compiler takes `function`, as quickly as that can be known."""
    try:
        jax.jit(function, compiler_options=QUICK).lower(*map(_struct, avals)).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _struct(aval) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _rewritten(closed: core.ClosedJaxpr, *, unroll: bool = False) -> core.ClosedJaxpr:
    """Return a jaxpr that computes the same by products of two dimensions, its loops unrolled where asked for."""
    return jax.make_jaxpr(lambda *args: _evaluated(closed.jaxpr, closed.consts, args, unroll))(
        *map(_struct, closed.in_avals)
    )


def _evaluated(jaxpr: core.Jaxpr, consts, args, unroll: bool) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(variable):
        return variable.val if isinstance(variable, core.Literal) else env[variable]

    for equation in jaxpr.eqns:
        ins = [read(v) for v in equation.invars]
        if equation.primitive.name in CALLS:
            inner = equation.params[CALLS[equation.primitive.name]]
            outs = _evaluated(inner.jaxpr, inner.consts, ins, unroll)
        elif equation.primitive.name == "dot_general":
            outs = [_product(*ins, **equation.params)]
        else:
            outs = _bound(jaxpr, equation, ins, unroll)
        env.update(zip(equation.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _bound(jaxpr: core.Jaxpr, equation, ins, unroll: bool) -> list[Any]:
    """Apply an equation, what it loops over or chooses from being rewritten too."""
    params = dict(equation.params)
    if equation.primitive.name in (*LOOPS, "cond"):
        for name, value in params.items():
            if isinstance(value, core.ClosedJaxpr):
                params[name] = _rewritten(value, unroll=unroll)
            elif name == "branches":
                params[name] = tuple(_rewritten(branch, unroll=unroll) for branch in value)
    if unroll and equation.primitive.name == "scan" and _carries_much(equation):
        params["unroll"] = max(params["unroll"], min(UNROLL, params["length"]))
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


def _carries_much(equation) -> bool:
    """Whether a loop, with no other inside, carries so many numbers that copying them costs."""
    [body] = core.jaxprs_in_params(equation.params)
    inside = any(map(_is_loop, _equations(body)))
    return not inside and sum(v.aval.size for v in equation.outvars) >= UNROLLED_FROM


def _product(x: jax.Array, y: jax.Array, *, dimension_numbers, out_sharding, **params) -> jax.Array:
    """Return a product of tensors, by one of matrices where the axes summed over lie first or last in both."""
    (contracting, shared) = dimension_numbers
    of_x, of_y = (_joined(v.ndim, axes) for v, axes in zip((x, y), contracting, strict=True))
    if shared[0] or of_x is None or of_y is None or max(x.ndim, y.ndim) < 3:
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
