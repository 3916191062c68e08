"""Histories of many runs, over seeds and learning rates, that one compiled program makes piece by piece.

>>> from gdjax import problems
>>> problem = problems.least_squares()
>>> keys = jax.random.split(jax.random.key(0), 2), jax.random.split(jax.random.key(1), 2)
>>> run = of_lanes(problem, 64, 4, (problem.train, problem.train), keys, 3, watch=lambda fraction: None)
>>> history = run(np.asarray([0.01, 0.03, 0.1]))
>>> history["loss"].shape, history["examples"][0, 0]
((2, 3, 5), array([   0, 1024, 2048, 3072, 4096], dtype=int32))
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, descent, gradients, timing
from gdjax.problem import Problem

MAX_PIECES = 16  # so that progress is shown and Ctrl-C is heard between them


def evaluate(problem: Problem, data, state, info=None):
    """Return the examples seen, the mean loss of the training examples, and the mean metrics of the test examples."""
    train_data, test_data = data
    return {
        "examples": state.num_examples.astype(jnp.int32),  # `compare` allows no more
        "loss": _mean_over(train_data, problem.loss, state.params),
        "metrics": {name: _mean_over(test_data, metric, state.params) for name, metric in problem.metrics.items()},
    }


def train(problem: Problem, every: int, data, state, batches, learning_rate):
    """Return (state, history): a piece of a run, one update for each batch, evaluated every `every` and at its end."""
    method = descent.method(gradients.mean(problem.loss), optax.sgd(learning_rate))
    return descent.run(method, state, data[0], batches, partial(evaluate, problem, data), every=every)


def of_lanes(problem: Problem, batch_size: int, num_epochs: int, data, keys, num_rates: int, watch):
    """Return a function: rates [R] -> history of all runs [S, R, E].

    Runs are evaluated before they begin, every N // B updates, and at their end. They are made piece by piece, and
    between two of them `watch` is told the fraction that is done: a callback from inside the program would do that too,
    but then the program could not be kept (see `timing.keep_compiled`).
    """
    num_seeds = len(keys[0])
    init_keys, stream_keys = keys
    start = descent.method(gradients.mean(problem.loss), optax.sgd(0.0)).init
    states = jax.jit(jax.vmap(lambda key: start(problem.init(key))))(init_keys)
    before = jax.jit(jax.vmap(partial(evaluate, problem), (None, 0)))(data, states)
    streams = jax.jit(jax.vmap(partial(batches, problem, batch_size, num_epochs)))(stream_keys)
    streams = np.asarray(jax.block_until_ready(streams))  # where memory ends, it raises, and NumPy alone would abort
    every = max(1, problem.num_examples // batch_size)
    pieces = _pieces(streams.shape[1], every)

    # One flat axis of lanes, a stream of its own for each: seeds and rates as two nested axes would share the streams,
    # and then every matrix product with B = 1 transposes all weights (measured: 1.5 times slower on a CPU).
    def of_lanes(data, states, batches, rates):
        batches = jnp.repeat(batches, num_rates, axis=0)
        return jax.vmap(partial(train, problem, every), (None, 0, 0, 0))(data, states, batches, rates)

    def repeated(tree):
        return jax.tree.map(lambda x: np.repeat(x, num_rates, axis=0), tree)

    lanes = repeated(states), np.tile(np.zeros(num_rates), num_seeds)
    programs = {
        stop - first: timing.compiled(of_lanes, data, lanes[0], streams[:, first:stop], lanes[1])
        for first, stop in reversed(pieces)
    }

    def run(rates: np.ndarray):
        state, histories = lanes[0], [jax.tree.map(lambda x: x[:, None], repeated(before))]
        for first, stop in pieces:
            program = programs[stop - first]
            state, history = program(data, state, streams[:, first:stop], np.tile(rates, num_seeds))
            histories.append(jax.tree.map(np.asarray, history))
            watch(stop / streams.shape[1])
        joined = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *histories)
        return jax.tree.map(lambda x: x.reshape(num_seeds, num_rates, -1), joined)

    return run


def batches(problem: Problem, batch_size: int, num_epochs: int, stream_key) -> jax.Array:
    """Return the batches of a reshuffled stream, int32[T, B], less a last incomplete one."""
    stream = batching.reshuffled(stream_key, problem.num_examples, num_epochs=num_epochs)
    return batching.cut(stream, batch_size, drop_remainder=True)


def _pieces(num_updates: int, every: int) -> list[tuple[int, int]]:
    """Return (first, stop) of the pieces of a run: at most MAX_PIECES equal ones between evaluations, and the rest."""
    num_evaluations = max(1, num_updates // every)
    count = max(n for n in range(1, MAX_PIECES + 1) if num_evaluations % n == 0)
    bounds = [i * every * (num_evaluations // count) for i in range(count + 1)]
    bounds = [bound for bound in bounds if bound < num_updates] + [num_updates]
    return list(itertools.pairwise(bounds))


def _mean_over(data, function, params):
    return jax.vmap(function, (None, 0))(params, data).mean()
