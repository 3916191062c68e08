"""Estimators built on per-example norms, and norms under every transformation around them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_ghost import PROGRAMS, B, check, normal, oracle, square

from gdjax import batching, descent, ghost, gradients
from gdjax.ghost import _cost as ghost_cost
from gdjax.problems import models

MODEL = models.mlp((4, 6, 3), activation=jnp.tanh)


def loss(params, example):
    return square(MODEL.apply(params, example[0]) - example[1])


@pytest.fixture
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture
def batch():
    return normal(1, B, 4), normal(2, B, 3)


def assert_close(a, b, rtol=1e-12):
    jax.tree.map(lambda a, b: precision.assert_close(a, b, rtol=rtol, atol=1e-13), a, b)


def materialised_norms(params, batch):
    return jax.tree.map(lambda g: (g.reshape(len(g), -1) ** 2).sum(1), oracle(loss, params, batch)[1])


@pytest.mark.slow
def test_with_sq_norms_is_mean_with_norms_beside_it(params, batch):
    estimate, mean = gradients.with_sq_norms(loss)(params, batch), gradients.mean(loss)(params, batch)
    assert_close(tuple(estimate[:2]), tuple(mean[:2]))
    assert_close(estimate.aux.sq_norms, materialised_norms(params, batch))
    assert_close(estimate.aux.losses, oracle(loss, params, batch)[0])


@pytest.mark.slow
def test_with_sq_norms_scans_over_steps_and_vmaps_over_seeds(batch):
    def train(key, estimator):
        method = descent.method(estimator(loss), optax.sgd(0.05, momentum=0.9))
        batches = batching.batches(batching.reshuffled(key, B, num_epochs=6), 3)
        return descent.run(method, method.init(MODEL.init(key)), batch, batches, lambda state, info: (state, info))

    keys = jax.random.split(jax.random.key(3), 2)
    states, (history, infos) = jax.jit(jax.vmap(lambda key: train(key, gradients.with_sq_norms)))(keys)
    for lane, key in enumerate(keys):
        state, (expected, _) = train(key, gradients.mean)
        assert_close(jax.tree.map(lambda x, lane=lane: x[lane], tuple(states)), tuple(state))
        before = jax.tree.map(lambda x: x[-2], expected.params)
        order = batching.batches(batching.reshuffled(key, B, num_epochs=6), 3)[-1]
        norms = materialised_norms(before, batching.take(batch, order))
        assert_close(jax.tree.map(lambda x, lane=lane: x[lane, -1], infos.aux.sq_norms), norms)
    assert history.num_examples.low.shape == (2, 10)


@pytest.mark.slow
def test_clipped_equals_optax_on_materialised_gradients(params, batch):
    _, grads = oracle(loss, params, batch)
    norms = jax.vmap(optax.tree.norm)(grads)
    for max_norm in (0.5 * float(norms.min()), float(jnp.median(norms)), 2 * float(norms.max())):
        leaves, structure = jax.tree.flatten(grads)
        clipped, _ = optax.per_example_global_norm_clip(leaves, max_norm)
        estimate = jax.jit(gradients.clipped(loss, max_norm))(params, batch)
        expected = jax.tree.unflatten(structure, [leaf / B for leaf in clipped])
        assert_close(estimate.grad, expected)
        assert_close(estimate.aux.norms, norms)
        assert_close(estimate.loss, gradients.mean(loss)(params, batch).loss)


@pytest.mark.slow
def test_infinite_max_norm_is_plain_sgd_and_zero_gradients_are_safe(params, batch):
    plain = gradients.mean(loss)(params, batch).grad
    assert_close(gradients.clipped(loss, float("inf"))(params, batch).grad, plain)
    assert_close(
        gradients.clipped(loss, float("inf"), expected_batch_size=10)(params, batch).grad,
        jax.tree.map(lambda g: g * B / 10, plain),
    )
    zero = gradients.clipped(lambda w, x: jax.nn.relu(x @ w - 100), 1.0)(jnp.ones(4), batch[0])
    np.testing.assert_array_equal(zero.grad, np.zeros(4))


@pytest.mark.slow
def test_noise_has_the_deviation_of_dp_sgd_and_comes_from_the_batch(params):
    """Deviation sigma C / L on every component, independent between leaves and components."""
    gradient = gradients.clipped(
        lambda p, e: loss(p, e["data"]),
        0.5,
        noise_multiplier=3.0,
        noise_key=lambda b: b["key"][0],
        expected_batch_size=4,
    )
    quiet = gradients.clipped(lambda p, e: loss(p, e["data"]), 0.5, expected_batch_size=4)
    data = (normal(1, B, 4), normal(2, B, 3))

    @jax.jit
    @jax.vmap
    def noise(key):
        batch = {"data": data, "key": jax.random.split(key, B)}
        both = gradient(params, batch).grad, quiet(params, batch).grad
        return jax.flatten_util.ravel_pytree(jax.tree.map(jnp.subtract, *both))[0]

    draws = np.asarray(noise(jax.random.split(jax.random.key(0), 2000))) / (3.0 * 0.5 / 4)
    covariance = draws.T @ draws / len(draws)
    np.testing.assert_allclose(covariance, np.eye(len(covariance)), atol=5.5 / np.sqrt(len(draws)) * np.sqrt(2))
    np.testing.assert_array_equal(
        noise(jax.random.split(jax.random.key(0), 3)), noise(jax.random.split(jax.random.key(0), 3))
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": 0.0}, "max_norm=0.0 must be positive"),
        ({"max_norm": float("nan")}, "max_norm=nan must be positive"),
        ({"max_norm": 1.0, "noise_multiplier": -1.0}, "noise_multiplier=-1.0 must be at least 0"),
        ({"max_norm": 1.0, "noise_multiplier": 1.0}, "noise_multiplier=1.0 needs a noise_key"),
        (
            {"max_norm": float("inf"), "noise_multiplier": 1.0, "noise_key": lambda batch: jax.random.key(0)},
            "finite max_norm=inf",
        ),
    ],
)
def test_clipping_that_cannot_be_done_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        gradients.clipped(loss, **arguments)


@pytest.mark.parametrize("measure", [ghost.sq_norms, ghost.second_moments, ghost.gram])
@pytest.mark.parametrize(
    "name", ["mlp", "rnn", *(pytest.param(x, marks=pytest.mark.slow) for x in ("transformer", "dense_one_by_one"))]
)
def test_a_batch_sharded_over_devices_gives_the_same(measure, name):
    make = PROGRAMS[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params, batch, its_loss = make()
        batch = jax.tree.map(lambda x: x[:4], batch)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        function = jax.jit(measure(its_loss))
        assert_close(function(replicated, sharded), function(params, batch))


def looped_and_checkpointed(w, x):
    """A product over positions, one in a loop, and one in a rematerialised block."""
    state = lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ w), x[0])
    return jnp.sum(jnp.tanh(x @ w)) + jnp.sum(state) + jnp.sum(jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w, x))


def test_in_shard_map_a_device_measures_its_own_examples():
    weight, batch = jnp.asarray(np.eye(4) + 0.1), jnp.asarray(np.random.default_rng(0).normal(size=(6, 3, 4)))
    expected = ghost.sq_norms(looped_and_checkpointed)(weight, batch).sq_norms
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec("data")}

    def norms(weight, batch):
        return ghost.sq_norms(looped_and_checkpointed)(weight, batch).sq_norms

    def of_own(weight, batch):
        return norms(lax.pcast(weight, ("data",), to="varying"), batch)

    assert_close(jax.jit(jax.shard_map(of_own, mesh=mesh, **specs))(weight, batch), expected)
    with pytest.raises(ValueError, match=r"give jax.lax.pcast.params, .'data',., to='varying'."):
        jax.jit(jax.shard_map(norms, mesh=mesh, **specs))(weight, batch)


def test_a_batch_sharded_along_explicit_axes_gives_the_same():
    weight, batch = jnp.asarray(np.eye(4) + 0.1), jnp.asarray(np.random.default_rng(0).normal(size=(6, 3, 4)))
    expected = ghost.sq_norms(looped_and_checkpointed)(weight, batch).sq_norms
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))):
        sharded = jax.device_put(weight, PartitionSpec()), jax.device_put(batch, PartitionSpec("data"))
        assert_close(jax.jit(ghost.sq_norms(looped_and_checkpointed))(*sharded).sq_norms, expected)


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        pytest.param("transformer", marks=pytest.mark.nightly),
        "rnn",
        "convolution_2d_strided_channels_last",
        "normalisations",
    ],
)
@pytest.mark.slow
def test_in_float32_norms_are_exact_to_rounding(name):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params, batch, its_loss = PROGRAMS[name]()
        assert all(leaf.dtype != jnp.float64 for leaf in jax.tree.leaves(params))
        losses, grads = oracle(its_loss, params, batch)
        expected = jax.tree.map(lambda g: (g.reshape(len(losses), -1) ** 2).sum(1), grads)
        found = jax.jit(ghost.sq_norms(its_loss))(params, batch)[2]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), found, expected
        )


def test_squares_of_a_bfloat16_model_are_added_in_float32():
    """A sum of 2^14 equal squares stops growing at 2^8 of them in bfloat16."""
    n = 2**14

    def its_loss(w, x):
        return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)

    weight, batch = jnp.zeros(n, jnp.float32), jnp.ones((3, n), jnp.float32)
    for params in (weight, weight.astype(jnp.bfloat16)):
        with jax.numpy_dtype_promotion("standard"):
            _, grad, norms = jax.jit(ghost.sq_norms(its_loss))(params, batch)
        np.testing.assert_allclose(norms, n, rtol=2**-8)
        assert (norms.dtype, grad.dtype) == (jnp.float32, params.dtype)


@pytest.mark.slow
def test_a_bfloat16_model_with_float32_parameters_agrees_to_its_own_rounding():
    def its_loss(p, x):
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (p, x))
        hidden = jnp.tanh(low[1] @ low[0]["w"] + low[0]["b"])
        return square((hidden @ low[0]["v"]).astype(jnp.float32))

    params = {"w": normal(0, 8, 16), "b": normal(1, 16), "v": normal(2, 16, 4)}
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float32), (params, normal(3, 6, 8)))
    with jax.numpy_dtype_promotion("standard"):
        found = ghost.sq_norms(its_loss)(params, batch)[2]
        expected = jax.tree.map(lambda g: (g.reshape(6, -1) ** 2).sum(1), oracle(its_loss, params, batch)[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-6), found, expected)


@pytest.mark.parametrize("way", ["gram", 1, 2, 3, B])
@pytest.mark.parametrize("name", ["convolution_2d_depthwise_channels_last", "dense_one_by_one"])
@pytest.mark.slow
def test_every_way_and_chunk_size_gives_the_same_norms(monkeypatch, name, way):
    """Among them chunks that divide the batch of five and chunks that do not."""
    chosen = ghost_cost.Way("gram") if way == "gram" else ghost_cost.Way("in chunks", way)
    monkeypatch.setattr(ghost_cost, "cheapest", lambda *shapes: chosen)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params, batch, its_loss = PROGRAMS[name]()
        _, grads = oracle(its_loss, params, batch)
        _, grad, norms = jax.jit(ghost.sq_norms(its_loss))(params, batch)
    assert_close(grad, jax.tree.map(lambda g: g.mean(0), grads))
    assert_close(norms, jax.tree.map(lambda g: (g.reshape(B, -1) ** 2).sum(1), grads))


def test_chunks_hold_no_more_than_the_working_set(monkeypatch):
    """Gradients of 6 x 10 numbers and 7 x 6 - 30 numbers of patches: 72 for each example."""
    sizes = ghost_cost.Sizes(b=100, k=1, t=7, i=6, o=10, x=30)
    for limit, expected in ((1, 1), (71, 1), (143, 1), (144, 2), (72 * 33, 32), (7199, 64), (7200, 100), (10**6, 100)):
        monkeypatch.setitem(ghost_cost.WORKING_SET, "cpu", limit)
        assert ghost_cost.chunk_size(sizes, "cpu") == expected


def test_a_tree_of_many_small_leaves_gives_xla_no_longer_a_program_than_vmap_of_grad():
    """Which is what compiling such a tree costs."""
    layers = [{"weight": jnp.eye(8), "bias": jnp.zeros(8)} for _ in range(20)]

    def its_loss(layers, x):
        for layer in layers:
            x = jnp.tanh(x @ layer["weight"] + layer["bias"])
        return jnp.sum(x**2)

    def materialised(layers, batch):
        losses, grads = jax.vmap(jax.value_and_grad(its_loss), (None, 0))(layers, batch)
        norms = jax.tree.map(lambda g: jnp.sum(g**2, tuple(range(1, g.ndim))), grads)
        return losses, jax.tree.map(lambda g: g.mean(0), grads), norms

    functions = ghost.sq_norms(its_loss), materialised
    found, by_vmap = (jax.jit(f).lower(layers, jnp.ones((B, 8))).as_text().count("\n") for f in functions)
    assert found < 1.2 * by_vmap


def test_coverage_says_how_every_leaf_is_measured():
    def its_loss(p, x):
        hidden = jnp.tanh(x @ p["dense"] + p["bias"])
        hidden, _ = lax.scan(lambda h, _: (jnp.tanh(h @ p["loop"]), None), hidden, None, length=7)
        return square(hidden @ p["tied"]) + square(x @ p["tied"]) + square(x @ jnp.tanh(p["changed"]))

    names = ("dense", "bias", "loop", "tied", "changed", "unused")
    params = {name: normal(0, *((4,) if name == "bias" else (4, 4))) for name in names} | {"step": jnp.asarray(3)}
    table = ghost.coverage(its_loss, params, normal(1, 4), batch_size=10)
    found = {path: (method, uses) for path, _, method, uses in table.rows}
    assert found == {
        "['bias']": ("add", "add"),
        "['changed']": ("materialised", "dot_general: computed from the parameter"),
        "['dense']": ("dot_general", "dot_general"),
        "['loop']": ("dot_general", "dot_general 7 times in a loop"),
        "['tied']": ("dot_general", "2 uses (dot_general)"),
        "['unused']": ("unused", ""),
    }
    sizes = dict(zip((path for path, *_ in table.rows), table.num_bytes, strict=True))
    number = 8 if precision.X64 else 4
    assert sizes["['dense']"] == 10 * number  # one number an example
    assert sizes["['changed']"] == 10 * number * 32  # its gradient, and that of what was computed from it
    lines = str(table).splitlines()
    assert lines[0].split() == ["parameter", "shape", "method", "bytes", "uses"]
    assert lines[-1].split()[:2] == ["total", str(sum(sizes.values()))]
    assert len(lines) == 8  # no advice: the total is small


@pytest.mark.slow
def test_what_is_written_for_platforms_is_measured_by_the_rules_of_one():
    """A branch that only another platform computes says the same: norms are those of the gradients of all examples."""

    def its_loss(params, x):
        def product(x, w):
            return x @ w

        first = lax.platform_dependent(x, params["first"], tpu=lambda x, w: w.T @ x, default=product)
        looped, _ = lax.scan(
            lambda h, _: (jnp.tanh(lax.platform_dependent(h, params["loop"], tpu=product, default=product)), None),
            first,
            None,
            length=3,
        )
        return square(looped)

    params = {"first": normal(0, 4, 5), "loop": normal(2, 5, 5)}
    batch = normal(1, 6, 4)
    found = ghost.sq_norms(its_loss)(params, batch).sq_norms
    grads = jax.vmap(jax.grad(its_loss), (None, 0))(params, batch)
    for name, g in grads.items():
        precision.assert_close(found[name], jnp.square(g).sum((1, 2)), rtol=1e-10)
    methods = {path: method for path, _, method, _ in ghost.coverage(its_loss, params, batch[0]).rows}
    assert set(methods.values()) == {"dot_general"}


def test_coverage_advises_where_the_measure_takes_more_than_ten_times_a_plain_gradient():
    def its_loss(w, x):
        return (w.at[x].get(mode="clip") ** 2).sum() + jnp.cumsum(w)[x[0]]

    table = ghost.coverage(its_loss, jnp.ones(1000), jnp.zeros(1, int), batch_size=512)
    assert sum(table.num_bytes) > 10 * table.plain_bytes or "takes" not in str(table)


@pytest.mark.parametrize(
    ("its_loss", "params", "batch", "message"),
    [
        (lambda w, x: w * x, jnp.ones(2), jnp.ones(3), r"returns float\d+\[2\]: reduce it"),
        (lambda w, x: w * x, jnp.asarray(1), jnp.ones(3), "params must have a floating-point leaf"),
        (lambda w, x: w * x, jnp.asarray(1.0), jnp.ones(0), "batch is empty"),
        (lambda w, x: w * x[0], jnp.asarray(1.0), (jnp.ones(3), jnp.ones(2)), "every leaf of batch"),
    ],
)
def test_what_cannot_be_measured_is_refused(its_loss, params, batch, message):
    with pytest.raises(ValueError, match=message):
        ghost.sq_norms(its_loss)(params, batch)


@pytest.mark.slow
def test_results_are_not_differentiated_wrongly_but_refused(params, batch):
    def penalty(params, batch):
        return ghost.sq_norms(loss)(params, batch)[2][0]["weight"].sum()

    for argument in (0, 1):
        with pytest.raises(ValueError, match="cannot be differentiated"):
            jax.grad(penalty, argument)(params, batch)


@pytest.mark.parametrize("measure", [ghost.sq_norms, ghost.second_moments, ghost.gram])
@pytest.mark.slow
def test_parameters_may_be_wider_or_narrower_than_the_computation(measure):
    """Float64 parameters, float32 activations, a product kept in float32 from bfloat16 factors."""

    def its_loss(p, x):
        hidden = jnp.tanh(x.astype(jnp.float32) @ p["w"].astype(jnp.float32))
        out = lax.dot(hidden.astype(jnp.bfloat16), p["v"], preferred_element_type=jnp.float32)
        return square(out)

    params = {"w": normal(0, 16, 16), "v": normal(1, 16, 16).astype(jnp.bfloat16)}
    batch = normal(2, B, 9, 16)
    with jax.numpy_dtype_promotion("standard"):
        _, grad, found = jax.jit(measure(its_loss))(params, batch)
        _, grads = oracle(its_loss, params, batch)
    assert jax.tree.map(lambda x: x.dtype, grad) == jax.tree.map(lambda x: x.dtype, params)
    expected = {
        ghost.sq_norms: lambda g: (g**2).sum((1, 2)),
        ghost.second_moments: lambda g: (g**2).mean(0),
        ghost.gram: lambda g: jnp.einsum("bio,cio->bc", g, g),
    }[measure]
    for name, tolerance in (("w", 2**-6), ("v", 2**-6)):
        wanted = expected(grads[name].astype(float))
        np.testing.assert_allclose(found[name], wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def test_a_loss_that_mixes_examples_is_refused():
    with pytest.raises(NameError, match="unbound axis name: batch"):
        ghost.sq_norms(lambda w, x: w * (x - lax.pmean(x, "batch")))(jnp.asarray(1.0), jnp.ones(3))


def layers(width):
    """Small programs [T, width] -> [T, width] with a parameter p [width, width]: the grammar of the property test."""
    return {
        "dense": lambda p, x: x @ p,
        "left": lambda p, x: (p @ x.T).T,
        "bias": lambda p, x: x + p[0][None],
        "scale": lambda p, x: x * jnp.exp(p[:1]),
        "norm": lambda p, x: (x - x.mean(0, keepdims=True)) / jnp.sqrt(1 + x.var(0, keepdims=True)) * p[1][None],
        "twice": lambda p, x: jnp.tanh(x @ p) @ p,
        "loop": lambda p, x: lax.scan(lambda h, row: (jnp.tanh(h @ p + row),) * 2, jnp.zeros(width), x)[1],
        "attention": lambda p, x: jax.nn.softmax((x @ p) @ x.T) @ x,
        "masked": lambda p, x: x @ (p * jnp.eye(width)),
        "normalised": lambda p, x: x @ (p / jnp.linalg.norm(p)),
        "again": lambda p, x: jax.checkpoint(lambda x: jnp.sin(x @ p))(x),
        "choice": lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p, lambda: x * p[0, 0]),
        "lookup": lambda p, x: x + p[jnp.argmax(x, 1)],
        "conv": lambda p, x: (
            lax.conv_general_dilated(
                x.T[None], jnp.stack([p, p.T], -1), (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH")
            )[0].T
        ),
        "penalty": lambda p, x: x + 0.1 * square(p),
    }


@pytest.mark.slow
@settings(max_examples=10)  # every program compiles anew
@given(
    chosen=st.lists(st.tuples(st.sampled_from(sorted(layers(3))), st.integers(0, 2)), min_size=1, max_size=4),
    length=st.sampled_from([1, 2, 5]),
)
def test_random_programs_are_measured_exactly(chosen, length):
    """Layers in any order, which may share parameters."""

    def its_loss(params, x):
        for name, i in chosen:
            x = jnp.tanh(layers(3)[name](params[i], x))
        return square(x)

    params = [0.5 * normal(i, 3, 3) for i in range(3)]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        check(its_loss, params, normal(7, B, length, 3))


def test_what_a_loss_prints_of_its_parameters_is_seen_and_changes_nothing():
    seen = []

    def loss(w, x):
        jax.debug.callback(seen.append, w[0])
        return x @ w

    found = ghost.sq_norms(loss)(jnp.ones(2), jnp.asarray([[3.0, 4.0]]))
    jax.effects_barrier()
    np.testing.assert_array_equal(found.sq_norms, [25])
    assert set(map(float, seen)) == {1.0}
