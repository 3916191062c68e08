"""Noise scales in every unit of the loss, with weights, of heavy tails, in other geometries, of nested parts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from test_noise import PARAMS, explicit_gradients, linear_loss, moments, population

from gdjax import batching, noise
from gdjax.noise import _geometry as noise_geometry
from gdjax.noise import _intervals as intervals

pytestmark = pytest.mark.slow  # hundreds of programs are compiled


@pytest.fixture
def single():
    """Let everything be in float32, sums too."""
    with jax.enable_x64(False):
        yield


def in_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float32), tree)


def as_numbers(scale):
    return [np.asarray(getattr(scale, field)) for field in ("b_simple", "low", "high")]


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("num_examples", [20, 180])
@pytest.mark.parametrize("unit", [1e-15, *(pytest.param(u, marks=pytest.mark.nightly) for u in (1e-8, 1e8)), 1e15])
def test_every_unit_gives_the_same_interval_in_float32(unit, num_examples):
    """|G|^2 from 1e-30 to 1e30, and so its square, which float32 does not hold."""
    data, params = in_float32((population(400), PARAMS))

    def measured(unit):
        def loss(params, example):
            return linear_loss(params, example) * jnp.float32(unit)

        return noise.measure(loss, params, data, jax.random.key(0), num_examples=num_examples)

    plain, found = measured(1.0), measured(unit)
    for one, other in ((plain, found), (plain.per_leaf["weight"], found.per_leaf["weight"])):
        np.testing.assert_allclose(as_numbers(other), as_numbers(one), rtol=2e-3)
        assert one.verdict == other.verdict
        assert bool(one.heavy_tail) == bool(other.heavy_tail)
    np.testing.assert_allclose(found.grad_sq_norm, unit**2 * plain.grad_sq_norm, rtol=1e-4)


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("unit", [1e-10, 1e10])
def test_the_hessian_scale_is_the_same_in_every_unit(unit):
    """Three factors of the loss's unit: 1e-30 and 1e30, whose squares are out of range."""
    data, params = in_float32((population(100), PARAMS))

    def measured(unit):
        def loss(params, example):
            return linear_loss(params, example) * jnp.float32(unit)

        return noise.measure_hessian(loss, params, data, jax.random.key(0), batch_size=8, num_pairs=20)

    plain, found = measured(1.0), measured(unit)
    fields = ("b_noise", "low", "high")
    expected = [np.asarray(getattr(plain, field)) for field in fields]
    np.testing.assert_allclose([np.asarray(getattr(found, field)) for field in fields], expected, rtol=2e-3)


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_the_interval_of_a_ratio_solves_its_equation_in_any_two_units(unit):
    rng = np.random.default_rng(0)
    deviations = rng.normal(size=(16, 2)) * 0.1
    numerator, denominator = 6.0, 2.0
    scaled = jnp.asarray(deviations * [1 / unit, unit], jnp.float32)
    ratio, low, high = intervals.ratio_interval(
        jnp.float32(numerator * unit), jnp.float32(denominator / unit), scaled, quantile=1.7
    )
    if unit == 1.0:
        cov = deviations.T @ deviations
        for end in (float(low), float(high)):
            error = np.sqrt(cov[1, 1] - 2 * end * cov[0, 1] + end**2 * cov[0, 0])
            np.testing.assert_allclose(abs(numerator - end * denominator), 1.7 * error, rtol=1e-4)
        assert low < ratio < high
    else:  # the ratio itself is out of range
        assert not np.isnan([ratio, low, high]).any()


def scaled_gradients(key, kind, num_examples):
    """Gradients [n, 20] of mean (1, 0, ...) and trace 16 times a scale of the kind."""
    normal, scale = jax.random.split(key)
    if kind == "Gaussian":
        scales = jnp.ones(num_examples)
    elif kind.startswith("lognormal"):
        sigma = float(kind.removeprefix("lognormal"))
        scales = jnp.exp(sigma * jax.random.normal(scale, (num_examples,)) - sigma**2)
    else:
        rare = jax.random.uniform(scale, (num_examples,)) < 0.02
        scales = jnp.where(rare, 30.0, 1.0) / np.sqrt(0.98 + 0.02 * 900)
    grads = np.sqrt(16 / 20) * scales[:, None] * jax.random.normal(normal, (num_examples, 20))
    return grads.at[:, 0].add(1.0)


