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
from jax import lax

from gdjax import batching, descent, gradients
from gdjax._trees import kept
from gdjax.gradients import Gradient
from gdjax.problem import Batch, Params, Problem
from gdjax.training import average as averages
from gdjax.tuning import _faults
from gdjax.tuning._optimizers import Optimizer, Recipe, made, needs_num_updates

# Examples in memory at once, in all runs together, at least one run's batch: a GPU is idle without many. On a CPU few
# runs are faster side by side (see `sweep.vmap`), and one after another they need not go on where they have arrived.
IN_FLIGHT = {"cpu": 1}
ACCELERATOR_IN_FLIGHT = 2048
WINDOW = 2**18  # entries of a stream drawn at a time, or one batch, or one epoch where that is shorter


class Runs(NamedTuple):
    """Where runs stand: [L], rates varying fastest over seeds, then those that are not used.

    Attributes:
        states: descent.State, [L].
        learning_rates: [L], or [L, K] for an optimiser of K numbers.
        horizon: updates that a schedule is made for, or None.
        stream_keys: of each seed.
        seeds: int [L], the seed of each run.
        streams: int32[S, W], the part of each seed's stream that updates are being made from.
        values: pytree of [L], what the evaluation said after the last update of each run.
        num_updates: made so far.
    """

    states: descent.State
    learning_rates: jax.Array
    horizon: int | None
    stream_keys: jax.Array
    seeds: np.ndarray
    streams: jax.Array | None
    values: Any
    num_updates: int


class Trainer(NamedTuple):
    """How runs begin and go on.

    Attributes:
        start: `(learning_rates [R], *, num_seeds, key, horizon=None) -> Runs`, evaluated. Where the optimiser needs
            the number of updates that a run is to make, that is the horizon.
        advance: `(runs, num_updates, active [L], *, batch_size) -> Runs` after so many updates, evaluated; runs that
            are not active are left where they are, or go on unevaluated. The runs given are used up. The batch size is
            a number, or the `batching.Phases` of all updates from the start.
        num_examples: N.
        num_evaluated: examples in an evaluation.
        fault: params -> which example's loss, gradient or metric is not finite there, in words, or None.
    """

    start: Callable[..., Runs]
    advance: Callable[..., Runs]
    num_examples: int
    num_evaluated: int
    fault: Callable[[Params], str | None] = lambda params: None


