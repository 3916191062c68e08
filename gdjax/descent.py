"""Gradient descent: one step, the loop over a stream of batches, and the same loop ended by a rule.

>>> import jax, jax.numpy as jnp, optax
>>> from gdjax import batching, gradients
>>> data = jnp.asarray([1.0, 2.0, 6.0, 7.0])
>>> loss = lambda mean, x: 0.5 * (mean - x) ** 2
>>> sgd = method(gradients.mean(loss), optax.sgd(0.5))
>>> stream = batching.cyclic(jax.random.key(0), 4, num_epochs=3)
>>> for batch_size in (1, 2, 4):
...     state, losses = run(sgd, sgd.init(0.0), data, batching.cut(stream, batch_size))
...     print(batch_size, losses.shape, float(state.params), int(state.num_examples))
1 (12,) 5.665283203125 12
2 (6,) 4.7578125 12
4 (3,) 3.5 12
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gdjax import batching, problem
from gdjax.gradients import Gradient
from gdjax.problem import Batch, Params


class State(NamedTuple):
    """What a method carries from update to update: a pytree, complete for an exact resume.

    Attributes:
        params: the parameters.
        opt_state: the state of the optax transformation.
        num_examples: int32 scalar, examples seen so far, below 2^31.
    """

    params: Params
    opt_state: Any
    num_examples: jax.Array


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


def method(
    gradient: Gradient, optimizer: optax.GradientTransformation, *, trainable: problem.Trainable = None
) -> Method:
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
        train, _ = problem.trainable(params, trainable)
        return State(params, optimizer.init(train), jnp.zeros((), jnp.int32))

    def step(state: State, batch: Batch) -> tuple[State, Info]:
        estimate = gradient(state.params, batch)
        train, frozen = problem.trainable(state.params, trainable)
        if jax.tree.structure(estimate.grad) != jax.tree.structure(train):
            raise ValueError("the estimator and descent.method must be given the same trainable: their leaves differ")
        update, opt_state = optimizer.update(
            estimate.grad, state.opt_state, train, value=estimate.loss, grad=estimate.grad
        )
        params = problem.merge(optax.apply_updates(train, update), frozen)
        num_examples = state.num_examples + problem.num_examples(batch, "batch")
        return State(params, opt_state, num_examples), Info(estimate.loss, estimate.grad, update, estimate.aux)

    return Method(init, step)


def with_keys(method: Method, key: jax.Array) -> Method:
    """Give every example a PRNG key of its own, for a loss with dropout or augmentation.

    The gradient of `method` must be of a loss `(params, (example, key)) -> scalar`. The key at position p of the stream
    is `fold_in(key, p)`, p being counted by `State.num_examples`: an example that is visited again has a fresh key, a
    replayed or resumed run has the same ones, and so has every batch size. A loss without randomness, of the same
    parameters, is what a `Problem` evaluates.

    Args:
        method: whose batches become `(batch, keys [B])`.
        key: typed PRNG key, one for each run; not the key of the stream.
    """

    def step(state: State, batch: Batch) -> tuple[State, Info]:
        positions = state.num_examples + jnp.arange(problem.num_examples(batch, "batch"), dtype=jnp.int32)
        return method.step(state, (batch, jax.vmap(jax.random.fold_in, (None, 0))(key, positions)))

    return Method(method.init, step)


def batch_loss(state: State, info: Info) -> jax.Array:
    """Record the mean loss of the batch before the update."""
    return info.loss


def run(
    method: Method,
    state: State,
    data: Batch,
    batches: jax.Array,
    record: Record = batch_loss,
    *,
    every: int = 1,
    unroll: int = 1,
) -> tuple[State, Any]:
    """Make one update for each batch, as one compiled loop.

    Args:
        method: from `method`.
        state: where to start, `method.init(params)` or the state of an earlier run.
        data: examples, every leaf [N, ...].
        batches: int32[T, B], indices in [0, N), from `batching.cut`. They are not checked against N.
        record: (state after the update, info of the update) -> pytree.
        every: updates between records. The last update is always recorded, whether or not `every` divides T.
        unroll: updates in one iteration of the compiled loop: more take longer to compile, and may run faster where
            an update is small.

    Returns:
        (state after T updates, records stacked along a new axis 0 of length ceil(T / every)).

    Raises:
        ValueError: for `every` or `unroll` < 1 and for data with no or unequal numbers of examples.
    """
    for name, number in (("every", every), ("unroll", unroll)):
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1 update")
    block, batches = _block(method, data, batches, unroll=min(unroll, every))

    def recorded_block(state, batches):
        state, info = block(state, batches)
        return state, record(state, info)

    num_updates, batch_size = batches.shape
    num_blocks, tail = divmod(num_updates, every)
    whole = batches[: num_blocks * every].reshape(num_blocks, every, batch_size)
    state, history = lax.scan(recorded_block, state, whole, unroll=max(1, unroll // every))
    if not tail:
        return state, history
    state, last = recorded_block(state, batches[num_blocks * every :])
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
    method: Method, state: State, data: Batch, batches: jax.Array, rules: Mapping[str, Rule], *, every: int = 1
) -> tuple[State, Ending]:
    """Make updates until a rule holds or the batches are used up, as one `lax.while_loop`.

    Under `jax.vmap` each lane ends by its own rule at its own time and keeps the state it ended with.

    Args:
        method, state, data, batches: as in `run`; the T batches are the budget.
        rules: {name: Rule}. `(*rules, "budget")[ending.rule]` is the name of what ended the run.
        every: updates between evaluations of the rules; it must divide T.

    Returns:
        (state at the end, Ending).

    Raises:
        ValueError: where `every` does not divide T.
    """
    block, batches = _block(method, data, batches)
    num_updates = len(batches)
    if every < 1 or not num_updates or num_updates % every:
        raise ValueError(f"every={every} must divide the budget of {num_updates} updates, at least one")

    def proceed(carry):
        _, _, ending = carry
        return (ending.rule == len(rules)) & (ending.num_updates < num_updates)

    def advance(carry):
        state, memories, ending = carry
        state, info = block(state, lax.dynamic_slice_in_dim(batches, ending.num_updates, every))
        steps = [rule.step(memory, state, info) for rule, memory in zip(rules.values(), memories, strict=True)]
        stops = jnp.asarray([stop for _, stop in steps] + [True])
        return state, [memory for memory, _ in steps], Ending(_first(stops), ending.num_updates + every)

    carry = (state, [rule.init() for rule in rules.values()], Ending(jnp.int32(len(rules)), jnp.int32(0)))
    state, _, ending = lax.while_loop(proceed, advance, carry)
    return state, ending


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


def _block(method: Method, data: Batch, batches: jax.Array, *, unroll: int = 1) -> tuple[Callable, jax.Array]:
    """Return `(state, batches [K, B]) -> (state, info of the last update)`, and all batches as an array."""
    problem.num_examples(data)
    batches = jnp.asarray(batches)
    if batches.ndim != 2 or not jnp.issubdtype(batches.dtype, jnp.integer):
        raise ValueError(
            f"batches must be int[T, B], indices of examples from batching.cut, but is {batches.dtype} {batches.shape}"
        )
    data = jax.tree.map(jnp.asarray, data)

    def update(state, indices):
        return method.step(state, batching.take(data, indices))

    update = jax.jit(update, inline=True)  # traced once for the shapes below and for the loop

    def block(state, batches):
        # The info travels in the carry, so that only the last one is kept and the step is compiled once; what
        # nobody records of it is removed by the compiler.
        shape = jax.eval_shape(update, state, batches[0])[1]
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)

        def advance(carry, indices):
            return update(carry[0], indices), None

        return lax.scan(advance, (state, blank), batches, unroll=unroll)[0]

    return block, batches
