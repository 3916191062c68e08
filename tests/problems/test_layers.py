"""Layers written for speed compute what the same layers written for legibility do, and so do their derivatives."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest
from jax import lax

from gdjax import ghost
from gdjax.problems import models


def plain_group_norm(x, *, num_groups):
    groups = x.reshape(-1, num_groups, x.shape[-1] // num_groups)
    centred = groups - groups.mean((0, 2), keepdims=True)
    return (centred * lax.rsqrt((centred**2).mean((0, 2), keepdims=True) + models.EPSILON)).reshape(x.shape)


def plain_attention(q, k, v):
    scores = jnp.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    past = jnp.tril(jnp.ones((1, len(q), len(q)), bool))
    return jnp.einsum("hts,shd->thd", jax.nn.softmax(jnp.where(past, scores, -jnp.inf)), v)


LAYERS = {
    "group norm": (
        lambda x: models.group_norm(x, num_groups=3),
        lambda x: plain_group_norm(x, num_groups=3),
        [(5, 4, 6)],
    ),
    "attention": (models.attention, plain_attention, [(7, 2, 4)] * 3),
}
PRECISIONS = [(jnp.float32, 1e-5), (jnp.float64, 1e-12)]


def tolerance(bound):
    return max(bound, 64 * precision.EPS)


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_its_first_and_second_derivatives_are_those_of_its_formula(name, dtype, bound, key):
    new, plain, shapes = LAYERS[name]
    keys = jax.random.split(key, 2 * len(shapes))
    x, direction = (
        [jax.random.normal(k, (2, *shape), dtype) for k, shape in zip(some, shapes, strict=True)]
        for some in (keys[::2], keys[1::2])
    )

    def derivatives(layer):
        def loss(*x):
            return jnp.sin(jax.vmap(layer)(*x)).sum()

        gradient = jax.grad(loss, range(len(shapes)))
        curvature = jax.jvp(gradient, tuple(x), tuple(direction))[1]  # forward over reverse
        again = jax.grad(lambda *x: sum(jnp.vdot(g, d) for g, d in zip(gradient(*x), direction, strict=True)))(*x)
        return jax.vmap(layer)(*x), gradient(*x), curvature, again

    found, expected = jax.jit(derivatives, static_argnums=0)(new), jax.jit(derivatives, static_argnums=0)(plain)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance(bound), atol=10 * tolerance(bound))


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
@pytest.mark.parametrize("name", ["cnn", "transformer"])
@pytest.mark.slow
def test_a_model_and_its_gradient_are_those_of_the_plain_layers(name, dtype, bound, key, monkeypatch):
    if name == "cnn":
        model, x = models.cnn((9, 8, 3), channels=(4, 8), num_groups=2), jax.random.normal(key, (3, 9, 8, 3), dtype)
    else:
        model = models.transformer(num_tokens=11, width=16, num_heads=2)
        x = jax.random.randint(key, (3, 6), 0, 11)
    params = jax.tree.map(lambda w: w.astype(dtype), model.init(jax.random.key(1)))

    def evaluated():
        def loss(params):
            logits = jax.vmap(model.apply, (None, 0))(params, x)
            return jnp.sin(10 * logits).mean(), logits

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    found = evaluated()
    monkeypatch.setattr(models, "group_norm", plain_group_norm)
    monkeypatch.setattr(models, "attention", plain_attention)
    for a, b in zip(*map(jax.tree.leaves, (found, evaluated())), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance(bound), atol=tolerance(bound))


def test_group_norm_keeps_its_accuracy_where_the_mean_is_large(key):
    """Mean squares less squared means would lose the variance of 1 beside a mean of 3000 in float32."""
    x = 3000 + jax.random.normal(key, (14, 14, 16), jnp.float32)
    found = models.group_norm(x, num_groups=8)
    precise = np.asarray(x, np.float64).reshape(-1, 8, 2)
    centred = precise - precise.mean((0, 2), keepdims=True)
    expected = centred / np.sqrt((centred**2).mean((0, 2), keepdims=True) + models.EPSILON)
    np.testing.assert_allclose(found, expected.reshape(x.shape), atol=1e-3)


def test_attention_keeps_no_weights_for_the_backward_pass():
    """What is kept is of the size T heads D, for T much larger than D."""
    q = jax.ShapeDtypeStruct((64, 2, 4), jnp.float32)
    kept = jax.eval_shape(lambda q, k, v: jax.vjp(models.attention, q, k, v)[1], q, q, q)
    assert {leaf.size for leaf in jax.tree.leaves(kept)} == {64 * 2 * 4}


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_every_leaf_is_measured_by_a_rule(name):
    if name == "cnn":
        model, x = models.cnn((8, 8, 1), channels=(4,), num_groups=2), jnp.ones((8, 8, 1))
    else:
        model, x = models.transformer(num_tokens=5, width=8, num_heads=2), jnp.arange(3)
    rows = ghost.coverage(lambda params, x: model.apply(params, x).sum(), model.init(jax.random.key(0)), x).rows
    assert "materialised" not in {method for _, _, method, _ in rows}
