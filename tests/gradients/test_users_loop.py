"""Norms of every example inside somebody's own training step: Flax NNX, optax, two devices, accumulated gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gdjax import ghost

pytestmark = pytest.mark.slow  # hundreds of programs are compiled


def model(key):
    rngs = nnx.Rngs(key)
    return nnx.Sequential(
        nnx.Linear(3, 8, rngs=rngs), jnp.tanh, nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
    )


def test_a_jitted_sharded_accumulated_step_of_a_user_sees_the_norm_of_every_example(key):
    """The step is the user's: gdjax gives `ghost.sq_norms` alone."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        graph, start = nnx.split(model(key))
        optimizer = optax.adamw(0.01)

        def loss(params, example):
            x, y = example
            return jnp.sum((nnx.merge(graph, params)(x) - y) ** 2)

        measured = ghost.sq_norms(loss)

        @jax.jit
        def step(params, opt_state, batch):
            """Make one update from a batch [K, m, ...] in K pieces; return the norms of its examples, [K, m]."""

            def accumulate(total, piece):
                losses, grad, sq_norms = measured(params, piece)
                norms = jnp.sqrt(sum(jax.tree.leaves(sq_norms)))
                return jax.tree.map(jnp.add, total, grad), (losses.mean(), norms)

            zeros = jax.tree.map(jnp.zeros_like, params)
            grad, (losses, norms) = lax.scan(accumulate, zeros, batch)
            grad = jax.tree.map(lambda g: g / len(losses), grad)
            update, opt_state = optimizer.update(grad, opt_state, params)
            return optax.apply_updates(params, update), opt_state, losses.mean(), norms

        x = jax.random.normal(key, (2, 3, 4, 3))  # two updates of three pieces of four examples
        data = x, jnp.stack([x[..., 0], x[..., 1] * x[..., 2]], -1)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        everywhere = NamedSharding(mesh, PartitionSpec())
        split = jax.device_put(data, NamedSharding(mesh, PartitionSpec(None, None, "data")))
        params, opt_state = jax.device_put((start, optimizer.init(start)), everywhere)

        expected, expected_state = start, optimizer.init(start)
        for t in range(2):
            batch = jax.tree.map(lambda a, t=t: a[t], split)
            params, opt_state, mean_loss, norms = step(params, opt_state, batch)

            whole = jax.tree.map(lambda a, t=t: a[t].reshape(12, -1), data)
            losses, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(expected, whole)
            precision.assert_close(norms.reshape(-1), jax.vmap(optax.tree.norm)(grads), rtol=1e-6, atol=1e-7)
            precision.assert_close(mean_loss, losses.mean(), rtol=1e-6)
            grad = jax.tree.map(lambda g: g.mean(0), grads)
            update, expected_state = optimizer.update(grad, expected_state, expected)
            expected = optax.apply_updates(expected, update)
        assert len(norms.sharding.device_set) == 2
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected)
