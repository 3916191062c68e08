"""Data sets, real and drawn: each returns `Split(train, test)` of arrays with the examples along axis 0.

>>> split = digits()
>>> features, labels = split.train
>>> features.shape, labels.shape, split.test[1].shape
((1440, 64), (1440,), (357,))
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdjax.problem import Batch

NUM_DIGITS = 1797
NUM_DIGITS_TEST = 357  # leaves 1440 = 2^5 * 3^2 * 5 for training, which most batch sizes divide


class Split(NamedTuple):
    """Training and test examples, two pytrees of arrays with leading axes N and N_test; `test` may be None."""

    train: Batch
    test: Batch | None


def digits(key: jax.Array | None = None) -> Split:
    """Return scikit-learn's 1797 real handwritten digits (8 x 8 pixels; Alpaydin & Kaynak 1998) as (features, labels).

    Features are float[N, 64], each pixel standardised by its mean and deviation over the training part alone; labels
    are int32[N], 0 to 9. There are 1440 training and 357 test examples, chosen by `key` (default `jax.random.key(0)`).

    Raises:
        ModuleNotFoundError: without scikit-learn, which holds the data.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "datasets.digits reads the copy inside scikit-learn: pip install 'gdjax[experiments]'"
        ) from error
    features, labels = load_digits(return_X_y=True)
    order = np.asarray(jax.random.permutation(jax.random.key(0) if key is None else key, NUM_DIGITS))
    test, train = np.split(order, [NUM_DIGITS_TEST])
    train_features, test_features = standardised(features[train], features[test])
    return Split(
        (jnp.asarray(train_features, float), jnp.asarray(labels[train], jnp.int32)),
        (jnp.asarray(test_features, float), jnp.asarray(labels[test], jnp.int32)),
    )


def gaussian_regression(
    key: jax.Array,
    *,
    num_examples: int = 1024,
    dimension: int = 16,
    condition_number: float = 30.0,
    noise: float = 0.1,
) -> Split:
    """Draw (x, y) with x ~ N(0, H) and y = x.w + noise: linear regression with a spectrum that is known.

    H is diagonal, its eigenvalues spaced evenly in the logarithm from 1 to 1 / condition_number; w ~ N(0, I). The test
    part is as large as the training part.
    """
    features_key, weights_key, noise_key = jax.random.split(key, 3)
    eigenvalues = jnp.geomspace(1.0, 1 / condition_number, dimension)
    features = jax.random.normal(features_key, (2 * num_examples, dimension)) * jnp.sqrt(eigenvalues)[None]
    targets = features @ jax.random.normal(weights_key, (dimension,))
    targets += noise * jax.random.normal(noise_key, targets.shape)
    return _halves(features, targets)


def gaussian_classification(key: jax.Array, *, num_examples: int = 1024, dimension: int = 16) -> Split:
    """Draw (x, y) with x ~ N(0, I) and P(y = 1) = sigmoid(x.w), w ~ N(0, I): labels int32 in {0, 1}.

    The test part is as large as the training part.
    """
    features_key, weights_key, labels_key = jax.random.split(key, 3)
    features = jax.random.normal(features_key, (2 * num_examples, dimension))
    logits = features @ jax.random.normal(weights_key, (dimension,))
    return _halves(features, jax.random.bernoulli(labels_key, jax.nn.sigmoid(logits)).astype(jnp.int32))


def standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale both parts, [N, D] and [N_test, D], to mean 0 and deviation 1 of each feature in `train`.

    A feature that is constant in `train` is shifted only.
    """
    mean, deviation = train.mean(0), train.std(0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    return (train - mean) / deviation, (test - mean) / deviation


def _halves(*arrays: jax.Array) -> Split:
    half = len(arrays[0]) // 2
    return Split(tuple(array[:half] for array in arrays), tuple(array[half:] for array in arrays))
