"""Evaluate the jaxpr of the loss of one example on a batch: the dynamic half of `ghost`."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gdjax.ghost import _flow as ghost_flow
from gdjax.ghost import _rules as ghost_rules
from gdjax.ghost._flow import BATCHED, FIXED, Chain, Kind
from gdjax.ghost._rules import Backward, Measure


@partial(jax.tree_util.register_dataclass, data_fields=["value", "hook"], meta_fields=["ruled"])
@dataclasses.dataclass(frozen=True)
class Weight:
    """A value that depends on parameters alone.

    Attributes:
        value: the value, without a batch axis.
        hook: a zero whose cotangent is what is wanted: the measure of the one parameter that this value is, where it is
            `ruled`; else its twin [B, *value.shape], whose cotangent is the gradient of every example.
        ruled: whether a rule will measure it.
    """

    value: jax.Array
    hook: jax.Array
    ruled: bool


@partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Batched:
    """A value for each example, [B, ...]."""

    value: jax.Array


Value = Any
"""A Weight, a Batched value, or an array: a fixed value."""


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates jaxprs on values of the three kinds, for batches of B examples and one measure."""

    batch_size: int
    measure: Measure

    def run(self, jaxpr, consts: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
        """Return the outputs of a jaxpr."""
        env: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        for equation in jaxpr.eqns:
            ins = [ghost_flow.read(env, v) for v in equation.invars]
            env.update(zip(equation.outvars, self.equation(jaxpr, equation, ins), strict=True))
        return [ghost_flow.read(env, v) for v in jaxpr.outvars]

    def equation(self, jaxpr, equation, ins: list[Value]) -> list[Value]:
        """Return the outputs of one equation; the same case distinction as `ghost_flow`."""
        name = equation.primitive.name
        weights, any_batched = [x for x in ins if isinstance(x, Weight)], any(isinstance(x, Batched) for x in ins)
        if weights and name in ghost_flow.INLINED:
            closed = equation.params["jaxpr"]
            return self.run(closed.jaxpr, closed.consts, ins)
        if weights and any_batched and name in ghost_flow.REMAT:
            again = partial(self.run, equation.params["jaxpr"], [])
            again = jax.checkpoint(again, policy=equation.params["policy"], prevent_cse=equation.params["prevent_cse"])
            return again(ins)
        if weights and any_batched and name == "scan":
            return self.scan(equation, ins)
        operands, function = ghost_flow.function_of(jaxpr, equation, ins)
        if not weights:
            return self.plain(function, operands)
        if not any_batched:
            return self.chain(equation, function, operands)
        rule = None
        if len(weights) == 1 and weights[0].ruled:
            rule = ghost_rules.find(equation, next(i for i, x in enumerate(ins) if isinstance(x, Weight)))
        return self.use(function, operands, rule)

    def plain(self, function: Callable, operands: list[Value]) -> list[Value]:
        """Apply a function to fixed and batched values."""
        axes = [0 if isinstance(x, Batched) else None for x in operands]
        if 0 not in axes:
            return function(*operands)
        values = [x.value if isinstance(x, Batched) else x for x in operands]
        return [Batched(out) for out in jax.vmap(function, axes)(*values)]

    def chain(self, equation, function: Callable, operands: list[Value]) -> list[Value]:
        """Apply a function to weights and fixed values; a twin follows to first order."""
        weights = [x for x in operands if isinstance(x, Weight)]

        def of_weights(*values):
            remaining = iter(values)
            return function(*(next(remaining) if isinstance(x, Weight) else x for x in operands))

        values = [weight.value for weight in weights]
        if weights[0].ruled:  # the plan has made sure that this is an isometry of one weight
            [weight] = weights
            keeps_order = equation.primitive.name in ("convert_element_type", "copy", "copy_p")
            hook = weight.hook
            if self.measure.like_weight and not keeps_order:
                [hook] = of_weights(hook)
            return [Weight(out, hook, ruled=True) for out in of_weights(weight.value)]
        values = tuple(lax.stop_gradient(value) for value in values)
        outs = of_weights(*values)

        def first_order(*twins):
            tangents = jax.jvp(of_weights, values, twins)[1]
            return [t for t, out in zip(tangents, outs, strict=True) if ghost_flow.differentiable(out)]

        tangents = iter(jax.vmap(first_order)(*(weight.hook for weight in weights)))
        return [Weight(out, next(tangents), ruled=False) if ghost_flow.differentiable(out) else out for out in outs]

    def use(self, function: Callable, operands: list[Value], rule: Backward | None) -> list[Value]:
        """Apply a function where weights and batched values meet, with a backward pass that also measures."""
        kinds = [type(x) if isinstance(x, Weight | Batched) else None for x in operands]
        weights = [x for x in operands if isinstance(x, Weight)]
        dtypes = [weight.hook.dtype for weight in weights]  # the functions below outlive this trace: no tracer in them

        def one(values, batched, fixed):
            sources = {Weight: iter(values), Batched: iter(batched), None: iter(fixed)}
            return function(*(next(sources[kind]) for kind in kinds))

        def whole(values, batched, fixed):
            return jax.vmap(one, (None, 0, None), axis_size=self.batch_size)(values, batched, fixed)

        def forward(values, hooks, batched, fixed):
            return whole(values, batched, fixed), (values, batched, fixed)

        def backward(residuals, cotangents):
            values, batched, fixed = residuals
            if rule is not None:
                total, measured = rule(self.measure, values[0], batched[0], cotangents[0])
                plain = _pull(lambda both: whole(both[0], both[1], fixed), (values, batched), cotangents)
                value_grads = plain[0] if total is None else [total.astype(values[0].dtype)]
                return value_grads, [measured.astype(dtypes[0])], plain[1], [None for _ in fixed]

            def pull_one(batched, cotangents):
                return _pull(lambda both: one(both[0], both[1], fixed), (values, batched), cotangents)

            pulled = jax.vmap(pull_one, axis_size=self.batch_size)
            twins, batched_grads = pulled(batched, cotangents)
            return [None for _ in values], twins, batched_grads, [None for _ in fixed]

        measured_use = jax.custom_vjp(lambda values, hooks, batched, fixed: whole(values, batched, fixed))
        measured_use.defvjp(forward, backward)
        outs = measured_use(
            [weight.value for weight in weights],
            [weight.hook for weight in weights],
            [x.value for x in operands if isinstance(x, Batched)],
            [x for x in operands if not isinstance(x, Weight | Batched)],
        )
        return [Batched(out) for out in outs]

    def batched(self, value: Value) -> jax.Array:
        """Return a value of any kind as an array with a batch axis."""
        if isinstance(value, Batched):
            return value.value
        if isinstance(value, Weight):
            [out] = self.use(lambda x: [x], [value], None)
            return out.value
        return jnp.broadcast_to(value, (self.batch_size, *jnp.shape(value)))

    def scan(self, equation, ins: list[Value]) -> list[Value]:
        """Scan a body in which weights and batched values meet; stacked values keep their batch axis in front."""
        parameters = equation.params
        first, num_carry = ghost_flow.scan_sizes(equation)
        last = first + num_carry
        _, outer = ghost_flow.scan_kinds(equation, [_kind(x) for x in ins], [])
        carry_kinds, y_kinds = outer[: last - first], outer[last - first :]
        body = parameters["jaxpr"]

        def array(value: Value, kind: Kind):
            return self.batched(value) if kind == BATCHED else value

        def unstack(x: Value):
            if isinstance(x, Batched):
                return Batched(jnp.moveaxis(x.value, 1, 0))
            if isinstance(x, Weight) and not x.ruled:
                return Weight(x.value, jnp.moveaxis(x.hook, 1, 0), ruled=False)
            return x

        def iteration(carry, xs):
            slices = [
                Weight(x, whole.hook, ruled=True) if _is_whole(whole, self.measure) else x
                for x, whole in zip(xs, ins[last:], strict=True)
            ]
            states = [Batched(x) if kind == BATCHED else x for x, kind in zip(carry, carry_kinds, strict=True)]
            outs = self.run(body.jaxpr, body.consts, [*ins[:first], *states, *slices])
            arrays = [array(x, kind) for x, kind in zip(outs, outer, strict=True)]
            return arrays[: last - first], arrays[last - first :]

        xs = [x.value if _is_whole(x, self.measure) else unstack(x) for x in ins[last:]]
        initial = [array(x, kind) for x, kind in zip(ins[first:last], carry_kinds, strict=True)]
        carry, ys = lax.scan(iteration, initial, xs, parameters["length"], parameters["reverse"], parameters["unroll"])
        ys = [jnp.moveaxis(y, 0, 1) if kind == BATCHED else y for y, kind in zip(ys, y_kinds, strict=True)]
        return [Batched(x) if kind == BATCHED else x for x, kind in zip([*carry, *ys], outer, strict=True)]


def _is_whole(x: Value, measure: Measure) -> bool:
    """Whether the hook of a scanned weight is one for all its slices: their measures add up, as they are disjoint."""
    return isinstance(x, Weight) and x.ruled and not measure.like_weight


def _kind(value: Value) -> Kind:
    if isinstance(value, Weight):
        return Chain(frozenset())
    return BATCHED if isinstance(value, Batched) else FIXED


def _pull(function: Callable, inputs: Any, cotangents: list[jax.Array]) -> Any:
    """Return the gradients of <function(inputs), cotangents>, None where an input has none."""
    leaves, structure = jax.tree.flatten(inputs)
    wanted = [ghost_flow.differentiable(leaf) for leaf in leaves]

    def of_wanted(values):
        remaining = iter(values)
        merged = [next(remaining) if want else leaf for leaf, want in zip(leaves, wanted, strict=True)]
        outs = function(jax.tree.unflatten(structure, merged))
        return [out for out in outs if ghost_flow.differentiable(out)]

    _, pull = jax.vjp(of_wanted, [leaf for leaf, want in zip(leaves, wanted, strict=True) if want])
    [grads] = pull([cotangent for cotangent in cotangents if cotangent.dtype != jax.dtypes.float0])
    remaining = iter(grads)
    return jax.tree.unflatten(structure, [next(remaining) if want else None for want in wanted])
