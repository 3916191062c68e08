"""A loop in one kernel computes what the loop computes, and is one kernel."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
import precision
import pytest
from jax import export

from gdjax import batching, descent, gradients, kernels
from gdjax.problems import models

MODEL = models.mlp((3, 4, 2))
CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="for a CPU only")


EXAMPLES = jax.random.normal(jax.random.key(1), (12, 3))
BATCHES = batching.batches(batching.reshuffled(jax.random.key(2), 12, num_epochs=2), 1)


def train(learning_rate):
    gradient = gradients.mean(lambda params, x: jnp.square(MODEL.apply(params, x)).sum())
    method = descent.method(gradient, optax.sgd(learning_rate, momentum=0.9))
    return descent.run(method, method.init(MODEL.init(jax.random.key(0))), EXAMPLES, BATCHES, every=5)


@CPU
@pytest.mark.slow
def test_one_kernel_is_one_kernel_and_computes_the_same(key):
    one = jax.jit(kernels.one_kernel(train)).lower(0.01).compile()
    chex.assert_trees_all_close(one(0.01), jax.jit(train)(0.01), rtol=max(1e-12, 32 * precision.EPS))
    started = one.as_text().split("ENTRY")[1]
    assert started.count(" call(") == 1
    assert started.count(" while(") == started.count(" fusion(") == 0
    assert " fusion(" in jax.jit(train).lower(0.01).compile().as_text().split("ENTRY")[1]  # without it, a queue of them


@CPU
def test_one_kernel_maps_over_lanes():
    rates = jnp.asarray([0.01, 0.005])
    found = jax.jit(jax.vmap(kernels.one_kernel(train)))(rates)
    chex.assert_trees_all_close(found, jax.jit(jax.vmap(train))(rates), rtol=max(1e-12, 32 * precision.EPS))


@CPU
def test_what_cannot_be_in_one_kernel_is_an_error_and_not_a_wrong_number():
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.jit(kernels.one_kernel(jnp.sort))(jnp.asarray([2.0, 1.0]))


def test_elsewhere_the_function_is_left_as_it_is():
    """Whatever the machine is that traces it."""
    one, rate = jax.jit(kernels.one_kernel(train)), jnp.asarray(0.01)
    for platform, marked in (("cpu", True), ("cuda", False), ("tpu", False)):
        assert ("xla_cpu_small_call" in export.export(one, platforms=[platform])(rate).mlir_module()) == marked


def same(x):
    """Return x [A, 1, 2] by a product over two axes, that with the identity."""
    return jnp.einsum("abc,bcd->ad", x, jnp.eye(2)[None])[:, None]


def smooth(mark):
    """A quantity of a loop with products over several axes: its value, derivative and form are known."""
    decay = mark(lambda x, rate: jax.lax.scan(lambda y, _: (y - rate * same(y), y.sum()), x, None, length=3)[0])
    return lambda x, rate: decay(x, rate).sum()


def test_every_transformation_goes_through_it():
    """After three steps x is (1 - r)^3 x, whose derivative by r is -3 (1 - r)^2 sum x."""
    loop, x, rate = smooth(kernels.for_cpu), jnp.asarray([[[1.0, 2.0]]]), jnp.asarray(0.5)
    expected = 3 * 0.5**3
    assert float(loop(x, rate)) == float(jax.jit(loop)(x, rate)) == expected
    assert float(jax.jit(jax.grad(loop, 1))(x, rate)) == -9 * 0.25
    assert float(jax.jvp(lambda r: loop(x, r), (rate,), (jnp.ones(()),))[1]) == -9 * 0.25
    rates = jnp.asarray([0.5, 0.0])
    precision.assert_close(jax.jit(jax.vmap(loop, (None, 0)))(x, rates), [expected, 3.0], rtol=1e-12)
    precision.assert_close(jax.vmap(jax.grad(loop, 1), (None, 0))(x, rates), [-9 * 0.25, -9.0], rtol=1e-12)
    total, each = jax.jit(lambda: jax.lax.scan(lambda y, r: (loop(x, r) + 0 * y, loop(x, y)), rate, rates))()
    precision.assert_close((total, *each), (3.0, expected, 3 * (1 - expected) ** 3), rtol=1e-12)


def test_it_keeps_integers_keys_and_structure_and_closes_over_traced_values():
    def count(outer):
        def loop(state):
            def advance(s, _):
                return {"n": s["n"] + 1, "x": same(s["x"]) * outer, "key": jax.random.fold_in(s["key"], 1)}, None

            return jax.lax.scan(advance, state, None, length=2)[0]

        return kernels.for_cpu(loop)({"n": jnp.int32(3), "x": jnp.ones((1, 1, 2)), "key": jax.random.key(0)})

    found, tangent = jax.jit(
        lambda: jax.jvp(lambda outer: count(outer)["x"], (jnp.asarray(3.0),), (jnp.asarray(1.0),))
    )()
    precision.assert_close((found, tangent), ([[[9.0, 9.0]]], [[[6.0, 6.0]]]), rtol=1e-12)
    end = jax.jit(count)(jnp.asarray(3.0))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 1)
    assert int(end["n"]) == 5
    assert (jax.random.key_data(end["key"]) == jax.random.key_data(key)).all()


@CPU
@pytest.mark.skipif(jax.device_count() < 2, reason="for two devices")
def test_devices_share_a_loop():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shared = jax.device_put(jnp.arange(4.0).reshape(2, 1, 2), jax.NamedSharding(mesh, jax.P("x")))
    loop = kernels.for_cpu(lambda x: jax.lax.fori_loop(0, 2, lambda i, x: same(x) + x.sum(), x))
    precision.assert_close(jax.jit(loop)(shared), jnp.arange(4.0).reshape(2, 1, 2) + 6 + 30, rtol=1e-12)


def test_what_has_no_such_product_is_left_as_it_is():
    x = jnp.ones(3)
    assert f"{jax.make_jaxpr(kernels.for_cpu(jnp.sin))(x)}" == f"{jax.make_jaxpr(jnp.sin)(x)}"
    assert "for_cpu" in f"{jax.make_jaxpr(kernels.for_cpu(same))(jnp.ones((1, 1, 2)))}"


@CPU
def test_products_over_two_axes_become_products_of_matrices_inside_loops_and_calls():
    """Each einsum is one that a dense layer over [B, T, D] meets: forwards, to its input, and to its weight.

    The first two sum over one axis: XLA itself makes matrices of them, and of other layouts more cheaply than we would.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    x, g, w = (jax.random.normal(k, s) for k, s in zip(keys, ((2, 3, 4), (2, 3, 5), (4, 5)), strict=True))

    def products(x, g, w):
        def body(w, _):
            up, down = jnp.einsum("btd,do->bto", x, w), jnp.einsum("bto,do->btd", g, w)
            return w + jax.jit(lambda x, g: jnp.einsum("btd,bto->do", x, g))(x, g), (up, down)

        return jax.lax.scan(body, w, None, length=2)

    def ranks(function):
        lines = jax.jit(function).lower(x, g, w).as_text().splitlines()
        found = [line.split("(tensor<")[1].split(">")[0].count("x") for line in lines if "dot_general" in line]
        return sorted(found)

    assert ranks(products) == [3, 3, 3]
    assert ranks(kernels.for_cpu(products)) == [2, 3, 3]
    found, expected = jax.jit(kernels.for_cpu(products))(x, g, w), jax.jit(products)(x, g, w)
    chex.assert_trees_all_close(found, expected, rtol=max(1e-12, 32 * precision.EPS))


@pytest.mark.parametrize(
    "equation", ["abc,cb->a", "abc,dbc->ad", "bca,bcd->ad", "abc,c->ab", "abc,abd->acd", "ab,cd->abcd"]
)
def test_no_product_changes(equation):
    letters = dict(zip("abcd", (2, 3, 4, 5), strict=True))
    shapes = [[letters[letter] for letter in part] for part in equation.split("->")[0].split(",")]
    operands = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    function = partial(jnp.einsum, equation)
    precision.assert_close(
        jax.jit(kernels.for_cpu(function))(*operands),
        function(*operands),
        rtol=1e-12,
        atol=max(1e-12, 32 * precision.EPS),
    )
