"""All updates of a run in one kernel of a TPU, with the state on the chip."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gdjax.kernels._jaxprs import Rules, evaluated

VMEM_BYTES = 100 * 2**20  # of the 128 MiB of a v5e or v6e
INDICES = 2**14  # examples of the stream whose indices are on the chip at a time


def on_chip(
    step: Callable[[Any, Any], tuple[Any, Any]], *, interpret: bool = False
) -> Callable[[Any, Any, Any], tuple[Any, jax.Array]]:
    """Return a loop over batches that is one kernel of a TPU. Experimental: compiled, never run on a TPU.

    State and data stay in the chip's vector memory (VMEM) for the whole run, where XLA's own loop starts several
    kernels for every update. Under `jax.vmap` the runs follow one another in the same kernel.

    Compiled for a TPU v5e by libtpu 0.0.42.1, with jax 0.10.2: SGD, momentum, Adam and clipping, of an MLP 64-128-10
    with labels chosen by an index or by comparison. What Pallas cannot compile becomes something else: a power exp(y
    log x), for x > 0; a gather along one axis, and the scatter that is its transpose, a one-hot matrix, by which an
    index out of range gives 0. The rest ends in Pallas's error, mostly a NotImplementedError that names the operation:
    convolutions, attention, gradients of every example side by side (`gradients.per_example`), random keys. It takes
    long where the state is large: an MLP 784-512-512-10 compiles with SGD in 2 s, with Adam at B = 8 not in 15 s.
    Products have the precision that Pallas gives them, or that `jax.default_matmul_precision("highest")` asks for.

    Args:
        step: (state, batch) -> (state, info) with a scalar `info.loss`, as `descent.Method.step`. The state's leaves
            keep their shapes and dtypes.
        interpret: compute it where there is no TPU, slowly, to compare.

    Returns:
        (state, data, batches) -> (state after T updates, float[T] of `info.loss`), as `descent.run` returns it. Leaves
        of data are [N, ...], batches int32[T, B], not checked against N. To be called under `jax.jit`.

    Raises:
        ValueError: by the loop, before anything is compiled, for data and state that do not fit into 100 MiB of VMEM,
            what a v5e or v6e can spare. A row of up to 128 numbers fills 512 bytes, and so does a label.
        TypeError: by the loop, for a step that changes the shape or dtype of a leaf.

    >>> import optax
    >>> from gdjax import descent, gradients
    >>> sgd = descent.method(gradients.mean(lambda mean, x: 0.5 * (mean - x) ** 2), optax.sgd(0.5))
    >>> loop = jax.jit(on_chip(sgd.step, interpret=True))
    >>> state, losses = loop(sgd.init(0.0), jnp.asarray([1.0, 2.0, 6.0, 7.0]), jnp.asarray([[0, 1], [2, 3]]))
    >>> float(state.params), losses
    (3.625, Array([ 1.25   , 16.65625], dtype=float32))
    """

    def run(state, data, batches):
        num_updates, batch_size = batches.shape
        leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, state))
        columns, of_data = jax.tree.flatten(jax.tree.map(jnp.asarray, data))

        def update(leaves, rows):
            state, info = step(structure.unflatten(leaves), of_data.unflatten(rows))
            return structure.flatten_up_to(state), info.loss

        rows = [jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for x in columns]
        closed = jax.make_jaxpr(update)(leaves, rows)
        _check(leaves, columns, closed)
        visit = min(num_updates, max(1, INDICES // batch_size))
        indices = jnp.pad(batches.astype(jnp.int32), ((0, -num_updates % visit), (0, 0))).reshape(-1, visit, batch_size)
        end, losses = _call(closed, leaves, columns, indices, num_updates, interpret)
        return structure.unflatten(end), losses.reshape(-1)[:num_updates]

    return run


def _check(leaves: list[jax.Array], columns: list[jax.Array], closed: Any) -> None:
    for old, new in zip(leaves, closed.out_avals[:-1], strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise TypeError(f"step makes {new.dtype}{new.shape} of a leaf of the state, {old.dtype}{old.shape}")
    needed = sum(_bytes(x.shape, x.dtype) for x in (*map(_table, columns), *closed.consts, *leaves, *leaves))
    if needed > VMEM_BYTES:
        raise ValueError(
            f"data and state need {needed} bytes of VMEM, and {VMEM_BYTES} are there: use descent.run, or less data"
        )


def _call(closed: Any, leaves: list, columns: list, indices: jax.Array, num_updates: int, interpret: bool):
    """Start the kernel: one visit of the grid for each block of indices [visits, updates, B]."""
    # Imported here, since it takes a while and most have no use for it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    visits, visit, batch_size = indices.shape
    consts = [jnp.asarray(x) for x in closed.consts]  # a kernel closes over nothing: they are arguments
    tables = [_table(x) for x in columns]

    def kernel(indices, *refs):
        refs = iter(refs)
        of_data, held, start, now = ([next(refs) for _ in part] for part in (tables, consts, leaves, leaves))
        [losses] = refs
        first = pl.program_id(0) * visit

        @pl.when(first == 0)
        def _():
            for ref, given, x in zip(now, start, leaves, strict=True):
                ref[_at(x)] = given[_at(x)]

        def update(t, carry):
            places = [indices[0, 0, t * batch_size + b] for b in range(batch_size)]
            rows = [jnp.concatenate([ref[pl.ds(place, 1)] for place in places]) for ref in of_data]
            batch = [row.reshape(batch_size, *x.shape[1:]) for row, x in zip(rows, columns, strict=True)]
            state = [ref[_at(x)] for ref, x in zip(now, leaves, strict=True)]
            constants = [ref[_at(x)] for ref, x in zip(held, consts, strict=True)]
            *state, losses[0, 0, t] = evaluated(closed.jaxpr, constants, [*state, *batch], RULES)
            for ref, x in zip(now, state, strict=True):
                ref[_at(x)] = x
            return carry

        lax.fori_loop(0, jnp.minimum(visit, num_updates - first), update, None)

    def whole(x):
        shape, memory = _wide(x.shape), pltpu.VMEM if x.ndim else pltpu.SMEM
        return pl.BlockSpec(shape, lambda _: (0,) * len(shape), memory_space=memory)

    def part(size):
        return pl.BlockSpec((1, 1, size), lambda i: (i, 0, 0), memory_space=pltpu.SMEM)

    inputs = [*tables, *consts, *leaves]
    *end, losses = pl.pallas_call(
        kernel,
        grid=(visits,),
        in_specs=[part(visit * batch_size), *map(whole, inputs)],
        out_specs=[*map(whole, leaves), part(visit)],
        out_shape=[
            *(jax.ShapeDtypeStruct(_wide(x.shape), x.dtype) for x in leaves),
            jax.ShapeDtypeStruct((visits, 1, visit), closed.out_avals[-1].dtype),
        ],
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
    )(indices.reshape(visits, 1, -1), *(x.reshape(_wide(x.shape)) for x in inputs))
    return [x.reshape(leaf.shape) for x, leaf in zip(end, leaves, strict=True)], losses


def _table(x: jax.Array) -> jax.Array:
    """Return the examples as rows, of a number where they are numbers."""
    return x[:, None] if x.ndim == 1 else x


def _wide(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which the chip holds an array, scalars and vectors as [1, n]."""
    return (1,) * (2 - len(shape)) + shape


