"""Ready-made problems.

>>> problem = named("least-squares")
>>> problem.name, problem.num_examples, list(problem.metrics)
('least-squares', 1024, ['squared_error'])
>>> named("least-square")
Traceback (most recent call last):
ValueError: problem='least-square' is not one of digits-mlp, least-squares, logistic, noisy-quadratic, mnist-mlp, \
fashion-mnist-cnn, cifar10-cnn, a9a-logistic, power-plant, tiny-shakespeare; a problem of your own is \
package.module:attribute

Those from mnist-mlp on read published files from the folder named by `--data` or the environment variable GDJAX_DATA,
see `sources`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax.problem import Problem
from gdjax.problems import datasets, models
from gdjax.problems.datasets import Split


def digits_mlp(hidden: tuple[int, ...] = (128,), *, scale: models.Scale = "he", data: Split | None = None) -> Problem:
    """Classify 8 x 8 handwritten digits by a multilayer perceptron, `models.mlp((64, *hidden, 10), scale=scale)`."""
    model = models.mlp((64, *hidden, 10), scale=scale)
    return classification(model, data or datasets.digits(), num_classes=10, name="digits-mlp")


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return -log softmax(logits [..., C]) at the labels, int[...], in nats.

    The label's logit is selected by a comparison with all C, not looked up: the gradient of a look-up is a scatter,
    which XLA runs as a loop of its own on a CPU and as further kernels elsewhere.
    """
    chosen = jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), logits, 0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def classification(model: models.Model, data: Split, *, num_classes: int, name: str = "classification") -> Problem:
    """Fit `model`, x -> logits [num_classes], to examples (x, label) by softmax cross-entropy; metric: accuracy.

    Raises:
        ValueError: for labels that are not integers in [0, num_classes).
    """
    _check_labels(data, num_classes)

    def loss(params, example):
        x, label = example
        return cross_entropy(model.apply(params, x), label)

    def accuracy(params, example):
        x, label = example
        return (model.apply(params, x).argmax().astype(label.dtype) == label).astype(float)

    return Problem(model.init, loss, data.train, data.test, {"accuracy": accuracy}, name=name)


def language_model(model: models.Model, data: Split, *, num_tokens: int, name: str = "language-model") -> Problem:
    """Predict each token from those before it, on examples of tokens int32[T + 1]; metric: accuracy.

    The loss of an example is the mean cross-entropy of its T predictions, in nats.

    Raises:
        ValueError: for tokens that are not integers in [0, num_tokens).
    """
    for part, tokens in zip(("train", "test"), data, strict=True):
        _check_integers(tokens, num_tokens, f"{part} tokens")

    def loss(params, tokens):
        logits = model.apply(params, tokens[:-1])
        return cross_entropy(logits, tokens[1:]).mean()

    def accuracy(params, tokens):
        predictions = model.apply(params, tokens[:-1]).argmax(-1).astype(tokens.dtype)
        return (predictions == tokens[1:]).astype(float).mean()

    return Problem(model.init, loss, data.train, data.test, {"accuracy": accuracy}, name=name)


def regression(model: models.Model, data: Split, *, name: str = "regression") -> Problem:
    """Fit `model`, x -> a scalar or [1], to examples (x, y) with the loss (f(x) - y)^2 / 2; metric: squared_error.

    Raises:
        ValueError: for a model that returns more than one number.
    """

    def squared_error(params, example):
        x, y = example
        prediction = model.apply(params, x)
        if prediction.size != 1:
            raise ValueError(f"model must return one number for an example, but returns {prediction.shape}")
        return (prediction.reshape(()) - y) ** 2

    def loss(params, example):
        return 0.5 * squared_error(params, example)

    return Problem(model.init, loss, data.train, data.test, {"squared_error": squared_error}, name=name)


def mnist_mlp(hidden: tuple[int, ...] = (256,), *, data: Split | None = None) -> Problem:
    """Classify MNIST by a multilayer perceptron that reads an image as one vector."""
    parts = data or datasets.mnist()
    flat = Split(*(part and (part[0].reshape(len(part[0]), -1), part[1]) for part in parts))
    return classification(models.mlp((28 * 28, *hidden, 10)), flat, num_classes=10, name="mnist-mlp")


def image_cnn(data: Split, *, name: str) -> Problem:
    """Classify images, float[N, H, W, C] and labels below ten, by `models.cnn`."""
    return classification(models.cnn(data.train[0].shape[1:]), data, num_classes=10, name=name)


def power_plant(data: Split | None = None) -> Problem:
    """Predict the output of a power plant, in deviations of it, by a small multilayer perceptron."""
    return regression(models.mlp((4, 32, 1)), data or datasets.power_plant(), name="power-plant")


def tiny_shakespeare(data: Split | None = None) -> Problem:
    """Predict the next of 65 characters of Shakespeare by `models.transformer`."""
    model = models.transformer(num_tokens=datasets.NUM_SHAKESPEARE_CHARACTERS)
    return language_model(
        model,
        data or datasets.tiny_shakespeare(),
        num_tokens=datasets.NUM_SHAKESPEARE_CHARACTERS,
        name="tiny-shakespeare",
    )


