"""Which batch size and rate reach a target first: a search in plain JAX and optax that shares no code with the advice.

Every batch size is tried at rates a factor of two apart, with three seeds, from the best rate of the one beside it on:
downwards while the lowest is best, upwards until two rates in a row are worse or fail. A rate fails where a seed fails.
The best pairs, and the advised one, are run again with ten fresh seeds, and tens more until their means are exact to
EXACT, as long as that takes seconds. Only the loss, the metric and the examples that the target is judged on are those
of the problem.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import lax

from gdjax import tuning
from gdjax.problem import Problem

FACTOR, NUM_SEEDS, NUM_FRESH, NUM_FINAL = 2.0, 3, 10, 5
GROWTH = 1.08  # between two looks at a run
MAX_EPOCHS = 200
MOST_FAILED = 8  # rates of one batch size
SHORTEST = 1e-3  # seconds that a timed run takes at least: to call a program costs tens of microseconds
EXACT = 0.03  # standard error of a mean, over it
SETTLING, MOST_FRESH = 20.0, 100  # seconds and fresh seeds after which a mean is let be
SLOW = 3.0  # times the best at a batch size, or of all, that a run is waited for


class Found(NamedTuple):
    """What the search found.

    Attributes:
        batch_size, learning_rate, seconds: of the best pair, by fresh seeds.
        advised_seconds: of the advised pair by the same seeds, infinite where one does not arrive.
        num_seeds, arrived: how many seeds these are, and with how many of them the advised pair arrives.
        searched: {batch size: (best rate, seconds by three seeds)}.
        at_edge: batch sizes whose best rate is at the edge of those tried.
        search_seconds: that the search took.
        complete: whether it came to its end.
    """

    batch_size: int
    learning_rate: float
    seconds: float
    advised_seconds: float
    num_seeds: int
    arrived: int
    searched: dict[int, tuple[float, float]]
    at_edge: list[int]
    search_seconds: float
    complete: bool


class Runner:
    """Runs of one problem, each from a seed, at any batch size and rate."""

    def __init__(self, problem: Problem, optimizer: Callable[..., Any], target: tuning.Target):
        self.problem, self.optimizer, self.target = problem, optimizer, target
        metric = problem.loss if target.metric == "loss" else problem.metrics[target.metric]
        examples = tuning.evaluation_examples(problem, target.on)
        value = jax.jit(lambda params, data: jax.vmap(metric, (None, 0))(params, data).mean())
        self.evaluate = lambda params: float(value(params, examples))
        self.init = jax.jit(lambda key, rate: (params := problem.init(key), optimizer(rate).init(params)))
        self.programs: dict[int, Callable[..., Any]] = {}
        self.speeds: dict[int, float] = {}

    def advance(self, batch_size: int) -> Callable[..., Any]:
        """Return `(state, rate, order, first, count) -> state` after `count` updates, from batch `first` on."""
        loss, optimizer = self.problem.loss, self.optimizer

        def program(state, rate, data, order, first, count):
            def step(i, state):
                params, inner = state
                indices = lax.dynamic_slice(order, ((first + i) * batch_size,), (batch_size,))
                batch = jax.tree.map(lambda x: x[indices], data)
                grads = jax.grad(lambda params: jax.vmap(loss, (None, 0))(params, batch).mean())(params)
                updates, inner = optimizer(rate).update(grads, inner, params)
                return optax.apply_updates(params, updates), inner

            return lax.fori_loop(0, count, step, state)

        if batch_size not in self.programs:
            self.programs[batch_size] = jax.jit(program)
        made = self.programs[batch_size]
        return lambda state, rate, order, first, count: made(state, rate, self.problem.train, order, first, count)

    def updates(self, batch_size: int, rate: float, seed: int, most: float) -> float:
        """Return the updates to the target, infinite where it is not reached in `most`."""
        advance, draw = self.advance(batch_size), np.random.default_rng(seed)
        state = self.init(jax.random.key(seed), rate)
        an_epoch = self.problem.num_examples // batch_size
        before, done, order = self.evaluate(state[0]), 0, None
        while done < most:
            end = min(max(done + 1, math.ceil(GROWTH * done)), math.ceil(most))
            start = done
            while done < end:
                if done % an_epoch == 0 or order is None:
                    order = draw.permutation(self.problem.num_examples).astype(np.int32)
                count = min(end - done, an_epoch - done % an_epoch)
                state = advance(state, rate, order, done % an_epoch, count)
                done += count
            value = self.evaluate(state[0])
            if not math.isfinite(value):
                return math.inf
            if self.target.reached(value):
                part = (self.target.value - before) / (value - before)
                return start + part * (end - start) if start else float(end)
            before = value
        return math.inf

    def speed(self, batch_size: int) -> float:
        """Return seconds per update, the least of a few and of all earlier ones."""
        advance, count = self.advance(batch_size), min(self.problem.num_examples // batch_size, 256)
        state, num_examples = self.init(jax.random.key(0), 1e-6), self.problem.num_examples
        while True:
            order = np.arange(max(count * batch_size, num_examples), dtype=np.int32) % num_examples
            jax.block_until_ready(advance(state, 1e-6, order, 0, count))
            runs = []
            for _ in range(5):
                began = time.perf_counter()
                jax.block_until_ready(advance(state, 1e-6, order, 0, count))
                runs.append(time.perf_counter() - began)
            if min(runs) >= SHORTEST:
                break
            count *= 4
        self.speeds[batch_size] = min(min(runs) / count, self.speeds.get(batch_size, math.inf))
        return self.speeds[batch_size]

    def mean(self, batch_size: int, rate: float, most: float) -> float:
        """Return the mean updates of NUM_SEEDS seeds, infinite where one fails, which ends it: see `_mean`."""
        costs: list[float] = []
        while len(costs) < NUM_SEEDS and math.inf not in costs:
            costs.append(self.updates(batch_size, rate, len(costs), most))
        return _mean(np.asarray(costs))


def judged(
    problem: Problem,
    optimizer: Callable[..., Any],
    target: tuning.Target,
    sizes: Sequence[int],
    rate: float,
    advised: tuple[int, float],
    *,
    limit: float = math.inf,
) -> Found:
    """Search all sizes, and run the best and the advised pair with ten fresh seeds.

    Args:
        problem, optimizer, target, sizes: what is searched.
        rate: to begin with, at the middle size.
        advised: (batch size, learning rate).
        limit: seconds after which the search goes no further.
    """
    began, runner = time.perf_counter(), Runner(problem, optimizer, target)
    middle = len(sizes) // 2
    best_rates: dict[int, float] = {}
    pairs: dict[tuple[int, float], float] = {}  # (batch size, rate) -> seconds
    at_edge: list[int] = []
    complete = True
    for size in [*sizes[middle:], *reversed(sizes[:middle])]:
        if best_rates:
            rate = best_rates[min(best_rates, key=lambda other: abs(math.log(other / size)))]
        speed = runner.speed(size)
        fastest = min(pairs.values(), default=math.inf)
        tried, complete = _tried(runner, size, rate, SLOW * fastest / speed, began + limit)
        least = min(tried, key=lambda r: (tried[r], r))
        if math.isfinite(tried[least]):
            best_rates[size] = least
            at_edge += [size] * (least in (min(tried), max(tried)))
            pairs |= {(size, r): cost * speed for r, cost in tried.items() if math.isfinite(cost)}
        if not complete:
            break
    search_seconds = time.perf_counter() - began
    for _ in range(3):
        for size in {*best_rates, advised[0]}:
            runner.speed(size)
    finals = sorted(pairs, key=pairs.__getitem__)[:NUM_FINAL]
    most = {pair: 4 * pairs[pair] for pair in finals}
    most[advised] = max(10 * pairs[finals[0]], most.get(advised, 0.0))
    costs = _fresh(runner, most)
    seconds = {pair: _mean(costs[pair]) * runner.speeds[pair[0]] for pair in most}
    best = min(finals, key=seconds.__getitem__)
    searched = {b: (r, pairs[b, r]) for b, r in sorted(best_rates.items())}
    arrived = int(np.isfinite(costs[advised]).sum())
    found = seconds[advised], len(costs[advised]), arrived, searched, at_edge, search_seconds, complete
    return Found(*best, seconds[best], *found)


def _fresh(runner: Runner, most: dict[tuple[int, float], float]) -> dict[tuple[int, float], np.ndarray]:
    """Return the updates [S] of pairs with fresh seeds, the same for all, none run for longer than `most` seconds."""
    costs = {pair: np.zeros(0) for pair in most}
    began, first = time.perf_counter(), 1000
    while True:
        for size, rate in most:
            limit = max(most[size, rate] / runner.speeds[size], 10)
            more = [runner.updates(size, rate, seed, limit) for seed in range(first, first + NUM_FRESH)]
            costs[size, rate] = np.append(costs[size, rate], more)
        first += NUM_FRESH
        with np.errstate(invalid="ignore"):
            errors = [np.std(found, ddof=1) / len(found) ** 0.5 / np.mean(found) for found in costs.values()]
        settled = not any(error > EXACT for error in errors)  # NaN where a seed does not arrive
        if settled or first >= 1000 + MOST_FRESH or time.perf_counter() - began > SETTLING:
            return costs


def _mean(costs: np.ndarray) -> float:
    """Return the mean of updates [S], infinite where one of the first ten takes three times the median of these."""
    few = costs[:NUM_FRESH]
    return float(costs.mean()) if (few <= 3 * np.median(few)).all() and np.isfinite(few).all() else math.inf


def _tried(runner: Runner, size: int, rate: float, most: float, end: float) -> tuple[dict[float, float], bool]:
    """Return {rate: updates} at one batch size, none longer than `most`, and whether that ended before `end`."""
    tried: dict[float, float] = {}
    most = min(MAX_EPOCHS * runner.problem.num_examples / size, max(most, 10))

    def attempt(rate: float) -> None:
        tried[rate] = runner.mean(size, rate, min(most, SLOW * min(tried.values(), default=most)))

    for start in (rate, rate / FACTOR, rate * FACTOR):
        attempt(start)
    while time.perf_counter() < end:
        rates, least = sorted(tried), min(tried, key=lambda r: (tried[r], r))
        if tried[least] == math.inf:  # nothing arrived: all diverge, or none is high enough
            if len(tried) > MOST_FAILED:
                return tried, True
            attempt(rates[0] / FACTOR if len(tried) % 2 else rates[-1] * FACTOR)
        elif least == rates[0]:
            attempt(rates[0] / FACTOR)
        elif sum(r > least for r in rates) < 2:
            attempt(rates[-1] * FACTOR)
        else:
            return tried, True
    return tried, False
