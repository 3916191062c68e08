"""Optimisers by name, each with a learning rate to begin with.

>>> factory, rate = named("momentum")
>>> rate
0.03
"""

from functools import partial

import optax

from gdjax.problem import imported
from gdjax.tuning._runs import Optimizer

# With the learning rate that the first grid has in its middle.
OPTIMIZERS: dict[str, tuple[Optimizer, float]] = {
    "sgd": (optax.sgd, 0.2),
    "momentum": (partial(optax.sgd, momentum=0.9), 0.03),
    "adam": (optax.adam, 0.003),
}


def load(spec: str) -> str | Optimizer:
    """Return a name of OPTIMIZERS as it is, and import what is named as 'package.module:factory'.

    Raises:
        ValueError: where it cannot be imported, or does not make an optax transformation of a learning rate.
    """
    if ":" not in spec:
        return spec
    factory = imported(spec, "optimizer")
    try:
        made = factory(0.1)
    except Exception as error:
        raise ValueError(f"optimizer={spec!r}: calling it with a learning rate raised {error!r}") from error
    if not isinstance(made, optax.GradientTransformation):
        raise ValueError(f"optimizer={spec!r} returned a {type(made).__name__}, not an optax.GradientTransformation")
    return factory


def named(optimizer: str | Optimizer) -> tuple[Optimizer, float]:
    """Return (the optimiser's factory, a learning rate to begin with).

    Raises:
        ValueError: for a name that is not in OPTIMIZERS.
    """
    if not isinstance(optimizer, str):
        return optimizer, 0.03
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is not one of {', '.join(OPTIMIZERS)}, or module:factory")
    return OPTIMIZERS[optimizer]