def linear(w, g):
    return w @ g


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize(
    ("kind", "num_examples", "least", "most"),
    [
        ("Gaussian", 512, 0.0, 0.0),
        ("lognormal 1.5", 512, 1.0, 1.0),
        ("lognormal 1", 128, 0.85, 1.0),  # 0.7 by the lengths alone, without the cross term
        ("outliers", 512, 1.0, 1.0),
    ],
)
def test_heavy_tails_are_told_and_gaussians_never_are(key, kind, num_examples, least, most):
    def drawn(key):
        grads = scaled_gradients(key, kind, 4 * num_examples)
        return noise.measure(linear, jnp.zeros(20), grads, key, num_examples=num_examples)

    heavy = jax.jit(jax.vmap(drawn))(jax.random.split(key, 40)).heavy_tail
    assert least <= np.mean(heavy) <= most


def test_the_effective_number_of_examples_from_norms_is_that_of_the_gradients(key):
    """Where the flag turns, found by bisection in the number of duplicates, against n_Y of explicit gradients."""
    rng = np.random.default_rng(0)
    told = []
    for outlier in (1.0, 3.0, 6.0, 12.0, 24.0, 48.0):
        grads = rng.normal(size=(200, 5)) + 0.5
        grads[:10] *= outlier
        y = ((grads - grads.mean(0)) ** 2).sum(1)
        exact = y.sum() ** 2 / (y**2).sum() < 40
        scale = noise.measure(linear, jnp.zeros(5), jnp.asarray(grads), key, num_examples=200, replace=False)
        assert not scale.heavy_tail
        more = jnp.asarray(np.concatenate([grads, grads]))  # so that the sample is not all there are
        found = noise.measure(linear, jnp.zeros(5), more, key, num_examples=399)
        told.append((bool(found.heavy_tail), bool(exact) or False))
    found, exact = zip(*told, strict=True)
    assert found[0] is False
    assert found[-1] is True
    assert sum(a != b for a, b in zip(found, exact, strict=True)) <= 1  # 399 of 400 are not 200


# Weights: the oracle of ratio estimators, by enumeration.
GRADS = jnp.asarray([[1.0, 2], [-1, 0], [0.5, -1.5], [2, 1], [-0.5, 0.5], [0, -1]])
WEIGHTS = jnp.asarray([1.0, 2, 4, 3, 1, 1])


def weighted_case():
    """A loss whose w g are GRADS, with the weights beside it."""
    return (GRADS / WEIGHTS[:, None], WEIGHTS), lambda w, example: w @ example[0], lambda example: example[1]


def test_weighted_examples_have_the_scale_of_the_ratio(key):
    data, loss, weight = weighted_case()
    scale = noise.measure(loss, jnp.zeros(2), data, key, num_examples=6, weight=weight)
    np.testing.assert_allclose(scale.trace_cov, 0.5914351852, rtol=1e-6)
    np.testing.assert_allclose(scale.grad_sq_norm, 1 / 36 + 1 / 144, rtol=1e-6)
    np.testing.assert_allclose([scale.b_simple, scale.low, scale.high], 17.03333, rtol=1e-6)


@pytest.mark.parametrize(
    ("num_examples", "trace", "signal"), [(3, 0.853, 0.0375), (4, 0.762, 0.0402), (5, 0.728, 0.0373)]
)
def test_samples_of_weighted_examples_come_near_it(num_examples, trace, signal):
    """The mean over all samples of n distinct examples, by the formulas; trace is times N / (N - 1)."""
    u, w = np.asarray(GRADS), np.asarray(WEIGHTS)
    pairs = []
    for draw in map(list, itertools.combinations(range(6), num_examples)):
        mean = u[draw].sum(0) / w[draw].sum()
        deviations = u[draw] - w[draw, None] * mean
        variance = (deviations**2).sum() / (num_examples - 1) / w[draw].mean() ** 2
        pairs.append((variance, mean @ mean - (1 / num_examples - 1 / 6) * variance))
    np.testing.assert_allclose(np.mean(pairs, 0), (trace, signal), rtol=2e-3)


