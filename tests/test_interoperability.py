"""Models of other libraries are trained as they are: what a problem needs of them is a function and a pytree."""

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gdjax import batching, descent, gradients
from gdjax.problem import Problem


def equinox():
    def make(key):
        return eqx.partition(eqx.nn.MLP(3, 1, width_size=4, depth=1, key=key), eqx.is_array)

    _, static = make(jax.random.key(0))
    return lambda key: make(key)[0], lambda params, x: eqx.combine(params, static)(x)


def linen():
    model = flax.linen.Sequential([flax.linen.Dense(4), jnp.tanh, flax.linen.Dense(1)])
    return lambda key: model.init(key, jnp.ones(3)), model.apply


def flax_nnx():
    def make(key):
        rngs = nnx.Rngs(key)
        return nnx.split(nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), jnp.tanh, nnx.Linear(4, 1, rngs=rngs)))

    graph, _ = make(jax.random.key(0))
    return lambda key: make(key)[1], lambda params, x: nnx.merge(graph, params)(x)


def plain():
    def init(key):
        return {"hidden": jax.random.normal(key, (3, 4)), "out": (jnp.ones(4), jnp.zeros(()))}

    def apply(params, x):
        weight, bias = params["out"]
        return jnp.tanh(x @ params["hidden"]) @ weight + bias

    return init, apply


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("library", [equinox, linen, flax_nnx, plain])
@pytest.mark.slow
def test_a_model_of_another_library_trains_and_a_step_is_the_gradient_of_the_batch_loss(library, key):
    # Their code mixes float32 with float64, and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        init, apply = library()
        x = jax.random.normal(key, (32, 3))
        problem = Problem(
            init, lambda params, example: (apply(params, example[0]) - example[1]).sum() ** 2, (x, x[:, 0])
        )

        def mean_loss(params, x, y):
            return jnp.stack([problem.loss(params, example) for example in zip(x, y, strict=True)]).mean()

        method = descent.method(gradients.mean(problem.loss), optax.sgd(0.05))
        start = method.init(problem.init(key))
        batches = batching.batches(batching.reshuffled(key, 32, num_epochs=10), 4)
        state, _ = descent.run(method, start, problem.train, batches[:1])
        grad = jax.grad(mean_loss)(start.params, *batching.take(problem.train, batches[0]))
        expected = jax.tree.map(lambda weight, g: weight - 0.05 * g, start.params, grad)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.params, expected)

        state, _ = descent.run(method, state, problem.train, batches[1:])
        assert mean_loss(state.params, *problem.train) < 0.5 * mean_loss(start.params, *problem.train)
