"""Where numbers are large, small, cancel, or are none: each against a closed form or numbers in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gdjax import ghost, gradients
from gdjax.ghost import _cost as ghost_cost
from gdjax.ghost import _factors as ghost_factors


@pytest.fixture(autouse=True)
def in_float32():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("use", ["product", "table", "bias"])
@pytest.mark.slow
def test_sums_over_examples_are_taken_in_float32(use, dtype):
    """4096 gradients of 40 add up to 163840: infinite in float16, and 10240 where bfloat16 stops counting."""
    batch = jnp.full((4096, 2), 4, dtype)
    losses = {
        "product": lambda w, x: 10 * (x @ w.astype(dtype)).astype(jnp.float32),
        "table": lambda w, x: 40 * jnp.sum(w.astype(dtype)[(x > 8).astype(int)]).astype(jnp.float32) / 2,
        "bias": lambda w, x: 10 * jnp.sum(x * (x + w.astype(dtype))).astype(jnp.float32),
    }
    for parameter in (jnp.float32, dtype):
        found = ghost.sq_norms(losses[use])(jnp.ones(2, parameter), batch)
        expected = {"product": [40, 40], "table": [40, 0], "bias": [40, 40]}[use]
        np.testing.assert_array_equal(found.grad.astype(float), expected)
        np.testing.assert_array_equal(found.total, np.sum(np.square(expected, dtype=float)))
        assert found.grad.dtype == parameter


def cancelling(kind):
    """Three nearly equal positions, whose cotangents add up to zero: (loss, w, batch, gradients in float64)."""
    cotangents = np.array([1.0, 1.0, -2.0])[:, None] * np.asarray(normal(9, 64), float)
    if kind == "table":
        batch = jnp.asarray([[3, 3, 3], [3, 3, 3]])
        gradients = np.zeros((2, 8, 64))
        gradients[:, 3] = np.asarray(jnp.asarray(cotangents, jnp.float32), float).sum(0)
        return lambda w, i: jnp.sum(w[i] * jnp.asarray(cotangents, jnp.float32)), normal(0, 8, 64), batch, gradients
    batch = jnp.ones((4, 3, 64)) * normal(5, 64) + 1e-4 * normal(6, 4, 3, 64)
    low = jnp.asarray(cotangents, jnp.float32)
    gradients = np.einsum("bti,to->bio", np.asarray(batch, float), np.asarray(low, float))
    return lambda w, x: jnp.sum((x @ w) * low), normal(0, 64, 64), batch, gradients


@pytest.mark.parametrize("kind", ["dense", "table"])
@pytest.mark.slow
def test_a_norm_that_is_small_by_cancellation_is_right_to_a_thousandth(monkeypatch, kind):
    monkeypatch.setattr(ghost_cost, "cheapest", lambda sizes, device: ghost_cost.Way("gram"))
    loss, w, batch, gradients = cancelling(kind)
    norms = (gradients**2).sum((1, 2))
    size = np.sqrt((gradients**2).sum((1, 2)).max())
    np.testing.assert_allclose(jax.jit(ghost.sq_norms(loss))(w, batch).sq_norms, norms, rtol=1e-3, atol=1e-9 * size)


def test_the_error_of_the_gram_form_is_bounded_by_that_of_the_norm_without_cancellation():
    """What `_gram_norms` relies on: |error| < 2 eps S, and S / norm decides whether the other way is taken."""
    rng = np.random.default_rng(0)
    for correlation in (0.0, 0.9, 0.999, 0.999999):
        a, g = (rng.normal(size=(50, 1, 6, 16)) for _ in range(2))
        a = (correlation * a[:, :, :1] + (1 - correlation) * a).astype(np.float32)
        g = (g - correlation * g.mean(2, keepdims=True)).astype(np.float32)
        exact = (np.einsum("bkti,bkto->bkio", a.astype(float), g.astype(float)) ** 2).sum((1, 2, 3))
        lengths = (np.linalg.norm(a.astype(float), axis=-1) * np.linalg.norm(g.astype(float), axis=-1)).sum((1, 2))
        found, is_bad = ghost_factors._gram_norms(jnp.asarray(a), jnp.asarray(g))
        error = np.abs(np.asarray(found, float) - exact) / (np.finfo(np.float32).eps * lengths**2)
        assert error.max() < 2
        assert bool(is_bad) == (correlation > 0.99)


@pytest.mark.parametrize("masked", [1e30, np.inf, np.nan])
def test_a_position_that_the_loss_masks_is_measured_as_its_gradient_would_be(monkeypatch, masked):
    """In the Gram form its square, infinite, meets a cotangent of zero; in the gradient 1e30 does, and inf is NaN."""
    monkeypatch.setattr(ghost_cost, "cheapest", lambda sizes, device: ghost_cost.Way("gram"))
    batch = normal(1, 3, 4, 8).at[1, 2].set(masked)
    w, low = normal(0, 8, 8), jnp.asarray([1.0, 1.0, 0.0, 1.0])[:, None]

    def loss(w, x):
        return jnp.sum((x @ w) * low)

    with jax.debug_nans(False):
        found = jax.jit(ghost.sq_norms(loss))(w, batch).sq_norms
        gradients = np.asarray(jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(w, batch), float)
    np.testing.assert_allclose(found, (gradients**2).sum((1, 2)), rtol=1e-5)
    assert np.isfinite(found[1]) == (masked == 1e30)


def test_the_branch_for_norms_that_cancel_forms_few_gradients_at_a_time(monkeypatch):
    """Gradients of 64 examples would take 16 MiB; the factors and the chunk of the branch take less than 2."""
    monkeypatch.setattr(ghost_cost, "cheapest", lambda sizes, device: ghost_cost.Way("gram"))
    w, batch = jnp.ones((256, 256)), jnp.ones((64, 4, 256))
    compiled = jax.jit(ghost.sq_norms(lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2))).lower(w, batch).compile()
    factors, chunk = 4 * 2 * batch.size, 4 * ghost_cost.WORKING_SET["rare"]
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * factors + 2 * chunk < w.size * len(batch) * 4 / 8


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the compiler of jax 0.10.0 copies weights of its own")
@pytest.mark.parametrize(
    ("loss", "ratio", "num_gradients"),
    [
        # Of one example it forms the gradients, in the branch for penalties that cancel against the data.
        (lambda w, x: jnp.sum(jnp.tanh(x[0] @ w) ** 2) + 0.1 * jnp.sum(w**2), 3.0, 2),
        (lambda w, x: jnp.sum(jnp.tanh(jnp.stack([jnp.tanh(row @ w) for row in x])) ** 2), 1.25, 0),
    ],
)
def test_a_penalty_and_a_layer_used_three_times_take_little_memory_beside_a_plain_gradient(loss, ratio, num_gradients):
    """64 gradients take 64; the penalty's product copied the weight, and the uses' products were added up apart."""
    w, batch = normal(0, 512, 512), normal(1, 64, 3, 512)
    measured, plain = (jax.jit(f(loss)).lower(w, batch).compile() for f in (ghost.sq_norms, gradients.mean))
    bound = ratio * plain.memory_analysis().temp_size_in_bytes + num_gradients * w.nbytes
    assert measured.memory_analysis().temp_size_in_bytes < bound


def test_activations_whose_squares_overflow_do_no_harm_where_the_gradient_is_small():
    """Examples: 1e20 times a cotangent of 0, of 1e-10, and plain ones."""

    def loss(w, x):
        return jnp.sum(jnp.where(jnp.abs(x).max() < 1e10, 1, x[0] * 0 + jnp.where(x[1] > 0, 1e-10, 0)) * (x @ w))

    batch = jnp.stack([-jnp.full(4, 1e20), jnp.full(4, 1e20), jnp.ones(4)])
    found = jax.jit(ghost.sq_norms(loss))(jnp.ones((4, 4)), batch)
    np.testing.assert_allclose(found.sq_norms, [0, 16e20, 16], rtol=1e-5)


@pytest.mark.parametrize("size", [1e20, 1e-30])
@pytest.mark.parametrize("num_positions", [1, 2])
def test_nor_where_the_squares_of_cotangents_vanish_or_overflow(monkeypatch, num_positions, size):
    """Activations times cotangents of one over their size, in the Gram form where there is more than one position."""
    if num_positions > 1:
        monkeypatch.setattr(ghost_cost, "cheapest", lambda sizes, device: ghost_cost.Way("gram"))
    batch = size * normal(1, 3, num_positions, 4)
    w = normal(0, 4, 2)

    def loss(w, x):
        return jnp.sum((x @ w) * jnp.asarray([1 / size, 2 / size]))

    def statistics(w, batch):
        return [measure(loss)(w, batch)[2] for measure in (ghost.sq_norms, ghost.second_moments, ghost.gram)]

    gradients = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(w, batch), float)
    norms, moments, gram = jax.jit(statistics)(w, batch)
    np.testing.assert_allclose(norms, (gradients**2).sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(moments, (gradients**2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(gram, np.einsum("bio,cio->bc", gradients, gradients), rtol=1e-4, atol=1e-5)


def test_norms_whose_squares_overflow_or_vanish():
    batch = jnp.asarray([[1e20, 0.0], [3.0, 4.0], [jnp.inf, 0.0], [3e-30, 4e-30], [0.0, 0.0], [1e30, 1e30]])
    found, norms = jax.jit(ghost.norms(lambda w, x: x @ w))(jnp.ones(2), batch)
    np.testing.assert_allclose(norms, [1e20, 5, np.inf, 5e-30, 0, 2**0.5 * 1e30], rtol=1e-6)
    np.testing.assert_array_equal(found.total, [np.inf, 25, np.inf, 0, 0, np.inf])
    # A norm of zero is none to look at twice, where what is small need not be told from it.
    of_bound = jax.jit(lambda least, x: ghost.norms(lambda w, x: x @ w, smallest=least)(jnp.ones(2), x)[1])
    np.testing.assert_array_equal(of_bound(1.0, batch[3:5]), [0, 0])
    np.testing.assert_allclose(of_bound(1e-20, batch[3:5]), [5e-30, 0], rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
@pytest.mark.slow
def test_an_example_that_is_not_finite_spoils_no_other_and_can_be_dropped(bad, nans):
    """Dense over positions, a table, a bias and a penalty, so that every way of measuring sees it."""

    def loss(p, x):
        hidden = jnp.tanh(x @ p["w"]) + p["b"] + p["e"][jnp.asarray([0, 1, 0])]
        return jnp.sum(hidden**2) * jnp.where(jnp.isfinite(x[0, 0]), 1, x[0, 0]) + 0.1 * jnp.sum(p["w"] ** 2)

    params = {"w": normal(0, 4, 8), "b": normal(1, 8), "e": normal(2, 2, 8)}
    good = normal(3, 4, 3, 4)
    batch = good.at[1, 0, 0].set(bad)
    clean = good[jnp.asarray([0, 2, 3])]
    found = jax.jit(ghost.sq_norms(loss, drop_nonfinite=True))(params, batch)
    expected = ghost.sq_norms(loss)(params, clean)
    for key in params:
        np.testing.assert_allclose(found.sq_norms[key][jnp.asarray([0, 2, 3])], expected.sq_norms[key], rtol=1e-5)
        np.testing.assert_allclose(found.grad[key], expected.grad[key], rtol=1e-4, atol=1e-5)
    assert int(found.num_nonfinite) == 1
    assert int(expected.num_nonfinite) == 0
    none = jax.jit(ghost.sq_norms(loss, drop_nonfinite=True))(params, batch[1:2])
    assert int(none.num_nonfinite) == 1
    np.testing.assert_array_equal(none.grad["w"], np.zeros((4, 8)))


@pytest.mark.parametrize("shape", [(4, 0), (0, 3), (0, 0)])
@pytest.mark.slow
def test_layers_without_features_have_no_gradient(shape):
    def loss(p, x):
        return ((x[:, : shape[0]] @ p["none"]).sum() + (x @ p["w"]) ** 2).sum()

    params = {"none": jnp.zeros(shape), "w": jnp.ones((4, 2))}
    for measure in (ghost.sq_norms, ghost.gram):
        found = measure(loss)(params, jnp.ones((5, 3, 4)))[2]
        np.testing.assert_array_equal(found["none"], 0)
        np.testing.assert_array_equal(found["w"], 4608)  # 4 x 2 entries of 3 x 8
    assert ghost.second_moments(loss)(params, jnp.ones((5, 3, 4)))[2]["none"].shape == shape


def backward(rule):
    @jax.custom_vjp
    def same(x):
        return x

    same.defvjp(lambda x: (x, x), rule)
    return same


@pytest.mark.parametrize(
    ("rule", "is_linear"),
    [
        (lambda x, g: (jnp.clip(g, -0.1, 0.1),), False),
        (lambda x, g: (jnp.where(jnp.isnan(g), 0, g),), False),
        (lambda x, g: (g / jnp.maximum(1, jnp.linalg.norm(g)),), False),
        (lambda x, g: (jax.jit(lambda g: g * g)(g),), False),
        (lambda x, g: (1 / g,), False),
        (lambda x, g: (jnp.where(jnp.abs(x) < 1, g, 0),), True),
        (lambda x, g: (-2 * g / (1 + x**2),), True),
        (lambda x, g: (lax.scan(lambda c, _: (0.5 * c, None), g, None, length=3)[0],), True),
    ],
)
@pytest.mark.parametrize("place", ["weight", "activation", "loop"])
def test_backward_passes_that_are_not_linear_are_seen(rule, is_linear, place):
    def named(x, g):
        return rule(x, g)

    same = backward(named)
    loss = {
        "weight": lambda w, x: jnp.sum(x @ same(w)),
        "activation": lambda w, x: jnp.sum(same(x @ w)),
        "loop": lambda w, x: jnp.sum(lax.fori_loop(0, 2, lambda _, h: same(h @ w), x)),
    }[place]
    assert ghost.nonlinear(loss, jnp.ones((3, 3)), jnp.ones(3)) == ([] if is_linear else ["same"])


@pytest.mark.slow
def test_gradients_are_those_of_each_example_added_up_where_a_backward_pass_is_not_linear():
    same = backward(lambda x, g: (jnp.clip(g, -0.1, 0.1),))
    batch = jnp.tile(jnp.asarray([[1.0, 2.0, 2.0]]), (10, 1))
    for loss in (lambda w, x: 100 * same(x @ w), lambda w, x: 100 * (x @ same(w))):
        found = ghost.sq_norms(loss)(jnp.ones(3), batch)
        grads = jax.vmap(jax.grad(loss), (None, 0))(jnp.ones(3), batch)
        np.testing.assert_allclose(found.grad, grads.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found.sq_norms, (grads**2).sum(1), rtol=1e-6)


POINT = np.random.default_rng(0).normal(size=50).astype(np.float32)
NEAR = POINT + np.float32(1e-4) * np.random.default_rng(1).normal(size=(5, 50)).astype(np.float32)
ONES = np.ones((2, 2), np.float32), np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    ("loss", "w", "batch"),
    [
        (lambda w, x: 0.5 * jnp.sum(w**2) - x @ w, POINT, NEAR),
        (lambda w, x: 0.5 * jnp.sum(w**2) - jnp.sum(x @ w), POINT, NEAR[:, None]),
        (lambda w, x: 0.5 * jnp.sum(w**2) - jnp.sum(w * x), POINT, NEAR),
        (lambda w, x: jnp.sum(x @ w) + x[0] * jnp.sum((w * 1e12) ** 2) * 1e-24, *ONES),
        (lambda w, x: jnp.sum(x @ w) + x[0] * jnp.sum((w * 1e-12) ** 2) * 1e24, *ONES),
        (lambda w, x: jnp.sum(x @ w) + 1e-36 * x[0] * jnp.exp(80 + jnp.sum(w)), *ONES),
    ],
    ids=["dense", "positions", "scale", "large", "small", "larger"],
)
def test_a_penalty_against_the_data_leaves_a_norm_that_is_right_to_a_thousandth(loss, w, batch):
    """The square of a difference is that of small numbers, or the penalty's own has no square in float32."""
    found = jax.jit(ghost.sq_norms(loss))(w, batch)
    with jax.enable_x64(True):
        grads = jax.vmap(jax.grad(loss), (None, 0))(*jax.tree.map(lambda x: jnp.asarray(x, float), (w, batch)))
        expected = np.sum(np.square(grads), tuple(range(1, grads.ndim)))
    np.testing.assert_allclose(found.sq_norms, expected, rtol=1e-3)
    clipped = jax.jit(gradients.clipped(loss, bound := 0.5 * float(np.sqrt(expected.min()))))(w, batch)
    np.testing.assert_allclose(clipped.aux.norms, np.sqrt(expected), rtol=1e-3)
    assert np.linalg.norm(clipped.grad) < bound * (1 + 1e-6)