@pytest.mark.parametrize("replace", [True, False])
def test_a_weighted_sample_is_measured_by_these_formulas(key, replace):
    rng = np.random.default_rng(1)
    x, y = population(50, seed=3)
    w = jnp.asarray(rng.uniform(0.5, 4.0, 50))

    def loss(params, example):
        return linear_loss(params, example[0])

    found = noise.measure(
        loss, PARAMS, ((x, y), w), key, num_examples=21, weight=lambda example: example[1], replace=replace
    )
    draw = (batching.with_replacement if replace else batching.reshuffled)(key, 50, length=21)
    w = np.asarray(w)[draw]
    u = explicit_gradients((x[draw], y[draw])) * w[:, None]

    def estimates(u, w):
        n, mean = len(u), u.sum(0) / w.sum()
        variance = ((u - w[:, None] * mean) ** 2).sum() / (n - 1) / w.mean() ** 2
        f = 1 / n if replace else (1 / n - 1 / 50)
        return np.array([mean @ mean - f * variance, variance * (1 if replace else 49 / 50)])

    whole = estimates(u, w)
    precision.assert_close((found.grad_sq_norm, found.trace_cov), whole, rtol=1e-9)
    left_out = np.array([estimates(np.delete(u, i, 0), np.delete(w, i)) for i in range(21)])  # groups of one
    expected = intervals.ratio_interval(
        whole[1],
        whole[0],
        intervals.delete_a_group(jnp.asarray(whole), jnp.asarray(left_out), jnp.ones(21))
        * (1 if replace else np.sqrt(1 - 21 / 50)),
        quantile=intervals.student(20, confidence=0.9),
    )
    precision.assert_close(as_numbers(found), [np.asarray(x) for x in expected], rtol=1e-8)


def test_equal_weights_change_nothing(key):
    data = population(60)
    plain = noise.measure(linear_loss, PARAMS, data, key, num_examples=40)
    weighted = noise.measure(linear_loss, PARAMS, data, key, num_examples=40, weight=lambda example: jnp.asarray(3.0))
    precision.assert_close(as_numbers(weighted), as_numbers(plain), rtol=1e-9)
    precision.assert_close(weighted.trace_cov, plain.trace_cov, rtol=1e-9)


# Geometries.
@pytest.mark.usefixtures("replays")
def test_the_scales_of_other_norms_of_all_examples_are_exact(key):
    def scale(geometry):
        return noise.measure(linear, jnp.zeros(2), GRADS, key, num_examples=6, geometry=geometry)

    np.testing.assert_allclose(scale("euclidean").b_simple, 17, rtol=1e-9)
    found = scale(jnp.asarray([4.0, 0.25]))
    np.testing.assert_allclose([found.grad_sq_norm, found.trace_cov], [0.451389, 4.236111], rtol=2e-6)
    sign = scale("sign")
    np.testing.assert_allclose([sign.b_simple, sign.most, sign.low, sign.high], 18.740667, rtol=1e-6)
    assert sign.verdict == "ok"


def test_the_bracket_of_a_gaussian_is_that_of_its_formula():
    """E|g_n| of mu/sigma = 0.1 (truth 100) in closed form, at n = 256 and 4096."""
    for n, low, high in ((256, 94.4, 612.5), (4096, 100.0, 140.5)):
        mean = np.sqrt(2 / np.pi / n) * np.exp(-0.01 * n / 2) + 0.1 * jax.scipy.special.erf(0.1 * np.sqrt(n / 2))
        least = mean**-2.0
        np.testing.assert_allclose([least, noise_geometry.widest(least, 1 / n)], [low, high], rtol=1e-3)
    assert np.isinf(noise_geometry.widest(300.0, 1 / 256))


@pytest.mark.usefixtures("replays")
def test_brackets_of_samples_hold_the_truth(key):
    """Sign: 50 Gaussian coordinates with mu/sigma = 0.1. Nine in ten at least: the bracket is there to be wide."""

    def draw(key):
        grads = 0.1 + jax.random.normal(key, (256, 50))
        return noise.measure(linear, jnp.zeros(50), grads, key, num_examples=256, replace=True, geometry="sign")

    found = jax.jit(jax.vmap(draw))(jax.random.split(key, 100))
    assert np.mean((found.low <= 100) & (found.high >= 100)) >= 0.9
    assert np.median(found.b_simple) < 100 < np.median(found.most)


