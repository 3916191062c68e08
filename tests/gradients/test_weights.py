"""Weights of examples, frozen parameters, and sums in narrow dtypes, in every estimator."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gdjax import batching, descent, gradients, problem
from gdjax.problem import Problem

pytestmark = pytest.mark.slow  # hundreds of programs are compiled

ESTIMATORS = {
    "mean": gradients.mean,
    "microbatched": lambda loss, **options: gradients.microbatched(loss, microbatch_size=2, **options),
    "per_example": gradients.per_example,
    "with_sq_norms": gradients.with_sq_norms,
    "clipped": lambda loss, **options: gradients.clipped(loss, float("inf"), **options),
    "clipped by groups": lambda loss, **options: gradients.clipped(loss, float("inf"), groups=str, **options),
    "clipped in pieces": lambda loss, **options: gradients.clipped(loss, float("inf"), microbatch_size=2, **options),
}
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)

# Sums of the token gradients of six examples and their numbers of tokens.
U = np.array([(1, 2), (-1, 0), (0.5, -1.5), (2, 1), (-0.5, 0.5), (0, -1)], float)
W = np.array([1, 2, 4, 3, 1, 1], float)


def token_loss(params, example):
    return params @ example["mean"]


def tokens(example):
    return example["tokens"]


def token_batch(indices):
    return {"mean": jnp.asarray(U / W[:, None])[indices], "tokens": jnp.asarray(W)[indices]}


def logistic(params, example):
    x, y, _ = example
    return jnp.logaddexp(0.0, -y * (jnp.tanh(x @ params["hidden"]) @ params["out"]))


def third(example):
    return example[2]


@pytest.fixture
def params():
    a, b = jax.random.split(jax.random.key(1))
    return {"hidden": jax.random.normal(a, (3, 4)), "out": jax.random.normal(b, (4,))}


@pytest.fixture
def batch(key):
    x = jax.random.normal(key, (7, 3))
    return x, jnp.sign(x[:, 0]), jnp.asarray([0.0, 1.0, 0.25, 3.0, 0.0, 1.5, 2.0])


def oracle(loss, params, batch, weights):
    """Return (sum w l / sum w, sum w g / sum w), one example after the other, those of weight 0 left out."""
    total, gradient = 0.0, jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    for i in np.flatnonzero(weights):
        value, grad = jax.value_and_grad(loss)(params, jax.tree.map(lambda x, i=i: x[i], batch))
        total += weights[i] * float(value)
        gradient = jax.tree.map(lambda t, g, i=i: t + weights[i] * np.asarray(g, float), gradient, grad)
    total_weight = weights.sum()
    return total / total_weight, jax.tree.map(lambda g: g / total_weight, gradient)


def assert_same(found, expected):
    jax.tree.map(lambda a, b: precision.assert_close(a, b, rtol=1e-12, atol=1e-14), found, expected)


def test_the_bias_of_a_ratio_is_that_of_its_batch_and_of_no_piece():
    """Over every batch with replacement, by enumeration: the mean of the means of two pieces would have that of 2."""

    def bias(batch_size, estimator):
        indices = np.array(list(itertools.product(range(6), repeat=batch_size)))
        gradient = jax.vmap(lambda i: estimator(jnp.zeros(2), token_batch(i)).grad)
        return np.asarray(gradient(indices)).mean(0) - U.sum(0) / W.sum()

    of_two, of_four = (-0.0243717, 0.0907077), (-0.0132262, 0.0460485)
    np.testing.assert_allclose(bias(2, gradients.mean(token_loss, weight=tokens)), of_two, atol=1e-7)
    in_pieces = gradients.microbatched(token_loss, microbatch_size=2, weight=tokens)
    np.testing.assert_allclose(bias(4, in_pieces), of_four, atol=1e-7)


@every_estimator
def test_a_batch_is_the_weighted_mean_of_its_examples(estimator, params, batch):
    estimate = jax.jit(estimator(logistic, weight=third))(params, batch)
    assert_same(tuple(estimate[:2]), oracle(logistic, params, batch, np.asarray(batch[2])))


@every_estimator
@pytest.mark.parametrize("transform", ["vmap", "scan", "sharded"])
def test_an_example_of_weight_zero_contributes_nothing_even_if_it_is_nan(estimator, transform, params, batch, nans):
    """Its features are NaN, and the derivative of the loss with them."""
    poisoned = (batch[0].at[0].set(jnp.nan).at[4].set(jnp.inf), batch[1].at[0].set(jnp.nan), batch[2])
    expected = oracle(logistic, params, batch, np.asarray(batch[2]))
    gradient = estimator(logistic, weight=third)
    if transform == "vmap":
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), poisoned, batch)
        estimates = jax.vmap(gradient, (None, 0))(params, both)
        estimate, clean = (jax.tree.map(lambda x, i=i: x[i], estimates) for i in (0, 1))
        assert_same(tuple(clean[:2]), expected)
    elif transform == "scan":
        one = jax.tree.map(lambda x: x[None], poisoned)
        estimate = jax.tree.map(lambda x: x[0], lax.scan(lambda c, b: (c, gradient(params, b)), 0, one)[1])
    else:
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        even = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), poisoned)
        even = jax.device_put(even, NamedSharding(mesh, PartitionSpec("data")))
        estimate = jax.jit(gradient)(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), even)
    assert_same(tuple(estimate[:2]), expected)


def test_what_is_measured_of_an_example_is_not_weighted_and_zero_without_weight(params, batch, nans):
    poisoned = (batch[0].at[0].set(jnp.nan), *batch[1:])
    losses, grads = jax.vmap(jax.value_and_grad(logistic), (None, 0))(params, batch)
    here = np.asarray(batch[2]) > 0
    grads = jax.tree.map(lambda g: np.where(jnp.expand_dims(here, range(1, g.ndim)), g, 0), grads)
    sq_norms = jax.tree.map(lambda g: (g.reshape(len(g), -1) ** 2).sum(1), grads)
    formed = gradients.per_example(logistic, weight=third)(params, poisoned).aux
    assert_same(tuple(formed), (np.where(here, losses, 0), grads))
    measured = gradients.with_sq_norms(logistic, weight=third)(params, poisoned).aux
    assert_same(tuple(measured), (np.where(here, losses, 0), sq_norms, batch[2]))


@every_estimator
def test_no_example_is_no_loss_and_no_gradient(estimator, params, batch, nans):
    nothing = (jnp.full_like(batch[0], jnp.nan), batch[1], jnp.zeros(7))
    estimate = jax.jit(estimator(logistic, weight=third))(params, nothing)
    assert float(estimate.loss) == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(estimate.grad))


@pytest.mark.parametrize("weights", [(True, False, True), (1, 0, 2), (1e-300, 0.0, 2e-300), (3e5, 0.0, 6e5)])
def test_weights_of_any_kind_and_scale(weights):
    """Only their ratios count."""
    if not precision.X64 and weights[0] == 1e-300:
        pytest.skip("below the least float32")
    batch = jnp.asarray([1.0, jnp.inf, 3.0]), jnp.asarray(weights)
    for name, estimator in ESTIMATORS.items():
        estimate = estimator(lambda w, e: w * e[0], weight=lambda e: e[1])(jnp.asarray(1.0), batch)
        expected = (1.0 * weights[0] + 3.0 * weights[2]) / (1.0 * weights[0] + weights[2])
        np.testing.assert_allclose(estimate.grad, expected, rtol=8 * precision.EPS, err_msg=name)


@pytest.mark.parametrize(
    "microbatch_size", [1, 2, 7, 100, *(pytest.param(size, marks=pytest.mark.nightly) for size in (3, 4, 5, 6))]
)
def test_pieces_of_any_size_drop_no_example(microbatch_size, params, batch):
    for weight in (None, third):
        mean = gradients.mean(logistic, weight=weight)(params, batch)
        pieces = gradients.microbatched(logistic, microbatch_size=microbatch_size, weight=weight)(params, batch)
        assert_same(pieces, mean)


def test_examples_may_hold_keys(params, batch):
    """What stands in for an example brings its own."""

    def noisy(params, example):
        return logistic(params, example[0]) * jax.random.uniform(example[1], dtype=params["out"].dtype)

    keyed = batch, jax.random.split(jax.random.key(3), 7)
    for estimator in ESTIMATORS.values():
        estimate = estimator(noisy, weight=lambda e: e[0][2])(params, keyed)
        assert_same(tuple(estimate[:2]), oracle(noisy, params, keyed, np.asarray(batch[2])))


@pytest.mark.parametrize("microbatch_size", [1, 16, 256])
def test_sums_of_bfloat16_do_not_stop_growing(microbatch_size):
    """Parameters, losses and data in bfloat16: 4096 losses of mean 8 and gradients of mean 1."""
    x = (1 + jax.random.normal(jax.random.key(3), (4096, 8))).astype(jnp.bfloat16)
    estimate = jax.jit(gradients.microbatched(lambda w, x: x @ w, microbatch_size=microbatch_size))(
        jnp.ones(8, jnp.bfloat16), x
    )
    assert (estimate.loss.dtype, estimate.grad.dtype) == (jnp.bfloat16, jnp.bfloat16)
    expected = np.asarray(x, float).mean(0)
    np.testing.assert_allclose(np.asarray(estimate.grad, float), expected, rtol=2**-8)
    # A loss has rounding of its own, of 2^-9, and the last one.
    np.testing.assert_allclose(float(estimate.loss), expected.sum(), rtol=2**-8)


@every_estimator
def test_sums_of_float16_do_not_overflow(estimator):
    """2048 gradients of 80: their sum is beyond 65504."""

    def loss(w, x):
        return 10 * (x @ w.astype(jnp.float16)).astype(jnp.float32)

    if estimator is gradients.with_sq_norms:
        pytest.skip("the sum is that of ghost")
    x = jnp.full((2048, 4), 8.0, jnp.float16)
    for weight in (None, lambda x: jnp.asarray(3.0)):
        grad = jax.jit(estimator(loss, weight=weight))(jnp.ones(4, jnp.float32), x).grad
        np.testing.assert_allclose(grad, 80.0, rtol=1e-3)


@every_estimator
@pytest.mark.parametrize("trainable", [lambda path: "out" in path, {"hidden": False, "out": True}])
def test_frozen_leaves_have_no_gradient_and_the_others_the_same(estimator, trainable, params, batch):
    estimate = jax.jit(estimator(logistic, weight=third, trainable=trainable))(params, batch)
    assert estimate.grad["hidden"] is None
    expected = oracle(logistic, params, batch, np.asarray(batch[2]))
    assert_same((estimate.loss, estimate.grad["out"]), (expected[0], expected[1]["out"]))


def test_a_method_leaves_frozen_leaves_alone(params, batch):
    """They do not decay either, and have no state in the optimiser."""

    def only(path):
        return "out" in path

    gradient = gradients.mean(logistic, weight=third, trainable=only)
    optimizer = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1, momentum=0.9))
    method = descent.method(gradient, optimizer, trainable=only)
    start = method.init(params)
    assert [leaf.shape for leaf in jax.tree.leaves(start.opt_state)] == [(4,)]
    batches = batching.batches(batching.cyclic(jax.random.key(0), 7, num_epochs=2), 7)
    state, _ = descent.run(method, start, batch, batches)
    np.testing.assert_array_equal(state.params["hidden"], params["hidden"])

    def alone(out, example):
        return logistic({"hidden": params["hidden"], "out": out}, example)

    plain = descent.method(gradients.mean(alone, weight=third), optimizer)
    expected, _ = descent.run(plain, plain.init(params["out"]), batch, batches)
    assert_same(state.params["out"], expected.params)
    other = descent.method(gradient, optax.sgd(0.1))
    with pytest.raises(ValueError, match="must be given the same trainable"):
        other.step(other.init(params), batch)


def test_one_bool_may_stand_for_all_leaves_below_it(params):
    train, frozen = problem.trainable({"body": params, "head": jnp.ones(2)}, {"body": False, "head": True})
    assert len(jax.tree.leaves(train)) == 1
    assert len(jax.tree.leaves(frozen)) == 2


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (
            lambda path: False,
            r"chooses none of the floating-point leaves of params, \[\"\['hidden'\]\", \"\['out'\]\"\]",
        ),
        ({"hidden": True}, "trainable must be a predicate or bools in a pytree like params"),
    ],
)
def test_a_choice_of_leaves_that_cannot_be_made_is_refused(only, message, params):
    with pytest.raises(ValueError, match=message):
        problem.trainable(params, only)


@every_estimator
def test_a_model_with_functions_among_its_leaves_is_refused(estimator):
    model = eqx.nn.MLP(3, 1, width_size=4, depth=1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"leaf at \.activation.* is a .*eqx\.partition\(model, eqx\.is_array\)"):
        estimator(lambda model, x: model(x)[0])(model, jnp.ones((2, 3)))


@every_estimator
def test_a_loss_that_asks_for_the_other_examples_is_refused(estimator):
    with pytest.raises(ValueError, match="cannot depend on the others of its batch"):
        estimator(lambda w, x: w * (x - lax.pmean(x, "batch")))(jnp.asarray(1.0), jnp.ones(3))


@every_estimator
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda x: jnp.ones(2), r"weight must return one real scalar for one example, but it returns float\d+\[2\]"),
        (lambda x: lax.psum(x, "batch"), "cannot depend on the others of its batch"),
    ],
)
def test_a_weight_that_is_not_a_scalar_is_refused(estimator, weight, message):
    with pytest.raises(ValueError, match=message):
        estimator(lambda w, x: w * x, weight=weight)(jnp.asarray(1.0), jnp.ones(3))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda x: x, "weight must be finite and at least 0, but is not for 1 examples of test"),
        (lambda x: 1 / (x - 1), "weight must be finite and at least 0, but is not for 1 examples of train"),
        (lambda x: 0 * x, "weight is 0 for every example of train"),
        (lambda x: jnp.stack([x, x]), "weight must return one real scalar"),
    ],
)
def test_weights_of_a_problem_are_checked_when_it_is_made(weight, message, nans):
    train, test = jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([4.0, -1.0])
    with pytest.raises(ValueError, match=message):
        Problem(lambda key: jnp.zeros(()), lambda w, x: w * x, train, test, weight=weight)


def test_a_problem_with_weights_can_be_made_under_vmap():
    def make(x):
        return jnp.asarray(Problem(lambda key: jnp.zeros(()), lambda w, x: w * x, x, weight=lambda x: x).num_examples)

    np.testing.assert_array_equal(jax.vmap(make)(jnp.ones((3, 5))), [5, 5, 5])


@pytest.mark.parametrize(
    ("dtype", "small", "expected"), [("float32", 1e-18, 25), ("float32", 1e-22, np.nan), ("float16", 1e-8, np.nan)]
)
@pytest.mark.usefixtures("nans")
def test_a_norm_that_its_weight_has_lost_is_none(dtype, small, expected):
    """Not zero, which would say that the example has no gradient."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        batch = jnp.asarray([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]]), jnp.asarray([1.0, small, 0.0])
        estimator = gradients.with_sq_norms(lambda w, e: (e[0] @ w).astype(dtype), weight=lambda e: e[1])
        np.testing.assert_allclose(estimator(jnp.ones(2), batch).aux.sq_norms, [25, expected, 0], rtol=1e-5)


def test_a_loss_in_bfloat16_is_weighed_by_what_the_weights_are_there():
    """A mean of one and the same gradient is that gradient, however the weights are rounded."""
    weights = jnp.asarray([0.3, 1.1, 0.6, 0.2], jnp.float32)
    batch = jnp.ones((4, 3), jnp.float32), weights
    estimator = gradients.mean(lambda w, e: (e[0] @ w).astype(jnp.bfloat16), weight=lambda e: e[1])
    np.testing.assert_allclose(estimator(jnp.ones(3, jnp.float32), batch).grad, np.ones(3), rtol=1e-6)
