"""Norms of the gradient of every example, for any JAX function, from one backward pass.

`vmap(grad)` forms the gradient of every example: B times the parameters, written and read again. Here the loss of one
example is traced and run on the batch so that, where a parameter meets an activation, both the activation and the
cotangent of the result come back. From these the gradients of the examples are measured without being kept.

What depends on parameters alone is computed once for the batch. A *site* is an equation where such a value meets an
example. A parameter whose sites all have a rule (`_rules` holds them, `add_rule` adds one) is measured from the
factors of its gradients; several sites, as of a shared layer, a tied embedding or a loop, stand behind each other, as
if they were positions. Of any other parameter the gradients are formed for a chunk of examples at a time and pulled
back through whatever was computed from it: exact, at the price of forming them. `_flow` plans this from the traced
program alone, `_evaluate` runs the plan, `_leaves` decides for every parameter, `_measure` and `_factors` do it, and
`_cost` chooses among ways.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from gdjax import problem
from gdjax._trees import compiled_alone, made_varying, varying, wide
from gdjax.ghost import _evaluate as ghost_eval
from gdjax.ghost import _flow as ghost_flow
from gdjax.ghost import _jaxpr as ghost_jaxpr
from gdjax.ghost import _leaves as ghost_leaves
from gdjax.ghost import _measure as ghost_measure
from gdjax.ghost import _rules as ghost_rules
from gdjax.ghost._factors import GRAM, MOMENTS, NORMS, Measure
from gdjax.ghost._plan import Plan
from gdjax.ghost._rules import Factors as Factors
from gdjax.problem import Batch, Loss, Params


class SquaredNorms(NamedTuple):
    """What `sq_norms` says of a batch.

    Attributes:
        losses: of the examples, [B].
        grad: their mean gradient, shaped like the trainable parameters.
        sq_norms: squared norms of the gradients of the examples: shaped like the gradient, each leaf [B].
    """

    losses: jax.Array
    grad: Params
    sq_norms: Params

    @property
    def total(self) -> jax.Array:
        """Squared norms over all parameters, [B]."""
        # Leaves may differ in their dtypes.
        return sum((jnp.asarray(leaf, float) for leaf in jax.tree.leaves(self.sq_norms)), jnp.zeros(()))

    @property
    def num_nonfinite(self) -> jax.Array:
        """The number of examples whose loss or gradient is NaN or infinite: those that `drop_nonfinite` drops."""
        return jnp.sum(~(jnp.isfinite(self.losses) & jnp.isfinite(self.total)))


def sq_norms(loss: Loss, *, drop_nonfinite: bool = False) -> Callable[[Params, Batch], SquaredNorms]:
    """Return `(params, batch) -> SquaredNorms(losses [B], mean gradient, squared norms)`.

    The squared norms are the squared Euclidean norms of the gradient of the loss of one example (not of loss / B), in
    float32 at least. They are exact up to rounding: what no rule covers is formed, a chunk of examples at a time, see
    `coverage`. Where a norm is small because positions cancel, it is right to a thousandth.

    Args:
        loss: (params, example) -> scalar.
        drop_nonfinite: take the mean gradient over the examples whose loss and gradient are finite. They are looked at
            twice where one is not.

    Raises:
        ValueError: as `gradients.mean`; and where the result is differentiated.
    """
    measured = _measured(loss, NORMS)

    @compiled_alone
    def norms(params: Params, batch: Batch) -> SquaredNorms:
        found = SquaredNorms(*measured(params, batch))
        if not drop_nonfinite:
            return found
        is_good = jnp.isfinite(found.losses) & jnp.isfinite(found.total)
        train, frozen = problem.trainable(params)

        def again():
            # A bad example is replaced by a good one of weight 0: an infinite gradient times 0 would be NaN.
            rows = jnp.where(is_good, jnp.arange(len(is_good)), jnp.argmax(is_good))
            good = jax.tree.map(lambda x: jnp.asarray(x)[rows], batch)

            def mean(train):
                losses = wide(jax.vmap(loss, (None, 0))(problem.merge(train, frozen), good))
                return jnp.sum(losses, where=is_good) / jnp.maximum(is_good.sum(), 1).astype(losses.dtype)

            return jax.tree.map(lambda g: jnp.where(is_good.any(), g, 0).astype(g.dtype), jax.grad(mean)(train))

        return found._replace(grad=jax.lax.cond(is_good.all(), lambda: found.grad, again))

    return norms


def norms(loss: Loss, *, smallest: ArrayLike = 0.0) -> Callable[[Params, Batch], tuple[SquaredNorms, jax.Array]]:
    """Return `(params, batch) -> (SquaredNorms, norms [B] over all parameters)`, also of norms without a square.

    In float32, norms beyond 2^64 or, of n parameters, below sqrt(n) 2^-52 have squares that overflow or vanish. A batch
    with such an example is measured once more, their losses times 2^-64 or 2^64: gradients are linear in the cotangent.

    Args:
        loss: (params, example) -> scalar.
        smallest: norms below this need not be told from zero. A batch with norms of zero is then measured once, unless
            `smallest` is below sqrt(n) 2^-52.
    """

    def scaled(params, both):
        example, scale = both
        value = wide(loss(params, example))
        return value * scale.astype(value.dtype)

    @compiled_alone
    def both(params: Params, batch: Batch) -> tuple[SquaredNorms, jax.Array]:
        found = sq_norms(loss)(params, batch)
        norms = jnp.sqrt(found.total)
        least = sum(leaf.size for leaf in jax.tree.leaves(found.grad)) ** 0.5 * 2.0**-52
        larger = jnp.where((norms < least) & (jnp.asarray(smallest, float) < least), 2.0**64, 1.0)
        scales = jnp.where(jnp.isfinite(norms), larger, 2.0**-64).astype(norms.dtype)

        def again(state):
            scales, norms = state
            total = sq_norms(scaled)(params, (batch, scales)).total
            return jnp.ones_like(scales), jnp.where(scales == 1, norms, jnp.sqrt(total) / scales)

        # Under vmap a loop of one iteration is skipped where no element needs it; a branch would always be computed.
        return found, lax.while_loop(lambda state: jnp.any(state[0] != 1), again, (scales, norms))[1]

    return both


def second_moments(loss: Loss) -> Callable[[Params, Batch], tuple[jax.Array, Params, Params]]:
    """Return `(params, batch) -> (losses [B], mean gradient, mean over examples of the squared gradient, elementwise)`.

    The variance of every gradient component is the third minus the square of the second. Dense layers that see one
    position per example take no memory beyond the parameters' own (Dangel et al. 2020, arXiv 1912.10985).
    """

    @compiled_alone
    def moments(params: Params, batch: Batch):
        losses, grad, sums = _measured(loss, MOMENTS)(params, batch)
        return losses, grad, jax.tree.map(lambda x: x / len(losses), sums)

    return moments


def gram(loss: Loss) -> Callable[[Params, Batch], tuple[jax.Array, Params, Params]]:
    """Return `(params, batch) -> (losses [B], mean gradient, Gram matrices)`, each leaf [B, B].

    Entry [i, j] of a leaf is the inner product of the gradients of examples i and j with respect to that leaf.
    """
    return compiled_alone(_measured(loss, GRAM))


def add_rule(primitive: str, rule: Callable[[Any, int], ghost_rules.Rule | None]) -> None:
    """Measure the uses of a parameter in a primitive, for instance one of your own, by a rule.

    >>> from jax.extend.core import Primitive
    >>> from jax.interpreters import ad, batching
    >>> double = Primitive("double_product")  # of w [I, O] and x [I]
    >>> implementation = lambda w, x: 2 * x @ w
    >>> _ = double.def_impl(implementation)
    >>> _ = double.def_abstract_eval(lambda w, x: jax.core.ShapedArray(w.shape[1:], x.dtype))
    >>> batching.primitive_batchers[double] = lambda args, axes: (jax.vmap(implementation, axes)(*args), 0)
    >>> ad.primitive_jvps[double] = lambda primals, tangents: jax.jvp(implementation, primals, tangents)
    >>> def rule(equation, position):
    ...     factors = lambda x, g: (2 * x[None, None], g[None, None])  # A [K, T, I] and G [K, T, O], where K = T = 1
    ...     return Factors(factors, equation.invars[0].aval.shape, axes=((), (0,), (1,))) if position == 0 else None
    >>> add_rule("double_product", rule)
    >>> found = sq_norms(lambda w, x: double.bind(w, x).sum())(jnp.ones((2, 3)), jnp.asarray([[1.0, 0.0], [3.0, 4.0]]))
    >>> found.sq_norms
    Array([ 12., 300.], dtype=float32)

    Args:
        primitive: its name.
        rule: (equation, which operand the parameter is) -> `Factors` or `Entries`, or None where the rule cannot take
            this equation. It sees equations whose operands and results are real.
    """
    ghost_rules.RULES[primitive] = rule


def planned(loss: Loss, train: Params, frozen: Params, example: Any) -> Plan:
    """Trace and plan the loss of one example as a function of the list of trainable leaves."""

    def flat_loss(leaves, example):
        value = loss(problem.merge(jax.tree.unflatten(jax.tree.structure(train), leaves), frozen), example)
        problem.check_loss(value)
        return value

    return ghost_flow.plan(flat_loss, jax.tree.leaves(train), example)


def _measured(loss: Loss, measure: Measure):
    def measured(params: Params, batch: Batch):
        train, frozen = problem.trainable(params)
        batch = jax.tree.map(jnp.asarray, batch)
        size = problem.num_examples(batch, "batch")
        train = jax.tree.map(jnp.asarray, train)
        axes = varying(train, batch)
        if missing := tuple(sorted({axis for leaf in jax.tree.leaves(train) for axis in axes - varying(leaf)})):
            raise ValueError(
                f"the batch differs between devices along {missing} and the params do not, so that gradients would be "
                f"sums over devices: give jax.lax.pcast(params, {missing}, to='varying')"
            )
        batch = made_varying(batch, axes)
        seen = []  # the example that vmap sees, whose type says how it is sharded
        jax.eval_shape(jax.vmap(lambda example: seen.append(jax.tree.map(jax.typeof, example))), batch)
        [example] = seen
        leaves, structure = jax.tree.flatten(train)
        plan = planned(loss, train, frozen, example)
        uses = ghost_leaves.uses_of(plan, len(leaves))
        hows = [ghost_leaves.leaf_plan(plan, *of, measure, size) for of in zip(leaves, uses, strict=True)]
        env = ghost_eval.run_steps(plan.steps, ghost_eval.constants(plan) | dict(enumerate(leaves)))
        losses, by_backward, taps, run = _backward(plan, hows, env, batch, size, axes)
        sums, measures = [jnp.zeros(())] * len(leaves), [jnp.zeros(())] * len(leaves)
        formed: dict[Any, list[int]] = {}
        for leaf, how in enumerate(hows):
            if how.tap is not None:
                sums[leaf], measures[leaf] = by_backward[leaf], taps[how.tap]
            elif not how.uses:
                like = jax.ShapeDtypeStruct((size, *leaves[leaf].shape), leaves[leaf].dtype)
                sums[leaf], measures[leaf] = (
                    jnp.zeros(x.shape, x.dtype) for x in (leaves[leaf], jax.eval_shape(measure.of_gradients, like))
                )
            elif how.groups is None:
                formed.setdefault(tuple((use.site, use.place) for use in how.uses), []).append(leaf)
            else:
                given, measures[leaf] = run.measure_factors(leaf, how, measure)
                sums[leaf] = by_backward[leaf] if given is None else given
        for members in formed.values():
            found = run.measure_formed(members, hows[members[0]], measure)
            for leaf, total, measured in zip(members, *found, strict=True):
                sums[leaf], measures[leaf] = by_backward[leaf] if total is None else total, measured
        grads = [(total / size).astype(leaf.dtype) for total, leaf in zip(sums, leaves, strict=True)]
        measures = [m.astype(wide(leaf).dtype) for m, leaf in zip(measures, leaves, strict=True)]
        return _final((losses, *(jax.tree.unflatten(structure, x) for x in (grads, measures))))

    return measured


def _backward(plan, hows, env, batch, size, axes):
    """Return (losses [B], sums of gradients by leaf, squared norms by tapped site, what else the sites left)."""
    # A rule that asks whether a weight is differentiated is to be told so, even if what comes of it is not looked at.
    is_asked = ghost_jaxpr.asks_for_zeros(plan.jaxpr)
    ones = {leaf: env[leaf] for leaf, how in enumerate(hows) if is_asked or not how.is_given}
    tapped = {how.tap: leaf for leaf, how in enumerate(hows) if how.tap is not None}
    measures = {site: ghost_measure.tap(plan, hows[leaf]) for site, leaf in tapped.items()}

    def zeros(example):
        """Return zeros for one example; vmap adds the axis of the batch, sharded like that of its arrays."""
        hooks = {
            number: [
                lax.full((*site.lengths, *out.shape), 0, out.dtype)
                for out in site.out
                if ghost_jaxpr.differentiable(out)
            ]
            for number, site in enumerate(plan.sites)
            if number not in tapped
        }
        return hooks, {site: jnp.zeros((), wide(env[leaf]).dtype) for site, leaf in tapped.items()}

    hooks, taps = made_varying(jax.vmap(zeros)(batch), axes)
    steps = [step for step in plan.steps if not step.leaves.isdisjoint(ones)]

    def losses_of(leaves, hooks, taps):
        top = ghost_eval.run_steps(steps, env | leaves)

        def one(example, hooks, taps):
            inner = top | dict(zip(plan.example, jax.tree.leaves(example), strict=True))
            both = {site: (measures[site], tap) for site, tap in taps.items()}
            records = ghost_eval.run(plan, plan.actions, inner, hooks, both)
            return inner[plan.loss], records

        return jax.vmap(one, axis_size=size)(batch, hooks, taps)

    losses, backward, records = jax.vjp(losses_of, ones, hooks, taps, has_aux=True)
    sums, cotangents, norms = backward(jnp.ones_like(losses))
    return losses, sums, norms, ghost_measure.Run(plan, env, records, cotangents)


@jax.custom_jvp
def _final(outputs):
    return outputs


@_final.defjvp
def _refuse(primals, tangents):
    # Twins are constants to an outer derivative, which would silently come out wrong.
    raise ValueError("the results of ghost cannot be differentiated: use jax.vmap(jax.grad(loss), (None, 0)) for that")
