"""The parameters averaged along a run, at every update, with weights that halve every so many examples.

After update t the average is sum_s d^(t-s) theta_s / sum_s d^(t-s) over the parameters theta_s after updates
s = 1 ... t, with d = 2^(-B / half_life). The parameters that the run began with have no part in it, and a half-life
of infinity is the plain mean.

>>> import optax
>>> from gdjax import batching, descent, gradients
>>> sgd = descent.method(gradients.mean(lambda mean, x: 0.5 * (mean - x) ** 2), optax.sgd(0.5))
>>> both = averaged(sgd, half_life=2.0)
>>> batches = batching.batches(batching.cyclic(jax.random.key(0), 3, num_epochs=1), 1)
>>> data = jnp.asarray([1.0, 2.0, 6.0])
>>> state, thetas = descent.run(both, both.init(0.0), data, batches, lambda state, info: state.params)
>>> [float(theta) for theta in thetas]
[0.5, 1.25, 3.625]
>>> state, average = split(state)
>>> by_hand = (3.625 + 1.25 / 2**0.5 + 0.5 / 2) / (1 + 1 / 2**0.5 + 1 / 2)
>>> print(round(float(in_place(average, state.params)), 4), round(by_hand, 4))
2.1562 2.1562
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdjax._trees import wide
from gdjax.descent import Info, Method, State
from gdjax.problem import Batch, Params, merge, num_examples, trainable


class Average(NamedTuple):
    """The average so far.

    Attributes:
        mean: of the trainable parameters, in float32 at least.
        lost: what rounding has added to `mean` so far, likewise. With a long half-life an update adds less than half a
            unit in the last place: without this, the average would stand still.
        num_updates: int32 scalar, updates averaged.
    """

    mean: Params
    lost: Params
    num_updates: jax.Array


def averaged(method: Method, half_life: float) -> Method:
    """Return `method` with an `Average` beside the state of its optimiser, see `split`.

    Args:
        method: from `descent.method`.
        half_life: of a weight, in examples; `math.inf` for the plain mean.
    """

    def init(params: Params) -> State:
        return begun(method.init(params))

    def step(state: State, batch: Batch) -> tuple[State, Info]:
        state, past = split(state)
        state, info = method.step(state, batch)
        decay = math.log(2) * num_examples(batch, "batch") / half_life
        num_updates = past.num_updates + 1
        age = num_updates.astype(float)
        # The weight of the newest, 1 / sum_s d^(t-s), without the difference of two numbers near one.
        newest = math.expm1(-decay) / jnp.expm1(-decay * age) if decay else 1 / age

        def add(mean, lost, param):  # Kahan's sum
            increment = (param.astype(mean.dtype) - mean) * newest.astype(mean.dtype) - lost
            total = mean + increment
            return total, (total - mean) - increment

        params, _ = trainable(state.params)
        pairs = jax.tree.map(add, past.mean, past.lost, params)
        mean, lost = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0)), pairs)
        return joined(state, Average(mean, lost, num_updates)), info

    return Method(init, step)


def begun(state: State) -> State:
    """Return a state of the method itself as one of the averaged method, nothing averaged yet."""
    params, _ = trainable(state.params)
    zeros = jax.tree.map(lambda x: jnp.zeros_like(wide(jnp.asarray(x))), params)
    return joined(state, Average(zeros, zeros, jnp.int32(0)))


def joined(state: State, average: Average) -> State:
    """Undo `split`."""
    return state._replace(opt_state=(state.opt_state, average))


def split(state: State) -> tuple[State, Average]:
    """Return the state of the method itself, and the average."""
    opt_state, average = state.opt_state
    return state._replace(opt_state=opt_state), average


def in_place(average: Average, params: Params) -> Params:
    """Return the averaged parameters: shapes, types and the leaves that are not trained as in `params`."""
    train, frozen = trainable(params)
    return merge(jax.tree.map(lambda mean, x: mean.astype(x.dtype), average.mean, train), frozen)
