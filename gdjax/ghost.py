"""Norms of the gradient of every example, for any JAX function, from one backward pass.

`vmap(grad)` forms the gradient of every example: B times the parameters, written and read again. Here the loss of one
example is traced and evaluated on the whole batch, and where a parameter meets an activation, the backward pass also
returns what is wanted of each example's gradient.

Values are of three kinds. *Fixed* values depend on neither parameters nor example. A `Weight` depends on parameters
alone and is computed once for the batch. A `Batched` value depends on the example and has axis 0 of length B. A *use*
is an equation where a weight meets a batched value. A parameter with one use, reached by reshapes and transposes
alone, is measured there by a rule: `ghost_rules` holds them, and is where a new one goes. Any other parameter has a
*twin*, a zero of shape [B, *w.shape] that follows it to first order through every equation, so that the gradient with
respect to the twin is the gradient of every example, whatever happens on the way: exact, at the price of holding it.
`ghost_flow` decides which, from the traced program alone; `ghost_eval` runs it; `ghost_cost` chooses among ways.

>>> import jax.numpy as jnp
>>> def loss(params, example):
...     x, y = example
...     return (x @ params["weight"] + params["bias"] - y) ** 2
>>> params = {"weight": jnp.asarray([1.0, 2.0]), "bias": jnp.asarray(0.5)}
>>> batch = jnp.asarray([[1.0, 0.0], [3.0, 4.0]]), jnp.asarray([1.0, 11.0])
>>> losses, grad, norms = sq_norms(loss)(params, batch)
>>> losses, norms["weight"], norms["bias"]
(Array([0.25, 0.25], dtype=float32), Array([ 1., 25.], dtype=float32), Array([1., 1.], dtype=float32))
>>> print(coverage(loss, params, (batch[0][0], batch[1][0])))
parameter   shape  method        uses
['bias']    []     materialised  add: no rule for add
['weight']  [2]    dot_general   dot_general
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdjax import ghost_eval, ghost_flow, ghost_leaves, ghost_rules, problem
from gdjax.ghost_rules import GRAM, MOMENTS, NORMS, Measure, wide
from gdjax.problem import Batch, Example, Loss, Params


def sq_norms(loss: Loss) -> Callable[[Params, Batch], tuple[jax.Array, Params, Params]]:
    """Return `(params, batch) -> (losses [B], mean gradient, squared norms)`.

    The squared norms are shaped like the trainable parameters, each leaf [B]: the squared Euclidean norm of the
    gradient of the loss of one example (not of loss / B) with respect to that leaf, in float32 at least. They are exact
    up to rounding: what no rule covers is materialised, see `coverage`.

    Raises:
        ValueError: as `gradients.mean`; and where the result is differentiated.
    """
    return _measured(loss, NORMS)


def second_moments(loss: Loss) -> Callable[[Params, Batch], tuple[jax.Array, Params, Params]]:
    """Return `(params, batch) -> (losses [B], mean gradient, mean over examples of the squared gradient, elementwise)`.

    The variance of every gradient component is the third minus the square of the second. Dense layers that see one
    position per example take no memory beyond the parameters' own (Dangel et al. 2020, arXiv 1912.10985).
    """

    def moments(params: Params, batch: Batch):
        losses, grad, sums = _measured(loss, MOMENTS)(params, batch)
        return losses, grad, jax.tree.map(lambda x: x / len(losses), sums)

    return moments


def gram(loss: Loss) -> Callable[[Params, Batch], tuple[jax.Array, Params, Params]]:
    """Return `(params, batch) -> (losses [B], mean gradient, Gram matrices)`, each leaf [B, B].

    Entry [i, j] of a leaf is the inner product of the gradients of examples i and j with respect to that leaf.
    """
    return _measured(loss, GRAM)


class SquaredNorms(NamedTuple):
    losses: Any
    grad: Any
    sq_norms: Any


class Coverage(NamedTuple):
    """How every parameter leaf is measured; printed as a table.

    Attributes:
        rows: (path, shape, method, uses) of every trainable leaf; method is the name of a rule, 'materialised', or
            'unused', and uses says where the leaf is used and why no rule applies.
    """

    rows: list[tuple[str, tuple[int, ...], str, str]]

    def __str__(self) -> str:
        cells = [("parameter", "shape", "method", "uses")]
        cells += [(path, str(list(shape)), method, uses) for path, shape, method, uses in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
        return "\n".join(line.rstrip() for line in lines)


def coverage(loss: Loss, params: Params, example: Example) -> Coverage:
    """Return which rule takes every use of every parameter leaf, and which leaves are materialised and why."""
    train, frozen = problem.trainable(params)
    _, plans = _plan(loss, train, frozen, jax.tree.map(ghost_flow.shape_of, example))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(train)]
    leaves = jax.tree.leaves(train)
    triples = zip(paths, leaves, plans, strict=True)
    return Coverage([(path, jnp.shape(leaf), plan.method, plan.uses) for path, leaf, plan in triples])


def _plan(loss: Loss, train: Params, frozen: Params, example: Any) -> ghost_flow.Plan:
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
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, train))
        plan = _plan(loss, train, frozen, example)
        uses = ghost_leaves.uses_of(plan, len(leaves))
        hows = [ghost_leaves.leaf_plan(plan, *of, measure, size) for of in zip(leaves, uses, strict=True)]
        env = ghost_eval.run_steps(plan.steps, ghost_eval.constants(plan) | dict(enumerate(leaves)))
        losses, by_backward, taps, run = _backward(plan, hows, env, batch, size)
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
            found = run.measure_formed(members, hows[members[0]].uses, measure)
            for leaf, total, measured in zip(members, *found, strict=True):
                sums[leaf], measures[leaf] = total, measured
        grads = [(total / size).astype(leaf.dtype) for total, leaf in zip(sums, leaves, strict=True)]
        measures = [m.astype(wide(leaf).dtype) for m, leaf in zip(measures, leaves, strict=True)]
        return _final(SquaredNorms(losses, *(jax.tree.unflatten(structure, x) for x in (grads, measures))))

    return measured


def _backward(plan, hows, env, batch, size):
    """Return (losses [B], sums of gradients by leaf, squared norms by tapped site, what else the sites left)."""
    ones = {leaf: env[leaf] for leaf, how in enumerate(hows) if not how.is_given}
    tapped = {how.tap: leaf for leaf, how in enumerate(hows) if how.tap is not None}
    measures = {site: ghost_leaves.tap(plan, hows[leaf]) for site, leaf in tapped.items()}
    hooks = {
        number: [
            jnp.zeros((size, *site.lengths, *out.shape), out.dtype) for out in site.out if ghost_flow.differentiable(out)
        ]
        for number, site in enumerate(plan.sites)
        if number not in tapped
    }
    taps = {site: jnp.zeros(size, wide(env[leaf]).dtype) for site, leaf in tapped.items()}
    steps = [step for step in plan.steps if not step.leaves.isdisjoint(ones)]

    def total(leaves, hooks, taps):
        top = ghost_eval.run_steps(steps, env | leaves)

        def one(example, hooks, taps):
            inner = top | dict(zip(plan.example, jax.tree.leaves(example), strict=True))
            both = {site: (measures[site], tap) for site, tap in taps.items()}
            records = ghost_eval.run(plan, plan.actions, inner, hooks, both)
            return inner[plan.loss], records

        losses, records = jax.vmap(one, axis_size=size)(batch, hooks, taps)
        return losses.sum(), (losses, records)

    (sums, cotangents, norms), (losses, records) = jax.grad(total, (0, 1, 2), has_aux=True)(ones, hooks, taps)
    return losses, sums, norms, ghost_leaves.Run(plan, env, records, cotangents)


@jax.custom_jvp
def _final(outputs):
    return outputs


@_final.defjvp
def _refuse(primals, tangents):
    # Twins are constants to an outer derivative, which would silently come out wrong.
    raise ValueError("the results of ghost cannot be differentiated: use jax.vmap(jax.grad(loss), (None, 0)) for that")
