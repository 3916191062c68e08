import dataclasses
import hashlib
import io
import os
import tarfile
from collections import Counter

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from jax import lax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from gdjax import batching, descent, ghost, gradients, problems
from gdjax.problems import _sources as sources
from gdjax.problems import datasets, models


@pytest.mark.usefixtures("replays")
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
    precision.assert_close(train[0].mean(0), 0, atol=max(1e-12, 32 * precision.EPS))
    precision.assert_close(deviations[deviations > 0], 1, rtol=1e-12)
    assert np.abs(test[0].mean(0)).max() > 0.05


def test_a_feature_that_is_constant_in_training_is_only_shifted():
    train, test = datasets.standardised(np.asarray([[1.0, 2.0], [1.0, 4.0]]), np.asarray([[3.0, 3.0]]))
    np.testing.assert_array_equal(train, [[0, -1], [0, 1]])
    np.testing.assert_array_equal(test, [[2, 0]])


@pytest.mark.slow
def test_gaussian_features_have_the_spectrum_asked_for(key):
    (x, y), _ = datasets.gaussian_regression(key, num_examples=200_000, dimension=3, condition_number=100.0, noise=0.5)
    covariance = np.asarray(x.T @ x / len(x))
    # A sample covariance of Gaussians has relative standard error sqrt(2 / n) on the diagonal.
    np.testing.assert_allclose(np.diag(covariance), [1, 0.1, 0.01], rtol=5 * np.sqrt(2 / len(x)))
    residual = np.asarray(y - x @ jnp.linalg.lstsq(x, y)[0])
    np.testing.assert_allclose(residual.std(), 0.5, rtol=5 / np.sqrt(2 * len(x)))


@pytest.mark.slow
@pytest.mark.usefixtures("replays")
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
    precision.assert_close(model.apply([first, second], x), hidden @ np.asarray(second["weight"]), rtol=1e-12)


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


CNN = models.cnn((9, 8, 3), num_classes=5, channels=(4, 8), num_groups=2)
READER = models.transformer(num_tokens=11, width=16, num_layers=2, num_heads=2)


