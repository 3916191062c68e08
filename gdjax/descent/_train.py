"""From a problem to a trained state in one call."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from gdjax import batching, gradients
from gdjax.descent._loops import run
from gdjax.descent._method import Info, Record, State, Stream, method
from gdjax.gradients import Gradient
from gdjax.problem import Problem


def train(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    *,
    key: jax.Array,
    batch_size: int,
    num_updates: int | None = None,
    num_epochs: int | None = None,
    record: Record | None = None,
    every: int | None = None,
    gradient: Callable[..., Gradient] = gradients.mean,
    stream: Stream = batching.reshuffled,
    unroll: int = 1,
) -> tuple[State, Any]:
    """Train a problem from fresh parameters: pure, so that `jax.vmap` runs it over keys, rates and whatever else.

    Args:
        problem: what to train.
        optimizer: an optax transformation.
        key: typed PRNG key; parameters and stream are drawn from its two children.
        batch_size: B, examples per update.
        num_updates: T; or
        num_epochs: passes over the N examples, T = N * num_epochs // B updates.
        record: (state after the update, info of the update) -> pytree; default what `problem.evaluate` says of the
            state, with the examples seen beside it.
        every: updates between records; default N // B, at least one: an epoch.
        gradient: an estimator's factory from `gradients`, loss -> estimator.
        stream: from `batching`.
        unroll: as in `run`.

    Returns:
        (state after T updates, records stacked along axis 0), as `run`.

    Raises:
        ValueError: for both or neither of `num_updates` and `num_epochs`, and as `run` and `batching.batches`.
    """
    init_key, stream_key = jax.random.split(key)
    num_updates = count_updates(problem, batch_size=batch_size, num_updates=num_updates, num_epochs=num_epochs)
    weighted = {} if problem.weight is None else {"weight": problem.weight}
    method_ = method(gradient(problem.loss, **weighted), optimizer)
    order = stream(stream_key, problem.num_examples, length=num_updates * batch_size)
    return run(
        method_,
        method_.init(problem.init(init_key)),
        problem.train,
        batching.batches(order, batch_size),
        record or evaluation(problem),
        every=every or max(1, problem.num_examples // batch_size),
        unroll=unroll,
    )


def count_updates(problem: Problem, *, batch_size: int, num_updates: int | None, num_epochs: int | None) -> int:
    """Return T, from one of the two ways to say it.

    Raises:
        ValueError: for both or neither, and for a batch size or a number of updates below one.
    """
    if (num_updates is None) == (num_epochs is None):
        raise ValueError(f"give num_updates={num_updates} or num_epochs={num_epochs}, one of the two")
    if not 1 <= batch_size <= problem.num_examples:
        raise ValueError(
            f"batch_size={batch_size} must be between 1 and N={problem.num_examples}, the training examples"
        )
    count = num_epochs * problem.num_examples // batch_size if num_epochs is not None else num_updates
    if count is None or count < 1:
        raise ValueError(f"num_updates={num_updates}, num_epochs={num_epochs}: there must be at least one update")
    return count


def evaluation(problem: Problem) -> Record:
    """Return the record {"examples": seen so far, "loss": of the training examples, "metrics": {name: of the test}}.

    Metrics are those of the training examples where the problem has no test examples.
    """

    def record(state: State, info: Info | None = None) -> dict[str, Any]:
        del info
        on = "train" if problem.test is None else "test"
        return {
            "examples": state.num_examples,
            "loss": problem.evaluate(state.params, names=("loss",))["loss"],
            "metrics": problem.evaluate(state.params, on=on, names=tuple(problem.metrics)),
        }

    return record
