"""Optimisers by name, each with a learning rate to begin with.

>>> factory, rate = named("momentum")
>>> rate
0.03
"""

from functools import partial

import optax

from gdjax.tuning._runs import Optimizer

# With the learning rate that the first grid has in its middle.
OPTIMIZERS: dict[str, tuple[Optimizer, float]] = {
    "sgd": (optax.sgd, 0.2),
    "momentum": (partial(optax.sgd, momentum=0.9), 0.03),
    "adam": (optax.adam, 0.003),
}


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
