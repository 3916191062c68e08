"""What `ghost` reads in jaxprs. Everything that touches jax's core is in this file."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core
from jax.interpreters import partial_eval

INLINED = ("jit", "pjit", "closed_call", "core_call")
REMAT = ("remat2", "checkpoint", "remat")
# Derivative rules that are linear say nothing of these primitives applied to a cotangent.
NONLINEAR = {"max", "min", "clamp", "sign", "abs", "round", "floor", "ceil", "is_finite", "eq", "ne", "lt", "le", "gt"}
NONLINEAR |= {"ge", "exp", "log", "tanh", "logistic", "sqrt", "rsqrt", "integer_pow", "pow", "sin", "cos", "square"}
NONLINEAR |= {"reduce_precision"}

Jaxpr = core.Jaxpr


def traced(function: Callable, *arguments: Any) -> tuple[Jaxpr, list[Any]]:
    """Return (jaxpr of a function of one result, without what does not reach it, its constants)."""
    closed = jax.make_jaxpr(function)(*arguments)
    return partial_eval.dce_jaxpr(closed.jaxpr, [True], instantiate=True)[0], closed.consts


def is_literal(variable) -> bool:
    return isinstance(variable, core.Literal)


def struct(aval) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def scan_sizes(equation) -> tuple[int, int]:
    """Return how many of a scan's operands are constants, and how many are carried; the rest are scanned."""
    if "num_consts" in equation.params:
        return equation.params["num_consts"], equation.params["num_carry"]
    consts, carry, _ = equation.params["ft_in"].unpack()  # jax 0.12
    return len(list(consts.vals)), len(list(carry.vals))


def default_branch(equation) -> Any:
    """Return what `lax.platform_dependent` computes on a platform that it does not name; None of another equation.

    All its branches are the same function, so that norms taken from one of them are those of all.
    """
    platforms = equation.params.get("branches_platforms") or ()
    return equation.params["branches"][platforms.index(None)] if None in platforms else None


def increment(body, place: int, carry: int) -> Any:
    """Return what a loop's body adds to the integer that is its operand `place` and its result `carry`, or None."""
    counter, out = body.invars[place], body.outvars[carry]
    if counter.aval.shape or not jnp.issubdtype(counter.aval.dtype, jnp.integer):
        return None
    for equation in body.eqns:
        if out not in equation.outvars or counter not in equation.invars:
            continue
        others = [v for v in equation.invars if v is not counter]
        if equation.primitive.name == "add" and len(others) == 1 and is_literal(others[0]):
            return literal(others[0])
        if equation.primitive.name in (*INLINED, *REMAT):
            inner = equation.params["jaxpr"]
            places = equation.invars.index(counter), equation.outvars.index(out)
            return increment(getattr(inner, "jaxpr", inner), *places)
    return None


def concrete(value) -> np.ndarray | None:
    """Return an array that is known while a program is traced."""
    return None if isinstance(value, Tracer) else np.asarray(value)


def differentiable(aval) -> bool:
    """Whether a value has gradients: floating-point or complex."""
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def is_real(aval) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)


def is_rounding(equation) -> bool:
    """Whether an equation gives numbers, and takes cotangents, of less than float32."""
    avals = [v.aval for v in equation.outvars if is_real(v.aval)]
    return equation.primitive.name == "reduce_precision" or any(jnp.finfo(aval.dtype).bits < 32 for aval in avals)


def literal(variable) -> np.ndarray:
    return np.asarray(variable.val, variable.aval.dtype)


def reached(jaxpr: Jaxpr, outs: Sequence[bool]) -> set:
    """Return the variables to which a gradient comes back from the marked outputs."""
    found = {v for v, mark in zip(jaxpr.outvars, outs, strict=True) if mark and _takes_gradient(v)}
    for equation in reversed(jaxpr.eqns):
        marks = [v in found for v in equation.outvars]
        if not any(marks) or equation.primitive.name == "stop_gradient":
            continue
        ins = equation.invars
        if equation.primitive.name in INLINED:
            inner = equation.params["jaxpr"].jaxpr
            inside = reached(inner, marks)
            ins = [v for v, own in zip(ins, inner.invars, strict=True) if own in inside]
        found |= {v for v in ins if _takes_gradient(v)}
    return found


def _takes_gradient(variable) -> bool:
    return not is_literal(variable) and differentiable(variable.aval)


