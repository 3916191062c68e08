"""A function that is called again, outside of any program, with the same functions and shapes compiles nothing."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from gdjax import _trees, curvature, descent, ghost, gradients, noise, theory
from gdjax.problem import Problem

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **kwargs: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)
DATA = jax.random.normal(jax.random.key(0), (16, 3)), jnp.ones(16)
SQUARES = Problem(lambda key: jnp.ones(3), lambda w, e: 0.5 * (e[0] @ w - e[1]) ** 2, DATA)
PARAMS = jnp.ones(3)
QUADRATIC = theory.schedules.noisy_quadratic(jnp.ones(4), jnp.ones(4), start=jnp.ones(4))
METHOD = descent.method(gradients.mean(SQUARES.loss), optax.sgd(0.1))
KEY = jax.random.key(0)
OF_BATCHES = {
    "mean": gradients.mean(SQUARES.loss),
    "microbatched": gradients.microbatched(SQUARES.loss, microbatch_size=4),
    "clipped": gradients.clipped(SQUARES.loss, 1.0, microbatch_size=4),
    "sq_norms": ghost.sq_norms(SQUARES.loss),
    "gram": ghost.gram(SQUARES.loss),
    "with_sq_norms": gradients.with_sq_norms(SQUARES.loss),
    "trace": functools.partial(curvature.trace(SQUARES.loss, num_samples=2), key=KEY),
}
CALLS = {name: functools.partial(call, PARAMS, DATA) for name, call in OF_BATCHES.items()}
CALLS |= {
    "evaluate": lambda: SQUARES.evaluate(PARAMS),
    "run": lambda: descent.run(METHOD, METHOD.init(PARAMS), DATA, jnp.arange(16).reshape(4, 4)),
    "measure": lambda: noise.measure(SQUARES.loss, PARAMS, DATA, KEY, num_examples=8),
    "measure_hessian": lambda: noise.measure_hessian(SQUARES.loss, PARAMS, DATA, KEY, batch_size=4, num_pairs=2),
    "twin": lambda: theory.twin(SQUARES, PARAMS, key=KEY, num_steps=2, num_draws=1),
    "schedule": lambda: theory.schedules.run(QUADRATIC, jnp.full(5, 0.1), jnp.full(5, 8.0)),
    "noise_costs": lambda: theory.schedules.noise_costs(QUADRATIC, jnp.full(5, 0.1)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_compiles_nothing(name):
    CALLS[name]()
    before = len(COMPILED)
    CALLS[name]()
    assert len(COMPILED) == before


def test_what_is_compiled_alone_is_the_function_itself_within_a_program_and_of_what_is_no_array():
    traced = []

    @_trees.compiled_alone
    def double(tree):
        traced.append(tree)
        return jax.tree.map(lambda x: 2 * x, tree)

    assert [float(double(jnp.asarray(x))) for x in (1.0, 2.0)] == [2.0, 4.0]
    assert len(traced) == 1
    assert jax.vmap(double)(jnp.ones(3)).shape == (3,)
    assert len(traced) == 2
    assert double({"length": 1.5}) == {"length": 3.0}
