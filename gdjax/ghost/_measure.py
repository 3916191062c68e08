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

from gdjax import problem
from gdjax._trees import wide
from gdjax.ghost import _flow as ghost_flow
from gdjax.ghost import _rules as ghost_rules
from gdjax.ghost._evaluate import Batched, Evaluator, Weight
from gdjax.ghost._rules import GRAM, MOMENTS, NORMS, Measure
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


def _plan(loss: Loss, train: Params, frozen: Params, example: Any):
    """Trace the loss of one example; return (its jaxpr, the plan of every trainable leaf)."""

    def flat_loss(leaves, example):
        value = loss(problem.merge(jax.tree.unflatten(jax.tree.structure(train), leaves), frozen), example)
        problem.check_loss(value)
        return value

    closed = jax.make_jaxpr(flat_loss)(jax.tree.leaves(train), example)
    return closed, ghost_flow.plan(closed.jaxpr, num_leaves=len(jax.tree.leaves(train)))


def _measured(loss: Loss, measure: Measure):
    def measured(params: Params, batch: Batch):
        train, frozen = problem.trainable(params)
        batch = jax.tree.map(jnp.asarray, batch)
        batch_size = problem.num_examples(batch, "batch")
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        closed, plans = _plan(loss, train, frozen, example)
        leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, train))
        ruled = [plan.method in ghost_rules.RULES for plan in plans]

        def total(values, hooks):
            evaluator = Evaluator(batch_size, measure)
            weights = [Weight(*parts) for parts in zip(values, hooks, ruled, strict=True)]
            examples = [Batched(x) for x in jax.tree.leaves(batch)]
            [out] = evaluator.run(closed.jaxpr, closed.consts, [*weights, *examples])
            losses = evaluator.batched(out)
            return losses.sum(), losses

        hooks = [
            _hook(leaf, batch_size, measure) if is_ruled else jnp.zeros((batch_size, *leaf.shape), leaf.dtype)
            for leaf, is_ruled in zip(leaves, ruled, strict=True)
        ]
        (sums, measures), losses = jax.grad(total, argnums=(0, 1), has_aux=True)(leaves, hooks)
        grads = [s if is_ruled else ghost_rules.summed(m) for s, m, is_ruled in zip(sums, measures, ruled, strict=True)]
        measures = [m if is_ruled else measure.of_gradients(m) for m, is_ruled in zip(measures, ruled, strict=True)]
        grads = [(grad / batch_size).astype(leaf.dtype) for grad, leaf in zip(grads, leaves, strict=True)]
        return _final((losses, jax.tree.unflatten(structure, grads), jax.tree.unflatten(structure, measures)))

    return measured


@jax.custom_jvp
def _final(outputs):
    return outputs


@_final.defjvp
def _refuse(primals, tangents):
    # Twins are constants to an outer derivative, which would silently come out wrong.
    raise ValueError("the results of ghost cannot be differentiated: use jax.vmap(jax.grad(loss), (None, 0)) for that")


def _hook(leaf: jax.Array, batch_size: int, measure: Measure) -> jax.Array:
    """Return the zero whose cotangent will be the measure of a parameter that a rule takes."""
    return jnp.zeros(measure.shape(batch_size, leaf.shape), wide(leaf).dtype)
