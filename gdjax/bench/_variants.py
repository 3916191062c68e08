"""Ways to run the same updates of gradient descent: what `bench` times against one another.

A variant is `(problem, learning_rate) -> run`, and `run(params, data, batches) -> (params, records)` makes one update
for each row of batches, int32[T, B]. All of them compute the parameters of `scan`.

>>> import jax, jax.numpy as jnp
>>> data = jnp.asarray([1.0, 2.0, 6.0, 7.0])
>>> problem = Problem(lambda key: jnp.zeros(()), lambda mean, x: 0.5 * (mean - x) ** 2, data)
>>> batches = jnp.asarray([[0, 1], [2, 3]], dtype=jnp.int32)
>>> for name in ("scan", "microbatched", "per-example: ghost"):
...     print(name, float(jax.jit(VARIANTS[name](problem, 0.5))(jnp.float32(0), data, batches)[0]))
scan 3.625
microbatched 3.625
per-example: ghost 3.625
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gdjax import batching, descent, gradients, kernels, sweep
from gdjax.descent import Method
from gdjax.gradients import Gradient
from gdjax.problem import Batch, Params, Problem

Run = Callable[[Params, Batch, jax.Array], tuple[Params, Any]]
Variant = Callable[[Problem, float], Run]

UNROLL = 4  # updates in one iteration of a loop; more take longer to compile and are no faster on a CPU
# By the kernels that an update of a small network starts at B = 1 on an H100: 9, 6.25 and 6 for 1, 4 and 8 of them.
GPU_UNROLL = 8
NUM_SEEDS = {"cpu": 8}  # of vmapped-seeds
ACCELERATOR_NUM_SEEDS = 256
MANY = 1024  # updates, of which only those count


def python_loop(problem: Problem, learning_rate: float) -> Run:
    """Call a jitted step from Python, as loops are commonly written. Not to be jitted itself."""
    method = plain_method(problem, learning_rate)

    @jax.jit
    def step(state, data, indices):
        return method.step(state, batching.take(data, indices))[0]

    def run(params, data, batches):
        state = method.init(params)
        for indices in np.asarray(batches):
            state = step(state, data, indices)
        return state.params, ()

    return run


def scan(problem: Problem, learning_rate: float) -> Run:
    """Run `descent.run`: one compiled loop."""
    return _descend(gradients.mean(problem.loss, weight=problem.weight), learning_rate)


def unrolled(problem: Problem, learning_rate: float, *, unroll: int | None = None) -> Run:
    """Make several updates in one iteration of the loop, by default as many as the default device likes."""
    unroll = unroll or (GPU_UNROLL if jax.default_backend() == "gpu" else UNROLL)
    return _descend(gradients.mean(problem.loss, weight=problem.weight), learning_rate, unroll=unroll)


def one_kernel(problem: Problem, learning_rate: float) -> Run:
    """Run the unrolled loop as one kernel of a CPU, where the compiler can: see `kernels.one_kernel`.

    Raises:
        ValueError: on another device.
    """
    if jax.default_backend() != "cpu":
        raise ValueError("for a CPU only")
    return kernels.one_kernel(unrolled(problem, learning_rate))


def vmapped_seeds(problem: Problem, learning_rate: float, *, lanes: int | None = None) -> Run:
    """Run `num_seeds()` lanes by `sweep.vmap`, each with a stream of its own; the first is that of `scan`.

    All begin with the same parameters, and return [S, ...].
    """
    run_one = scan(problem, learning_rate)

    def run(params, data, batches):
        shifts = jnp.arange(lanes or num_seeds(), dtype=jnp.int32)
        streams = jax.vmap(lambda shift: jnp.roll(batches, shift, axis=0))(shifts)
        return sweep.vmap(lambda batches: run_one(params, data, batches))(streams)

    return run


def num_seeds() -> int:
    """Return S, the lanes of `vmapped_seeds` on the default device."""
    return NUM_SEEDS.get(jax.default_backend(), ACCELERATOR_NUM_SEEDS)


def seeds_at_once(problem: Problem, learning_rate: float, batch_size: int) -> int:
    """Return how many of the lanes of `vmapped_seeds` run side by side."""
    if jax.default_backend() != "cpu":
        return num_seeds()
    batches = jax.ShapeDtypeStruct((MANY, batch_size), jnp.int32)
    params = jax.eval_shape(problem.init, jax.random.key(0))
    return min(num_seeds(), sweep.at_once(scan(problem, learning_rate), params, problem.train, batches))


def sharded(problem: Problem, learning_rate: float, *, devices: Sequence[Any] | None = None) -> Run:
    """Share each batch by devices, default all of this process, which hold the parameters each.

    The compiler adds the gradients up.

    Raises:
        ValueError: where there is one device only, or the devices cannot share the batch equally.
    """
    devices = devices or jax.local_devices()
    num_devices = len(devices)
    if num_devices == 1:
        raise ValueError("one device only (a CPU is split by --devices 2)")
    mesh = jax.make_mesh((num_devices,), ("examples",), axis_types=(AxisType.Auto,), devices=devices)
    rows = NamedSharding(mesh, PartitionSpec("examples"))
    method = plain_method(problem, learning_rate)

    def step(state, batch):
        return method.step(state, lax.with_sharding_constraint(batch, rows))

    def run(params, data, batches):
        if batches.shape[1] % num_devices:
            raise ValueError(f"{batches.shape[1]} examples are not shared equally by {num_devices} devices")
        return _run(Method(method.init, step), params, data, batches)

    return run


def microbatched(problem: Problem, learning_rate: float) -> Run:
    """Read each batch in pieces, about four, for the memory of one.

    Raises:
        ValueError: for a batch of one example, which has no pieces.
    """

    def run(params, data, batches):
        batch_size = batches.shape[1]
        if batch_size == 1:
            raise ValueError("one example has no pieces")
        size = max(m for m in range(1, max(1, batch_size // 4) + 1) if batch_size % m == 0)
        gradient = gradients.microbatched(problem.loss, weight=problem.weight, microbatch_size=size)
        return _descend(gradient, learning_rate)(params, data, batches)

    return run


def per_example_vmap(problem: Problem, learning_rate: float) -> Run:
    """Record the squared gradient norm of every example, [T, B], from the gradients of all examples."""

    def sq_norms(state, info):
        squares = [jnp.sum(jnp.square(g).reshape(len(g), -1), 1) for g in jax.tree.leaves(info.aux.grads)]
        return jnp.sum(jnp.stack(squares), 0)

    return _descend(gradients.per_example(problem.loss, weight=problem.weight), learning_rate, sq_norms)


def per_example_ghost(problem: Problem, learning_rate: float) -> Run:
    """Record the squared gradient norm of every example, [T, B], without the gradients (see `ghost`)."""

    def sq_norms(state, info):
        return jnp.sum(jnp.stack(jax.tree.leaves(info.aux.sq_norms)), 0)

    return _descend(gradients.with_sq_norms(problem.loss, weight=problem.weight), learning_rate, sq_norms)


def lanes(problem: Problem, learning_rate: float, batch_sizes: Sequence[int]) -> Run:
    """Run every batch size B_i as a lane of one program, parameters [L, ...].

    All lanes take the same microbatch at a tick, one row of `batches` [K, m] where m divides every B_i, each at its own
    parameters. Lane i adds the gradients up and makes an update every B_i / m ticks; what is left over at the end makes
    none.

    Raises:
        ValueError: where m does not divide a batch size.
    """
    gradient = gradients.mean(problem.loss, weight=problem.weight)
    method = plain_method(problem, learning_rate)

    def lane(params, data, batches, period):
        def tick(carry, indices):
            state, total, count = carry
            estimate = gradient(state.params, batching.take(data, indices))
            total = jax.tree.map(jnp.add, total, estimate.grad)
            due = count + 1 == period
            mean = estimate._replace(grad=jax.tree.map(lambda g: g / period.astype(g.dtype), total))
            updated = _sgd(lambda params, batch: mean, learning_rate).step(state, indices)[0]
            state = jax.tree.map(lambda new, old: jnp.where(due, new, old), updated, state)
            total = jax.tree.map(lambda g: jnp.where(due, jnp.zeros_like(g), g), total)
            return (state, total, jnp.where(due, 0, count + 1)), None

        state = method.init(params)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, batching.take(data, batches[0])).grad)
        return lax.scan(tick, (state, zero, jnp.int32(0)), batches)[0][0].params

    def run(params, data, batches):
        microbatch_size = batches.shape[1]
        if any(size % microbatch_size for size in batch_sizes):
            raise ValueError(f"a microbatch of {microbatch_size} must divide every batch size of {tuple(batch_sizes)}")
        periods = jnp.asarray([size // microbatch_size for size in batch_sizes], jnp.int32)
        return sweep.vmap(lambda period: lane(params, data, batches, period))(periods), ()

    return run


def scans(problem: Problem, learning_rate: float, batch_sizes: Sequence[int]) -> Run:
    """Run every batch size as `scan` does, one after another: what `lanes` is compared with.

    Each cuts the examples of `batches` at its own size; returns a tuple of the parameters of each.
    """
    run_one = scan(problem, learning_rate)

    def run(params, data, batches):
        cuts = [batching.batches(batches.reshape(-1), size, drop_remainder=True) for size in batch_sizes]
        return tuple(run_one(params, data, cut)[0] for cut in cuts), ()

    return run


VARIANTS: dict[str, Variant] = {
    "python-loop": python_loop,
    "scan": scan,
    "scan-unrolled": unrolled,
    "one-kernel": one_kernel,
    "vmapped-seeds": vmapped_seeds,
    "sharded": sharded,
    "microbatched": microbatched,
    "per-example: vmap": per_example_vmap,
    "per-example: ghost": per_example_ghost,
}


def microbatch_size(batch_sizes: Sequence[int]) -> int:
    """Return the largest microbatch that `lanes` can take: the greatest common divisor, in examples."""
    return math.gcd(*batch_sizes)


def plain_method(problem: Problem, learning_rate: float) -> Method:
    """Return the method of `scan`: mean gradients and plain SGD."""
    return _sgd(gradients.mean(problem.loss, weight=problem.weight), learning_rate)


def _sgd(gradient: Gradient, learning_rate: float) -> Method:
    return descent.method(gradient, optax.sgd(learning_rate))


def _descend(gradient: Gradient, learning_rate: float, record=None, *, unroll: int = 1) -> Run:
    method = _sgd(gradient, learning_rate)
    return lambda params, data, batches: _run(method, params, data, batches, record, unroll=unroll)


def _run(
    method: Method, params: Params, data: Batch, batches: jax.Array, record=None, *, unroll: int = 1
) -> tuple[Params, Any]:
    every, record = (len(batches), lambda state, info: ()) if record is None else (1, record)
    state, records = descent.run(method, method.init(params), data, batches, record, every=every, unroll=unroll)
    return state.params, records