def test_the_spectral_scale_is_that_of_the_singular_values(key):
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(30, 3, 4)) + 0.3
    vectors = rng.normal(size=(30, 5)) + 0.3

    def loss(params, example):
        return jnp.sum(params["matrix"] * example[0]) + params["vector"] @ example[1]

    params = {"matrix": jnp.zeros((3, 4)), "vector": jnp.zeros(5)}
    data = jnp.asarray(grads), jnp.asarray(vectors)
    found = noise.measure(loss, params, data, key, num_examples=30, geometry="spectral", microbatch_size=7)
    deviations = grads - grads.mean(0)
    cov = np.einsum("nij,nkj->ik", deviations, deviations) / 30
    of_matrix = np.linalg.svd(grads.mean(0), compute_uv=False).sum(), np.sqrt(np.linalg.eigvalsh(cov)).sum()
    of_vector = np.linalg.norm(vectors.mean(0)), np.sqrt(vectors.var(0).sum())
    precision.assert_close((found.per_leaf["matrix"].grad_norm, found.per_leaf["matrix"].noise), of_matrix, rtol=1e-9)
    precision.assert_close((found.grad_norm, found.noise), np.add(of_matrix, of_vector), rtol=1e-9)
    precision.assert_close(found.b_simple, (found.noise / found.grad_norm) ** 2, rtol=1e-9)
    sampled = noise.measure(loss, params, data, key, num_examples=20, geometry="spectral")
    assert sampled.low <= sampled.b_simple <= sampled.most <= sampled.high


OPTIMIZERS = {
    "adam": optax.adam(0.1, b1=0.0),
    "adamw": optax.adamw(0.1, b1=0.0, weight_decay=0.0),
    "amsgrad": optax.amsgrad(0.1, b1=0.0),
    "rmsprop": optax.rmsprop(0.1),
    "chained": optax.chain(optax.clip_by_global_norm(1e9), noise.watch(half_life=1.0), optax.adam(0.1, b1=0.0)),
    "injected": optax.inject_hyperparams(optax.adam)(0.1, b1=0.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_diagonal_of_an_optimizer_is_what_it_multiplies_by(name):
    """A gradient so small that the moments stay: the update is -rate P g up to the common factor of the bias."""
    optimizer = OPTIMIZERS[name]
    params = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones((2, 2), jnp.float32)}
    grads = {"a": jnp.asarray([1.0, -3.0, 0.1], jnp.float32), "b": jnp.asarray([[2.0, 5.0], [-1.0, 0.3]], jnp.float32)}
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        parts = noise.parts(sq_norms=jnp.asarray([1.0, 3.0]), batch_size=2)
        extra = {"noise": parts} if name == "chained" else {}
        for _ in range(300):
            _, state = optimizer.update(grads, state, params, **extra)
        tiny = jax.tree.map(lambda g: 1e-3 * jnp.sign(g), grads)
        updates, _ = optimizer.update(tiny, state, params, **extra)
    found = noise_geometry.diagonal(state)
    ratios = jax.tree.map(lambda p, u, g: np.asarray(u / (p * g)), found, updates, tiny)
    ratios = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(ratios)])
    np.testing.assert_allclose(ratios, ratios[0], rtol=2e-3)


def test_a_geometry_that_is_none_is_refused(key):
    data = population(20)

    def measure(geometry, **options):
        return noise.measure(linear_loss, PARAMS, data, key, num_examples=10, geometry=geometry, **options)

    with pytest.raises(ValueError, match="geometry='l1' must be 'euclidean', 'sign', 'spectral'"):
        measure("l1")
    with pytest.raises(ValueError, match="before its first update"):
        measure(optax.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match=r"geometry must be a state of optax\.adam"):
        measure(optax.sgd(0.1, momentum=0.9).init(PARAMS))
    with pytest.raises(ValueError, match=r"but has \['ScaleByAdamState', 'ScaleByAdamState'\]"):
        measure(optax.chain(optax.adam(0.1), optax.adam(0.1)).init(PARAMS))
    with pytest.raises(ValueError, match="geometry='sign' has no weights"):
        measure("sign", weight=lambda example: example[1] ** 2)
    matrix = jnp.zeros((4, 4))
    with pytest.raises(ValueError, match="num_examples=4 must be above 4"):
        noise.measure(lambda w, x: (w @ x).sum(), matrix, jnp.ones((9, 4)), key, num_examples=4, geometry="spectral")


