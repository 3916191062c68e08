"""Execute the actions of a plan for one example, so that the cotangents of all sites come back: see `_flow`.

What runs here runs under `jax.vmap`, so that nothing needs to know what depends on the example. At every site the
outputs pass through a *hook*, a zero that the gradient is taken of as well: what comes back for it is their cotangent.
In a loop or rematerialised block, where cotangents had to be stacked, it may be the squared norm itself, a *tap*.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from gdjax._trees import made_varying, varying
from gdjax.ghost._jaxpr import differentiable
from gdjax.ghost._plan import Action, Choice, Plan, Scan, Step

Env = dict[int, jax.Array]
"""Values by slot."""
Hooks = dict[int, Any]
"""By site: a zero for each output, with the lengths of the loops around in front."""
Tap = tuple[Callable, jax.Array]
"""((x [B, ...], g [B, ...]) -> squared norms [B], a scalar zero)."""


def constants(plan: Plan) -> Env:
    """Return arrays for the constants, so that custom derivative rules see what they expect."""
    return {slot: jnp.asarray(value) for slot, value in plan.constants.items()}


def run_steps(steps: list[Step], env: Env) -> Env:
    """Return `env` with the values that depend on neither the example nor a loop."""
    env = dict(env)
    for step in steps:
        env.update(zip(step.outs, step.function(*(env[i] for i in step.ins)), strict=True))
    return env


def run(plan: Plan, actions: list[Action], env: Env, hooks: Hooks, taps: dict[int, Tap]) -> dict[int, list[jax.Array]]:
    """Execute actions, which add their results to `env`; return by site the operands to be recorded."""
    records = {}
    for action in actions:
        records.update(ACTIONS[action.name](plan, action, env, hooks, taps) or {})
    return records


def _plain(plan, action, env, hooks, taps):
    env.update(zip(action.outs, action.function(*(env[i] for i in action.ins)), strict=True))


def _site(plan, action, env, hooks, taps):
    outs = action.function(*(env[i] for i in action.ins))
    site = plan.sites[action.inner]
    operands = [env[slot] for i, slot in enumerate(action.ins) if i not in site.weights]
    if action.inner in taps:
        measure, hook = taps[action.inner]
        outs = [_tapped(measure, outs[0], operands, hook)]
    else:
        zeros = iter(hooks[action.inner])
        # A zero that a loop or a rematerialised block reads would be kept and added; elsewhere XLA removes it.
        hook = _hooked if site.inside else _added
        outs = [hook(out, next(zeros)) if differentiable(out) else out for out in outs]
    env.update(zip(action.outs, outs, strict=True))
    return {} if action.inner in taps else {action.inner: operands}


_added = jax.jit(lax.add)


@custom_vmap
def _spread(out, hook):
    return out


@_spread.def_vmap
def _(size, batched, out, hook):
    return out if batched[0] else jnp.broadcast_to(out, (size, *out.shape)), True


_hooked = jax.custom_vjp(_spread)
_hooked.defvjp(lambda out, hook: (_spread(out, hook), None), lambda _, g: (g, g))


def _tapped(measure, out, operands, hook):
    @custom_vmap
    def measured(operands, g):
        return measure(*jax.tree.map(lambda x: x[None], (operands, g)))[0]

    @measured.def_vmap
    def _(size, batched, operands, g):
        spread = jax.tree.map(
            lambda x, is_batched: x if is_batched else jnp.broadcast_to(x, (size, *x.shape)),
            (operands, g),
            tuple(batched),
        )
        return measure(*spread), True

    @jax.custom_vjp
    def tapped(out, operands, hook):
        return _spread(out, hook)

    def backward(operands, g):
        return g, None, measured(operands, g)

    tapped.defvjp(lambda out, operands, hook: (_spread(out, hook), operands), backward)
    return tapped(out, operands, hook)


def _remat(plan, action, env, hooks, taps):
    actions, sites = action.inner

    def block(values, hooks):
        inner = env | dict(zip(action.ins, values, strict=True))
        records = run(plan, actions, inner, hooks, taps)
        return [inner[i] for i in action.outs], records

    outs, records = jax.checkpoint(block, **action.function)(
        [env[i] for i in action.ins], {i: hooks[i] for i in sites if i in hooks}
    )
    env.update(zip(action.outs, outs, strict=True))
    return records


def _switch(plan, action, env, hooks, taps):
    which = jnp.clip(env[action.ins[0]], 0, len(action.inner) - 1)
    for out, *cases in zip(action.outs, *action.inner, strict=True):
        env[out] = lax.select_n(which, *(env[i] for i in cases))


def _choice(plan, action, env, hooks, taps):
    """One branch is taken; the sites of the others leave zeros, and get zeros back."""
    choice: Choice = action.inner

    def case(actions, returned):
        inner = dict(env)
        records = run(plan, actions, inner, hooks, taps)
        return [inner[i] for i in returned], records

    cases = [partial(case, *each) for each in choice.cases]
    none = {}
    for each in cases:
        none |= jax.eval_shape(lambda each=each: each()[1])
    zeros = jax.tree.map(lambda x: made_varying(jnp.zeros(x.shape, x.dtype), varying(x)), none)

    def full(each):
        outs, records = each()
        return outs, zeros | records

    outs, records = lax.switch(env[action.ins[0]], [partial(full, each) for each in cases])
    env.update(zip(action.outs, outs, strict=True))
    return records


def _scan(plan, action, env, hooks, taps):
    scan: Scan = action.inner
    values = [env[i] for i in action.ins]
    num_carry = action.function

    def iteration(carry, scanned):
        xs, sliced, inner_hooks = scanned
        inner = env | sliced | dict(zip(scan.carry, carry, strict=True)) | dict(zip(scan.xs, xs, strict=True))
        records = run(plan, scan.actions, inner, inner_hooks, taps)
        outs = [inner[i] for i in scan.outs]
        return outs[:num_carry], (outs[num_carry:], records)

    xs = values[num_carry:], {i: env[i] for i in scan.sliced}, {i: hooks[i] for i in scan.sites if i in hooks}
    carry, (ys, records) = lax.scan(iteration, values[:num_carry], xs, **scan.options)
    env.update(zip(action.outs, [*carry, *ys], strict=True))
    return records


ACTIONS = {"plain": _plain, "site": _site, "remat": _remat, "switch": _switch, "choice": _choice, "scan": _scan}
