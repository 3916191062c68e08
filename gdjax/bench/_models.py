"""Problems of random data, to be timed: what their numbers are does not matter."""

from collections.abc import Callable
from functools import partial

import jax

from gdjax import problems
from gdjax.problem import Problem
from gdjax.problems import models as networks
from gdjax.problems.datasets import Split

NUM_EXAMPLES = 1024
NUM_TOKENS, SEQUENCE = 65, 16


def mlp(*sizes: int) -> Problem:
    """Return a classifier of random vectors."""
    return _classification(networks.mlp(sizes), (sizes[0],))


def cnn() -> Problem:
    """Return a classifier of random 28 x 28 images."""
    return _classification(networks.cnn((28, 28, 1)), (28, 28, 1))


def transformer() -> Problem:
    """Return a language model of random sequences."""
    tokens = jax.random.randint(jax.random.key(0), (NUM_EXAMPLES, SEQUENCE + 1), 0, NUM_TOKENS)
    return problems.language_model(
        networks.transformer(num_tokens=NUM_TOKENS), Split(tokens, None), num_tokens=NUM_TOKENS
    )


MODELS: dict[str, Callable[[], Problem]] = {
    "mlp-small": partial(mlp, 64, 128, 10),
    "mlp-large": partial(mlp, 784, 512, 512, 10),
    "cnn": cnn,
    "transformer": transformer,
}


def _classification(model: networks.Model, shape: tuple[int, ...]) -> Problem:
    x_key, label_key = jax.random.split(jax.random.key(0))
    labels = jax.random.randint(label_key, (NUM_EXAMPLES,), 0, 10)
    return problems.classification(
        model, Split((jax.random.normal(x_key, (NUM_EXAMPLES, *shape)), labels), None), num_classes=10
    )
