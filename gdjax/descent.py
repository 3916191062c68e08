"""Gradient descent: one step, the loop over a stream of batches, and the same loop ended by a rule.

>>> import jax, jax.numpy as jnp, optax
>>> from gdjax import batching, gradients
>>> data = jnp.asarray([1.0, 2.0, 6.0, 7.0])
>>> loss = lambda mean, x: 0.5 * (mean - x) ** 2
>>> sgd = method(gradients.mean(loss), optax.sgd(0.5))
>>> stream = batching.cyclic(jax.random.key(0), 4, num_epochs=3)
>>> for batch_size in (1, 2, 4):
...     state, losses = run(sgd, sgd.init(0.0), data, batching.batches(stream, batch_size))
...     print(batch_size, losses.shape, float(state.params), int(state.num_examples))
1 (12,) 5.665283203125 12
2 (6,) 4.7578125 12
4 (3,) 3.5 12
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gdjax import batching, gradients, kernels
from gdjax._trees import kept, traced
from gdjax.gradients import Gradient
from gdjax.problem import Batch, Params, Problem, Trainable, merge, num_examples
from gdjax.problem import trainable as split_params


class State(NamedTuple):
    """What a method carries from update to update: a pytree, complete for an exact resume.

    Attributes:
        params: the parameters.
        opt_state: the state of the optax transformation.
        num_examples: examples seen so far, a scalar `batching.Count`: they may be more than 2^32.
    """

    params: Params
    opt_state: Any
    num_examples: batching.Count


class Info(NamedTuple):
    """What an update leaves behind to be recorded. Fields that nobody records are not computed under `jit`.

    Attributes:
        loss: mean loss of the batch before the update, scalar.
        grad: mean gradient of the batch, shaped like the trainable parameters.
        update: what was added to the parameters, likewise.
        aux: what else the gradient estimator measured.
    """

    loss: jax.Array
    grad: Params
    update: Params
    aux: Any


class Method(NamedTuple):
    """`init(params) -> State` and `step(state, batch) -> (State, Info)`."""

    init: Callable[[Params], State]
    step: Callable[[State, Batch], tuple[State, Info]]


Record = Callable[[State, Info], Any]
Fetch = Callable[[Batch, Any], Batch]
"""(data, one entry of the batches) -> the batch that a step is given."""
Stream = Callable[..., jax.Array]
"""(key, num_examples, *, start=, length=) -> int32[length], from `batching`."""


def method(gradient: Gradient, optimizer: optax.GradientTransformation, *, trainable: Trainable = None) -> Method:
    """Join a gradient estimator and an optax optimiser into a `Method`.

    Args:
        gradient: (params, batch) -> Estimate, from `gdjax.gradients`.
        optimizer: an optax transformation; it is also given `value` and `grad`, for those that ask for them. Line
            searches (`optax.lbfgs`), which evaluate the loss of the batch again, cannot be used.
        trainable: what the estimator was given: the other leaves have no state in the optimiser, no weight decay, and
            stay as they are.

    Raises:
        ValueError: when called, where the estimator trains other leaves.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> State:
        params = jax.tree.map(jnp.asarray, params)
        train, _ = split_params(params, trainable)
        return State(params, optimizer.init(train), batching.Count.of(0))

    def step(state: State, batch: Batch) -> tuple[State, Info]:
        estimate = gradient(state.params, batch)
        train, frozen = split_params(state.params, trainable)
        if jax.tree.structure(estimate.grad) != jax.tree.structure(train):
            raise ValueError("the estimator and descent.method must be given the same trainable: their leaves differ")
        update, opt_state = optimizer.update(
            estimate.grad, state.opt_state, train, value=estimate.loss, grad=estimate.grad
        )
        params = merge(optax.apply_updates(train, update), frozen)
        seen = state.num_examples + num_examples(batch, "batch")
        return State(params, opt_state, seen), Info(estimate.loss, estimate.grad, update, estimate.aux)

    return Method(init, step)


def with_keys(method: Method, key: jax.Array) -> Method:
    """Give every example a PRNG key of its own, for a loss with dropout or augmentation.

    The gradient of `method` must be of a loss `(params, (example, key)) -> scalar`. The key at position p of the stream
    is `fold_in(key, p)`, p being counted by `State.num_examples`: an example that is visited again has a fresh key, a
    replayed or resumed run has the same ones, and so has every batch size. From 2^32 on, the high and the low half of p
    are folded in one after the other. A loss without randomness, of the same parameters, is what a `Problem` evaluates.

    Args:
        method: whose batches become `(batch, keys [B])`.
        key: typed PRNG key, one for each run; not the key of the stream.
    """

    def step(state: State, batch: Batch) -> tuple[State, Info]:
        keys = batching.position_keys(key, state.num_examples, num_examples(batch, "batch"))
        return method.step(state, (batch, keys))

    return Method(method.init, step)


