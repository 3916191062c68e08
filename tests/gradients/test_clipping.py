"""Clipping: the bound in every dtype, groups, other factors, pieces, adaptive bounds, noise, and traced numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from jax import lax

from gdjax import batching, descent, gradients

pytestmark = pytest.mark.slow  # hundreds of programs are compiled


def loss(params, example):
    x, y = example
    return jnp.sum((jnp.tanh(x @ params["hidden"] + params["bias"]) @ params["out"] - y) ** 2)


@pytest.fixture
def params():
    a, b = jax.random.split(jax.random.key(1))
    return {"hidden": jax.random.normal(a, (3, 4)), "bias": jnp.zeros(4), "out": jax.random.normal(b, (4, 2))}


@pytest.fixture
def batch(key):
    a, b = jax.random.split(key)
    return jax.random.normal(a, (7, 3)), jax.random.normal(b, (7, 2))


def formed(params, batch, its_loss=loss):
    return jax.vmap(jax.grad(its_loss), (None, 0))(params, batch)


def assert_same(found, expected):
    jax.tree.map(lambda a, b: precision.assert_close(a, b, rtol=1e-12, atol=1e-14), found, expected)


def test_it_agrees_with_the_private_aggregate_of_optax(params, batch):
    for max_norm in (0.5, 3.0, 1e3):
        aggregate = optax.contrib.differentially_private_aggregate(max_norm, 0.0, jax.random.key(0))
        expected, _ = aggregate.update(formed(params, batch), aggregate.init(params))
        assert_same(jax.jit(gradients.clipped(loss, max_norm))(params, batch).grad, expected)


def test_it_agrees_with_the_clipping_by_layers_of_optax(params, batch):
    leaves, structure = jax.tree.flatten(formed(params, batch))
    sums, _ = optax.per_example_layer_norm_clip(leaves, 1.5)
    estimate = jax.jit(gradients.clipped(loss, 1.5, groups=str))(params, batch)
    assert_same(estimate.grad, jax.tree.unflatten(structure, [leaf / 7 for leaf in sums]))
    norms = {f"['{name}']": jax.vmap(optax.tree.norm)(g) for name, g in formed(params, batch).items()}
    assert_same(estimate.aux.norms, norms)


def test_groups_have_bounds_of_their_own(params, batch):
    def group(path):
        return "first" if path in ("['hidden']", "['bias']") else "last"

    bounds = {"first": 0.5, "last": 1.25}
    estimate = jax.jit(gradients.clipped(loss, bounds, groups=group))(params, batch)
    grads = formed(params, batch)
    for name, members in {"first": ("bias", "hidden"), "last": ("out",)}.items():
        own = {k: grads[k] for k in members}
        norms = jax.vmap(optax.tree.norm)(own)
        assert_same(estimate.aux.norms[name], norms)
        factors = np.minimum(1, bounds[name] / np.asarray(norms))
        expected = jax.tree.map(lambda g, factors=factors: np.tensordot(factors, g, 1) / 7, own)
        assert_same({k: estimate.grad[k] for k in members}, expected)


DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def narrow_losses(dtype):
    """Programs with a part in `dtype`: the losses alone, the products, and all of it."""

    def of_losses(w, x):
        return (x @ w).astype(dtype)

    def of_products(w, x):
        hidden = jnp.tanh(x.astype(dtype) @ w.reshape(8, 8).astype(dtype))
        return jnp.sum(hidden.astype(jnp.float32) ** 2)

    return {"losses": of_losses, "products": of_products}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", ["losses", "products"])
def test_the_bound_holds_to_1e_6_in_every_dtype(dtype, name):
    its_loss = narrow_losses(dtype)[name]
    w = jax.random.normal(jax.random.key(4), (64,), jnp.float32)
    shape = (24, 64) if name == "losses" else (24, 8)
    x = jax.random.normal(jax.random.key(5), shape, jnp.float32)
    grads = np.asarray(formed(w, x, its_loss), float)
    lengths = np.linalg.norm(grads, axis=1)

    @jax.jit
    def clipped(max_norm):
        gradient = gradients.clipped(its_loss, max_norm)
        return jax.vmap(lambda x: gradient(w, x[None]).grad)(x), gradient(w, x).grad

    for max_norm in (1e-3, float(np.median(lengths))):
        alone, together = clipped(max_norm)
        norms = np.linalg.norm(np.asarray(alone, float), axis=1)
        np.testing.assert_allclose(norms, np.minimum(lengths, max_norm), rtol=1e-6)
        expected = (grads * np.minimum(1, max_norm / lengths)[:, None]).mean(0)
        np.testing.assert_allclose(together, expected, atol=3e-6 * max_norm)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: dtype.__name__)
def test_the_bound_survives_the_cast_to_narrow_parameters(dtype):
    """Rounding to nearest would leave half of the norms above the bound."""
    w, x = jnp.ones(64, dtype), 3 * jax.random.normal(jax.random.key(5), (40, 64)).astype(dtype)
    grads = jax.jit(jax.vmap(lambda x: gradients.clipped(lambda w, x: x @ w, 1.0)(w, x[None]).grad))(x)
    assert grads.dtype == dtype
    norms = np.linalg.norm(np.asarray(grads, float), axis=1)
    assert norms.max() <= 1 + 1e-6
    np.testing.assert_allclose(norms, 1, rtol=2 * float(jnp.finfo(dtype).eps))


def test_the_bound_holds_where_the_backward_pass_clips():
    """The gradient clipping of a model bounds what it is given, not what its batch adds up to."""

    @jax.custom_vjp
    def identity(x):
        return x

    identity.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))

    def its_loss(w, x):
        return lax.scan(lambda c, _: (c, 100.0 * identity(x @ w)), 0.0, None, length=1)[1].sum()

    w, x = jnp.ones(3), jnp.asarray([[1.0, 2.0, 2.0]])
    for max_norm in (0.3, 0.03, 0.003):
        estimate = gradients.clipped(its_loss, max_norm)(w, x)
        np.testing.assert_allclose(estimate.aux.norms, [0.3], rtol=1e-6)
        np.testing.assert_allclose(jnp.linalg.norm(estimate.grad), max_norm, rtol=1e-6)


def test_norms_whose_squares_overflow_are_clipped():
    x = jnp.asarray([[1e30, 0.0], [0.0, 1e-3]], jnp.float32)
    two = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float32)}
    estimate = gradients.clipped(lambda w, x: x @ (w["a"] + w["b"]), 2**0.5, groups=str)(two, x)
    np.testing.assert_allclose(estimate.grad["a"], [0.5, 0.5e-3], rtol=1e-6)


@pytest.mark.parametrize("groups", [None, str])
def test_an_example_that_is_not_finite_is_dropped_where_asked(groups, params, batch, nans):
    poisoned = batch[0].at[2].set(jnp.inf), batch[1].at[5].set(jnp.nan)
    kept = jnp.asarray([0, 1, 3, 4, 6])
    gradient = gradients.clipped(loss, 1.0, groups=groups, drop_nonfinite=True)
    estimate = jax.jit(gradient)(params, poisoned)
    expected = gradients.clipped(loss, 1.0, groups=groups)(params, jax.tree.map(lambda x: x[kept], batch))
    assert_same(tuple(estimate[:2]), tuple(expected[:2]))
    assert int(estimate.aux.num_dropped) == 2
    np.testing.assert_array_equal(np.flatnonzero(estimate.aux.weights), kept)
    assert not np.isfinite(jax.tree.leaves(gradients.clipped(loss, 1.0)(params, poisoned).grad)[0]).all()


@pytest.mark.parametrize("groups", [None, str])
@pytest.mark.parametrize("microbatch_size", [1, 2, 3, 4, 7, 50])
def test_pieces_change_neither_the_gradient_nor_the_order_of_the_examples(groups, microbatch_size, params, batch):
    def gradient(size):
        return gradients.clipped(
            lambda p, e: loss(p, e[:2]),
            0.7,
            groups=groups,
            microbatch_size=size,
            weight=lambda e: e[2],
            noise_multiplier=1.0,
            noise_key=lambda batch: jax.random.key(3),
            expected_batch_size=5.5,
        )

    weighted = *batch, jnp.asarray([1.0, 0.0, 2.0, 0.5, 1.0, 0.0, 3.0])
    assert_same(gradient(microbatch_size)(params, weighted), gradient(None)(params, weighted))


def test_what_is_clipped_is_the_gradient_of_the_weighted_loss(params, batch):
    """So that an example contributes at most C whatever its weight is."""
    weights = jnp.asarray([1.0, 0.0, 20.0, 0.5, 1.0, 0.0, 3.0])
    estimate = gradients.clipped(lambda p, e: loss(p, e[:2]), 0.7, weight=lambda e: e[2])(params, (*batch, weights))
    grads = formed(params, batch)
    norms = np.asarray(weights * jax.vmap(optax.tree.norm)(grads))
    factors = np.asarray(weights) * np.minimum(1, 0.7 / np.maximum(norms, 1e-30))
    assert_same(estimate.aux.norms, norms)
    assert_same(estimate.grad, jax.tree.map(lambda g: np.tensordot(factors, g, 1) / np.sum(weights), grads))


def test_frozen_leaves_do_not_count_in_the_norm(params, batch):
    estimate = gradients.clipped(loss, 0.7, trainable=lambda path: "out" in path)(params, batch)
    norms = jax.vmap(optax.tree.norm)(formed(params, batch)["out"])
    assert_same(estimate.aux.norms, norms)
    factors = np.minimum(1, 0.7 / np.asarray(norms))
    assert_same(estimate.grad["out"], np.tensordot(factors, formed(params, batch)["out"], 1) / 7)


@pytest.mark.parametrize("groups", [None, str])
def test_a_factor_may_normalise_and_is_held_to_the_bound(groups, params, batch):
    grads = formed(params, batch)
    normalised = gradients.clipped(loss, 0.7, groups=groups, factor=lambda norm, c: c / (norm + 0.01))(params, batch)
    if groups is None:
        factors = 0.7 / (np.asarray(jax.vmap(optax.tree.norm)(grads)) + 0.01)
        assert_same(normalised.grad, jax.tree.map(lambda g: np.tensordot(factors, g, 1) / 7, grads))
    greedy = gradients.clipped(loss, 0.7, groups=groups, factor=lambda norm, c: 1e9 * norm)
    contributions = jax.vmap(lambda x, y: greedy(params, (x[None], y[None])).grad)(*batch)
    np.testing.assert_allclose(jax.vmap(optax.tree.norm)(contributions), 0.7, rtol=1e-6)


def test_bound_and_noise_may_be_traced(params, batch):
    """A sweep over C and sigma by vmap, a schedule by scan, and both are what constants give."""

    def gradient(max_norm, sigma):
        noise = {"noise_multiplier": sigma, "noise_key": lambda batch: jax.random.key(3)}
        return gradients.clipped(loss, max_norm, **noise)(params, batch)

    bounds, sigmas = jnp.asarray([0.1, 1.0, 50.0]), jnp.asarray([0.0, 2.0, 0.5])
    swept = jax.jit(jax.vmap(gradient))(bounds, sigmas)
    _, scheduled = lax.scan(lambda c, both: (c, gradient(*both)), None, (bounds, sigmas))
    for i, (bound, sigma) in enumerate(zip(bounds, sigmas, strict=True)):
        expected = gradient(float(bound), float(sigma))
        assert_same(jax.tree.map(lambda x, i=i: x[i], swept), expected)
        assert_same(jax.tree.map(lambda x, i=i: x[i], scheduled), expected)
    groups = {"['bias']": 1.0, "['hidden']": 2.0, "['out']": 0.5}
    by_group = jax.jit(lambda bounds: gradients.clipped(loss, bounds, groups=str)(params, batch))
    assert_same(by_group(groups), gradients.clipped(loss, groups, groups=str)(params, batch))


def test_an_infinite_bound_with_no_noise_is_the_mean_even_when_both_are_traced(params, batch):
    @jax.jit
    def gradient(max_norm, sigma):
        key = {"noise_key": lambda batch: jax.random.key(3)}
        return gradients.clipped(loss, max_norm, noise_multiplier=sigma, **key)(params, batch)

    assert_same(gradient(jnp.inf, 0.0).grad, gradients.mean(loss)(params, batch).grad)


def test_noise_of_groups_covers_all_bounds_together(params, batch):
    """Of deviation sigma sqrt(sum of C^2) / L on every component, in float32 for parameters in bfloat16."""
    bounds = {"['bias']": 3.0, "['hidden']": 4.0, "['out']": 12.0}  # together 13

    @jax.jit
    @jax.vmap
    def noisy(key):
        noise = {"noise_multiplier": 2.0, "noise_key": lambda batch: key, "expected_batch_size": 26}
        return gradients.clipped(lambda p, e: 0.0 * loss(p, e), bounds, groups=str, **noise)(params, batch).grad

    draws = jax.vmap(lambda tree: jax.flatten_util.ravel_pytree(tree)[0])(
        noisy(jax.random.split(jax.random.key(0), 2000))
    )
    np.testing.assert_allclose(np.std(draws, 0), 1.0, atol=5 / np.sqrt(2 * 2000))


def test_a_poisson_batch_is_divided_by_its_expected_size_even_if_it_is_empty(params, batch, nans):
    def gradient(mask, batch=batch):
        its_loss, weight = (lambda p, e: loss(p, e[0])), (lambda e: e[1])
        return gradients.clipped(its_loss, 0.7, weight=weight, expected_batch_size=4)(params, (batch, mask))

    mask = jnp.asarray([True, False, True, True, False, False, False])
    there = jax.tree.map(lambda x: x[np.flatnonzero(mask)], batch)
    expected = gradients.clipped(loss, 0.7, expected_batch_size=4)(params, there)
    assert_same(tuple(gradient(mask)[:2]), tuple(expected[:2]))
    for its_batch in (batch, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), batch)):
        empty = gradient(jnp.zeros(7, bool), its_batch)
        assert float(empty.loss) == 0
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(empty.grad))


def test_an_adapted_bound_is_the_formula_of_andrew(params, batch):
    seen = gradients.clipped(lambda p, e: loss(p, e[0]), 0.7, weight=lambda e: e[1])(
        params, (batch, jnp.asarray([1, 1, 0, 1, 1, 0, 1]))
    ).aux
    norms = np.sort(np.asarray(seen.norms)[np.asarray(seen.weights) > 0])
    for bound in (norms[0] - 0.01, norms[2] + 1e-6, norms[-1] + 1):
        fraction = np.mean(norms <= bound)
        found = gradients.next_max_norm(bound, seen, quantile=0.3, learning_rate=0.5)
        np.testing.assert_allclose(found, bound * np.exp(-0.5 * (fraction - 0.3)), rtol=1e-6)
        fixed = gradients.next_max_norm(bound, seen, quantile=0.3, learning_rate=0.5, expected_batch_size=10)
        # (1 / 10) sum (b - 1 / 2) + 1 / 2: examples that are missing count one half.
        noiseless = (5 * fraction - 2.5) / 10 + 0.5
        np.testing.assert_allclose(fixed, bound * np.exp(-0.5 * (noiseless - 0.3)), rtol=1e-6)


def test_the_noise_on_the_fraction_has_the_deviation_asked_for(params, batch):
    seen = gradients.clipped(loss, 0.7)(params, batch).aux

    def exponent(key, deviation):
        options = {"learning_rate": 1.0, "deviation": deviation, "key": key, "expected_batch_size": 8}
        return jnp.log(gradients.next_max_norm(1.0, seen, **options))

    keys = jax.random.split(jax.random.key(0), 2000)
    draws = jax.jit(jax.vmap(exponent, (0, None)))(keys, 2.0)
    np.testing.assert_allclose(np.std(draws), 2 / 8, rtol=4 / np.sqrt(2 * 2000))
    np.testing.assert_allclose(np.mean(draws), exponent(keys[0], 0.0), atol=4 * (2 / 8) / np.sqrt(2000))


def test_an_adaptive_bound_finds_the_quantile_along_a_run(key):
    """As a method whose optimiser state carries C: gradients of norm x, x uniform in (0, 1), quantile 0.8."""
    x = jax.random.uniform(key, (500, 1))
    optimizer = optax.sgd(0.0)

    def init(params):
        return descent.State(params, (jnp.asarray(20.0), optimizer.init(params)), jnp.zeros((), jnp.int32))

    def step(state, batch):
        max_norm, opt_state = state.opt_state
        estimate = gradients.clipped(lambda w, x: x @ w, max_norm)(state.params, batch)
        update, opt_state = optimizer.update(estimate.grad, opt_state)
        max_norm = gradients.next_max_norm(max_norm, estimate.aux, quantile=0.8)
        params = optax.apply_updates(state.params, update)
        return descent.State(params, (max_norm, opt_state), state.num_examples + len(batch)), estimate

    batches = batching.batches(batching.reshuffled(key, 500, num_epochs=20), 50)
    method = descent.Method(init, step)
    _, bounds = descent.run(method, init(jnp.ones(1)), x, batches, lambda state, info: state.opt_state[0])
    # A bound that moves by exp(-0.2 (b - 0.8)) an update, of batches of 50: within 0.05 of it.
    np.testing.assert_allclose(bounds[-50:].mean(), np.quantile(x, 0.8), atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": {"a": 1.0}}, "has a bound for each group: give groups"),
        ({"max_norm": {"a": 1.0}, "groups": str}, r"must name the groups .*\['bias'\]"),
        ({"max_norm": {"a": -1.0}, "groups": str}, "must be positive"),
        ({"max_norm": np.float32(0)}, "must be positive"),
        ({"max_norm": 1.0, "expected_batch_size": 0}, "expected_batch_size=0 must be positive"),
        ({"max_norm": 1.0, "microbatch_size": 0}, "microbatch_size=0 must be at least 1"),
        (
            {"max_norm": 1.0, "weight": lambda e: e[1].sum(), "noise_multiplier": 1.0, "noise_key": lambda b: None},
            "with weight or drop_nonfinite needs expected_batch_size, a fixed denominator",
        ),
        (
            {"max_norm": 1.0, "drop_nonfinite": True, "noise_multiplier": 1.0, "noise_key": lambda b: None},
            "with weight or drop_nonfinite needs expected_batch_size",
        ),
    ],
)
def test_clipping_that_cannot_be_done_is_refused(arguments, message, params, batch):
    with pytest.raises(ValueError, match=message):
        gradients.clipped(loss, **arguments)(params, batch)


def test_an_adaptation_that_cannot_be_done_is_refused(params, batch):
    seen = gradients.clipped(loss, 0.7)(params, batch).aux
    for arguments, message in (
        ({"quantile": 1.5}, "quantile=1.5 must be between 0 and 1"),
        ({"deviation": 1.0}, "deviation=1.0 needs a key"),
        ({"deviation": 1.0, "key": jax.random.key(0)}, "needs a key, and expected_batch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            gradients.next_max_norm(1.0, seen, **arguments)
