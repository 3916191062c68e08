"""The gradient noise scale along a run, from norms that the training computes anyway.

>>> import jax, jax.numpy as jnp, optax
>>> from gdjax import batching, descent
>>> loss = lambda mean, x: 0.5 * (mean - x) ** 2
>>> data = jax.random.normal(jax.random.key(0), (1000,))
>>> method = descent.method(gradients.with_sq_norms(loss), optax.sgd(0.0))
>>> method = noise_scale(method, half_life=5000)
>>> batches = batching.batches(batching.reshuffled(jax.random.key(1), 1000, num_epochs=20), 50)
>>> record = lambda state, info: info.aux.noise_scale.b_simple
>>> _, scales = descent.run(method, method.init(0.5), data, batches, record, every=100)
>>> [f"{scale:.2f}" for scale in scales]  # of the whole data: 3.83
['3.86', '3.88', '3.91', '3.82']
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdjax import gradients, problem, theory
from gdjax.descent import Info, Method, State
from gdjax.noise import _intervals as intervals
from gdjax.noise import _measure as noise
from gdjax.problem import Batch, Params


class NoiseScale(NamedTuple):
    """The noise scale along a run: the first fields of `noise.NoiseScale`, averaged over the recent past."""

    grad_sq_norm: jax.Array
    trace_cov: jax.Array
    b_simple: jax.Array


class Tracked(NamedTuple):
    """What `noise_scale` leaves in `Info.aux`: the running noise scale, and what the method itself left there."""

    noise_scale: NoiseScale
    aux: Any


class TrackingState(NamedTuple):
    """What `noise_scale` keeps in `State.opt_state`: sums, the sum of their weights, and the optimiser's own."""

    grad_sq_norm: jax.Array
    trace_cov: jax.Array
    weight: jax.Array
    opt_state: Any


def noise_scale(method: Method, *, half_life: float, num_examples: int | None = None) -> Method:
    """Return `method` with the running noise scale in `Info.aux`, at no extra backward pass.

    Numerator and denominator are averaged apart, with weights that halve every `half_life` examples, and then divided:
    the mean of the ratio would be biased. Along a run |G| and tr(S) move; a long half-life lags behind them.

    Args:
        method: made with `gradients.with_sq_norms`.
        half_life: in examples.
        num_examples: N, for batches of distinct examples out of N; None where they are drawn with replacement.

    Raises:
        ValueError: where the method does not measure norms, and for batches of one example.
    """
    if not half_life > 0:
        raise ValueError(f"half_life={half_life} must be positive, in examples")

    def init(params: Params) -> State:
        state = method.init(params)
        zero = jnp.zeros(())
        return state._replace(opt_state=TrackingState(zero, zero, zero, state.opt_state))

    def step(state: State, batch: Batch) -> tuple[State, Info]:
        past = state.opt_state
        state, info = method.step(state._replace(opt_state=past.opt_state), batch)
        if not isinstance(info.aux, gradients.SquaredNorms):
            raise ValueError(f"method must be made with gradients.with_sq_norms, but its aux is {type(info.aux)}")
        batch_size = problem.num_examples(batch, "batch")
        if batch_size < 2:
            raise ValueError(f"batch_size={batch_size} shows no noise: it must be at least 2")
        norms = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), info.aux.sq_norms)
        of_one = jax.tree.reduce(jnp.add, norms).mean()
        # One product of one long vector: in a loop of small updates, every operation more is felt.
        grad = jnp.concatenate([jnp.asarray(leaf, float).ravel() for leaf in jax.tree.leaves(info.grad)])
        of_batch = jnp.vdot(grad, grad)
        now = noise.unbiased(of_one, of_batch, batch_sizes=(1, batch_size), num_examples=num_examples)
        keep = theory.decay_per_update(half_life, batch_size)
        signal, variance, weight = (keep * old + new for old, new in zip(past[:3], (*now, 1.0), strict=True))
        scale = NoiseScale(signal / weight, variance / weight, intervals.ratio(variance, signal))
        state = state._replace(opt_state=TrackingState(signal, variance, weight, state.opt_state))
        return state, info._replace(aux=Tracked(scale, info.aux))

    return Method(init, step)