def batch_loss(state: State, info: Info) -> jax.Array:
    """Record the mean loss of the batch before the update."""
    return info.loss


def run(
    method: Method,
    state: State,
    data: Batch,
    batches: Any,
    record: Record = batch_loss,
    *,
    every: int = 1,
    unroll: int = 1,
    fetch: Fetch = batching.take,
) -> tuple[State, Any]:
    """Make one update for each batch, as one compiled loop.

    Called outside `jax.jit`, it compiles the loop once for the same functions and shapes, and keeps it with the method.

    Args:
        method: from `method`.
        state: where to start, `method.init(params)` or the state of an earlier run.
        data: examples, every leaf [N, ...].
        batches: int32[T, B], indices in [0, N), from `batching.batches`. They are not checked against N. Or a list of
            such arrays, phases of different B one after the other, as `batching.Phases.batches` cuts them: each is a
            loop of its own, compiled once for its B, whose last update is recorded. With another `fetch`, any pytree
            whose leaves have T entries on axis 0.
        record: (state after the update, info of the update) -> pytree.
        every: updates between records. The last update is always recorded, whether or not `every` divides T.
        unroll: updates in one iteration of the compiled loop: more take longer to compile, and may run faster where
            an update is small.
        fetch: (data, one entry of batches) -> the batch that `method.step` is given.

    Returns:
        (state after T updates, records stacked along a new axis 0 of length ceil(T / every)).

    Raises:
        ValueError: for `every` or `unroll` < 1 and for data with no or unequal numbers of examples.
    """
    for name, number in (("every", every), ("unroll", unroll)):
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1 update")
    if fetch is batching.take and isinstance(batches, list) and {getattr(part, "ndim", 0) for part in batches} == {2}:
        options: dict[str, Any] = {"every": every, "unroll": unroll}
        histories = []
        for part in batches:
            state, history = run(method, state, data, part, record, **options)
            histories.append(history)
        return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *histories)
    batches = _checked(data, batches, fetch)

    def make():
        return kernels.for_cpu(partial(_run, method, record, every, unroll, fetch))

    if traced(state, data, batches):
        return make()(state, data, batches)
    program = kept(method.step, ("run", record, every, unroll, fetch), lambda: jax.jit(make()))
    return program(state, data, batches)


def _run(method, record, every, unroll, fetch, state, data, batches):
    block = _block(method, data, fetch, unroll=min(unroll, every))

    def recorded_block(state, batches):
        state, info = block(state, batches)
        return state, record(state, info)

    num_updates = num_examples(batches, "batches")
    num_blocks, tail = divmod(num_updates, every)
    whole = jax.tree.map(lambda x: x[: num_blocks * every].reshape(num_blocks, every, *x.shape[1:]), batches)
    state, history = lax.scan(recorded_block, state, whole, unroll=max(1, unroll // every))
    if not tail:
        return state, history
    state, last = recorded_block(state, jax.tree.map(lambda x: x[num_blocks * every :], batches))
    return state, jax.tree.map(lambda blocks, x: jnp.concatenate([blocks, jnp.asarray(x)[None]]), history, last)


class Rule(NamedTuple):
    """When to stop: `init() -> carry` and `step(carry, state, info) -> (carry, stop: bool scalar)`."""

    init: Callable[[], Any]
    step: Callable[[Any, State, Info], tuple[Any, jax.Array]]


class Ending(NamedTuple):
    """How a run ended.

    Attributes:
        rule: int32 scalar, the position in `rules` of the first rule that held, or len(rules) for the budget.
        num_updates: int32 scalar, updates made.
    """

    rule: jax.Array
    num_updates: jax.Array


def until(
    method: Method,
    state: State,
    data: Batch,
    batches: Any,
    rules: Mapping[str, Rule] = MappingProxyType({}),
    *,
    every: int = 1,
    first: int | jax.Array = 0,
    num_updates: int | jax.Array | None = None,
    fetch: Fetch = batching.take,
) -> tuple[State, Ending]:
    """Make updates until a rule holds or the budget is used up, as one `lax.while_loop`.

    Under `jax.vmap` each run ends by its own rule at its own time and keeps the state it ended with. The budget may be
    traced, so that one compiled program serves any number of updates.

    Args:
        method, state, data, batches, fetch: as in `run`.
        rules: {name: Rule}. `(*rules, "budget")[ending.rule]` is the name of what ended the run.
        every: updates between evaluations of the rules; it must divide `num_updates`.
        first: the batch to begin with, from 0.
        num_updates: the budget, from `first` on; default all batches. A traced budget comes with every=1.

    Returns:
        (state at the end, Ending).

    Raises:
        ValueError: where `every` does not divide the budget, or cannot be compared with it; for no update.
    """
    batches = _checked(data, batches, fetch)
    if num_updates is None:
        num_updates = num_examples(batches, "batches")
    if traced(num_updates):
        if every != 1:
            raise ValueError(f"every={every} must be 1 where num_updates is traced: it may not divide it")
    elif every < 1 or int(num_updates) < 1 or int(num_updates) % every:
        raise ValueError(f"every={every} must divide the budget of {num_updates} updates, at least one")

    def make():
        return kernels.for_cpu(partial(_until, method, tuple(rules.values()), every, fetch))

    if traced(state, data, batches, first, num_updates):
        return make()(state, data, batches, first, num_updates)
    program = kept(method.step, ("until", tuple(rules.values()), every, fetch), lambda: jax.jit(make()))
    return program(state, data, batches, first, num_updates)


def _until(method, rules, every, fetch, state, data, batches, first, num_updates):
    block = _block(method, data, fetch)

    def proceed(carry):
        _, _, ending = carry
        return (ending.rule == len(rules)) & (ending.num_updates < num_updates)

    def advance(carry):
        state, memories, ending = carry
        here = first + ending.num_updates
        state, info = block(state, jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, here, every), batches))
        steps = [rule.step(memory, state, info) for rule, memory in zip(rules, memories, strict=True)]
        stops = jnp.asarray([stop for _, stop in steps] + [True])
        return state, [memory for memory, _ in steps], Ending(_first(stops), ending.num_updates + every)

    carry = (state, [rule.init() for rule in rules], Ending(jnp.int32(len(rules)), jnp.int32(0)))
    state, _, ending = lax.while_loop(proceed, advance, carry)
    return state, ending


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


