"""Clipping in float32 of gradients from 1e-30 to 1e30 by bounds from 1e-18 to 1e18, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gdjax import gradients

SIZES = {"large": [1e30, 1e25, 3e29], "small": [1e-30, 1e-25, 3e-29], "both": [1e30, 1e-30, 1.0], "one": [0.5, 1, 2]}
BOUNDS = [1e-18, 1e-9, 1.0, 1e9, 1e18]


def by_cotangents(params, x):
    """Dense over two positions, a table and a bias; the first number of an example is the size of its gradient."""
    hidden = jnp.tanh(x[1:].reshape(2, 4) @ params["dense"] + params["bias"])
    return x[0] * (jnp.sum(hidden**2) + jnp.sum(params["table"][jnp.asarray([0, 1, 0])]))


def by_activations(params, x):
    """The gradient is the example itself, beside that of a scale."""
    return x[1:] @ params["dense"].reshape(-1)[:8] + 0.5 * jnp.sum(x[1:3] * params["table"])


def drawn(sizes, of):
    rng = np.random.default_rng(0)
    params = {"dense": rng.normal(size=(4, 3)), "bias": rng.normal(size=3), "table": rng.normal(size=(2, 2))}
    x, sizes = rng.normal(size=(3, 9)), np.asarray(sizes)[:, None]
    x = np.concatenate([sizes, x[:, 1:]], 1) if of is by_cotangents else sizes * x
    return jax.tree.map(np.float32, (params, x))


@pytest.mark.parametrize("of", [by_cotangents, by_activations])
@pytest.mark.parametrize("groups", [None, str])
def test_the_clipped_sum_is_right_whatever_the_sizes_of_gradients_and_bound(groups, of):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        clipped = jax.jit(lambda params, x, bound: gradients.clipped(of, bound, groups=groups)(params, x))
        found = {(name, bound): clipped(*drawn(sizes, of), bound) for name, sizes in SIZES.items() for bound in BOUNDS}
    for name, sizes in SIZES.items():
        wide = jax.tree.map(np.float64, drawn(sizes, of))
        with jax.numpy_rank_promotion("allow"):
            leaves = [np.asarray(g) for g in jax.tree.leaves(jax.jit(jax.vmap(jax.grad(of), (None, 0)))(*wide))]
        norms = np.sqrt([(g.reshape(3, -1) ** 2).sum(1) for g in leaves])
        if groups is None:
            norms = np.broadcast_to(np.sqrt((norms**2).sum(0)), norms.shape)
        for bound in BOUNDS:
            estimate = found[name, bound]
            if groups is None:  # otherwise a small norm need not be told from zero
                is_told = (norms[0] > 1e-15) | (bound < 1e-15)
                np.testing.assert_allclose(estimate.aux.norms[is_told], norms[0][is_told], rtol=2e-6)
            factors = np.minimum(1, bound / (1 if groups is None else 3**0.5) / np.maximum(norms, 1e-100))
            expected = [np.tensordot(f, g, 1) / 3 for f, g in zip(factors, leaves, strict=True)]
            largest = max(np.abs(leaf).max() for leaf in expected)
            for leaf, wanted in zip(jax.tree.leaves(estimate.grad), expected, strict=True):
                np.testing.assert_allclose(leaf, wanted, rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize(
    ("place", "bits"),
    [("activation", (4, 3)), ("activation", (8, 10)), ("activation", (5, 23)), ("weight", (4, 3)), ("inner", (4, 3))],
)
def test_the_bound_holds_where_a_backward_pass_rounds_what_it_is_given(place, bits):
    """As that of `reduce_precision`, which simulates narrow numbers in float32, does."""

    def rounded(x):
        return lax.reduce_precision(x, *bits)

    outputs = {
        "activation": lambda w, x: rounded(x @ w),
        "weight": lambda w, x: x @ rounded(w),
        "inner": lambda w, x: lax.scan(lambda c, _: (jax.jit(rounded)(c), None), x @ w, None, length=2)[0],
    }

    def loss(w, x):
        return 10 * jnp.sum(outputs[place](w, x) * jnp.asarray([1.0, 0.7, 0.33]))

    w, batch = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3))), np.random.default_rng(1).normal(size=(8, 4))
    for bound in (1.0, 0.1, 0.01):
        each = jax.vmap(lambda x, bound=bound: gradients.clipped(loss, bound)(w, x[None]).grad)(jnp.asarray(batch))
        assert jnp.linalg.norm(each.reshape(8, -1), axis=1).max() <= bound * (1 + 1e-6)
