import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from gdjax import batching, datasets, descent, gradients, models, problems


def test_digits_are_a_split_of_all_of_scikit_learn_s(key):
    train, test = datasets.digits(key)
    assert (train[0].shape, test[0].shape) == ((1440, 64), (357, 64))
    counts = np.bincount(train[1]) + np.bincount(test[1])
    np.testing.assert_array_equal(counts, np.bincount(load_digits().target))
    again, other = datasets.digits(key), datasets.digits(jax.random.key(1))
    np.testing.assert_array_equal(train[0], again.train[0])
    assert (train[1] != other.train[1]).any()


def test_digits_are_standardised_by_the_training_part_alone(key):
    train, test = datasets.digits(key)
    deviations = np.asarray(train[0].std(0))
    np.testing.assert_allclose(train[0].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(deviations[deviations > 0], 1, rtol=1e-12)
    assert np.abs(test[0].mean(0)).max() > 0.05


def test_a_feature_that_is_constant_in_training_is_only_shifted():
    train, test = datasets.standardised(np.asarray([[1.0, 2.0], [1.0, 4.0]]), np.asarray([[3.0, 3.0]]))
    np.testing.assert_array_equal(train, [[0, -1], [0, 1]])
    np.testing.assert_array_equal(test, [[2, 0]])


def test_gaussian_features_have_the_spectrum_asked_for(key):
    (x, y), _ = datasets.gaussian_regression(key, num_examples=200_000, dimension=3, condition_number=100.0, noise=0.5)
    covariance = np.asarray(x.T @ x / len(x))
    # A sample covariance of Gaussians has relative standard error sqrt(2 / n) on the diagonal.
    np.testing.assert_allclose(np.diag(covariance), [1, 0.1, 0.01], rtol=5 * np.sqrt(2 / len(x)))
    residual = np.asarray(y - x @ jnp.linalg.lstsq(x, y)[0])
    np.testing.assert_allclose(residual.std(), 0.5, rtol=5 / np.sqrt(2 * len(x)))


def test_labels_have_the_probabilities_of_the_logistic_model(key):
    """At the true weights and for any feature f, sum_i f_i (y_i - p_i) is 0 ± sqrt(sum_i f_i^2 p_i (1 - p_i))."""
    (x, y), _ = jax.tree.map(np.asarray, datasets.gaussian_classification(key, num_examples=20_000, dimension=4))
    _, weights_key, _ = jax.random.split(key, 3)  # features, weights, labels
    logits = x @ np.asarray(jax.random.normal(weights_key, (4,)))
    p = 1 / (1 + np.exp(-logits))
    features = np.column_stack([x, logits, np.ones(len(x))])
    np.testing.assert_array_less(np.abs(features.T @ (y - p)), 4 * np.sqrt((features**2).T @ (p * (1 - p))))


@pytest.mark.parametrize(("scale", "deviation"), [("he", np.sqrt(2 / 300)), ("xavier", np.sqrt(2 / 500)), (0.3, 0.3)])
def test_weights_are_gaussian_at_the_named_scale(scale, deviation, key):
    [layer] = models.mlp((300, 200), scale=scale).init(key)
    weights = np.asarray(layer["weight"])
    np.testing.assert_allclose(weights.std(), deviation, rtol=5 / np.sqrt(2 * weights.size))
    np.testing.assert_allclose(np.mean((weights / deviation) ** 4), 3, rtol=0.05)  # the kurtosis of a Gaussian
    np.testing.assert_array_equal(layer["bias"], np.zeros(200))


def test_layers_are_drawn_from_different_keys(key):
    first, second = models.mlp((4, 4, 4)).init(key)
    assert (first["weight"] != second["weight"]).all()


def test_mlp_equals_its_formula(key):
    model = models.mlp((3, 4, 2), activation=jnp.tanh)
    first, second = model.init(key)
    x = np.asarray([1.0, -2.0, 0.5])
    hidden = np.tanh(x @ np.asarray(first["weight"]))
    np.testing.assert_allclose(model.apply([first, second], x), hidden @ np.asarray(second["weight"]), rtol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "scale", "message"),
    [
        ((3,), "he", r"sizes=\(3,\)"),
        ((3, 0), "he", r"sizes=\(3, 0\)"),
        ((3, 2), "kaiming", "scale='kaiming' must be 'he', 'xavier'"),
        ((3, 2), -1.0, "scale=-1.0"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(sizes, scale, message):
    with pytest.raises(ValueError, match=message):
        models.mlp(sizes, scale=scale)


@pytest.mark.parametrize("name", problems.BUILT_IN)
def test_the_loss_of_every_built_in_problem_falls(name, key):
    import optax

    problem = problems.named(name)
    method = descent.method(gradients.mean(problem.loss), optax.sgd(0.05))
    batches = batching.cut(batching.reshuffled(key, problem.num_examples, num_epochs=2), 32)
    start = method.init(problem.init(key))
    state, _ = jax.jit(lambda state: descent.run(method, state, problem.train, batches))(start)
    before, after = (jax.vmap(problem.loss, (None, 0))(s.params, problem.train).mean() for s in (start, state))
    floor = 50 if name == "noisy-quadratic" else 0  # sum_i h_i Var(c_i) / 2 = D / 2
    assert floor <= after < floor + 0.9 * (before - floor)


def test_logistic_has_the_optimum_of_scikit_learn(key):
    data = datasets.gaussian_classification(key, num_examples=200, dimension=3)
    problem = problems.logistic(data)
    fitted = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(*map(np.asarray, data.train))
    params = {"weight": jnp.asarray(fitted.coef_[0]), "bias": jnp.asarray(fitted.intercept_[0])}
    gradient = gradients.mean(problem.loss)(params, problem.train).grad
    assert all(np.abs(leaf).max() < 1e-6 for leaf in jax.tree.leaves(gradient))
    accuracy = jax.vmap(problem.metrics["accuracy"], (None, 0))(params, problem.train).mean()
    assert float(accuracy) == pytest.approx(fitted.score(*map(np.asarray, data.train)))


def test_least_squares_has_half_the_squared_error_as_its_loss(key):
    problem = problems.least_squares(datasets.gaussian_regression(key, num_examples=8, dimension=2))
    weights = np.asarray([1.0, -2.0])
    for x, y in zip(*map(np.asarray, problem.train), strict=True):
        squared_error = (x @ weights - y) ** 2
        assert float(problem.loss(weights, (x, y))) == pytest.approx(squared_error / 2, rel=1e-12)
        assert float(problem.metrics["squared_error"](weights, (x, y))) == pytest.approx(squared_error, rel=1e-12)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_classification_is_right_where_the_largest_logit_is_the_label_s(label):
    logits = np.asarray([0.5, 3.0, -1.0])
    data = datasets.Split((logits[None], np.asarray([label])), None)
    problem = problems.classification(models.mlp((3, 3)), data, num_classes=3)
    params = [{"weight": jnp.eye(3), "bias": jnp.zeros(3)}]  # the features are the logits
    example = jax.tree.map(lambda x: jnp.asarray(x)[0], data.train)
    expected = np.log(np.exp(logits).sum()) - logits[label]
    assert float(problem.loss(params, example)) == pytest.approx(expected, rel=1e-12)
    assert float(problem.metrics["accuracy"](params, example)) == (label == 1)


def test_the_noisy_quadratic_has_exactly_the_noise_it_promises(key):
    """Gradient variance h at every point, minimum at zero, and the metric is the loss above that minimum."""
    problem = problems.noisy_quadratic(key, num_examples=64, dimension=5)
    h = 1 / np.arange(1, 6)
    for params in (jnp.zeros(5), jnp.arange(5.0)):
        grads = np.asarray(gradients.per_example(problem.loss)(params, problem.train).aux.grads)
        np.testing.assert_allclose(grads.mean(0), h * np.asarray(params), atol=1e-12)
        np.testing.assert_allclose(grads.var(0), h, rtol=1e-12)
        loss = jax.vmap(problem.loss, (None, 0))(params, problem.train).mean()
        at_zero = jax.vmap(problem.loss, (None, 0))(jnp.zeros(5), problem.train).mean()
        np.testing.assert_allclose(problem.metrics["excess_loss"](params, None), loss - at_zero, atol=1e-12)
