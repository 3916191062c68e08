"""The noise scale in anyone's training loop, as an optax transformation that changes no update.

The step passes what it has. Norms of the gradients of single examples, or of equal parts of the batch:

>>> import jax, jax.numpy as jnp, optax
>>> from gdjax.noise._running import reading
>>> x = 0.5 + jax.random.normal(jax.random.key(0), (100, 8))  # updates of eight examples; the gradient is -x at 0
>>> optimizer = optax.chain(watch(half_life=1e4), optax.sgd(0.0))
>>> def step(state, x):
...     grads = -x
...     noise = parts(sq_norms=grads**2, batch_size=8)
...     updates, state = optimizer.update(grads.mean(), state, noise=noise)
...     return state, None
>>> state, _ = jax.lax.scan(step, optimizer.init(0.0), x)
>>> print(reading(state))
B_simple = 3.92 (90 % interval 2.97 to 5.53): ok, of the last 800 examples

or nothing, and `probe` measures a few examples of the batch now and then.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gdjax import ghost, gradients, problem
from gdjax._trees import varying, wide
from gdjax.noise._running import Running, push, start
from gdjax.noise._scale import ULPS, check_population, check_unweighted, solve, sq_norm, variance_factor
from gdjax.problem import Batch, Loss, Params


class Parts(NamedTuple):
    """What an update shows of its noise: made by `parts`.

    Attributes:
        small: mean of |g_b|^2 over the parts that are known, of b examples each.
        large: |g_B|^2 of the batch's gradient, or None: that of the updates that `watch` is given.
        part_size, batch_size: b and B, in examples.
        num_known: parts that are known.
        bound: |g_B|^2 is at most this, the square of the mean length of the parts; infinite where not all are known.
        equal: bool, whether more than half of the parts are as long as the longest, as clipped ones are.
    """

    small: jax.Array
    large: jax.Array | None
    part_size: Any
    batch_size: Any
    num_known: Any
    bound: jax.Array
    equal: jax.Array


def parts(*, batch_size: int, sq_norms: Any = None, grads: Params | None = None, part_size: int | None = None) -> Parts:
    """Describe the parts whose mean is the gradient of an update, for `watch`. Give `sq_norms` or `grads`.

    Args:
        batch_size: B, examples behind the gradient that the optimiser is given.
        sq_norms: [M], squared norms of the mean gradients of M equal parts of the batch, as an array or a pytree of
            arrays that are added up. M = B: of single examples, as from `ghost.sq_norms`; `gradients.SquaredNorms` can
            be passed as it is. A scalar is one part. Not of an estimator with `weight`.
        grads: the mean gradients themselves, every leaf [M, ...], of microbatches or examples. Their mean is then held
            against the updates.
        part_size: b, examples of a part; default B / M. Say it where only some parts are known: in
            `optax.MultiSteps(optimizer, k)` the last microbatch, of B / k examples.

    Raises:
        ValueError: for both or neither of the two, for what `gradients.clipped` or an estimator with weights measured,
            for parts that do not divide the batch, and for a single part that is the whole batch: one gradient shows no
            noise.
    """
    if (sq_norms is None) == (grads is None):
        raise ValueError("give either sq_norms, the squared norms of the parts' gradients, or grads, these gradients")
    if isinstance(sq_norms, gradients.Clipped):
        raise ValueError(
            "sq_norms is what gradients.clipped measured: the update is clipped, and says nothing of the noise of raw "
            "gradients. Measure apart, with probe or noise.measure"
        )
    if isinstance(sq_norms, gradients.SquaredNorms):
        check_unweighted(sq_norms, "sq_norms")
    sq_norms = getattr(sq_norms, "sq_norms", sq_norms)
    if grads is not None:
        num_known = problem.num_examples(grads, "grads")
        norms, mean = _sq_norms(grads), jax.tree.map(lambda leaf: wide(leaf).mean(0), grads)
    else:
        leaves = [jnp.atleast_1d(jnp.asarray(leaf, float)) for leaf in jax.tree.leaves(sq_norms)]
        num_known = problem.num_examples(leaves, "sq_norms")
        if any(leaf.ndim > 1 for leaf in leaves):
            raise ValueError(f"sq_norms must be [M], one number a part, but is {[leaf.shape for leaf in leaves]}")
        norms, mean = sum(leaves[1:], leaves[0]), None
    if part_size is None:
        part_size, rest = divmod(batch_size, num_known)
        if rest or not part_size:
            raise ValueError(
                f"batch_size={batch_size} is no multiple of the {num_known} parts: batch_size is that of the gradient "
                "which the optimiser is given; say part_size where not all parts are known"
            )
    if not 1 <= part_size < batch_size:
        raise ValueError(
            f"part_size={part_size} must be at least 1 and below batch_size={batch_size}: one gradient, of the whole "
            "batch, shows no noise. Pass the norms of single examples or of two microbatches at least, or use probe"
        )
    if num_known * part_size > batch_size:
        raise ValueError(f"{num_known} parts of part_size={part_size} are more than batch_size={batch_size}")
    complete = num_known * part_size == batch_size
    longest = norms.max() * (1 - ULPS * jnp.finfo(norms.dtype).eps)
    return Parts(
        small=norms.mean(),
        large=None if mean is None or not complete else sq_norm(mean),
        part_size=part_size,
        batch_size=batch_size,
        num_known=num_known,
        bound=jnp.sqrt(norms).mean() ** 2 if complete else jnp.asarray(jnp.inf),
        equal=(norms >= longest).sum() > max(1, num_known // 2),
    )


def watch(
    *, half_life: float, num_examples: int | None = None, axis_name: str | None = None, batch_size: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Return a transformation that keeps the running noise scale in its state; `noise.reading(state)` reads it.

    Put it first in `optax.chain`, where gradients are raw, and pass `noise=noise.parts(...)` to `update`. Updates leave
    it as they came. In `optax.MultiSteps(optax.chain(watch, ...), k)` it sees the mean of k microbatches, B examples,
    once every k steps.

    With `axis_name`, inside `jax.shard_map` or `jax.pmap`, the devices' own gradients are the parts, nothing more is
    passed, and the updates come out averaged over the devices, in the one all-reduce that data parallelism takes.

    An update whose parts cannot be raw gradients of its batch is left out, and where most are the verdict is
    'not raw': the mean of `grads` is not as long as the updates; the updates are longer than the mean length of the
    parts (a sum, or a scaled loss); the parts do not differ (averaged over devices before); or most of them are exactly
    as long as the longest (clipped one by one). What cannot be told from norms: updates that were clipped before where
    only `sq_norms` are passed, weights, single examples of which at most half were clipped, and a wrong `batch_size`.

    Args:
        half_life: in examples.
        num_examples: N, for batches of distinct examples out of N, as every epoch's are; None: of independent ones, or
            where N is far beyond B_simple. The estimate of |G|^2 is else off by a share of B_simple / (N - 1).
        axis_name: the mesh axis, or axes, that the batch is split over.
        batch_size: B, examples of all devices together; with `axis_name` only.

    Raises:
        ValueError: for a half-life that is not positive and for N < 2; when traced, for B > N, without `noise`, and
            with `axis_name` for gradients that do not vary over it: they were averaged, or summed by the transpose of a
            replicated argument.
    """
    check_population(num_examples)
    if (axis_name is None) != (batch_size is None):
        raise ValueError(f"axis_name={axis_name} and batch_size={batch_size}, of all devices, go together")
    blank = start(half_life=half_life)

    def init(params: Params) -> Running:
        del params
        return blank

    def update(updates, state: Any, params=None, *, noise: Parts | None = None, **extra):
        del params, extra
        if axis_name is not None:
            known, updates = _over_devices(updates, axis_name, batch_size)
        elif noise is None:
            raise ValueError(
                "watch needs update(..., noise=noise.parts(...)), or axis_name and batch_size, or use probe"
            )
        else:
            known = noise
        return updates, _pushed(state, known, sq_norm(updates), num_examples)

    return optax.GradientTransformationExtraArgs(init, update)