@pytest.mark.parametrize(("scale", "factor"), [(1e-8, 1e3), (1e5, 1e-3)])
@pytest.mark.parametrize("use", ["product", "positions", "divided", "two", "table", "bias"])
def test_a_scale_before_a_cast_to_float16_need_not_be_a_float16(use, scale, factor):
    low = jnp.float16
    losses = {
        "product": lambda w, x: x[0].astype(low) @ (w * scale).astype(low),
        "positions": lambda w, x: x.astype(low) @ (w * scale).astype(low),
        "divided": lambda w, x: x.astype(low) @ -(w / (1 / scale)).astype(low),
        "two": lambda w, x: (x.astype(low) @ (w * scale).astype(low)) @ (w.T * scale).astype(low),
        "table": lambda w, x: (w * scale).astype(low)[(x[0] > 0).astype(int)],
        "bias": lambda w, x: x[0, 0].astype(low) * x[0, 1].astype(low) + (w * scale).astype(low),
    }
    w, batch = 1e-5 * normal(0, 4, 2), normal(1, 3, 3, 4)

    def loss(w, x):
        return factor * jnp.sum(losses[use](w, x).astype(jnp.float32))

    grads = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(w, batch), float)
    found = jax.jit(lambda w, x: [f(loss)(w, x) for f in (ghost.sq_norms, ghost.second_moments, ghost.gram)])(w, batch)
    for result in found:
        np.testing.assert_allclose(result[1], grads.mean(0), rtol=1e-2, atol=1e-3 * abs(grads).max())
    np.testing.assert_allclose(found[0].sq_norms, (grads**2).sum((1, 2)), rtol=1e-2)
    np.testing.assert_allclose(found[1][2], (grads**2).mean(0), rtol=1e-2, atol=1e-3 * (grads**2).max())
    flat = grads.reshape(3, -1)
    np.testing.assert_allclose(found[2][2], flat @ flat.T, rtol=1e-2, atol=1e-3 * (flat**2).sum(1).max())


