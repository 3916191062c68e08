"""Programs written anew: the same jaxpr, some of its operations computed otherwise."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.extend import core

LOOPS = ("scan", "while")
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr"}
Rules = Mapping[str, Callable[..., Any]]
"""How an operation of that name is computed, given its operands and its parameters by name: to an array, or to a list
of them where it has several results."""


def equations(jaxpr: core.Jaxpr) -> Iterator[Any]:
    """Yield the equations of a jaxpr and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def _struct(aval) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def rewritten(closed: core.ClosedJaxpr, rules: Rules) -> core.ClosedJaxpr:
    """Return a jaxpr that computes the same by the rules."""
    return jax.make_jaxpr(lambda *args: evaluated(closed.jaxpr, closed.consts, args, rules))(
        *map(_struct, closed.in_avals)
    )


def evaluated(jaxpr: core.Jaxpr, consts, args, rules: Rules) -> list[Any]:
    """Compute what a jaxpr does by the rules, in all that it loops over, chooses from and calls."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(variable):
        return variable.val if isinstance(variable, core.Literal) else env[variable]

    for equation in jaxpr.eqns:
        ins = [read(v) for v in equation.invars]
        if equation.primitive.name in CALLS:
            inner = equation.params[CALLS[equation.primitive.name]]
            outs = evaluated(inner.jaxpr, inner.consts, ins, rules)
        elif equation.primitive.name in rules:
            outs = rules[equation.primitive.name](*ins, **equation.params)
            outs = outs if equation.primitive.multiple_results else [outs]
        else:
            outs = _bound(jaxpr, equation, ins, rules)
        env.update(zip(equation.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _bound(jaxpr: core.Jaxpr, equation, ins, rules: Rules) -> list[Any]:
    """Apply an equation, what it loops over or chooses from being rewritten too."""
    params = dict(equation.params)
    if equation.primitive.name in (*LOOPS, "cond"):
        for name, value in params.items():
            if isinstance(value, core.ClosedJaxpr):
                params[name] = rewritten(value, rules)
            elif name == "branches":
                params[name] = tuple(rewritten(branch, rules) for branch in value)
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
