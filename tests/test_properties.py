"""What holds for every tree of parameters, every kind of number and every batch size, against sums written in NumPy.

Every example is a program of its own, so there are few; `--hypothesis-profile thorough` looks at ten times as many.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gdjax import batching, curvature, descent, ghost, gradients, noise, problem, sweep, training

pytestmark = pytest.mark.slow  # hundreds of programs are compiled

WIDE = jax.dtypes.canonicalize_dtype(float)
FLOATS = (WIDE, jnp.float32, jnp.bfloat16, jnp.float16)
SHAPES = ((), (3,), (3, 2), (0, 3), (1, 1))
FROZEN = (jnp.asarray(3), jnp.asarray([True, False]), jnp.arange(2, dtype=jnp.int8), jax.random.key(5), None)
RATE = 1 / 64
FEW = settings(max_examples=settings.default.max_examples // 16)


class Pair(NamedTuple):
    first: Any
    second: Any


TREES = (
    tuple,
    lambda leaves: {f"leaf {i}": leaf for i, leaf in enumerate(leaves)},
    lambda leaves: Pair([], {"all": Pair(None, list(leaves))}),
    lambda leaves: leaves[0] if len(leaves) == 1 else [[leaf] for leaf in leaves],
)


def values(shape, dtype):
    """Return numbers that are exact in every dtype."""
    return jnp.asarray((np.arange(np.prod(shape, dtype=int)) % 5 - 2).reshape(shape) / 4, dtype)


@st.composite
def parameters(draw, floats=FLOATS):
    """A tree of leaves of all shapes and kinds, one of them at least to train."""
    kinds = draw(st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(floats)), min_size=1, max_size=4))
    leaves = [values(*kind) for kind in kinds]
    leaves += draw(st.lists(st.sampled_from(FROZEN), max_size=2))
    return draw(st.sampled_from(TREES))(draw(st.permutations(leaves)))


def examples(num_examples, dtype=WIDE):
    """Return (x [N, 3], y [N]), exact in every dtype."""
    x = np.arange(3 * num_examples).reshape(num_examples, 3) * 5 % 7 - 3
    return jnp.asarray(x / 4, dtype), jnp.asarray(np.arange(num_examples) % 3 / 2, dtype)


ALL = Pair({"all": [values(s, dtype) for s in SHAPES for dtype in (WIDE, jnp.bfloat16)]}, list(FROZEN))


def is_number(leaf):
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def loss(params, example):
    """Return (z - y)^2 / 2, to which every leaf adds what it can: a product with x, or its sum times that of x."""
    x, y = example
    z = jnp.zeros((), x.dtype)
    for leaf in filter(is_number, jax.tree.leaves(params)):
        leaf = leaf.astype(x.dtype)
        if leaf.shape == (3,):
            z += leaf @ x
        elif leaf.shape == (3, 2):
            z += jnp.tanh(x @ leaf).sum()
        else:
            z += leaf.sum() * x.sum()
    return (z - y) ** 2 / 2


def by_hand(leaves, x, y):
    """Return losses [B] and the gradients [B, ...] of every leaf, in float64 without jax."""
    z, slopes = np.zeros(len(y)), []
    for leaf in leaves:
        if leaf.shape == (3,):
            z, slope = z + x @ leaf, x
        elif leaf.shape == (3, 2):
            z, slope = z + np.tanh(x @ leaf).sum(1), x[:, :, None] * (1 - np.tanh(x @ leaf) ** 2)[:, None]
        else:
            z = z + leaf.sum() * x.sum(1)
            slope = x.sum(1).reshape(-1, *[1] * leaf.ndim) * np.ones(leaf.shape)
        slopes.append(slope)
    error = z - y
    return error**2 / 2, [error.reshape(-1, *[1] * (slope.ndim - 1)) * slope for slope in slopes]


def numbers(tree):
    return [np.asarray(leaf, np.float64) for leaf in filter(is_number, jax.tree.leaves(tree))]


def trained(params):
    """Return which of the numbers in `params` are trained."""
    return [jnp.issubdtype(x.dtype, jnp.floating) for x in filter(is_number, jax.tree.leaves(params))]


def expected(params, data):
    """Return losses [B] and the gradients [B, ...] of the leaves to train."""
    losses, grads = by_hand(numbers(params), *numbers(data))
    return losses, [grad for grad, is_trained in zip(grads, trained(params), strict=True) if is_trained]


def assert_close(found, wanted, *trees, scale=None, ulps=64):
    """Compare a tree with a list of arrays, to the least precise dtype in `trees`; errors are those of a sum."""
    eps = max([jnp.finfo(x.dtype).eps for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.floating)])
    found = jax.tree.leaves(found)
    assert [x.shape for x in found] == [x.shape for x in wanted]
    for a, b in zip(found, wanted, strict=True):
        size = np.abs(b).max(initial=1.0) if scale is None else scale
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=ulps * float(eps) * size)


def clipped(grads, max_norm):
    norms = np.sqrt(sum((grad.reshape(len(grad), -1) ** 2).sum(1) for grad in grads))
    return norms, [np.tensordot(1 / np.maximum(1, norms / max_norm), grad, 1) / len(grad) for grad in grads]


@FEW
@given(parameters(), st.sampled_from([1, 2, 5, 6]), st.sampled_from(FLOATS), st.data())
@example(ALL, 6, WIDE, None)
def test_every_estimator_is_the_mean_of_the_examples_gradients_and_measures_them(params, batch_size, dtype, data):
    batch = examples(batch_size, dtype)
    train, _ = problem.trainable(params)
    losses, grads = expected(params, batch)
    size = data.draw(st.sampled_from([n for n in (1, 2, 3, 5, 6) if batch_size % n == 0])) if data else 3
    factories = {
        "mean": gradients.mean,
        "microbatched": partial(gradients.microbatched, microbatch_size=size),
        "per_example": gradients.per_example,
        "with_sq_norms": gradients.with_sq_norms,
        "clipped by nothing": partial(gradients.clipped, max_norm=np.inf),
        "clipped": partial(gradients.clipped, max_norm=0.5),
    }
    program = jax.jit(
        lambda params, batch: (
            {name: factory(loss)(params, batch) for name, factory in factories.items()},
            ghost.second_moments(loss)(params, batch)[2],
            ghost.gram(loss)(params, batch)[2],
        )
    )
    estimates, moments, gram = program(params, batch)
    every, measured, few = (estimates[name] for name in ("per_example", "with_sq_norms", "clipped"))
    for estimate in (estimate for name, estimate in estimates.items() if name != "clipped"):
        assert jax.tree.map(lambda g: (g.shape, g.dtype), estimate.grad) == jax.tree.map(
            lambda p: (p.shape, p.dtype), train
        )
        assert_close(estimate.grad, [grad.mean(0) for grad in grads], params, batch)
        assert_close(estimate.loss, [losses.mean()], params, batch)
    assert_close(every.aux.grads, grads, params, batch)
    squares = [(grad.reshape(batch_size, -1) ** 2).sum(1) for grad in grads]
    assert_close(measured.aux.sq_norms, squares, params, batch)
    assert all(x.dtype in (jnp.float32, WIDE) for x in jax.tree.leaves(measured.aux.sq_norms))
    norms, means = clipped(grads, 0.5)
    assert_close([few.aux.norms, few.grad], [norms, *means], params, batch)
    assert_close(moments, [(g**2).mean(0) for g in grads], params, batch)
    flat = [grad.reshape(batch_size, -1) for grad in grads]
    assert_close(gram, [g @ g.T for g in flat], params, batch)


def descend(params, data, batches):
    """Return the numbers of `params` after each batch, and the loss of each batch."""
    now, losses = numbers(params), []
    for batch in batches:
        its_losses, grads = by_hand(now, *(x[batch] for x in numbers(data)))
        losses.append(its_losses.mean())
        now = [x - RATE * g.mean(0) * t for x, g, t in zip(now, grads, trained(params), strict=True)]
    return now, losses


@FEW
@given(parameters(), st.sampled_from([1, 2, 5, 6]), st.data())
def test_every_loop_is_the_loop_written_by_hand(params, num_examples, data):
    """From one example a batch to all; N prime and not; with `every` that divides T and not."""
    batch_size = data.draw(st.sampled_from([1, 2, num_examples]))
    train = examples(num_examples, data.draw(st.sampled_from(FLOATS)))
    stream = batching.reshuffled(jax.random.key(1), num_examples, length=4 * batch_size)
    batches = np.asarray(batching.batches(stream, batch_size))
    method = descent.method(gradients.mean(loss), optax.sgd(RATE))
    every = data.draw(st.integers(1, 5))
    state, losses = descent.run(method, method.init(params), train, batches.tolist(), every=every)
    now, expected_losses = descend(params, train, batches)
    assert_close(list(filter(is_number, jax.tree.leaves(state.params))), now, params, train)
    recorded = [*range(every - 1, 4, every), *([3] if 4 % every else [])]
    assert_close(losses, [np.asarray(expected_losses)[recorded]], params, train)
    assert int(state.num_examples) == 4 * batch_size
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        assert after.dtype == before.dtype
        assert jnp.issubdtype(before.dtype, jnp.floating) or bool((after == before).all())
    rules = {"diverged": descent.diverged()}
    forever, ending = descent.until(method, method.init(params), train, batches, rules, every=2)
    assert (int(ending.rule), int(ending.num_updates)) == (1, 4)
    assert_close(list(filter(is_number, jax.tree.leaves(forever.params))), now, params, train)


@FEW
@given(parameters(), st.sampled_from([2, 5, 6]), st.sampled_from(FLOATS))
def test_noise_scales_of_all_examples_are_exact(params, num_examples, dtype):
    train = examples(num_examples, dtype)
    _, grads = expected(params, train)
    squares = [(grad.reshape(num_examples, -1) ** 2).sum(1).mean() for grad in grads]
    signal = [(grad.mean(0) ** 2).sum() for grad in grads]
    measure = jax.jit(partial(noise.measure, loss, num_examples=num_examples))
    scale = measure(params, train, jax.random.key(2))
    scales = jax.tree.leaves(scale.per_leaf, is_leaf=lambda x: isinstance(x, noise.NoiseScale))
    for s, of_one, of_all in zip([scale, *scales], [sum(squares), *squares], [sum(signal), *signal], strict=True):
        assert_close([s.grad_sq_norm, s.trace_cov], [of_all, of_one - of_all], params, train, scale=1 + of_one)
    method = descent.method(gradients.with_sq_norms(loss), optax.sgd(RATE))
    method = noise.track(method, half_life=1, num_examples=num_examples)
    _, info = jax.jit(method.step)(method.init(params), train)
    tracked = info.aux.noise_scale
    wanted = [sum(signal), sum(squares) - sum(signal)]
    assert_close([tracked.grad_sq_norm, tracked.trace_cov], wanted, params, train, scale=1 + sum(squares))


@FEW
@given(parameters(floats=(WIDE,)), st.sampled_from([1, 5]))
@example(Pair([values(shape, WIDE) for shape in SHAPES], list(FROZEN)), 5)
def test_curvature_is_the_difference_of_gradients(params, num_examples):
    train, batch = problem.trainable(params)[0], examples(num_examples)
    vector = jax.tree.map(jnp.ones_like, train)
    step = np.cbrt(jnp.finfo(WIDE).eps)
    ends = [jax.tree.map(lambda p, s=s: p + s * step if is_floating(p) else p, params) for s in (1, -1)]
    up, down = ([grad.mean(0) for grad in expected(end, batch)[1]] for end in ends)
    image = [(a - b) / (2 * step) for a, b in zip(up, down, strict=True)]
    error = float(step**2) / float(jnp.finfo(WIDE).eps)  # of the differences, in units of the dtype
    hvp = jax.jit(curvature.hvp(loss))
    assert_close(hvp(params, batch, vector), image, train, ulps=100 * error)
    size = sum(leaf.size for leaf in jax.tree.leaves(train))
    if size:
        start = curvature.random_vectors(jax.random.key(3), params, num_vectors=min(2, size))
        pairs = jax.jit(curvature.top_eigenpairs(loss, num_iterations=4))(params, batch, start)
        top = jax.tree.map(lambda v: v[0], pairs.vectors)
        rayleigh = curvature.inner(top, hvp(params, batch, top))
        assert_close([pairs.values[:1]], [np.asarray([rayleigh])], train)
        assert float(pairs.values[0]) >= sum(map(np.sum, image)) / size - 1e-3 * abs(float(pairs.values[0]))


def is_floating(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


ROWS = {
    "int8": np.arange(7, dtype=np.int8),
    "bool": np.arange(7) % 2 == 0,
    "half": jnp.arange(14, dtype=jnp.bfloat16).reshape(7, 2),
    "key": jax.random.split(jax.random.key(0), 7),
    "empty": np.zeros((7, 0), np.float32),
    "none": None,
}


@FEW
@given(st.sampled_from([7, 1, 5]), st.sets(st.sampled_from(sorted(ROWS)), min_size=1), st.data())
def test_an_epoch_of_batches_holds_every_row_of_the_data_once(num_examples, names, data):
    names = sorted(names | {"int8"})
    rows = {name: jax.tree.map(lambda x: x[:num_examples], ROWS[name]) for name in names}
    batch_size = data.draw(st.sampled_from([n for n in (1, 2, 3, 5, 7) if n <= 2 * num_examples]))
    stream = data.draw(st.sampled_from([batching.reshuffled, batching.shuffled_once, batching.cyclic]))
    entries = stream(jax.random.key(data.draw(st.integers(0, 9))), np.int64(num_examples), num_epochs=2 * batch_size)
    batches = [batching.take(rows, batch) for batch in batching.batches(entries, batch_size)]
    for name in names:
        if rows[name] is None:
            continue
        seen = jnp.concatenate([batch[name] for batch in batches])
        assert seen.dtype == rows[name].dtype
        order = np.asarray(jnp.concatenate([batch["int8"] for batch in batches])).reshape(-1, num_examples)
        np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(num_examples), (2 * batch_size, 1)))
        flat = jax.random.key_data(seen) if name == "key" else seen
        source = jax.random.key_data(rows[name]) if name == "key" else jnp.asarray(rows[name])
        np.testing.assert_array_equal(flat, source[order.reshape(-1)])


AXES = (
    [1, 2],
    (0.5,),
    range(3),
    [True, False],
    np.asarray([1.5, 2.5, 3.5], np.float16),
    jnp.asarray([1, 2], jnp.bfloat16),
    np.zeros((2, 0, 3)),
    Pair(np.arange(2), {"b": np.arange(4.0).reshape(2, 2)}),
)


@FEW
@given(st.lists(st.sampled_from(range(len(AXES))), min_size=1, max_size=3), st.sampled_from([None, 2, 4]))
def test_a_sweep_of_a_grid_is_the_product_point_by_point(chosen, chunk_size):
    axes = {f"axis {i}": AXES[axis] for i, axis in enumerate(chosen)}
    grid = sweep.grid(**axes)
    found = sweep.map(lambda point: (point, None), grid, chunk_size=chunk_size)
    rows = [
        [
            jax.tree.map(lambda x, i=i: np.asarray(x)[i], axis if isinstance(axis, Pair) else np.asarray(axis))
            for i in range(len(jax.tree.leaves(axis)[0]) if isinstance(axis, Pair) else len(axis))
        ]
        for axis in axes.values()
    ]
    product = list(itertools.product(*rows))
    for i, name in enumerate(axes):
        wanted = jax.tree.map(lambda *x: np.stack(x).reshape(*grid.shape, *x[0].shape), *(row[i] for row in product))
        jax.tree.map(np.testing.assert_array_equal, found[0][name], wanted)


def test_training_is_the_loop_written_by_hand_for_a_tree_of_every_kind():
    num_examples, batch_size = 5, 3
    train = examples(num_examples)
    method = descent.method(gradients.mean(loss), optax.sgd(RATE))
    key = jax.random.key(1)
    options = {"key": key, "batch_size": batch_size, "num_updates": 5, "chunk_updates": 2}
    state, losses = training.run(method, method.init(ALL), train, **options)
    batches = batching.batches(batching.reshuffled(key, num_examples, length=5 * batch_size), batch_size)
    now, expected_losses = descend(ALL, train, np.asarray(batches))
    assert_close(list(filter(is_number, jax.tree.leaves(state.params))), now, ALL)
    assert_close(losses, [np.asarray(expected_losses)], ALL)


SGD = descent.method(gradients.mean(lambda w, x: w * x), optax.sgd(RATE))
KEY = jax.random.key(0)
BAD = {
    r"expected_batch_size=0 must be positive": lambda: gradients.clipped(loss, 1.0, expected_batch_size=0),
    r"batches must be int\[T, B\].* but is int64 \(2,\)|int32 \(2,\)": lambda: descent.run(
        SGD, SGD.init(1.0), np.ones(3), [0, 1]
    ),
    r"batches must be int\[T, B\].* but is float": lambda: descent.until(SGD, SGD.init(1.0), np.ones(3), [[0.5]], {}),
    r"batch_sizes=\(2, 2\) must be \(b, B\) with b < B": lambda: noise.unbiased(1.0, 1.0, batch_sizes=(2, 2)),
    r"batch_sizes=\(1, 5\) .*at most num_examples=4": lambda: noise.unbiased(
        1.0, 1.0, batch_sizes=(1, 5), num_examples=4
    ),
    r"x must be an array of numbers or typed keys, but is <U1": lambda: sweep.grid(x=np.asarray(["a", "b"])),
    r"x must be an array of numbers or typed keys: .*inhomogeneous": lambda: sweep.grid(x=[[1, 2], [3]]),
    r"x must be an array of numbers or typed keys: .*PRNGKey": lambda: sweep.grid(x=[KEY, KEY]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_the_name_of_the_argument(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_numbers_of_python_are_parameters_too():
    def square(w, x):
        return (w * x) ** 2 / 2

    def measure(data):
        scale = noise.measure(square, 2.0, data, KEY, num_examples=3, geometry=jnp.float32(0.5))
        return [
            scale.grad_sq_norm,
            gradients.clipped(square, 2.0)(2.0, data).grad,
            curvature.hvp(square)(2.0, data, 1.0),
        ]

    data = jnp.asarray([1.0, 2.0, 4.0])
    assert_close(jax.jit(measure)(data), [np.asarray(x) for x in (98.0, 2.0, 7.0)], data)
