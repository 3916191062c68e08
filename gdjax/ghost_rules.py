"""Rules: how the gradients of the examples are measured at one use of a parameter, without keeping them.

A rule speaks for one primitive in which a parameter w meets an activation x. Given x and the cotangent g of the result,
for the whole batch, it returns the gradient of w summed over the batch and a measure of every example's gradient.

To add a rule: write `(equation, position of w) -> Backward or None`, None where the equation is not of the kind that the
rule can do, and add it to `RULES` under the name of its primitive. Uses without a rule are materialised.

Most rules reduce to *factors*: the gradient of example b is A_b' G_b with A [B, K, T, I] and G [B, K, T, O], where T runs
over the positions that share the weight (tokens, pixels), K over axes that every factor has (heads, groups). For T = 1
its squared norm is |a|^2 |g|^2 (Goodfellow 2015, arXiv 1510.01799); for T > 1 it is the sum of A A' * G G' (Li et al.
2022, arXiv 2110.05679), or is taken from A_b' G_b itself, formed for one example at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax import ghost_cost

Equation = Any
Measured = tuple[jax.Array, jax.Array]
"""(sum over examples of the gradient of w, shaped like w; the measure)."""


class Measure(NamedTuple):
    """What is wanted of the gradients of the examples at a use.

    Attributes:
        name: for messages.
        of_factors: (A [B, K, T, I], G [B, K, T, O], back) -> (sum [K, I, O], measure), where `back` takes [K, I, O] to the
            shape of w.
        of_gradients: gradients [B, ...] -> measure.
        like_weight: whether the measure has the shape of w, and so follows its reshapes, or is one for the whole parameter.
    """

    name: str
    of_factors: Callable
    of_gradients: Callable
    like_weight: bool


Backward = Callable[[Measure, jax.Array, jax.Array, jax.Array], Measured]
"""(measure, w, x, g) -> Measured."""


def wide(x: jax.Array) -> jax.Array:
    """Return x in float32 at least: squares of bfloat16 do not add up."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _norms_of_factors(a, g, back):
    how = ghost_cost.cheapest(a.shape, g.shape)
    if how == "product":
        squares = jnp.sum(wide(a) ** 2, (2, 3)) * jnp.sum(wide(g) ** 2, (2, 3))
        return _sum_of_products(a, g), jnp.sum(squares, 1)
    if how == "gram":
        inner = jnp.einsum("bkti,bksi->bkts", wide(a), wide(a)) * jnp.einsum("bkto,bkso->bkts", wide(g), wide(g))
        # Rounding can leave a small negative number where the true norm is zero.
        return _sum_of_products(a, g), jnp.maximum(jnp.sum(inner, (1, 2, 3)), 0)
    if how == "all":
        gradients = jnp.einsum("bkti,bkto->bkio", a, g)
        return jnp.sum(gradients, 0), jnp.sum(wide(gradients) ** 2, (1, 2, 3))

    def one(total, factors):
        gradient = jnp.einsum("kti,kto->kio", *factors)
        return total + gradient, jnp.sum(wide(gradient) ** 2)

    shape = (a.shape[1], a.shape[3], g.shape[3])
    return lax.scan(one, jnp.zeros(shape, jnp.result_type(a, g)), (a, g))


def _sum_of_products(a, g):
    return jnp.einsum("bkti,bkto->kio", a, g)


def _moments_of_factors(a, g, back):
    """Return sums of squares of every element; for T = 1 they are (a * a)' (g * g) (Dangel et al. 2020, BackPACK)."""
    if a.shape[2] == 1:
        return _sum_of_products(a, g), back(_sum_of_products(wide(a) ** 2, wide(g) ** 2))

    def one(sums, factors):
        gradient = jnp.einsum("kti,kto->kio", *factors)
        return (sums[0] + gradient, sums[1] + wide(gradient) ** 2), None

    shape = (a.shape[1], a.shape[3], g.shape[3])
    zeros = jnp.zeros(shape, jnp.result_type(a, g))
    (total, squares), _ = lax.scan(one, (zeros, wide(zeros)), (a, g))
    return total, back(squares)


def _gram_of_factors(a, g, back):
    if a.shape[2] == 1:
        a, g = (wide(x)[:, :, 0] for x in (a, g))
        inner = jnp.einsum("bki,cki->kbc", a, a) * jnp.einsum("bko,cko->kbc", g, g)
        return jnp.einsum("bki,bko->kio", a, g), jnp.sum(inner, 0)
    gradients = jnp.einsum("bkti,bkto->bkio", a, g)
    return jnp.sum(gradients, 0), _gram(gradients)


def _norms(gradients):
    return jnp.sum(wide(gradients) ** 2, tuple(range(1, gradients.ndim)))


def _gram(gradients):
    flat = wide(gradients).reshape(len(gradients), -1)
    return flat @ flat.T


NORMS = Measure("squared norms", _norms_of_factors, _norms, like_weight=False)
MOMENTS = Measure("second moments", _moments_of_factors, lambda g: jnp.sum(wide(g) ** 2, 0), like_weight=True)
GRAM = Measure("Gram matrix", _gram_of_factors, _gram, like_weight=False)