@pytest.mark.parametrize("low", [jnp.float16, jnp.float8_e4m3fn, jnp.bfloat16])
@pytest.mark.parametrize("use", ["product", "loop", "bias", "simulated", "checkpoint"])
def test_gradients_of_a_weight_that_is_rounded_and_wide_again_are_summed_in_float32(use, low):
    losses = {
        "product": lambda w, x: x @ w.astype(low).astype(jnp.float32),
        "loop": lambda w, x: lax.scan(lambda c, v: (c + x @ v.astype(low).astype(jnp.float32), None), 0.0, w[None])[0],
        "bias": lambda w, x: jnp.sum(x * (w.astype(low).astype(jnp.float32) + x)),
        "simulated": lambda w, x: jnp.sum(x * (lax.reduce_precision(w, 5, 10) + x)),
        "checkpoint": lambda w, x: jax.checkpoint(lambda v: x @ v.astype(jnp.float32))(w.astype(low)),
    }
    w, batch = jnp.ones(4), jnp.full((2048, 4), 80.0)
    found = jax.jit(ghost.sq_norms(losses[use]))(w, batch)
    np.testing.assert_array_equal(found.grad, 80)
    np.testing.assert_array_equal(found.sq_norms, 4 * 6400)


@pytest.mark.slow
def test_a_table_that_an_example_reads_many_times_takes_memory_in_proportion(monkeypatch):
    """Twice the positions took four times the memory, where each was compared with each."""
    monkeypatch.setattr(ghost_cost, "cheapest", lambda sizes, device: ghost_cost.Way("gram"))

    def loss(w, i):
        return jnp.sum(jnp.tanh(jnp.cumsum(w[i], 0)) ** 2)

    def num_bytes(num_positions):
        batch = jax.random.randint(jax.random.key(0), (4, num_positions), 0, 50)
        return jax.jit(ghost.sq_norms(loss)).lower(w, batch).compile().memory_analysis().temp_size_in_bytes

    w, batch = normal(0, 50, 8), jax.random.randint(jax.random.key(0), (4, 300), -60, 60)
    grads = jax.vmap(jax.grad(loss), (None, 0))(w, batch)
    np.testing.assert_allclose(ghost.sq_norms(loss)(w, batch).sq_norms, jnp.sum(grads**2, (1, 2)), rtol=1e-3)
    assert num_bytes(1024) < 2.5 * num_bytes(512)
