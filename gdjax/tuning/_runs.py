"""Runs of every learning rate with every seed, advanced together and evaluated now and then.

Programs take most of the time of a search over small problems. Here what does not depend on the batch size is compiled
once for all batch sizes, and runs that are not used let searches of different sizes share their programs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gdjax import batching, descent, gradients
from gdjax._trees import kept
from gdjax.gradients import Gradient
from gdjax.problem import Batch, Params, Problem

Optimizer = Callable[[Any], optax.GradientTransformation]
"""learning_rate -> optax transformation; the rate is traced."""

# Examples in memory at once, in all runs together, at least one run's batch: a GPU is idle without many. On a CPU runs
# side by side are no faster, and runs one after another need not go on where they have arrived.
IN_FLIGHT = {"cpu": 1}
ACCELERATOR_IN_FLIGHT = 2048
WINDOW = 2**18  # entries of a stream drawn at a time, or one batch, or one epoch where that is shorter


class Runs(NamedTuple):
    """Where runs stand: [L], rates varying fastest over seeds, then those that are not used.

    Attributes:
        states: descent.State, [L].
        learning_rates: [L], or with a horizon the pair ([L], [L]) of both.
        stream_keys: of each seed.
        seeds: int [L], the seed of each run.
        streams: int32[S, W], the part of each seed's stream that updates are being made from.
        values: pytree of [L], what the evaluation said after the last update of each run.
        num_updates: made so far.
    """

    states: descent.State
    learning_rates: Any
    stream_keys: jax.Array
    seeds: np.ndarray
    streams: jax.Array | None
    values: Any
    num_updates: int


class Trainer(NamedTuple):
    """How runs begin and go on.

    Attributes:
        start: `(learning_rates [R], *, num_seeds, key, horizon=None) -> Runs`, evaluated.
        advance: `(runs, num_updates, active [L], *, batch_size) -> Runs` after so many updates, evaluated; runs that
            are not active are left where they are, or go on unevaluated. The runs given are used up. The batch size is
            a number, or the `batching.Phases` of all updates from the start.
        num_examples: N.
        num_evaluated: examples in an evaluation.
    """

    start: Callable[..., Runs]
    advance: Callable[..., Runs]
    num_examples: int
    num_evaluated: int


def trainer(
    problem: Problem,
    optimizer: Optimizer,
    *,
    evaluate: Callable[[Params, Batch], Any],
    examples: Batch,
    num_evaluated: int,
    num_runs: int = 0,
    gradient: Callable[[int], Gradient] | None = None,
) -> Trainer:
    """Return how runs of gradient descent on `problem` begin and go on.

    Args:
        problem: what to train.
        optimizer: learning_rate -> optax transformation.
        evaluate: (params, examples) -> pytree of scalars.
        examples: what it is given.
        num_evaluated: how many these are, for who decides how often.
        num_runs: L, at least; more than are asked for are never active.
        gradient: batch size -> estimator; default `gradients.mean` of the problem's loss.
    """
    length = problem.num_examples
    # One seed at a time: one program serves any number of them.
    init = kept(problem.init, "tuning", lambda: jax.jit(problem.init))
    begin, train = _training(
        problem, optimizer, gradient or (lambda batch_size: gradients.mean(problem.loss, weight=problem.weight))
    )
    evaluate_runs = _evaluating(evaluate)

    @partial(jax.jit, static_argnames="entries")
    def window(key, start, *, entries):
        return batching.reshuffled(key, length, start=start, length=entries)

    def start(learning_rates: np.ndarray, *, num_seeds: int, key: jax.Array, horizon: float | None = None) -> Runs:
        init_key, stream_key = jax.random.split(key)
        num_rates = len(learning_rates)
        total = max(num_runs, num_seeds * num_rates)
        seeds = np.minimum(np.arange(total) // num_rates, num_seeds - 1)
        params = list(map(init, jax.random.split(init_key, num_seeds)))
        rates: Any = jnp.asarray(np.resize(learning_rates, total), float)
        rates = rates if horizon is None else (rates, jnp.full_like(rates, horizon))
        states = begin([params[seed] for seed in seeds], rates)
        used = np.arange(total) < num_seeds * num_rates
        shapes = jax.eval_shape(evaluate, params[0], examples)
        unknown = jax.tree.map(lambda x: jnp.full(total, jnp.inf, x.dtype), shapes)
        values = evaluate_runs(states.params, unknown, used, examples)
        return Runs(states, rates, jax.random.split(stream_key, num_seeds), seeds, None, values, 0)

    def advance(runs: Runs, num_updates: int, active: np.ndarray, *, batch_size: int | batching.Phases) -> Runs:
        phases = batching.Phases.of(batch_size)
        states, streams, done = runs.states, runs.streams, runs.num_updates
        end = done + num_updates
        while done < end:
            size, begin, last = phases.at(done)
            most = max(1, min(length, WINDOW) // size)  # updates that a window holds
            first = (done - begin) % most
            if first == 0 or streams is None:
                begun = batching.Count.of(phases.examples(done - first))
                streams = jnp.stack([window(key, begun, entries=most * size) for key in runs.stream_keys])
            count = min(end - done, most - first, (last or end) - done)
            given = states, runs.learning_rates, runs.seeds, active, streams, first, count, problem.train
            states = train(*given, batch_size=size)
            done += count
        values = evaluate_runs(states.params, runs.values, active, examples)
        return runs._replace(states=states, streams=streams, values=values, num_updates=done)

    return Trainer(start, advance, length, num_evaluated)


def _training(problem: Problem, optimizer: Optimizer, gradient: Callable[[int], Gradient]) -> tuple[Callable, Callable]:
    """Return the programs that begin runs, and that make `count` updates from the `first` of a window on."""

    @jax.jit
    def begin(params: Sequence[Any], learning_rates):
        def start(params, rate):
            return descent.method(gradients.mean(problem.loss, weight=problem.weight), optimizer(rate)).init(params)

        return jax.vmap(start)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *params), learning_rates)

    @partial(jax.jit, static_argnames="batch_size", donate_argnums=0)
    def train(states, learning_rates, seeds, active, streams, first, count, data, *, batch_size):
        in_flight = IN_FLIGHT.get(jax.default_backend(), ACCELERATOR_IN_FLIGHT)
        at_once = _largest_divisor(len(seeds), in_flight // batch_size)

        def run(state, learning_rate, seed, active):
            method = descent.method(gradient(batch_size), optimizer(learning_rate))
            batches = streams[seed].reshape(-1, batch_size)
            # Side by side, runs would select at every update what to keep.
            budget = count if at_once > 1 else jnp.where(active, count, 0)
            return descent.until(method, state, data, batches, first=first, num_updates=budget)[0]

        each = states, learning_rates, seeds, active
        return lax.map(lambda each: run(*each), each, batch_size=at_once if at_once > 1 else None)

    return begin, train


def _evaluating(evaluate: Callable) -> Callable:
    """Return the program that evaluates the runs that are active and keeps the values [L] of the others."""

    @jax.jit
    def evaluate_runs(params, values, active, examples):
        def run(params, value, active):
            return lax.cond(active, lambda: evaluate(params, examples), lambda: value)

        return lax.map(lambda each: run(*each), (params, values, active))

    return evaluate_runs


def _largest_divisor(number: int, limit: int) -> int:
    return max(i for i in range(1, number + 1) if number % i == 0 and i <= max(limit, 1))