def loss_at_most(target: jax.typing.ArrayLike, evaluate: Record = batch_loss) -> Rule:
    """Stop once `evaluate(state, info)` <= target. The default is the batch's own loss, noisy for small batches."""
    return Rule(lambda: (), lambda carry, state, info: (carry, evaluate(state, info) <= target))


def gradient_norm_at_most(
    target: jax.typing.ArrayLike, gradient: Callable[[State, Info], Params] = lambda state, info: info.grad
) -> Rule:
    """Stop once the Euclidean norm of `gradient(state, info)`, over all leaves, is <= target."""
    return Rule(lambda: (), lambda carry, state, info: (carry, optax.tree.norm(gradient(state, info)) <= target))


def no_improvement(num_evaluations: int, evaluate: Record = batch_loss) -> Rule:
    """Stop once `num_evaluations` values of `evaluate(state, info)` in a row were not below the best so far."""
    if num_evaluations < 1:
        raise ValueError(f"num_evaluations={num_evaluations} must be at least 1")

    def step(carry, state, info):
        best, since = carry
        value = jnp.asarray(evaluate(state, info), best.dtype)
        since = jnp.where(value < best, 0, since + 1)
        return (jnp.fmin(best, value), since), since >= num_evaluations

    return Rule(lambda: (jnp.asarray(jnp.inf), jnp.int32(0)), step)


def diverged(evaluate: Record = batch_loss) -> Rule:
    """Stop once `evaluate(state, info)` is NaN or infinite."""
    return Rule(lambda: (), lambda carry, state, info: (carry, ~jnp.isfinite(evaluate(state, info))))


def _first(stops: jax.Array) -> jax.Array:
    return jnp.argmax(stops).astype(jnp.int32)


def _checked(data: Batch, batches: Any, fetch: Fetch) -> Any:
    """Return the batches as arrays."""
    num_examples(data)
    if fetch is not batching.take:
        batches = jax.tree.map(jnp.asarray, batches)
    else:
        try:
            batches = jnp.asarray(batches)  # of a list too, which is an array of indices here, not a pytree
            found = f"{batches.dtype} {batches.shape}"
        except (TypeError, ValueError):
            found = f"a {type(batches).__name__}"
        if not isinstance(batches, jax.Array) or batches.ndim != 2 or not jnp.issubdtype(batches.dtype, jnp.integer):
            raise ValueError(f"batches must be int[T, B], indices of examples from batching.batches, but is {found}")
    num_examples(batches, "batches")
    return batches


def _block(method: Method, data: Batch, fetch: Fetch, *, unroll: int = 1) -> Callable:
    """Return `(state, batches [K, ...]) -> (state, info of the last update)`."""
    data = jax.tree.map(jnp.asarray, data)

    def update(state, batch):
        return method.step(state, fetch(data, batch))

    update = jax.jit(update, inline=True)  # traced once for the shapes below and for the loop

    def block(state, batches):
        # The info travels in the carry, so that only the last one is kept and the step is compiled once; what
        # nobody records of it is removed by the compiler.
        one = jax.tree.map(lambda x: x[0], batches)
        if num_examples(batches, "batches") == 1:
            return update(state, one)
        shape = jax.eval_shape(update, state, one)[1]
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)

        def advance(carry, batch):
            return update(carry[0], batch), None

        return lax.scan(advance, (state, blank), batches, unroll=unroll)[0]

    return block