def function_of(jaxpr: Jaxpr, equation, known: dict[Any, Callable]) -> tuple[list[int], Callable]:
    """Return the places of an equation's operands, each once and without literals, and its outputs as a function.

    The function keeps whatever derivative rule the equation has. Equations that are alike have the same one, which JAX
    differentiates once: `known` holds them.
    """
    places: dict[Any, int] = {}
    for i, v in enumerate(equation.invars):
        if not is_literal(v):
            places.setdefault(v, i)
    operands = [literal(v).tobytes() if is_literal(v) else places[v] for v in equation.invars]
    avals = [v.aval for v in (*equation.invars, *equation.outvars)]
    key = equation.primitive, tuple(sorted(equation.params.items())), equation.ctx, *operands, *avals
    try:
        is_known = key in known
    except (TypeError, ValueError):  # of parameters without a hash
        key, is_known = equation, False
    if not is_known:
        part = jaxpr.replace(
            constvars=[],
            invars=list(places),
            outvars=equation.outvars,
            eqns=[equation],
            effects=equation.effects,
            debug_info=jaxpr.debug_info.with_unknown_names(),
        )
        known[key] = jax.jit(core.jaxpr_as_fun(core.ClosedJaxpr(part, [])))
    return list(places.values()), known[key]


def custom_rules(jaxpr: Jaxpr, equations: Sequence[Any] | None = None) -> Iterator[tuple[Jaxpr, Any]]:
    """Yield (jaxpr, equation) for every custom backward pass in a jaxpr, or in these of its equations."""
    for equation in jaxpr.eqns if equations is None else equations:
        if equation.primitive.name.startswith("custom_vjp"):
            yield jaxpr, equation
        else:
            for inner in core.jaxprs_in_params(equation.params):
                yield from custom_rules(inner)


def asks_for_zeros(jaxpr: Jaxpr) -> bool:
    """Return whether a derivative rule in a jaxpr is told which of its inputs depend on what is differentiated."""
    inner = (sub for equation in jaxpr.eqns for sub in core.jaxprs_in_params(equation.params))
    return any(equation.params.get("symbolic_zeros") for equation in jaxpr.eqns) or any(map(asks_for_zeros, inner))


def nonlinear_rules(jaxpr: Jaxpr, equations: Sequence[Any] | None = None) -> list[str]:
    """Return the names of the functions whose custom backward pass is seen not to be linear in the cotangent."""
    found = []
    for outer, equation in custom_rules(jaxpr, equations):
        places, function = function_of(outer, equation, {})
        ins, outs = [struct(equation.invars[i].aval) for i in places], [struct(v.aval) for v in equation.outvars]
        try:
            backward = jax.make_jaxpr(lambda outs, ins, f=function: jax.vjp(f, *ins)[1](list(outs)))(outs, ins).jaxpr
        except TypeError:  # of an output without gradients
            continue
        if _bends(backward, [True] * len(outs) + [False] * len(ins))[0]:
            found.append(equation.params["call_jaxpr"].jaxpr.debug_info.func_name)
    return found


def _bends(jaxpr: Jaxpr, inputs: Sequence[bool]) -> tuple[bool, list[bool]]:
    """Return (whether something is not linear in the marked inputs, the marks of the outputs)."""
    marked = {v for v, mark in zip(jaxpr.invars, inputs, strict=True) if mark}
    for equation in jaxpr.eqns:
        marks = [not is_literal(v) and v in marked for v in equation.invars]
        if not any(marks):
            continue
        name, outs = equation.primitive.name, [True] * len(equation.outvars)
        products = name in ("mul", "dot_general", "conv_general_dilated") and all(marks)
        if name in NONLINEAR or products or (name == "div" and marks[1]) or (name == "select_n" and marks[0]):
            return True, []
        if name in INLINED or name == "custom_jvp_call":
            inner = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
            bends, outs = _bends(inner.jaxpr, marks)
            if bends:
                return True, []
        marked |= {v for v, mark in zip(equation.outvars, outs, strict=True) if mark}
    return False, [not is_literal(v) and v in marked for v in jaxpr.outvars]


def num_bytes(jaxpr: Jaxpr) -> int:
    """Return the bytes of all that a jaxpr computes, which a backward pass keeps at most."""
    avals: list[Any] = [v.aval for equation in jaxpr.eqns for v in equation.outvars]
    own = sum(aval.size * aval.dtype.itemsize for aval in avals if hasattr(aval, "dtype"))
    inner = (
        equation.params.get("length", 1) * num_bytes(sub)
        for equation in jaxpr.eqns
        for sub in core.jaxprs_in_params(equation.params)
    )
    return own + sum(inner)
