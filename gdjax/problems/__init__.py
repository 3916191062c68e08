"""Ready-made problems, the models and the data that they are made of."""

from gdjax.problems import datasets, models
from gdjax.problems._ready import (
    BUILT_IN,
    classification,
    digits_mlp,
    image_cnn,
    language_model,
    least_squares,
    logistic,
    mnist_mlp,
    named,
    noisy_quadratic,
    power_plant,
    regression,
    tiny_shakespeare,
)
from gdjax.problems._sources import contents, read_from

__all__ = [
    "BUILT_IN",
    "classification",
    "contents",
    "datasets",
    "digits_mlp",
    "image_cnn",
    "language_model",
    "least_squares",
    "logistic",
    "mnist_mlp",
    "models",
    "named",
    "noisy_quadratic",
    "power_plant",
    "read_from",
    "regression",
    "tiny_shakespeare",
]
