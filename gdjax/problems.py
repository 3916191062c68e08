"""Ready-made problems.

>>> problem = named("least-squares")
>>> problem.name, problem.num_examples, list(problem.metrics)
('least-squares', 1024, ['squared_error'])
>>> named("least-square")
Traceback (most recent call last):
ValueError: problem='least-square' is not one of digits-mlp, least-squares, logistic, noisy-quadratic; a problem of \
your own is package.module:attribute
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import datasets, models
from gdjax.datasets import Split
from gdjax.problem import Problem, load


def digits_mlp(hidden: tuple[int, ...] = (128,), *, scale: models.Scale = "he", data: Split | None = None) -> Problem:
    """Classify 8 x 8 handwritten digits by a multilayer perceptron, `models.mlp((64, *hidden, 10), scale=scale)`."""
    model = models.mlp((64, *hidden, 10), scale=scale)
    return classification(model, data or datasets.digits(), num_classes=10, name="digits-mlp")


def classification(model: models.Model, data: Split, *, num_classes: int, name: str = "classification") -> Problem:
    """Fit `model`, x -> logits [num_classes], to examples (x, label) by softmax cross-entropy; metric: accuracy.

    Raises:
        ValueError: for labels that are not integers in [0, num_classes).
    """
    _check_labels(data, num_classes)

    def loss(params, example):
        x, label = example
        return optax.losses.softmax_cross_entropy_with_integer_labels(model.apply(params, x), label)

    def accuracy(params, example):
        x, label = example
        return (model.apply(params, x).argmax().astype(label.dtype) == label).astype(float)

    return Problem(model.init, loss, data.train, data.test, {"accuracy": accuracy}, name)


def least_squares(data: Split | None = None) -> Problem:
    """Fit y by x.w, with the loss (x.w - y)^2 / 2, from w = 0, on examples (x [D], y); metric: squared_error."""
    data = data or datasets.gaussian_regression(jax.random.key(0))

    def loss(weights, example):
        x, y = example
        return 0.5 * (x @ weights - y) ** 2

    def init(key):
        return jnp.zeros(data.train[0].shape[1])

    metrics = {"squared_error": lambda weights, example: 2 * loss(weights, example)}
    return Problem(init, loss, data.train, data.test, metrics, "least-squares")


def logistic(data: Split | None = None) -> Problem:
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

    return Problem(init, loss, data.train, data.test, {"accuracy": accuracy}, "logistic")


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

    return Problem(init, loss, centres, None, {"excess_loss": excess_loss}, "noisy-quadratic")


BUILT_IN: dict[str, Callable[[], Problem]] = {
    "digits-mlp": digits_mlp,
    "least-squares": least_squares,
    "logistic": logistic,
    "noisy-quadratic": noisy_quadratic,
}


def named(spec: str) -> Problem:
    """Return a built-in problem by name, or load 'package.module:attribute' (see `problem.load`).

    Raises:
        ValueError: for a name that is not built in and a spec that cannot be loaded.
    """
    if ":" in spec:
        return load(spec)
    if spec not in BUILT_IN:
        raise ValueError(
            f"problem={spec!r} is not one of {', '.join(BUILT_IN)}; a problem of your own is package.module:attribute"
        )
    return BUILT_IN[spec]()


def _check_labels(data: Split, num_classes: int) -> None:
    for part, examples in zip(("train", "test"), data, strict=True):
        if examples is None:
            continue
        labels = np.asarray(examples[1])
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{part} labels must be integers, but are {labels.dtype}")
        wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if wrong.size:
            raise ValueError(
                f"{part} labels must be in [0, {num_classes}), but example {wrong[0]} has {labels[wrong[0]]} "
                f"({wrong.size} such examples)"
            )
