"""What a plan says of a loss without running it: how every parameter is measured, at what price, and how safely.

>>> import jax.numpy as jnp
>>> loss = lambda params, example: (example[0] @ params["weight"] + params["bias"] - example[1]) ** 2
>>> params = {"weight": jnp.asarray([1.0, 2.0]), "bias": jnp.asarray(0.5)}
>>> print(coverage(loss, params, (jnp.ones(2), jnp.ones(()))))
parameter   shape  method       bytes  uses
['bias']    []     add          1024   add
['weight']  [2]    dot_general  512    dot_general
total                           1536   plain gradient: 2572
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdjax import problem
from gdjax.ghost import _jaxpr as ghost_jaxpr
from gdjax.ghost import _leaves as ghost_leaves
from gdjax.ghost._factors import NORMS
from gdjax.ghost._norms import planned
from gdjax.problem import Example, Loss, Params


class Coverage(NamedTuple):
    """How every parameter leaf is measured; printed as a table.

    Attributes:
        rows: (path, shape, method, uses) of every trainable leaf; method names its rules, or is 'materialised' or
            'unused', and uses says where the leaf is used and why no rule applies.
        num_bytes: for every leaf, what its measure takes beside a plain gradient, predicted.
        plain_bytes: what a plain gradient takes at most: the parameters, and all values computed for the batch.
    """

    rows: list[tuple[str, tuple[int, ...], str, str]]
    num_bytes: list[int]
    plain_bytes: int

    def __str__(self) -> str:
        cells = [("parameter", "shape", "method", "bytes", "uses")]
        for (path, shape, method, uses), size in zip(self.rows, self.num_bytes, strict=True):
            cells.append((path, str(list(shape)), method, str(size), uses))
        cells.append(("total", "", "", str(sum(self.num_bytes)), f"plain gradient: {self.plain_bytes}"))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        if sum(self.num_bytes) > 10 * self.plain_bytes:
            size, (path, _, _, uses) = max(zip(self.num_bytes, self.rows, strict=True))
            lines.append(
                f"{path} takes {size} bytes ({uses}): write its use with a rule, see ghost.add_rule, or use less "
                "examples at a time"
            )
        return "\n".join(lines)


def coverage(loss: Loss, params: Params, example: Example, *, batch_size: int = 128) -> Coverage:
    """Return which rules take the uses of every parameter leaf, which leaves are materialised why, and the bytes."""
    train, frozen = problem.trainable(params)
    plan = planned(loss, train, frozen, jax.tree.map(_struct, example))
    rows, sizes = [], []
    leaves = jax.tree_util.tree_leaves_with_path(train)
    for (path, leaf), uses in zip(leaves, ghost_leaves.uses_of(plan, len(leaves)), strict=True):
        how = ghost_leaves.leaf_plan(plan, _struct(leaf), uses, NORMS, batch_size)
        rows.append((jax.tree_util.keystr(path), jnp.shape(leaf), *ghost_leaves.described(plan, how)))
        sizes.append(ghost_leaves.num_bytes(plan, _struct(leaf), how, batch_size))
    parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in map(_struct, jax.tree.leaves(train)))
    return Coverage(rows, sizes, parameters + batch_size * ghost_jaxpr.num_bytes(plan.jaxpr))


def nonlinear(loss: Loss, params: Params, example: Example) -> list[str]:
    """Return the names of the custom backward passes in a loss that are seen not to be linear in the cotangent.

    The derivative rules of JAX are linear, so that it does not matter whether cotangents are added up, or scaled by
    1 / B or by a clipping factor, before or after them. A rule of `jax.custom_vjp` need not be: clipping of cotangents,
    or their cleaning of NaN. What 'the gradient of a batch' means then depends on who asks: `gradients.mean` and
    `microbatched` hand the rule cotangents of the mean loss (and for a function of a parameter alone, their sum);
    `gradients.per_example` and this module hand it those of the loss of each example, and add up afterwards. A weighted
    backward pass no longer weights gradients, so that clipping cannot keep its bound. Loops inside a backward pass
    are taken to be linear.
    """
    train, frozen = problem.trainable(params)
    return ghost_jaxpr.nonlinear_rules(planned(loss, train, frozen, jax.tree.map(_struct, example)).jaxpr)


def _struct(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