def least_squares(data: Split | None = None) -> Problem:
    """Fit y by x.w, with the loss (x.w - y)^2 / 2, from w = 0, on examples (x [D], y); metric: squared_error."""
    data = data or datasets.gaussian_regression(jax.random.key(0))

    def loss(weights, example):
        x, y = example
        return 0.5 * (x @ weights - y) ** 2

    def init(key):
        return jnp.zeros(data.train[0].shape[1])

    metrics = {"squared_error": lambda weights, example: 2 * loss(weights, example)}
    return Problem(init, loss, data.train, data.test, metrics, name="least-squares")


def logistic(data: Split | None = None, *, name: str = "logistic") -> Problem:
    """Fit P(y = 1) by sigmoid(x.w + b), from zero, on examples (x [D], y in {0, 1}); metric: accuracy.

    Raises:
        ValueError: for labels other than the integers 0 and 1.
    """
    data = data or datasets.gaussian_classification(jax.random.key(0))
    _check_labels(data, 2)

    def logit(params, x):
        return x @ params["weight"] + params["bias"]

    def loss(params, example):
        x, label = example
        return optax.losses.sigmoid_binary_cross_entropy(logit(params, x), label.astype(float))

    def accuracy(params, example):
        x, label = example
        return ((logit(params, x) > 0) == (label == 1)).astype(float)

    def init(key):
        return {"weight": jnp.zeros(data.train[0].shape[1]), "bias": jnp.zeros(())}

    return Problem(init, loss, data.train, data.test, {"accuracy": accuracy}, name=name)


def noisy_quadratic(
    key: jax.Array | None = None, *, num_examples: int = 4096, dimension: int = 100, curvature: jax.Array | None = None
) -> Problem:
    """Return the noisy quadratic model (Zhang et al. 2019, arXiv 1907.04164, section 3) as a finite data set.

    The loss of example c is sum_i h_i (theta_i - c_i)^2 / 2 with h_i = 1 / i, or the given `curvature` [D]. The
    examples are drawn with variance 1 / h_i, then centred and scaled so that their mean is 0 and their variance 1 / h_i
    exactly: the minimum is at theta = 0, and the gradient of one uniformly drawn example has variance h_i everywhere.
    Parameters start from N(0, I). The metric is excess_loss, sum_i h_i theta_i^2 / 2.
    """
    h = 1 / jnp.arange(1.0, dimension + 1) if curvature is None else jnp.asarray(curvature)
    if num_examples < 2:
        raise ValueError(f"num_examples={num_examples} must be at least 2, so that the gradient can vary")
    centres = jax.random.normal(jax.random.key(0) if key is None else key, (num_examples, *h.shape))
    centres -= centres.mean(0, keepdims=True)
    centres /= centres.std(0, keepdims=True) * jnp.sqrt(h)[None]

    def excess_loss(params, example=None):
        return 0.5 * (h * params**2).sum()

    def loss(params, centre):
        return 0.5 * (h * (params - centre) ** 2).sum()

    def init(key):
        return jax.random.normal(key, h.shape)

    return Problem(init, loss, centres, None, {"excess_loss": excess_loss}, name="noisy-quadratic")


BUILT_IN: dict[str, Callable[[], Problem]] = {
    "digits-mlp": digits_mlp,
    "least-squares": least_squares,
    "logistic": logistic,
    "noisy-quadratic": noisy_quadratic,
    "mnist-mlp": mnist_mlp,
    "fashion-mnist-cnn": lambda: image_cnn(datasets.fashion_mnist(), name="fashion-mnist-cnn"),
    "cifar10-cnn": lambda: image_cnn(datasets.cifar10(), name="cifar10-cnn"),
    "a9a-logistic": lambda: logistic(datasets.a9a(), name="a9a-logistic"),
    "power-plant": power_plant,
    "tiny-shakespeare": tiny_shakespeare,
}


def named(name: str) -> Problem:
    """Return a built-in problem by its name, a key of BUILT_IN.

    Raises:
        ValueError: for a name that is not built in.
    """
    if name not in BUILT_IN:
        raise ValueError(
            f"problem={name!r} is not one of {', '.join(BUILT_IN)}; a problem of your own is package.module:attribute"
        )
    return BUILT_IN[name]()


def _check_labels(data: Split, num_classes: int) -> None:
    for part, examples in zip(("train", "test"), data, strict=True):
        if examples is not None:
            _check_integers(examples[1], num_classes, f"{part} labels")


def _check_integers(values, limit: int, name: str) -> None:
    """Raise ValueError unless `values` [N, ...], if any, are integers in [0, limit)."""
    if values is None:
        return
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must be integers, but are {values.dtype}")
    wrong = np.argwhere((values < 0) | (values >= limit))
    if len(wrong):
        raise ValueError(
            f"{name} must be in [0, {limit}), but example {wrong[0][0]} has {values[tuple(wrong[0])]} "
            f"({len(wrong)} such {'examples' if values.ndim == 1 else 'values'})"
        )
