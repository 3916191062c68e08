"""Stochastic, mini-batch and batch gradient descent: one program, cut at different points of one stream.

Every batch size starts from the same parameters, sees the same stream and the same number of examples. Only the number
of examples per update differs, and the learning rate, which is tuned for each.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdjax import batching, curvature, gradients, timing, tuning
from gdjax._trees import kept, wide
from gdjax.compare._plan import Plan, plan
from gdjax.gradients import Gradient
from gdjax.problem import Problem
from gdjax.tuning import Budget

NUM_AT_ONCE = 64  # examples of a gradient over all that are judged
DIVERGED = 1e3  # a final loss this many times the initial one has diverged, whether or not it overflowed

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
        metrics: {name: [S, E]}, mean over the examples of `metrics_on`; with an average the loss too, and all of them
            at its parameters, as 'loss of the average'.
        metrics_on: 'test', or 'train' where the problem has no test examples.
        gradient_noise: E|g_B - g|^2 / |g|^2 over the batches of an epoch of `num_noise` examples, at the initial
            parameters; NaN where a batch is larger than that, and 0 where it is all N.
        num_noise: examples that it is taken over, at most NUM_EVALUATED.
        seconds: time of one run of T updates, without evaluation.
        extrapolated: whether an update was too long to be timed, so that its time is in proportion to the examples.
        microbatch_size: examples that a gradient holds at a time, None for all B.
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
    num_noise: int
    seconds: float
    extrapolated: bool
    microbatch_size: int | None
    compile_seconds: float
    flops_per_gradient: float | None
    memory_per_gradient: float | None
    sweep_seconds: float
    num_runs: int

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> "Row":
        """Return the row whose fields are in `kept`, arrays as lists, as a JSON file gives them back."""
        row = cls(**kept)
        metrics = {name: np.asarray(values, float) for name, values in row.metrics.items()}
        return dataclasses.replace(
            row, examples_seen=np.asarray(row.examples_seen), losses=np.asarray(row.losses, float), metrics=metrics
        )

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


def batch_sizes(
    problem: Problem,
    sizes: Sequence[int] | None = None,
    *,
    planned: Plan | None = None,
    seed: int = 0,
    done: Sequence[Row] = (),
    keep: Callable[[Row], None] = lambda row: None,
    progress: Progress = lambda stage, fraction: None,
    **options: Any,
) -> list[Row]:
    """Train at every batch size on the same stream, each at its best learning rate, and measure.

    Args:
        problem: what to train.
        sizes: batch sizes; default (1, 32, N).
        planned: what to do, from `plan`; by default it is made here, of `options`.
        seed: of the key that parameters and streams are drawn from.
        done: rows of an earlier call with the same plan and seed; their batch sizes are not run again.
        keep: called with every row when it is known.
        progress: called with what is being done and the fraction that is done, now and then.
        **options: as in `plan`: optimizer, learning_rate, num_epochs, num_seeds, budget, memory, average.

    Returns:
        One Row for every batch size of the plan, in its order.

    Raises:
        ValueError: before anything is compiled, for a batch size outside 1 ... N or given twice, or numbers below 1.
    """
    what = planned or plan(problem, sizes, **options)
    rows = {row.batch_size: row for row in done}
    for i, speed in enumerate(what.speeds):
        if speed.batch_size in rows:
            continue

        def of_all(stage: str, fraction: float, i=i) -> None:
            progress(stage, (i + fraction) / len(what.speeds))

        row = _row(problem, what, speed, seed, of_all)
        rows[row.batch_size] = row
        keep(row)
    return [rows[speed.batch_size] for speed in what.speeds]


def gradient_noise(problem: Problem, gradient: Gradient, batch_size: int, examples, init_key, stream_key):
    """Return E|g_B - g|^2 / |g|^2 over the batches of one epoch, at the initial parameters: tr Cov(update) / |g|^2.

    The learning rate cancels. For N uniform examples it is (tr Sigma / B) (N - B)/(N - 1) / |g|^2 (SGD without
    replacement).

    Args:
        problem, gradient: the loss, and an estimator of its mean gradient.
        batch_size: B.
        examples: the N examples that the epoch goes over.
        init_key, stream_key: of the parameters, and of the order of the epoch.
    """
    params = problem.init(init_key)
    count = len(jax.tree.leaves(examples)[0])
    stream = batching.reshuffled(stream_key, count, num_epochs=1)
    whole = gradients.microbatched(problem.loss, weight=problem.weight, microbatch_size=min(count, NUM_AT_ONCE))
    full = whole(params, examples).grad
    size = curvature.magnitude(full)  # in any unit of the loss, no square overflows or vanishes
    full = jax.tree.map(lambda leaf: wide(leaf) / size.astype(wide(leaf).dtype), full)

    def squared_error(indices):
        estimate = gradient(params, batching.take(examples, indices))
        error = jax.tree.map(lambda g, f: wide(g) / size.astype(f.dtype) - f, estimate.grad, full)
        return curvature.inner(error, error)

    errors = jax.lax.map(squared_error, batching.batches(stream, batch_size, drop_remainder=True))
    return errors.mean() / curvature.inner(full, full)


def _row(problem: Problem, what: Plan, speed: tuning.Speed, seed: int, progress: Progress) -> Row:
    """Tune one batch size, with the draws that all batch sizes share: keys are used again on purpose."""
    batch_size, num_examples = speed.batch_size, problem.num_examples
    num_updates = what.num_examples // batch_size
    tuned = _tuned(problem, what, speed, jax.random.key(seed), progress)
    history, best = tuned.history, tuned.best
    assert history is not None
    values = jax.tree.map(lambda x: x[best], history.values)
    progress(f"B = {batch_size}: its gradient", 0.9)
    flops, memory = _gradient_counts(problem, what, batch_size)
    noise, num_noise = _noise(problem, what, batch_size, jax.random.key(seed))
    return Row(
        name="stochastic" if batch_size == 1 else "batch" if batch_size == num_examples else "mini-batch",
        batch_size=batch_size,
        num_updates=num_updates,
        num_examples=num_updates * batch_size,
        num_epochs=num_updates * batch_size / num_examples,
        learning_rate=tuned.rate,
        learning_rates=tuned.learning_rates.tolist(),
        tuning_losses=tuned.losses.tolist(),
        at_edge=what.learning_rate is None and tuned.at_edge,
        examples_seen=history.updates * batch_size,
        losses=values["loss"],
        metrics=values["metrics"],
        metrics_on="train" if problem.test is None else "test",
        gradient_noise=noise,
        num_noise=num_noise,
        seconds=speed.seconds_per_update * num_updates,
        extrapolated=speed.extrapolated,
        microbatch_size=speed.microbatch_size,
        compile_seconds=speed.compile_seconds,
        flops_per_gradient=flops,
        memory_per_gradient=memory,
        sweep_seconds=tuned.seconds,
        num_runs=tuned.costs.size,
    )


def _tuned(problem: Problem, what: Plan, speed: tuning.Speed, key, progress: Progress) -> tuning.Tuning:
    """Return the search of one batch size, evaluated every N // B updates and at the end."""
    batch_size = speed.batch_size
    num_updates = what.num_examples // batch_size
    num_runs = what.num_seeds * len(what.learning_rates)
    trained = f"B = {batch_size}: {num_runs} runs of {num_updates} updates"
    progress(trained, 0.0)
    search = tuning.search(_trainer(problem, what, num_runs), Budget(what.num_examples), lambda values: values["loss"])
    limits: dict[str, Any] = {
        "batch_size": batch_size,
        "num_seeds": what.num_seeds,
        "key": key,
        "every": max(1, min(problem.num_examples // batch_size, num_updates)),
        "stop_diverged": what.learning_rate is None,
        "progress": lambda updates, loss: progress(trained, 0.9 * updates / num_updates),
    }
    if what.learning_rate is not None:
        return search(np.asarray(what.learning_rates), **limits)
    return tuning.search_grid(search, np.asarray(what.learning_rates), **limits)


def _trainer(problem: Problem, what: Plan, num_runs: int) -> Any:
    on = "train" if problem.test is None else "test"

    def evaluate(params, examples):
        train, test = examples
        if what.average is None:
            last, metrics = params, problem.evaluate(params, test, names=tuple(problem.metrics))
        else:
            last, mean = params
            metrics = problem.evaluate(last, test)
            metrics |= {f"{name} of the average": value for name, value in problem.evaluate(mean, test).items()}
        return {"loss": problem.evaluate(last, train, names=("loss",))["loss"], "metrics": metrics}

    def make():
        examples = tuning.evaluation_examples(problem, "train"), tuning.evaluation_examples(problem, on)
        return tuning.trainer(
            problem,
            what.optimizer,
            evaluate=evaluate,
            examples=examples,
            num_evaluated=len(jax.tree.leaves(examples[0])[0]),
            num_runs=num_runs,
            gradient=tuning.estimator(problem, what.microbatches),
            average=what.average,
        )

    microbatches = tuple(what.microbatches.items())
    return kept(problem, ("compare", what.optimizer, num_runs, microbatches, what.average), make)


def _gradient_counts(problem: Problem, what: Plan, batch_size: int) -> tuple[float | None, int | None]:
    """Return (floating-point operations, temporary bytes) of one gradient, by the compiler's count; nothing is run."""
    size = what.microbatches[batch_size]
    gradient = tuning.estimator(problem, what.microbatches)(batch_size)
    params = jax.eval_shape(problem.init, jax.random.key(0))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch_size, *np.shape(x)[1:]), jnp.result_type(x)), problem.train
    )
    program = kept(problem, ("gradient", batch_size, size), lambda: timing.compiled(gradient, params, batch))
    pieces = -(-batch_size // (size or batch_size))  # the body of a loop counts once
    return program.flops and program.flops * pieces, program.temporary_bytes


def _noise(problem: Problem, what: Plan, batch_size: int, key) -> tuple[float, int]:
    """Return (gradient noise, the number of examples that it was taken over)."""
    examples = tuning.evaluation_examples(problem, "train")
    count = len(jax.tree.leaves(examples)[0])
    if batch_size >= count:
        return 0.0 if batch_size == problem.num_examples else float("nan"), count
    gradient = tuning.estimator(problem, what.microbatches)(batch_size)
    measure = partial(gradient_noise, problem, gradient, batch_size)

    def of_seeds(examples, *keys):
        return jax.lax.map(lambda pair: measure(examples, *pair), keys)

    program = kept(problem, ("noise", batch_size, what.microbatches[batch_size]), lambda: jax.jit(of_seeds))
    init_key, stream_key = (jax.random.split(part, what.num_seeds) for part in jax.random.split(key))
    return float(program(examples, init_key, stream_key).mean()), count