def dot_general(equation: Equation, position: int) -> Backward | None:
    """w @ x and x @ w, with any contracted, shared and free axes."""
    contracting, shared = equation.params["dimension_numbers"]
    w_contract, w_shared = contracting[position], shared[position]
    x_contract, x_shared = contracting[1 - position], shared[1 - position]

    def backward(measure, w, x, g):
        w_free = [i for i in range(w.ndim) if i not in (*w_contract, *w_shared)]
        x_free = [i for i in range(x.ndim - 1) if i not in (*x_contract, *x_shared)]
        num_shared, num_x = len(x_shared), len(x_free)
        # The result has the shared axes first, then the free axes of the left and of the right operand.
        first_x = num_shared + (len(w_free) if position == 0 else 0)
        first_w = num_shared + (0 if position == 0 else num_x)
        a = _grouped(x, x_shared, x_free, x_contract)
        g = _grouped(g, range(num_shared), range(first_x, first_x + num_x), range(first_w, first_w + len(w_free)))
        order = [*w_shared, *w_contract, *w_free]

        def back(product):
            return product.reshape([w.shape[i] for i in order]).transpose(np.argsort(order))

        total, measured = measure.of_factors(a, g, back)
        return back(total), measured

    return backward


def _grouped(x: jax.Array, *groups) -> jax.Array:
    """Move the axes of each group, counted without axis 0, together and into one: [B, ...] -> [B, group, group, ...]."""
    axes = [i + 1 for group in groups for i in group]
    sizes = [int(np.prod([x.shape[i + 1] for i in group], dtype=int)) for group in groups]
    return x.transpose(0, *axes).reshape(x.shape[0], *sizes)


def conv_general_dilated(equation: Equation, position: int) -> Backward | None:
    """Convolution by a kernel w: the dot rule on patches of x, with K the groups."""
    parameters = equation.params
    if position != 1 or parameters["batch_group_count"] != 1:
        return None
    lhs, rhs, out = parameters["dimension_numbers"]
    groups = parameters["feature_group_count"]

    def backward(measure, w, x, g):
        spatial = [w.shape[i] for i in rhs[2:]]
        num_out, num_in = w.shape[rhs[0]], w.shape[rhs[1]]

        def patches(x):
            return lax.conv_general_dilated_patches(
                x,
                spatial,
                parameters["window_strides"],
                parameters["padding"],
                parameters["lhs_dilation"],
                parameters["rhs_dilation"],
                dimension_numbers=lax.ConvDimensionNumbers(lhs, tuple(range(len(rhs))), out),
                precision=parameters["precision"],
            )

        # Features of a patch run over input channels, which the groups divide, then over the window.
        a = jax.vmap(patches)(x)
        positions = [out[0], *out[2:]]
        a = _grouped(a, [out[1]], positions, []).reshape(x.shape[0], groups, num_in * int(np.prod(spatial)), -1)
        g = _grouped(g, [out[1]], positions, []).reshape(x.shape[0], groups, num_out // groups, -1)

        def back(product):
            kernel = product.reshape(groups, num_in, *spatial, num_out // groups)
            kernel = jnp.moveaxis(kernel, -1, 1).reshape(num_out, num_in, *spatial)
            return kernel.transpose(np.argsort(rhs))

        total, measured = measure.of_factors(a.swapaxes(2, 3), g.swapaxes(2, 3), back)
        return back(total), measured

    return backward


def gather(equation: Equation, position: int) -> Backward | None:
    """Rows of a table w: positions that read the same row add up before they are squared."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    mode = equation.params["mode"]
    table = equation.invars[0].aval
    whole_rows = tuple(sizes) == (1, *table.shape[1:]) and tuple(numbers.start_index_map) == (0,)
    plain = tuple(numbers.collapsed_slice_dims) == (0,) and not numbers.operand_batching_dims
    if position != 0 or not (whole_rows and plain):
        return None

    def backward(measure, w, x, g):
        index = x[..., 0]
        _, pull = jax.vjp(lambda w: jax.vmap(lambda x: gathered(w, x))(x), w)
        [total] = pull(g)
        offsets = [i for i in range(g.ndim - 1) if i in numbers.offset_dims]
        places = [i for i in range(g.ndim - 1) if i not in numbers.offset_dims]
        rows = _grouped(g, places, offsets)
        index = index.reshape(len(index), -1)
        if mode == lax.GatherScatterMode.CLIP:
            index = jnp.clip(index, 0, len(w) - 1)
        else:
            rows = rows * ((index >= 0) & (index < len(w)))[..., None].astype(rows.dtype)
        if measure is not NORMS:
            empty = jnp.zeros((len(w), rows.shape[-1]), rows.dtype)
            gradients = jax.vmap(lambda index, rows: empty.at[index].add(rows))(index, rows)
            gradients = gradients.reshape(len(index), *w.shape)
            return total, measure.of_gradients(gradients)
        same = (index[:, :, None] == index[:, None, :]).astype(wide(rows).dtype)
        inner = jnp.einsum("btd,bsd->bts", wide(rows), wide(rows))
        return total, jnp.maximum(jnp.sum(inner * same, (1, 2)), 0)

    def gathered(w, x):
        return lax.gather(w, x, numbers, tuple(sizes), mode=mode)

    return backward


RULES: dict[str, Callable[[Equation, int], Backward | None]] = {
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
    "gather": gather,
}


def find(equation: Equation, position: int) -> Backward | None:
    """Return the rule for the parameter at this operand of an equation, or None."""
    rule = RULES.get(equation.primitive.name)
    return rule(equation, position) if rule else None
