import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest

from gdjax import descent, gradients, sweep
from gdjax.sweep import _lanes as lanes
from gdjax.sweep import _programs as programs


def descend(size, num_updates, start, example):
    """Updates of least squares on a square matrix, of one example again and again: 2 size^2 multiplications each."""
    loss = lambda w, x: 0.5 * jnp.sum((x @ w) ** 2)  # noqa: E731
    method = descent.method(gradients.mean(loss), optax.sgd(0.5 / size))
    batches = jnp.zeros((num_updates, 1), jnp.int32)
    return descent.run(method, method.init(start * jnp.eye(size)), example[None], batches)[0].params


def descended(size, num_updates, start, example):
    w, x = start * np.eye(size), np.asarray(example)
    for _ in range(num_updates):
        w = w - 0.5 / size * np.outer(x, x @ w)
    return w


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 7, 64])
def test_lanes_in_groups_of_any_size_are_those_of_numpy_in_their_order(at_once):
    starts, examples = np.linspace(0.5, 2, 7), np.linspace(-1, 1, 21).reshape(7, 3)
    function = lanes.grouped(lambda *lane: [descend(3, 4, *lane), lane[0]], at_once)
    found, again = jax.jit(function)(jnp.asarray(starts), jnp.asarray(examples))
    expected = np.stack(list(map(partial(descended, 3, 4), starts, examples)))
    precision.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(again, jnp.asarray(starts))


def sizes_of_scans(function, *args, platform="cpu"):
    """Return the leading sizes that the outermost loops of a program, lowered for a platform, go through."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return [int(n) for n in re.findall(r"dense<(\d+)> : tensor<i(?:32|64)>", text.split("stablehlo.while")[1])][:1]


def test_small_lanes_run_side_by_side_and_large_ones_one_after_another_on_a_cpu_alone():
    run = {size: partial(descend, size, 100) for size in (4, 256)}
    of_one = {size: (jax.ShapeDtypeStruct((), float), jax.ShapeDtypeStruct((size,), float)) for size in run}
    assert sweep.at_once(run[4], *of_one[4]) >= 256
    assert sweep.at_once(run[256], *of_one[256]) == 1
    args = jnp.ones(6), jnp.ones((6, 256))
    assert sizes_of_scans(sweep.vmap(run[256]), *args) == [6]
    assert sizes_of_scans(sweep.vmap(run[256]), *args, platform="cuda") == [100]
    assert sizes_of_scans(sweep.vmap(run[4]), jnp.ones(6), jnp.ones((6, 4))) == [100]


def test_what_is_computed_most_often_decides():
    def loop(function, length):
        return lambda x: jax.lax.fori_loop(0, length, lambda i, x: function(x), x)

    def large(x):
        return x + jnp.sin(jnp.full(2**17, x)).sum()

    few, many = sweep.at_once(large, 1.0), sweep.at_once(loop(jnp.sin, 100), 1.0)
    assert (few, math.log2(many) > 10) == (1, True)
    assert sweep.at_once(lambda x: loop(jnp.sin, 100)(large(x)), 1.0) == many
    assert sweep.at_once(loop(lambda x: loop(jnp.sin, 4)(large(x)), 100), 1.0) == 1  # about as often
    assert sweep.at_once(lambda x: jax.lax.while_loop(lambda x: x < 9, jnp.exp, large(x)), 1.0) > 1000
    product = lambda x: x @ x  # noqa: E731
    assert [sweep.at_once(product, jnp.ones((n, n), jnp.float32)) for n in (16, 32, 64)] == [32, 4, 1]
    elsewhere = partial(jax.lax.platform_dependent, tpu=large, default=jnp.sin)
    assert sweep.at_once(loop(elsewhere, 100), 1.0) == many
    images, kernel = jnp.ones((4, 8, 16, 16), jnp.float32), jnp.ones((16, 8, 3, 3), jnp.float32)
    assert sweep.at_once(lambda x: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME"), images[:, :, :2, :2]) == 8
    assert sweep.at_once(lambda x: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME"), images) == 1


def test_keys_trees_and_what_is_closed_over_are_mapped_as_by_jax():
    scale = jnp.asarray([1.0, 10.0])
    size = 2**15  # one after another

    def draw(point, shift):
        return {"sum": jax.random.normal(point["key"], (size,)).sum() * scale + shift, "key": point["key"]}

    args = {"key": jax.random.split(jax.random.key(0), 3)}, jnp.arange(3.0)
    assert sweep.at_once(draw, *jax.tree.map(lambda x: x[0], args)) == 1
    found, expected = jax.jit(sweep.vmap(draw))(*args), jax.vmap(draw)(*args)
    precision.assert_close(found["sum"], expected["sum"], rtol=1e-10, atol=1e-10)
    assert (found["key"] == expected["key"]).all()


def test_on_several_devices_each_loops_over_its_own_lanes_and_none_talks_to_another():
    size = 256
    points = {"start": np.linspace(0.5, 2, 8), "example": np.linspace(-1, 1, 8 * size).reshape(8, size)}

    def run(point):
        return descend(size, 3, point["start"], point["example"])

    found = sweep.map(run, points)
    expected = np.stack(list(map(partial(descended, size, 3), points["start"], points["example"])))
    precision.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("points",))
    leaves = [programs.numbers(x, "points") for x in jax.tree.leaves(points)]
    text = programs.compiled(run, programs.traced(run, points), leaves, mesh, None).compiled.as_text() or ""
    assert mesh.size == 2
    assert " while(" in text
    assert not re.search("all-gather|all-reduce|all-to-all|collective", text)
    assert programs.traced(run, points).lanes == 1
    assert re.search(r"f(32|64)\[4,256,256\]", text)  # the results of one device
