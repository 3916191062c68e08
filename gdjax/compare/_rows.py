"""Stochastic, mini-batch and batch gradient descent: one program, cut at different points of one stream.

Every batch size starts from the same parameters, sees the same stream and the same number of examples. Only the number
of examples per update differs, and the learning rate, which is tuned for each.

>>> tried = tune(lambda rates: (np.log10(rates) - 1) ** 2, np.asarray([0.01, 0.1, 1.0]))  # the best is beyond the grid
>>> list(tried), best_rate(tried)
([0.01, 0.1, 1.0, 10.0, 100.0, 1000.0], 10.0)
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from gdjax import batching, descent, gradients, timing
from gdjax.problem import Problem
from gdjax.tuning import _histories as histories

LEARNING_RATES = tuple(np.logspace(-2.5, 1, 8).tolist())
DIVERGED = 1e3  # a final loss this many times the initial one has diverged, whether or not it overflowed
MAX_GRIDS = 4  # of 8 rates, each 4 decades from the one before
NUM_EPOCHS = 64
NUM_SEEDS = 3

Progress = Callable[[str, float], None]
"""(what is being done, fraction of all that is done)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One batch size: what it did, what it reached, and what it cost. Arrays run over seeds [S] and records [E].

    Attributes:
        name: 'stochastic' (B = 1), 'batch' (B = N) or 'mini-batch'.
        batch_size: B, examples per update.
        num_updates, num_examples, num_epochs: T, T * B and T * B / N, for one run.
        learning_rate: the one used, the best of `learning_rates` unless it was given.
        learning_rates, tuning_losses: the rates tried, and the mean final training loss of each, inf if one diverged.
        at_edge: whether the best rate is still the largest or smallest that was tried.
        examples_seen: int [E], where the run was evaluated, from 0.
        losses: [S, E], mean loss over the training examples.
        metrics: {name: [S, E]}, mean over the examples of `metrics_on`.
        metrics_on: 'test', or 'train' where the problem has no test examples.
        gradient_noise: E|g_B - g|^2 / |g|^2 over the batches of an epoch, at the initial parameters.
        seconds: median time of one run of T updates, without evaluation.
        compile_seconds: compilation of that run.
        flops_per_gradient, memory_per_gradient: floating-point operations and temporary bytes of one compiled
            gradient, by the compiler's own count; None where it has none.
        sweep_seconds, num_runs: time and number of trainings spent on tuning.
    """

    name: str
    batch_size: int
    num_updates: int
    num_examples: int
    num_epochs: float
    learning_rate: float
    learning_rates: list[float]
    tuning_losses: list[float]
    at_edge: bool
    examples_seen: np.ndarray
    losses: np.ndarray
    metrics: dict[str, np.ndarray]
    metrics_on: str
    gradient_noise: float
    seconds: float
    compile_seconds: float
    flops_per_gradient: float | None
    memory_per_gradient: float | None
    sweep_seconds: float
    num_runs: int

    @property
    def diverged(self) -> np.ndarray:
        """Which seeds ended with a training loss that is not finite, or far above where they began; bool [S]."""
        return ~(self.losses[:, -1] - self.losses[:, 0] <= DIVERGED * np.abs(self.losses[:, 0]))

    @property
    def num_diverged(self) -> int:
        """The number of seeds that diverged."""
        return int(np.sum(self.diverged))

    def summary(self) -> dict[str, Any]:
        """Return the row for a JSON file: every field, then final values (mean and deviation over seeds) and rates."""
        final = {"train_loss": self.losses} | {f"{self.metrics_on}_{name}": x for name, x in self.metrics.items()}
        with np.errstate(invalid="ignore", over="ignore"):  # in a diverged run
            means = {name: values[:, -1].mean() for name, values in final.items()}
            deviations = {f"{name}_std": values[:, -1].std(ddof=1) for name, values in final.items() if len(values) > 1}
        return {
            "test_accuracy": None,  # there for every problem, so that a reader of rows need not ask
            **dataclasses.asdict(self),
            **means,
            **deviations,
            "num_diverged": self.num_diverged,
            "microseconds_per_update": 1e6 * self.seconds / self.num_updates,
            "examples_per_second": self.num_examples / self.seconds,
        }


def compare(
    problem: Problem,
    *,
    batch_sizes: Sequence[int] | None = None,
    learning_rate: float | None = None,
    num_epochs: int = NUM_EPOCHS,
    num_seeds: int = NUM_SEEDS,
    seed: int = 0,
    progress: Progress = lambda stage, fraction: None,
) -> list[Row]:
    """Train at every batch size on the same stream, each at its best learning rate, and measure.

    Args:
        problem: what to train.
        batch_sizes: default (1, 32, N).
        learning_rate: one rate for all batch sizes, instead of tuning.
        num_epochs: length of the stream in epochs; all batch sizes see it, less a last incomplete batch.
        num_seeds: initial parameters and streams drawn, each used at every batch size and rate.
        seed: of the key that they are drawn from.
        progress: called with what is being done and the fraction that is done, now and then.

    Returns:
        One Row for every batch size, in the order given.

    Raises:
        ValueError: before anything is compiled, for a batch size outside 1 ... N or given twice, or numbers below 1.
    """
    num_examples = problem.num_examples
    batch_sizes = default_batch_sizes(num_examples) if batch_sizes is None else tuple(batch_sizes)
    _check(batch_sizes, num_examples, learning_rate, num_epochs, num_seeds)
    init_key, stream_key = jax.random.split(jax.random.key(seed))
    keys = jax.random.split(init_key, num_seeds), jax.random.split(stream_key, num_seeds)
    data = problem.train, problem.train if problem.test is None else problem.test
    rows = []
    for i, batch_size in enumerate(batch_sizes):

        def of_all(stage: str, fraction: float, i=i) -> None:
            progress(stage, (i + fraction) / len(batch_sizes))

        rows.append(_row(problem, batch_size, num_epochs, data, keys, learning_rate, of_all))
    return rows


def default_batch_sizes(num_examples: int) -> tuple[int, ...]:
    """Return (1, 32, N), without repeats where N <= 32."""
    return tuple(dict.fromkeys((1, min(32, num_examples), num_examples)))


def gradient_noise(problem: Problem, batch_size: int, data, init_key, stream_key):
    """Return E|g_B - g|^2 / |g|^2 over the batches of one epoch, at the initial parameters: tr Cov(update) / |g|^2.

    The learning rate cancels. For N uniform examples it is (tr Sigma / B) (N - B)/(N - 1) / |g|^2 (SGD without
    replacement).
    """
    gradient = gradients.mean(problem.loss)
    params = problem.init(init_key)
    stream = batching.reshuffled(stream_key, problem.num_examples, num_epochs=1)
    full = gradient(params, data).grad

    def squared_error(indices):
        estimate = gradient(params, batching.take(data, indices))
        return optax.tree.norm(optax.tree.sub(estimate.grad, full), squared=True)

    errors = jax.lax.map(squared_error, batching.cut(stream, batch_size, drop_remainder=True))
    return errors.mean() / optax.tree.norm(full, squared=True)


def tune(losses_at: Callable[[np.ndarray], np.ndarray], grid: np.ndarray, *, grow: bool = True) -> dict[float, float]:
    """Return {rate: loss} over a logarithmic grid that grows until its best rate is not at an edge.

    Args:
        losses_at: rates [R] -> losses [R]; NaN and infinity count as infeasible. Every call is for R rates, so that one
            compiled program serves them all.
        grid: the first rates [R], ascending.
        grow: whether to look beyond the first grid; at most MAX_GRIDS grids are tried.
    """
    found: dict[float, float] = {}
    factor = (grid[-1] / grid[0]) * (grid[1] / grid[0]) if grow else 1.0
    below = above = grid
    for _ in range(MAX_GRIDS if grow else 1):
        losses = losses_at(grid)
        found |= zip(grid.tolist(), np.where(np.isfinite(losses), losses, np.inf).tolist(), strict=True)
        best = best_rate(found)
        if best == min(found):  # also where every rate diverged
            grid = below = below / factor
        elif best == max(found):
            grid = above = above * factor
        else:
            break
    return dict(sorted(found.items()))


def best_rate(losses: dict[float, float]) -> float:
    """Return the rate of the lowest loss, the smallest such rate where several are equal."""
    return min(losses, key=lambda rate: (losses[rate], rate))


def _row(problem: Problem, batch_size: int, num_epochs: int, data, keys, learning_rate, progress) -> Row:
    """Tune, then time, one batch size, with the draws that all batch sizes share: keys are used again on purpose."""
    again = partial(jax.tree.map, jax.random.clone, keys)
    num_examples, num_seeds = problem.num_examples, len(keys[0])
    num_updates = num_epochs * num_examples // batch_size
    grid = np.asarray(LEARNING_RATES if learning_rate is None else (learning_rate,))

    def watch(fraction: float) -> None:
        runs = f"{len(grid) * num_seeds} runs of {num_updates} updates"
        progress(f"B = {batch_size}: {runs}", 0.9 * fraction)

    watch(0.0)
    train_lanes = histories.of_lanes(problem, batch_size, num_epochs, data, again(), len(grid), watch)
    found, sweep_seconds = {}, 0.0

    def losses_at(rates: np.ndarray) -> np.ndarray:
        nonlocal sweep_seconds
        history, elapsed = timing.timed(train_lanes, rates)
        sweep_seconds += elapsed
        for i, rate in enumerate(rates.tolist()):
            found[rate] = jax.tree.map(lambda x, i=i: x[:, i], history)
        return history["loss"][:, :, -1].mean(0)

    losses = tune(losses_at, grid, grow=learning_rate is None)
    rate = best_rate(losses)

    progress(f"B = {batch_size}: timing at learning rate {rate:.3g}", 0.9)
    init_key, stream_key = (keys_of_seeds[0] for keys_of_seeds in again())
    params = problem.init(init_key)
    batches = histories.batches(problem, batch_size, num_epochs, stream_key)
    run = timing.compiled(partial(_descend, problem), data[0], batches, params, rate)
    batch = jax.tree.map(lambda x: x[:batch_size], data[0])
    step = timing.compiled(gradients.mean(problem.loss), params, batch)
    noise = jax.jit(jax.vmap(partial(gradient_noise, problem, batch_size), (None, 0, 0)))(data[0], *again())
    return Row(
        name="stochastic" if batch_size == 1 else "batch" if batch_size == num_examples else "mini-batch",
        batch_size=batch_size,
        num_updates=num_updates,
        num_examples=num_updates * batch_size,
        num_epochs=num_updates * batch_size / num_examples,
        learning_rate=rate,
        learning_rates=list(losses),
        tuning_losses=list(losses.values()),
        at_edge=learning_rate is None and rate in (min(losses), max(losses)),
        examples_seen=found[rate]["examples"][0],
        losses=found[rate]["loss"],
        metrics=found[rate]["metrics"],
        metrics_on="train" if problem.test is None else "test",
        gradient_noise=float(noise.mean()),
        seconds=timing.seconds(run, data[0], batches, params, rate),
        compile_seconds=run.compile_seconds,
        flops_per_gradient=step.flops,
        memory_per_gradient=step.temporary_bytes,
        sweep_seconds=sweep_seconds,
        num_runs=len(losses) * num_seeds,
    )


def _descend(problem: Problem, data, batches, params, learning_rate):
    """Return the parameters after one update for each batch: the loop alone, to be timed."""
    method = descent.method(gradients.mean(problem.loss), optax.sgd(learning_rate))
    state, _ = descent.run(method, method.init(params), data, batches, lambda state, info: (), every=len(batches))
    return state.params


def _check(batch_sizes: Sequence[int], num_examples: int, learning_rate, num_epochs: int, num_seeds: int) -> None:
    for batch_size in batch_sizes:
        if not 1 <= batch_size <= num_examples:
            raise ValueError(f"batch_size={batch_size} must be between 1 and N={num_examples}, the training examples")
    if len(set(batch_sizes)) < len(batch_sizes) or not batch_sizes:
        raise ValueError(f"batch_sizes={tuple(batch_sizes)} must be different, and at least one")
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate={learning_rate} must be positive and finite")
    for name, value, entries in (("num_epochs", num_epochs, num_examples), ("num_seeds", num_seeds, 1)):
        limit = (2**31 - 1) // entries  # examples seen are counted in int32
        if not 1 <= value <= limit:
            raise ValueError(f"{name}={value} must be at least 1 and at most {limit}")
