"""A loop in one kernel computes what the loop computes, and is one kernel."""

import chex
import jax
import jax.numpy as jnp
import optax
import precision
import pytest

from gdjax import batching, descent, gradients, kernels
from gdjax.problems import models

MODEL = models.mlp((3, 4, 2))
CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="for a CPU only")


EXAMPLES = jax.random.normal(jax.random.key(1), (12, 3))
BATCHES = batching.batches(batching.reshuffled(jax.random.key(2), 12, num_epochs=2), 1)


def train(learning_rate):
    gradient = gradients.mean(lambda params, x: jnp.square(MODEL.apply(params, x)).sum())
    method = descent.method(gradient, optax.sgd(learning_rate, momentum=0.9))
    return descent.run(method, method.init(MODEL.init(jax.random.key(0))), EXAMPLES, BATCHES, every=5)


@CPU
def test_one_kernel_is_one_kernel_and_computes_the_same(key):
    one = jax.jit(kernels.one_kernel(train)).lower(0.01).compile()
    chex.assert_trees_all_close(one(0.01), jax.jit(train)(0.01), rtol=max(1e-12, 32 * precision.EPS))
    started = one.as_text().split("ENTRY")[1]
    assert started.count(" call(") == 1
    assert started.count(" while(") == started.count(" fusion(") == 0
    assert " fusion(" in jax.jit(train).lower(0.01).compile().as_text().split("ENTRY")[1]  # without it, a queue of them


@CPU
def test_one_kernel_maps_over_lanes():
    rates = jnp.asarray([0.01, 0.005])
    found = jax.jit(jax.vmap(kernels.one_kernel(train)))(rates)
    chex.assert_trees_all_close(found, jax.jit(jax.vmap(train))(rates), rtol=max(1e-12, 32 * precision.EPS))


@CPU
def test_what_cannot_be_in_one_kernel_is_an_error_and_not_a_wrong_number():
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.jit(kernels.one_kernel(jnp.sort))(jnp.asarray([2.0, 1.0]))


def test_elsewhere_the_function_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kernels.one_kernel(train) is train
