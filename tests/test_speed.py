"""What a step of descent costs beside the ways people write it: ratios are printed, results asserted."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gdjax import batching, descent, gradients, problems, timing

NUM_UPDATES = 4000


@pytest.fixture(scope="module")
def problem():
    jax.config.update("jax_disable_most_optimizations", False)  # what is compared is what a user runs
    with jax.enable_x64(False):
        yield problems.digits_mlp()
    jax.config.update("jax_disable_most_optimizations", True)


def median_ratio(f, g, repeats=7):
    """Return the median of time(f) / time(g), each pair in turn and in both orders."""
    ratios = []
    for i in range(repeats):
        times = {}
        for name, function in [("f", f), ("g", g)][:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name] = time.perf_counter() - start
        ratios.append(times["f"] / times["g"])
    return statistics.median(ratios)


def test_run_equals_a_hand_written_scan_and_a_python_loop(problem, capsys):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        key = jax.random.key(0)
        stream = batching.reshuffled(key, problem.num_examples, length=NUM_UPDATES)
        params, rate = problem.init(key), jnp.float32(0.01)

        def library(params, stream):
            method = descent.method(gradients.mean(problem.loss), optax.sgd(rate))
            return descent.run(method, method.init(params), problem.train, batching.batches(stream, 1))[0].params

        def by_hand(params, stream):
            def update(params, i):
                value, grad = jax.value_and_grad(problem.loss)(params, jax.tree.map(lambda x: x[i], problem.train))
                return jax.tree.map(lambda p, g: p - rate * g, params, grad), value

            return jax.lax.scan(update, params, stream)[0]

        method = descent.method(gradients.mean(problem.loss), optax.sgd(rate))
        step = jax.jit(method.step)

        def python_loop(params, stream):
            state = method.init(params)
            for i in stream:
                state, _ = step(state, jax.tree.map(lambda x, i=i: x[i : i + 1], data))
            return state.params

        data = jax.tree.map(np.asarray, problem.train)
        library_program, hand_program = (timing.compiled(f, params, stream) for f in (library, by_hand))
        short = np.asarray(stream[: NUM_UPDATES // 10])
        results = library_program(params, stream), hand_program(params, stream)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *results)
        results = python_loop(params, short), library(params, jnp.asarray(short))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *results)

        to_hand = median_ratio(lambda: library_program(params, stream), lambda: hand_program(params, stream))
        to_loop = median_ratio(lambda: python_loop(params, short), lambda: library_program(params, stream), repeats=3)
    with capsys.disabled():
        print(f"\n  B = 1: run / hand-written scan {to_hand:.2f}; Python loop of jitted steps / run {10 * to_loop:.0f}")


def test_the_program_does_not_grow_with_updates_rates_or_seeds(problem, capsys):
    def program(num_epochs, num_rates, num_seeds):
        def train(key, rate):
            method = descent.method(gradients.mean(problem.loss), optax.sgd(rate))
            stream = batching.reshuffled(key, problem.num_examples, num_epochs=num_epochs)
            state = method.init(problem.init(key))
            return descent.run(method, state, problem.train, batching.batches(stream, 1), every=problem.num_examples)[1]

        keys, rates = jax.random.split(jax.random.key(0), num_seeds), jnp.geomspace(1e-3, 1, num_rates)
        return timing.compiled(jax.vmap(jax.vmap(train, (None, 0)), (0, None)), keys, rates)

    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        small, large = program(2, 2, 2), program(200, 20, 20)
    with capsys.disabled():
        print(f"\n  compile seconds: {small.compile_seconds:.2f}; 100 x updates and lanes: {large.compile_seconds:.2f}")
    lines = [program.program.as_text().count("\n") for program in (small, large)]
    assert lines[1] <= 1.05 * lines[0]