def test_group_norm_is_that_of_flax(key):
    x = 3 + 2 * jax.random.normal(key, (5, 4, 6), jnp.float32)
    layer = flax.linen.GroupNorm(num_groups=3, epsilon=models.EPSILON, use_bias=False, use_scale=False)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = layer.apply({}, x[None])[0]
    np.testing.assert_allclose(models.group_norm(x, num_groups=3), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_convolutional_network_equals_its_formula(key):
    """Every output is the sum over a window of 3 x 3, of stride 2, padded as SAME: below and right where uneven."""
    model = models.cnn((3, 4, 2), num_classes=2, channels=(4,), num_groups=2)
    params = model.init(key)
    [kernel], x = map(np.asarray, params["kernels"]), np.asarray(jax.random.normal(jax.random.key(1), (3, 4, 2)))
    padded = np.pad(x, ((1, 1), (0, 1), (0, 0)))
    windows = [[padded[i : i + 3, j : j + 3] for j in (0, 2)] for i in (0, 2)]
    hidden = np.asarray([[np.tensordot(window, kernel, 3) for window in row] for row in windows])
    for group in (slice(0, 2), slice(2, 4)):
        part = hidden[..., group]
        hidden[..., group] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    expected = np.maximum(hidden, 0).reshape(-1) @ np.asarray(params["head"])
    precision.assert_close(model.apply(params, jnp.asarray(x)), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("shape", "stride"), [((3, 4, 2), 2), ((5, 2, 1), 1), ((7, 8, 3), 3), ((2, 1, 1), 2)])
def test_a_convolution_equals_that_of_lax(key, shape, stride):
    x_key, kernel_key = jax.random.split(key)
    x, kernel = jax.random.normal(x_key, shape), jax.random.normal(kernel_key, (3, 2, shape[2], 4))
    dimensions = ("NHWC", "HWIO", "NHWC")
    expected = lax.conv_general_dilated(x[None], kernel, (stride, stride), "SAME", dimension_numbers=dimensions)[0]
    found = models.convolution(x, kernel, stride=stride)
    assert found.shape == expected.shape
    precision.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_transformer_equals_its_formula(key):
    """Head by head and position by position, rotations as complex numbers."""
    model = models.transformer(num_tokens=7, width=8, num_layers=1, num_heads=2)
    params, tokens = model.init(key), np.asarray([3, 3, 6, 0])
    [p], t, size = jax.tree.map(np.asarray, params["blocks"]), len(tokens), 4

    def norm(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def turned(x):
        turns = np.exp(1j * np.arange(t)[:, None] * 10_000.0 ** (-np.arange(size // 2) / (size // 2)))
        pairs = (x[:, : size // 2] + 1j * x[:, size // 2 :]) * turns
        return np.concatenate([pairs.real, pairs.imag], 1)

    x = np.asarray(params["embed"])[tokens]
    q, k, v = np.split(norm(x) @ p["attend"], 3, axis=1)
    mixed = np.zeros_like(x)
    for head in (slice(0, size), slice(size, 2 * size)):
        scores = turned(q[:, head]) @ turned(k[:, head]).T / np.sqrt(size)
        for i in range(t):
            weights = np.exp(scores[i, : i + 1])
            mixed[i, head] = weights / weights.sum() @ v[: i + 1, head]
    x = x + mixed @ p["mix"]
    hidden = norm(x) @ p["up"]
    x = x + 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))) @ p["down"]
    expected = norm(x) @ np.asarray(params["head"])
    precision.assert_close(model.apply(params, jnp.asarray(tokens)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_logits_do_not_depend_on_later_tokens(key):
    params, tokens = READER.init(key), jax.random.randint(jax.random.key(1), (12,), 0, 11)
    apply = jax.jit(READER.apply)
    logits = np.asarray(apply(params, tokens))
    for t in range(12):
        changed = np.asarray(apply(params, tokens.at[t].set((tokens[t] + 1) % 11)))
        np.testing.assert_array_equal(changed[:t], logits[:t])
        assert (changed[t:] != logits[t:]).any(1).all()


def cross_entropy(model):
    def loss(params, example):
        x, label = example
        logits = jnp.atleast_2d(model.apply(params, x))
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.atleast_1d(label)).mean()

    return loss


@pytest.mark.parametrize(("model", "num_classes"), [(CNN, 5), (READER, 11)], ids=["cnn", "transformer"])
@pytest.mark.slow
def test_a_new_model_is_undecided_every_weight_learns_and_ghost_needs_no_gradient_of_an_example(
    model, num_classes, key
):
    x_key, label_key, init_key = jax.random.split(key, 3)
    if model is CNN:
        batch = jax.random.normal(x_key, (32, 9, 8, 3)), jax.random.randint(label_key, (32,), 0, 5)
    else:
        batch = jax.random.randint(x_key, (32, 6), 0, 11), jax.random.randint(label_key, (32, 6), 0, 11)
    loss, params = cross_entropy(model), model.init(init_key)
    measured = jax.jit(gradients.with_sq_norms(loss))(params, batch)
    exact = jax.jit(gradients.per_example(loss))(params, batch)
    np.testing.assert_allclose(measured.loss, np.log(num_classes), rtol=0.05)
    for norms, grads in zip(*map(jax.tree.leaves, (measured.aux.sq_norms, exact.aux.grads)), strict=True):
        precision.assert_close(norms, (grads.reshape(32, -1) ** 2).sum(1), rtol=1e-9)
        assert (norms > 0).all()
    methods = {method for _, _, method, _ in ghost.coverage(loss, params, jax.tree.map(lambda x: x[0], batch)).rows}
    assert methods <= {"dot_general", "conv_general_dilated", "gather"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.cnn((8, 8, 1), channels=(16, 12)), r"num_groups=8 must divide each of channels=\(16, 12\)"),
        (
            lambda: models.transformer(num_tokens=5, width=12),
            "width=12 must be a positive even multiple of num_heads=4",
        ),
    ],
)
def test_a_network_of_impossible_widths_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def real(name):
    """Return marks that skip a test where the files of this data set are not in the folder GDJAX_DATA."""
    folder = os.environ.get("GDJAX_DATA", "")
    paths = [os.path.join(folder, source.path) for source in sources.KNOWN[name]]
    there = folder and all(os.path.exists(path) or os.path.exists(path + ".gz") for path in paths)
    return pytest.mark.skipif(not there, reason=f"the files of {name} are not in the folder GDJAX_DATA")


DATA_OF = {"mnist-mlp": "mnist", "fashion-mnist-cnn": "fashion-mnist", "cifar10-cnn": "cifar10", "a9a-logistic": "a9a"}
DATA_OF |= {name: name for name in ("power-plant", "tiny-shakespeare")}
NAMES = [pytest.param(name, marks=real(DATA_OF[name]) if name in DATA_OF else ()) for name in problems.BUILT_IN]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_the_loss_of_every_built_in_problem_falls(name, key):
    problem = problems.named(name)
    if problem.num_examples > 5000:
        problem = dataclasses.replace(problem, train=jax.tree.map(lambda x: x[:128], problem.train), test=None)
    method = descent.method(gradients.mean(problem.loss), optax.sgd(0.05))
    batches = batching.batches(batching.reshuffled(key, problem.num_examples, num_epochs=2), 32)
    start = method.init(problem.init(key))
    state, _ = jax.jit(lambda state: descent.run(method, state, problem.train, batches))(start)
    before, after = (jax.vmap(problem.loss, (None, 0))(s.params, problem.train).mean() for s in (start, state))
    floor = 50 if name == "noisy-quadratic" else 0  # sum_i h_i Var(c_i) / 2 = D / 2
    fall = 0.98 if name in DATA_OF else 0.9  # a few examples of them
    assert floor <= after < floor + fall * (before - floor)


@pytest.mark.parametrize("name", DATA_OF)
def test_a_problem_whose_data_is_not_there_says_what_to_do(name, monkeypatch, tmp_path):
    monkeypatch.delenv("GDJAX_DATA", raising=False)
    with pytest.raises(ValueError, match=f"{DATA_OF[name]} is read from a folder: name it by --data or .* GDJAX_DATA"):
        problems.named(name)
    monkeypatch.setenv("GDJAX_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"is missing: get it from https://"):
        problems.named(name)


@pytest.mark.parametrize(
    ("read", "name", "mean", "deviation", "train", "test"),
    [
        pytest.param(*(datasets.mnist, "mnist", 0.1307, 0.3081, 60_000, 10_000), marks=real("mnist")),
        pytest.param(
            *(datasets.fashion_mnist, "fashion-mnist", 0.2860, 0.3530, 60_000, 10_000), marks=real("fashion-mnist")
        ),
    ],
)
def test_images_are_scaled_by_the_published_mean_and_deviation_of_training_pixels(
    read, name, mean, deviation, train, test
):
    """White and black are (1 - mean) / deviation and -mean / deviation with the constants that everybody uses."""
    split = read()
    assert [x.shape for x in (*split.train, *split.test)] == [(train, 28, 28, 1), (train,), (test, 28, 28, 1), (test,)]
    for images, _ in split:
        np.testing.assert_allclose(images.max(), (1 - mean) / deviation, rtol=1e-3)
        np.testing.assert_allclose(images.min(), -mean / deviation, rtol=1e-3)
    np.testing.assert_allclose([split.train[0].mean(), split.train[0].std()], [0, 1], atol=1e-4)
    assert set(np.unique(split.test[1])) == set(range(10))
    if name == "fashion-mnist":
        np.testing.assert_array_equal(np.bincount(split.train[1]), np.full(10, 6000))


def test_cifar_is_read_out_of_its_archive_and_scaled_by_colour(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (6, 4, 3073), np.uint8)
    records[:, :, 0] %= 10
    records[:5, :, 1:1025] //= 4  # little red
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as tar:
        for name, content in zip(
            ("test_batch", *(f"data_batch_{i}" for i in range(5, 0, -1))), records[::-1], strict=True
        ):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = content.nbytes
            tar.addfile(member, io.BytesIO(content.tobytes()))
    [source] = sources.KNOWN["cifar10"]
    archive = file.getvalue()
    known = source._replace(size=len(archive), sha256=hashlib.sha256(archive).hexdigest())
    monkeypatch.setitem(sources.KNOWN, "cifar10", (known,))
    (tmp_path / "cifar10").mkdir()
    (tmp_path / source.path).write_bytes(archive)
    train, test = datasets.cifar10(tmp_path)
    np.testing.assert_array_equal(train[1], records[:5, :, 0].reshape(-1))
    np.testing.assert_array_equal(test[1], records[5, :, 0])
    colours = records[:, :, 1:].reshape(6, 4, 3, 32, 32).astype(float)
    mean, deviation = colours[:5].mean((0, 1, 3, 4)), colours[:5].std((0, 1, 3, 4))
    expected = (colours.transpose(0, 1, 3, 4, 2) - mean) / deviation
    precision.assert_close(train[0], expected[:5].reshape(20, 32, 32, 3), rtol=1e-9, atol=1e-12)
    precision.assert_close(test[0], expected[5], rtol=1e-9, atol=1e-12)


@real("a9a")
def test_a9a_has_the_published_counts():
    train, test = datasets.a9a()
    assert [x.shape for x in (*train, *test)] == [(32561, 123), (32561,), (16281, 123), (16281,)]
    assert (int(train[1].sum()), int(test[1].sum())) == (7841, 3846)
    assert set(np.unique(train[0])) == {0.0, 1.0}


@real("power-plant")
def test_the_power_plant_is_standardised_by_its_training_part_and_split_by_its_key(key):
    train, test = datasets.power_plant(key=key)
    assert [x.shape for x in (*train, *test)] == [(8192, 4), (8192,), (1376, 4), (1376,)]
    precision.assert_close(train[0].mean(0), 0, atol=max(1e-10, 32 * precision.EPS))
    precision.assert_close([train[0][:, 0].std(), train[1].std()], 1, rtol=1e-10)
    assert np.abs(test[0].mean(0)).max() > 1e-3
    np.testing.assert_array_equal(datasets.power_plant().train[1], train[1])
    assert (datasets.power_plant(key=jax.random.key(1)).train[1] != train[1]).any()
    # Hotter air gives less power: the known correlation of the two is -0.948 (Tufekci 2014, table 3).
    np.testing.assert_allclose(np.mean(train[0][:, 0] * train[1]), -0.948, atol=0.003)


@real("tiny-shakespeare")
def test_shakespeare_is_cut_into_windows_that_predict_every_character_once():
    train, test = datasets.tiny_shakespeare(num_tokens=100)
    assert (train.shape, test.shape) == ((10038, 101), (1115, 101))
    assert (int(train.min()), int(train.max())) == (0, datasets.NUM_SHAKESPEARE_CHARACTERS - 1)
    start = "First Citizen:\nBefore we proceed"
    assert (
        Counter(np.asarray(train[0, : len(start)]).tolist()).most_common(1)[0][1] == Counter(start).most_common(1)[0][1]
    )


def test_windows_share_one_token_and_the_parts_none():
    train, test = datasets.windows(np.arange(100), num_tokens=4)
    np.testing.assert_array_equal(train[:, :-1].reshape(-1), np.arange(88))
    np.testing.assert_array_equal(train[:, 1:].reshape(-1), np.arange(1, 89))
    np.testing.assert_array_equal(test, [[90, 91, 92, 93, 94], [94, 95, 96, 97, 98]])
    for num_tokens in (0, -1, 10):
        with pytest.raises(ValueError, match=f"num_tokens={num_tokens} must be at least 1"):
            datasets.windows(np.arange(100), num_tokens=num_tokens)


def test_a_language_model_is_judged_by_its_prediction_of_every_next_token():
    table = jnp.log(jnp.asarray([[0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.7, 0.2, 0.1]]))
    bigram = models.Model(lambda key: table, lambda params, tokens: params[tokens])
    tokens = jnp.asarray([[0, 1, 2, 2]])
    problem = problems.language_model(bigram, datasets.Split(tokens, None), num_tokens=3)
    precision.assert_close(problem.loss(table, tokens[0]), -np.log(0.6 * 0.5 * 0.1) / 3, rtol=1e-12)
    assert float(problem.metrics["accuracy"](table, tokens[0])) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"train tokens must be in \[0, 2\), but example 0 has 2 \(2 such"):
        problems.language_model(bigram, datasets.Split(tokens, None), num_tokens=2)


def test_regression_has_half_the_squared_error_as_its_loss():
    model = models.mlp((2, 1))
    problem = problems.regression(model, datasets.Split((jnp.ones((3, 2)), jnp.zeros(3)), None))
    params = [{"weight": jnp.asarray([[1.0], [2.0]]), "bias": jnp.asarray([0.5])}]
    example = jnp.asarray([1.0, -1.0]), jnp.asarray(2.0)
    assert float(problem.loss(params, example)) == 0.5 * 2.5**2
    assert float(problem.metrics["squared_error"](params, example)) == 2.5**2


def test_regression_takes_models_of_a_scalar_and_of_one_number_and_no_others():
    data = datasets.Split((jnp.ones((3, 2)), jnp.zeros(3)), None)
    w = jnp.asarray([1.0, 2.0])
    for shape in ((), (1,)):
        model = models.Model(lambda key: w, lambda w, x, shape=shape: (w @ x).reshape(shape))
        assert float(problems.regression(model, data).loss(w, (jnp.asarray([1.0, 1.0]), jnp.asarray(1.0)))) == 2.0
    with pytest.raises(ValueError, match=r"model must return one number for an example, but returns \(2,\)"):
        problems.regression(models.Model(lambda key: w, lambda w, x: w * x), data)


@pytest.mark.slow
def test_logistic_has_the_optimum_of_scikit_learn(key):
    data = datasets.gaussian_classification(key, num_examples=200, dimension=3)
    problem = problems.logistic(data)
    x, y = np.asarray(data.train[0], float), np.asarray(data.train[1])  # scikit-learn computes in the dtype it is given
    fitted = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(x, y)
    params = {"weight": jnp.asarray(fitted.coef_[0]), "bias": jnp.asarray(fitted.intercept_[0])}
    gradient = gradients.mean(problem.loss)(params, problem.train).grad
    assert all(np.abs(leaf).max() < max(1e-6, 32 * precision.EPS) for leaf in jax.tree.leaves(gradient))
    accuracy = jax.vmap(problem.metrics["accuracy"], (None, 0))(params, problem.train).mean()
    assert float(accuracy) == pytest.approx(fitted.score(x, y))


def test_least_squares_has_half_the_squared_error_as_its_loss(key):
    problem = problems.least_squares(datasets.gaussian_regression(key, num_examples=8, dimension=2))
    weights = np.asarray([1.0, -2.0])
    for x, y in zip(*map(np.asarray, problem.train), strict=True):
        squared_error = (x @ weights - y) ** 2
        precision.assert_close(problem.loss(weights, (x, y)), squared_error / 2, rtol=1e-12)
        precision.assert_close(problem.metrics["squared_error"](weights, (x, y)), squared_error, rtol=1e-12)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_classification_is_right_where_the_largest_logit_is_the_label_s(label):
    logits = np.asarray([0.5, 3.0, -1.0])
    data = datasets.Split((logits[None], np.asarray([label])), None)
    problem = problems.classification(models.mlp((3, 3)), data, num_classes=3)
    params = [{"weight": jnp.eye(3), "bias": jnp.zeros(3)}]  # the features are the logits
    example = jax.tree.map(lambda x: jnp.asarray(x)[0], data.train)
    expected = np.log(np.exp(logits).sum()) - logits[label]
    precision.assert_close(problem.loss(params, example), expected, rtol=1e-12)
    assert float(problem.metrics["accuracy"](params, example)) == (label == 1)


def test_the_noisy_quadratic_has_exactly_the_noise_it_promises(key):
    """Gradient variance h at every point, minimum at zero, and the metric is the loss above that minimum."""
    problem = problems.noisy_quadratic(key, num_examples=64, dimension=5)
    h = 1 / np.arange(1, 6)
    for params in (jnp.zeros(5), jnp.arange(5.0)):
        grads = np.asarray(gradients.per_example(problem.loss)(params, problem.train).aux.grads)
        precision.assert_close(grads.mean(0), h * np.asarray(params), atol=max(1e-12, 32 * precision.EPS))
        precision.assert_close(grads.var(0), h, rtol=1e-12)
        loss = jax.vmap(problem.loss, (None, 0))(params, problem.train).mean()
        at_zero = jax.vmap(problem.loss, (None, 0))(jnp.zeros(5), problem.train).mean()
        precision.assert_close(problem.metrics["excess_loss"](params, None), loss - at_zero, atol=1e-12)