def trainer(
    problem: Problem,
    optimizer: Optimizer,
    *,
    evaluate: Callable[[Params, Batch], Any],
    examples: Batch,
    num_evaluated: int,
    num_runs: int = 0,
    gradient: Callable[[int], Gradient] | None = None,
    average: float | None = None,
) -> Trainer:
    """Return how runs of gradient descent on `problem` begin and go on.

    Args:
        problem: what to train.
        optimizer: learning_rate -> optax transformation, or (learning_rate, num_updates) -> one. The rate may be a row
            of K numbers.
        evaluate: (params, examples) -> pytree of scalars. With an `average` it is given the pair of the last
            parameters and the averaged ones.
        examples: what it is given.
        num_evaluated: how many these are, for who decides how often.
        num_runs: L, at least; more than are asked for are never active.
        gradient: batch size -> estimator; default `gradients.mean` of the problem's loss.
        average: half-life, in examples, of the weights with which the parameters are averaged along the run;
            infinity is their plain mean. Default none.
    """
    length = problem.num_examples
    # One seed at a time: one program serves any number of them.
    init = kept(problem.init, "tuning", lambda: jax.jit(problem.init))
    gradient = gradient or (lambda batch_size: gradients.mean(problem.loss, weight=problem.weight))
    begin, train = _training(problem, optimizer, gradient, average)
    evaluate_runs = _evaluating(evaluate, averaged=average is not None)

    @partial(jax.jit, static_argnames="entries")
    def window(key, start, *, entries):
        return batching.reshuffled(key, length, start=start, length=entries)

    def start(learning_rates: np.ndarray, *, num_seeds: int, key: jax.Array, horizon: int | None = None) -> Runs:
        if horizon is None and needs_num_updates(optimizer):
            raise ValueError("horizon=None: this optimiser needs the number of updates that its schedule is made for")
        if not needs_num_updates(optimizer):
            horizon = None  # one program for all
        init_key, stream_key = jax.random.split(key)
        num_rates = len(learning_rates)
        total = max(num_runs, num_seeds * num_rates)
        seeds = np.minimum(np.arange(total) // num_rates, num_seeds - 1)
        params = list(map(init, jax.random.split(init_key, num_seeds)))
        rates = jnp.asarray(np.resize(learning_rates, (total, *np.shape(learning_rates)[1:])), float)
        states = begin([params[seed] for seed in seeds], rates, horizon)
        used = np.arange(total) < num_seeds * num_rates
        pair = params[0] if average is None else (params[0], params[0])
        shapes = jax.eval_shape(evaluate, pair, examples)
        unknown = jax.tree.map(lambda x: jnp.full(total, jnp.inf, x.dtype), shapes)
        values = evaluate_runs(states, unknown, used, examples)
        return Runs(states, rates, horizon, jax.random.split(stream_key, num_seeds), seeds, None, values, 0)

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
            states = train(*given, horizon=runs.horizon, batch_size=size)
            done += count
        values = evaluate_runs(states, runs.values, active, examples)
        return runs._replace(states=states, streams=streams, values=values, num_updates=done)

    return Trainer(start, advance, length, num_evaluated, partial(_faults.fault, problem))


def _training(
    problem: Problem, optimizer: Optimizer, gradient: Callable[[int], Gradient], average: float | None
) -> tuple[Callable, Callable]:
    """Return the programs that begin runs, and that make `count` updates from the `first` of a window on."""
    # A schedule of optax branches on its length: only ours serves all lengths by one program.
    fixed = () if isinstance(optimizer, Recipe) else ("horizon",)

    def method_of(rate, horizon, batch_size: int) -> descent.Method:
        method = descent.method(gradient(batch_size), made(optimizer, rate, horizon))
        return method if average is None else averages.averaged(method, average)

    @partial(jax.jit, static_argnames=fixed)
    def begin(params: Sequence[Any], learning_rates, horizon):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        return jax.vmap(lambda params, rate: method_of(rate, horizon, 1).init(params))(stacked, learning_rates)

    @partial(jax.jit, static_argnames=("batch_size", *fixed), donate_argnums=0)
    def train(states, learning_rates, seeds, active, streams, first, count, data, *, horizon, batch_size):
        in_flight = IN_FLIGHT.get(jax.default_backend(), ACCELERATOR_IN_FLIGHT)
        at_once = _largest_divisor(len(seeds), in_flight // batch_size)

        def run(state, learning_rate, seed, active):
            method = method_of(learning_rate, horizon, batch_size)
            batches = streams[seed].reshape(-1, batch_size)
            # Side by side, runs would select at every update what to keep.
            budget = count if at_once > 1 else jnp.where(active, count, 0)
            return descent.until(method, state, data, batches, first=first, num_updates=budget)[0]

        each = states, learning_rates, seeds, active
        return lax.map(lambda each: run(*each), each, batch_size=at_once if at_once > 1 else None)

    return begin, train


def _evaluating(evaluate: Callable, *, averaged: bool) -> Callable:
    """Return the program that evaluates the runs that are active and keeps the values [L] of the others."""

    def parameters(state: descent.State) -> Any:
        if not averaged:
            return state.params
        state, average = averages.split(state)
        mean = averages.in_place(average, state.params)
        begun = average.num_updates > 0  # before that, there is nothing to average
        return state.params, jax.tree.map(lambda mean, last: jnp.where(begun, mean, last), mean, state.params)

    @jax.jit
    def evaluate_runs(states, values, active, examples):
        def run(state, value, active):
            return lax.cond(active, lambda: evaluate(parameters(state), examples), lambda: value)

        return lax.map(lambda each: run(*each), (states, values, active))

    return evaluate_runs


def _largest_divisor(number: int, limit: int) -> int:
    return max(i for i in range(1, number + 1) if number % i == 0 and i <= max(limit, 1))