class ProbeState(NamedTuple):
    """The running noise scale, and updates until the next measurement, an int32 scalar."""

    running: Running
    wait: jax.Array


def probe(
    loss: Loss, *, every: int, sample_size: int, half_life: float, num_examples: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Return a transformation that measures norms of some examples at every `every`-th update, by itself.

    Put it first in `optax.chain` and pass `batch=batch` and the parameters to `update`; the updates must be the mean
    gradient of `loss` over that batch. The first `sample_size` examples give |g_1|^2, the updates |g_B|^2. Their
    gradients with norms are what is computed in addition: sample_size / (every B) of the training's own, times what
    `ghost` costs over a gradient, 1.1 to 1.5. Under `jax.vmap` all lanes measure at every update.

    Args:
        loss: of one example.
        every: updates between measurements.
        sample_size: examples measured, at most B.
        half_life: in examples of all updates, measured or not.
        num_examples: N, as in `watch`.
    """
    for name, value in (("every", every), ("sample_size", sample_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    check_population(num_examples)
    blank = start(half_life=half_life)
    measured = ghost.sq_norms(loss)

    def init(params: Params) -> ProbeState:
        del params
        return ProbeState(blank, jnp.zeros((), jnp.int32))

    def update(updates, state: Any, params=None, *, batch: Batch | None = None, **extra):
        del extra
        if batch is None or params is None:
            raise ValueError(
                "probe needs update(grads, state, params, batch=batch), the batch that grads are the mean of"
            )
        size = problem.num_examples(batch, "batch")
        if not 2 <= size >= sample_size:
            raise ValueError(f"batch has {size} examples: it must have 2, and sample_size={sample_size}, at least")

        def measure(running: Running) -> Running:
            _, _, norms = measured(params, jax.tree.map(lambda leaf: leaf[:sample_size], batch))
            known = parts(sq_norms=norms, batch_size=size, part_size=1)
            # Weights decay by the examples of all updates since the last measurement.
            return _pushed(running, known, sq_norm(updates), num_examples, updates=every)

        running = lax.cond(state.wait == 0, measure, lambda running: running, state.running)
        return updates, ProbeState(running, jnp.where(state.wait == 0, every, state.wait) - 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _pushed(running: Running, known: Parts, large, num_examples: int | None, *, updates: int = 1) -> Running:
    """Return the sums after an update whose gradient has the squared norm `large`."""
    # Of parts that were made outside of a compiled step the size is not known here.
    if num_examples is not None and isinstance(known.batch_size, int) and known.batch_size > num_examples:
        raise ValueError(
            f"num_examples={num_examples} of the data must be at least batch_size={known.batch_size}, whose examples "
            "are distinct; None where they are drawn independently"
        )
    dtype = jnp.result_type(known.small, large)
    close = ULPS * jnp.finfo(dtype).eps
    raw = ~known.equal & (large <= known.bound * (1 + close))
    if known.large is not None:
        # Both are sums of the same squares, in another order, and the updates may have been rounded to bfloat16.
        raw &= jnp.abs(known.large - large) <= 2.0**-6 * known.large
        large = known.large
    raw &= jnp.isinf(known.bound) | (known.small - large > close * known.small)
    sizes = known.part_size, known.batch_size
    f, g = (jnp.asarray(variance_factor(size, num_examples), dtype) for size in sizes)
    pair = solve(known.small, large, f, g)
    return push(running, *pair, batch_size=known.batch_size * updates, num_parts=known.num_known, raw=raw)


def _over_devices(updates: Params, axis_name, batch_size: int | None) -> tuple[Parts, Params]:
    """Return the parts that the devices' gradients are, and the updates averaged over the devices."""
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    of_devices = varying(lax.axis_index(axes))  # empty where shard_map does not check, and in pmap
    for leaf in jax.tree.leaves(updates):
        if not of_devices <= varying(leaf):
            raise ValueError(
                f"gradients do not vary over axis_name={axis_name!r}: they are already averaged or summed over the "
                "devices. In jax.shard_map, differentiate with respect to jax.lax.pcast(params, axis, to='varying'), "
                "and leave the average to watch"
            )
    num_devices = lax.axis_size(axis_name)
    part_size, rest = divmod(batch_size or 0, num_devices)
    if rest or num_devices < 2:
        raise ValueError(f"batch_size={batch_size} must be a multiple of the devices over {axis_name!r}, two at least")
    norm = sq_norm(updates)
    updates = jax.tree.map(lambda leaf: lax.pmean(leaf, axis_name), updates)
    small, length, most, least = (
        *(lax.pmean(x, axis_name) for x in (norm, jnp.sqrt(norm))),
        lax.pmax(norm, axis_name),
        lax.pmin(norm, axis_name),
    )
    equal = least >= most * (1 - ULPS * jnp.finfo(norm.dtype).eps)
    return Parts(small, None, part_size, batch_size, num_devices, length**2, equal), updates


def _sq_norms(tree: Params) -> jax.Array:
    return jax.vmap(sq_norm)(tree)