def _at(x: jax.Array) -> Any:
    """Return where, in what the chip holds, the array itself is."""
    return (0,) * (2 - x.ndim) if x.ndim < 2 else ...


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Return the bytes of an array in VMEM, which is laid out in tiles of 8 rows of 128."""
    *outer, rows, width = _wide(shape)
    return math.prod(outer) * (rows if rows == 1 else 8 * -(-rows // 8)) * 128 * -(-width // 128) * dtype.itemsize


def _sign(x: jax.Array) -> jax.Array:
    # Pallas has it, but asks the device that is there how to compute it, also where it compiles for another.
    return jnp.where(x > 0, jnp.ones_like(x), jnp.where(x < 0, -jnp.ones_like(x), x))


def _power(x: Any, y: Any) -> jax.Array:
    """Return x^y for x > 0. The scalar unit has no exponential: a scalar is made a vector."""
    scalar = jnp.ndim(x) == jnp.ndim(y) == 0
    base = jnp.full((1, 1), x) if scalar else jnp.asarray(x)
    power = jnp.exp(jnp.log(base) * jnp.asarray(y).astype(base.dtype))
    return power[0, 0] if scalar else power


def _gather(x: jax.Array, indices: jax.Array, *, dimension_numbers: Any, slice_sizes: Any, mode: Any, **_) -> jax.Array:
    """Take entries along one axis: whole slices by a one-hot matrix, or one number of every row by comparison."""
    shared, taken = dimension_numbers.operand_batching_dims, dimension_numbers.start_index_map
    kept = [i for i in range(x.ndim) if i not in (*taken, *shared)]
    whole = all(slice_sizes[i] == (1 if i in taken else x.shape[i]) for i in (*taken, *kept))
    if len(taken) > 1 or (shared and kept) or not whole:
        raise NotImplementedError(f"on_chip: a gather of slices {slice_sizes} of {x.shape} by {dimension_numbers}")
    [axis] = taken
    size, places = x.shape[axis], indices.reshape(-1, 1)
    if mode == lax.GatherScatterMode.CLIP:
        places = jnp.clip(places, 0, size - 1)
    chosen = places == lax.broadcasted_iota(places.dtype, (len(places), size), 1)
    if shared:
        found = jnp.where(chosen, x.transpose(*shared, axis).reshape(-1, size), 0).sum(1)
    else:
        found = jnp.dot(chosen.astype(x.dtype), x.transpose(axis, *kept).reshape(size, -1), precision="highest")
    left_out = (*dimension_numbers.collapsed_slice_dims, *shared)
    windows = [1 if i == axis else x.shape[i] for i in range(x.ndim) if i not in left_out]
    found = found.reshape(*indices.shape[:-1], *windows)
    order = [i for i in range(found.ndim) if i not in dimension_numbers.offset_dims] + [*dimension_numbers.offset_dims]
    return found.transpose([order.index(i) for i in range(found.ndim)])


def _scatter_add(x: jax.Array, indices: Any, updates: jax.Array, *, dimension_numbers: Any, mode: Any, **_):
    """Add what the transpose of a gather makes of the updates."""
    numbers = lax.GatherDimensionNumbers(*dimension_numbers)
    left_out = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    windows = iter(updates.shape[i] for i in numbers.offset_dims)
    sizes = tuple(1 if i in left_out else next(windows) for i in range(x.ndim))
    gather = partial(_gather, indices=indices, dimension_numbers=numbers, slice_sizes=sizes, mode=mode)
    return x + jax.linear_transpose(gather, x)(updates)[0]


RULES: Rules = {
    "copy": lambda x: x,
    "optimization_barrier": lambda *args: list(args),
    "sign": _sign,
    "pow": _power,
    "gather": _gather,
    "scatter-add": _scatter_add,
}
