"""A run as one kernel of a TPU computes what `descent.run` computes, interpreted; .ci/aot.py compiles it for one."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gdjax import batching, descent, gradients, kernels
from gdjax.problems import models

MODEL = models.mlp((3, 4, 3))


def by_index(params, example):
    """Choose by an index that may be negative: a gather that clips, and its scatter."""
    x, label = example
    return -jax.nn.log_softmax(MODEL.apply(params, x))[label]


def by_optax(params, example):
    """Choose along an axis: gathers that fill."""
    x, label = example
    return optax.softmax_cross_entropy_with_integer_labels(MODEL.apply(params, x), label)


METHODS = {
    "sgd": (gradients.mean(by_optax), optax.sgd(0.1)),
    "momentum": (gradients.mean(by_index), optax.sgd(0.1, momentum=0.9)),
    "adam": (gradients.mean(by_optax), optax.adam(0.01)),
    "clipped": (gradients.clipped(by_index, 0.5), optax.sgd(0.1)),
}


@pytest.fixture
def float32():
    """A TPU has no other; optax.adam raises a float to an integer."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def setting(name, batch_size, num_updates=5):
    method = descent.method(*METHODS[name])
    data = jax.random.normal(jax.random.key(1), (12, 3)), jnp.arange(12) % 3
    stream = batching.with_replacement(jax.random.key(2), 12, length=num_updates * batch_size)
    return method, method.init(MODEL.init(jax.random.key(0))), data, batching.batches(stream, batch_size)


def assert_same(found, expected, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), found, expected)
    assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, expected)


CASES = [(name, size) for name in METHODS for size in (1, 8)]
CASES = [case if case == ("adam", 8) else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("name", "batch_size"), CASES)
def test_it_is_the_loop_of_descent(float32, name, batch_size):
    method, state, data, batches = setting(name, batch_size)
    found = jax.jit(kernels.on_chip(method.step, interpret=True))(state, data, batches)
    assert_same(found, descent.run(method, state, data, batches))


def test_the_state_outlives_a_visit_of_the_grid_and_lanes_do_not_share_it(float32, monkeypatch):
    """x' - c = (1 - r) (x - c) where all examples are c."""
    monkeypatch.setattr("gdjax.kernels._on_chip.INDICES", 4)  # three visits, the last of one update
    method = descent.method(gradients.mean(lambda x, c: 0.5 * (x - c) ** 2), optax.sgd(0.5))
    lanes = jax.vmap(method.init)(jnp.asarray([1.0, 5.0]))
    loop = jax.jit(jax.vmap(kernels.on_chip(method.step, interpret=True), (0, None, None)))
    state, losses = loop(lanes, jnp.ones(3), jnp.zeros((5, 2), int))
    assert_same(state.params, 1 + jnp.asarray([0.0, 4.0]) / 2**5)
    assert_same(losses, jnp.asarray([0.0, 8.0])[:, None] / 4.0 ** jnp.arange(5.0)[None])
    assert [int(n) for n in state.num_examples.low] == [10, 10]


def test_what_the_step_closes_over_is_an_argument_of_the_kernel(float32):
    table, rate = jnp.asarray([1.0, 2.0]), jnp.asarray(0.5)

    def run(rate):
        method = descent.method(gradients.mean(lambda x, row: jnp.sum((x - row) ** 2 * table)), optax.sgd(rate))
        state, data, batches = method.init(jnp.zeros(2)), jnp.ones((2, 2)), jnp.asarray([[0], [1]])
        return kernels.on_chip(method.step, interpret=True)(state, data, batches)

    state, losses = jax.jit(run)(rate / 4)  # x' = x - r 2 t (x - 1) / 4: errors of 1, 1 - r t / 2, its square
    assert_same(state.params, jnp.asarray([1 - 0.75**2, 1 - 0.5**2]))
    assert_same(losses, jnp.asarray([3.0, 0.75**2 + 2 * 0.5**2]))


@pytest.mark.parametrize("shape", [(5, 3), (5,)])
def test_rows_by_a_one_hot_matrix(float32, shape):
    """Of a table, as an embedding has it, forwards and backwards: x' = x - r times how often a row was drawn."""
    method = descent.method(gradients.mean(lambda table, rows: table.at[rows].get(mode="clip").sum()), optax.sgd(0.5))
    table = jax.random.normal(jax.random.key(0), shape)
    rows = jnp.asarray([[0, 4, 9]])
    state, losses = jax.jit(kernels.on_chip(method.step, interpret=True))(
        method.init(table), rows, jnp.zeros((1, 1), int)
    )
    counts = jnp.zeros(shape).at[jnp.asarray([0, 4, 4])].add(1.0)
    assert_same((state.params, losses), (table - 0.5 * counts, (table * counts).sum()[None]))


def test_powers_and_signs_of_vectors(float32):
    method = descent.method(gradients.mean(lambda x, y: (x**y).sum() + 0 * y), optax.sign_sgd(0.5))
    state, losses = jax.jit(kernels.on_chip(method.step, interpret=True))(
        method.init(jnp.asarray([4.0, 9.0])), jnp.asarray([-0.5]), jnp.zeros((1, 1), int)
    )
    assert_same((state.params, losses), (jnp.asarray([4.5, 9.5]), jnp.asarray([1 / 2 + 1 / 3])))


def test_data_that_do_not_fit_are_refused_with_their_bytes(float32):
    """Each row of 3 numbers fills 512 bytes, and each label too."""
    method, state, (x, labels), batches = setting("sgd", 1)
    data = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2**17, *x.shape[1:]), x.dtype), (x, labels))
    with pytest.raises(ValueError, match=r"13\d{7} bytes of VMEM, and 104857600 are there"):
        jax.eval_shape(kernels.on_chip(method.step), state, data, batches)


def test_a_step_that_changes_its_state_is_refused(float32):
    _, *rest = setting("sgd", 1)
    with pytest.raises(TypeError, match=r"step makes float32\(1,\) of a leaf of the state, float32\(\)"):
        kernels.on_chip(lambda state, batch: (state[None], SimpleNamespace(loss=state)))(jnp.zeros(()), *rest[1:])


def test_a_gather_of_another_kind_is_an_error_that_shows_it(float32):
    method = descent.method(gradients.mean(lambda x, i: jax.lax.dynamic_slice(x, (i,), (2,)).sum()), optax.sgd(0.1))
    with pytest.raises(NotImplementedError, match=r"gather of slices \(2,\) of \(5,\)"):
        kernels.on_chip(method.step, interpret=True)(method.init(jnp.ones(5)), jnp.arange(3), jnp.zeros((1, 2), int))