# Nested parts.
def nested(values):
    """The textbook's estimates for gradients [n, J, K, D]: mean squares between means, peeled from the inside."""
    n, j, k, _ = values.shape
    of_sequences, of_documents = values.mean(2), values.mean((1, 2))
    mean = values.mean((0, 1, 2))
    token = ((values - of_sequences[:, :, None]) ** 2).sum() / (n * j * (k - 1))
    sequence = k * ((of_sequences - of_documents[:, None]) ** 2).sum() / (n * (j - 1))
    document = j * k * ((of_documents - mean) ** 2).sum() / (n - 1)
    variances = [(document - sequence) / (j * k), (sequence - token) / k, token]
    return np.array([mean @ mean - document / (n * j * k), *variances])


def token_losses(w, document):
    return document @ w


def documents(num_documents, seed=0):
    rng = np.random.default_rng(seed)
    shape = num_documents, 3, 4, 2
    return (
        0.7
        + 1.0 * rng.normal(size=(num_documents, 1, 1, 2))
        + 0.5 * rng.normal(size=(num_documents, 3, 1, 2))
        + 2.0 * rng.normal(size=shape)
    )


@pytest.mark.parametrize("microbatch_size", [64, 5])
def test_components_are_those_of_the_nested_analysis_of_variance(key, microbatch_size):
    values = documents(21)
    found = noise.components(
        token_losses, jnp.zeros(2), jnp.asarray(values), key, num_examples=21, microbatch_size=microbatch_size
    )
    whole = nested(values)
    precision.assert_close((found.grad_sq_norm, *found.variances), whole, rtol=1e-9)
    precision.assert_close(found.enough, [whole[2] / whole[1], whole[3] / (whole[1] + whole[2])], rtol=1e-9)
    left_out = jnp.asarray([nested(np.delete(values, i, 0)) for i in range(21)])
    deviations = intervals.delete_a_group(jnp.asarray(whole), left_out, jnp.ones(21))
    precision.assert_close(found.errors, np.sqrt((deviations**2).sum(0))[1:], rtol=1e-8)
    assert found.sizes == (3, 4)


@pytest.mark.slow
@pytest.mark.usefixtures("replays")
def test_components_are_unbiased_and_nine_intervals_in_ten_hold_the_ratio(key):
    def draw(key):
        keys = jax.random.split(key, 4)
        values = 0.7 + jax.random.normal(keys[0], (200, 1, 3)) + 2 * jax.random.normal(keys[1], (200, 8, 3))
        return noise.components(token_losses, jnp.zeros(3), values, keys[2], num_examples=200)

    found = jax.jit(jax.vmap(draw))(jax.random.split(key, 400))
    for values, exact in ((found.variances[:, 0], 3.0), (found.variances[:, 1], 12.0), (found.grad_sq_norm, 3 * 0.49)):
        assert abs(values.mean() - exact) <= 4 * values.std() / 20
    assert 0.85 <= np.mean((found.low <= 4) & (found.high >= 4)) <= 0.95


def test_what_has_no_parts_is_refused(key):
    values = jnp.asarray(documents(4))
    with pytest.raises(ValueError, match=r"two parts or more at every level, but returns \[\]"):
        noise.components(lambda w, x: token_losses(w, x).mean(), jnp.zeros(2), values, key, num_examples=4)
    with pytest.raises(ValueError, match="num_examples=5 must be at least 2, and at most the 4"):
        noise.components(token_losses, jnp.zeros(2), values, key, num_examples=5)


def test_moments_are_of_the_population():
    """The helper that other tests lean on."""
    assert np.allclose(moments(np.asarray(GRADS)), (17 * 0.1388889 / 17, 17 * 0.1388889))
