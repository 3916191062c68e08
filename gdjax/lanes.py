"""Runs of every learning rate with every seed, advanced together and evaluated now and then: what pilots are made of.

Programs take most of the time of a search over small problems. Here what does not depend on the batch size is compiled
once for all batch sizes, and lanes that are not used make searches of different sizes share their programs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gdjax import batching, descent, gradients, targets
from gdjax.problem import Problem

Optimizer = Callable[[Any], optax.GradientTransformation]
"""learning_rate -> optax transformation; the rate is traced."""

# Examples in memory at once, in all lanes together, at least one lane's batch: a GPU is idle without many. On a CPU
# lanes side by side are no faster, and lanes one by one need not go on where they have arrived.
IN_FLIGHT = {"cpu": 1}
ACCELERATOR_IN_FLIGHT = 2048


class Lanes(NamedTuple):
    """Where runs stand: lanes [L], rates varying fastest over seeds, then those that are not used.

    Attributes:
        states: descent.State, [L].
        learning_rates: [L].
        stream_keys: of each seed.
        seeds: int [L], the seed of each lane.
        streams: int32[L, N], the part of each lane's stream that updates are being made from.
        values: [L], the metric after the last update of each lane.
        num_updates: made so far.
    """

    states: descent.State
    learning_rates: jax.Array
    stream_keys: jax.Array
    seeds: np.ndarray
    streams: jax.Array | None
    values: jax.Array
    num_updates: int


class Runs(NamedTuple):
    """How lanes begin and go on.

    Attributes:
        start: `(learning_rates [R], *, num_seeds, key) -> Lanes`, evaluated.
        advance: `(lanes, num_updates, active [L], *, batch_size) -> Lanes` after so many updates, evaluated; lanes that
            are not active are left where they are, or go on unevaluated. The lanes given are used up.
        num_examples: N.
        num_evaluated: examples in an evaluation.
    """

    start: Callable[..., Lanes]
    advance: Callable[..., Lanes]
    num_examples: int
    num_evaluated: int


def runs(
    problem: Problem, optimizer: Optimizer, *, metric: str = "loss", on: str = "train", num_lanes: int = 0
) -> Runs:
    """Return runs of gradient descent on `problem`, judged by a metric.

    Args:
        problem: what to train.
        optimizer: learning_rate -> optax transformation.
        metric, on: as in `targets.Target`.
        num_lanes: L, at least; more than are asked for are never active.
    """
    length = problem.num_examples
    examples = targets.evaluation_examples(problem, on)
    # One seed at a time: one program serves any number of them.
    init = jax.jit(problem.init)
    window = jax.jit(lambda key, start: batching.reshuffled(key, length, start=start, length=length))
    begin, train = _training(problem, optimizer)
    evaluate = _evaluating(targets.evaluation(problem, metric))

    def start(learning_rates: np.ndarray, *, num_seeds: int, key: jax.Array) -> Lanes:
        init_key, stream_key = jax.random.split(key)
        num_rates = len(learning_rates)
        total = max(num_lanes, num_seeds * num_rates)
        seeds = np.minimum(np.arange(total) // num_rates, num_seeds - 1)
        params = list(map(init, jax.random.split(init_key, num_seeds)))
        rates = jnp.asarray(np.resize(learning_rates, total), float)
        states = begin([params[seed] for seed in seeds], rates)
        used = np.arange(total) < num_seeds * num_rates
        values = evaluate(states.params, jnp.full(total, jnp.inf, float), used, examples)
        return Lanes(states, rates, jax.random.split(stream_key, num_seeds), seeds, None, values, 0)

    def advance(lanes: Lanes, num_updates: int, active: np.ndarray, *, batch_size: int) -> Lanes:
        most = length // batch_size  # updates that a window holds
        states, streams, done = lanes.states, lanes.streams, lanes.num_updates
        end = done + num_updates
        while done < end:
            first = done % most
            if first == 0 or streams is None:
                start = batching.Count.of(done * batch_size)
                windows = [window(key, start) for key in lanes.stream_keys]
                streams = jnp.stack([windows[seed] for seed in lanes.seeds])
            count = min(end - done, most - first)
            states = train(
                states, streams, lanes.learning_rates, active, first, count, problem.train, batch_size=batch_size
            )
            done += count
        values = evaluate(states.params, lanes.values, active, examples)
        return lanes._replace(states=states, streams=streams, values=values, num_updates=done)

    return Runs(start, advance, length, len(jax.tree.leaves(examples)[0]))


def _training(problem: Problem, optimizer: Optimizer) -> tuple[Callable, Callable]:
    """Return the programs that begin lanes, and that make updates `first` to `first + count` of their streams."""

    def method(learning_rate):
        return descent.method(gradients.mean(problem.loss), optimizer(learning_rate))

    @jax.jit
    def begin(params: Sequence[Any], learning_rates):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        return jax.vmap(lambda params, rate: method(rate).init(params))(stacked, learning_rates)

    @partial(jax.jit, static_argnames="batch_size", donate_argnums=0)
    def train(states, streams, learning_rates, active, first, count, data, *, batch_size):
        in_flight = IN_FLIGHT.get(jax.default_backend(), ACCELERATOR_IN_FLIGHT)
        at_once = _largest_divisor(len(learning_rates), in_flight // batch_size)

        def lane(state, stream, learning_rate, active):
            step = method(learning_rate).step

            def update(i, state):
                indices = lax.dynamic_slice_in_dim(stream, i * batch_size, batch_size)
                return step(state, batching.take(data, indices))[0]

            # Side by side, lanes would select at every update what to keep.
            end = first + (count if at_once > 1 else jnp.where(active, count, 0))
            return lax.fori_loop(first, end, update, state)

        each = states, streams, learning_rates, active
        return lax.map(lambda each: lane(*each), each, batch_size=at_once if at_once > 1 else None)

    return begin, train


def _evaluating(evaluation: Callable) -> Callable:
    """Return the program that evaluates the lanes that are active and keeps the values [L] of the others."""

    @jax.jit
    def evaluate(params, values, active, examples):
        def lane(params, value, active):
            return lax.cond(active, lambda: evaluation(params, examples).astype(value.dtype), lambda: value)

        return lax.map(lambda each: lane(*each), (params, values, active))

    return evaluate


def _largest_divisor(number: int, limit: int) -> int:
    return max(i for i in range(1, number + 1) if number % i == 0 and i <= max(limit, 1))
