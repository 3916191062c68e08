import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest

from gdjax import gradients
from gdjax.problems import models


def mlp_loss(params, example):
    x, y = example
    return ((MODEL.apply(params, x) - y) ** 2).sum()


MODEL = models.mlp((3, 5, 2), activation=jnp.tanh)


@pytest.fixture
def batch(key):
    x_key, y_key = jax.random.split(key)
    return jax.random.normal(x_key, (12, 3)), jax.random.normal(y_key, (12, 2))


@pytest.fixture
def params():
    return MODEL.init(jax.random.key(1))


def numerical_gradient(params, batch):
    """Central differences of the mean loss, in float64, as a loop over examples: independent of jax.grad and vmap."""
    params, batch = jax.tree.map(lambda x: np.asarray(x, float), (params, batch))
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def mean_loss(flat):
        return np.mean([mlp_loss(unravel(flat), jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(12)])

    step = 1e-6 * np.eye(len(flat))
    return mean_loss(flat), np.array([(mean_loss(flat + e) - mean_loss(flat - e)) / 2e-6 for e in step])


@pytest.mark.slow
def test_mean_is_the_gradient_of_the_mean_loss(params, batch):
    with jax.enable_x64(True):
        loss, gradient = numerical_gradient(params, batch)
    estimate = gradients.mean(mlp_loss)(params, batch)
    precision.assert_close(estimate.loss, loss, rtol=1e-12)
    precision.assert_close(jax.flatten_util.ravel_pytree(estimate.grad)[0], gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("microbatch_size", [1, 3, 4, 12])
@pytest.mark.slow
def test_microbatched_equals_mean(params, batch, microbatch_size):
    estimate = gradients.microbatched(mlp_loss, microbatch_size=microbatch_size)(params, batch)
    jax.tree.map(
        lambda a, b: precision.assert_close(a, b, rtol=1e-12, atol=1e-14),
        estimate,
        gradients.mean(mlp_loss)(params, batch),
    )


@pytest.mark.slow
def test_per_example_has_the_gradient_of_each_example_and_their_mean(params, batch):
    estimate = gradients.per_example(mlp_loss)(params, batch)
    for i in range(12):
        example = jax.tree.map(lambda x, i=i: x[i], batch)
        expected = jax.value_and_grad(mlp_loss)(params, example)
        found = jax.tree.map(lambda x, i=i: x[i], tuple(estimate.aux))
        jax.tree.map(lambda a, b: precision.assert_close(a, b, rtol=1e-12, atol=1e-14), found, expected)
    mean = gradients.mean(mlp_loss)(params, batch)
    jax.tree.map(lambda a, b: precision.assert_close(a, b, rtol=1e-12, atol=1e-14), estimate[:2], mean[:2])


ESTIMATORS = {
    "mean": gradients.mean,
    "microbatched": lambda loss: gradients.microbatched(loss, microbatch_size=2),
    "per_example": gradients.per_example,
}


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_leaves_that_are_not_floating_are_carried_and_have_no_gradient(estimator):
    params = {"weight": jnp.asarray(2.0), "power": jnp.asarray(3), "mask": jnp.asarray(True)}

    def loss(params, x):
        return jnp.where(params["mask"], params["weight"] * x ** params["power"], 0.0)

    estimate = estimator(loss)(params, jnp.asarray([1.0, 3.0]))
    assert float(estimate.loss) == 28.0
    assert float(estimate.grad["weight"]) == 14.0
    assert estimate.grad["power"] is None
    assert estimate.grad["mask"] is None


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda w, x: w * x * jnp.ones(3), r"returns float\d+\[3\]: reduce it"),
        (lambda w, x: (w * x).astype(int), r"returns int\d+\[\]"),
        (lambda w, x: (w * x, x), "returns a tuple"),
    ],
)
def test_a_loss_that_is_not_a_floating_scalar_is_refused(estimator, loss, message):
    with pytest.raises(ValueError, match=message):
        estimator(loss)(jnp.asarray(1.0), jnp.ones(4))


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize(
    ("params", "batch", "message"),
    [
        (jnp.asarray(1), jnp.ones(4), "params must have a floating-point leaf to train, but its leaves are .*int"),
        (jnp.asarray(1.0), (jnp.ones(4), jnp.ones(2)), r"every leaf of batch .* batch\[0\]: 4, batch\[1\]: 2"),
        (jnp.asarray(1.0), (jnp.ones(4), jnp.asarray(1.0)), r"batch\[1\]: scalar"),
        (jnp.asarray(1.0), jnp.ones(0), "batch is empty"),
        (jnp.asarray(1.0), (), "batch has no arrays"),
    ],
)
def test_parameters_and_batches_that_cannot_be_used_are_refused(estimator, params, batch, message):
    with pytest.raises(ValueError, match=message):
        estimator(lambda w, x: w * 1.0)(params, batch)


def test_a_microbatch_of_no_example_is_refused():
    with pytest.raises(ValueError, match="microbatch_size=0 must be at least 1"):
        gradients.microbatched(lambda w, x: w * x, microbatch_size=0)
