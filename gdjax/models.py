"""Small pure models: `init(key) -> params` and `apply(params, x) -> output` for one example.

>>> import jax
>>> model = mlp((64, 128, 10), scale="he")
>>> params = model.init(jax.random.key(0))
>>> [layer["weight"].shape for layer in params]
[(64, 128), (128, 10)]
>>> model.apply(params, jax.numpy.ones(64)).shape
(10,)
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from gdjax.problem import Params

Scale = Literal["he", "xavier"] | float
"""Standard deviation of Gaussian weights: "he", sqrt(2 / fan_in) (He et al. 2015, eq. 10); "xavier",
sqrt(2 / (fan_in + fan_out)) (Glorot & Bengio 2010, eq. 12); or the number itself."""


class Model(NamedTuple):
    """`init(key) -> params` and `apply(params, x) -> output`, both pure."""

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array], jax.Array]


def mlp(
    sizes: tuple[int, ...],
    *,
    scale: Scale = "he",
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
) -> Model:
    """Return a multilayer perceptron, x [..., sizes[0]] -> [..., sizes[-1]].

    Its parameters are a list of {"weight": [fan_in, fan_out], "bias": [fan_out]}; biases start at zero.

    Args:
        sizes: widths from input to output, at least two.
        scale: standard deviation of the Gaussian that weights are drawn from, see `Scale`.
        activation: applied between layers, not after the last.

    Raises:
        ValueError: for fewer than two sizes, a size below 1, or an unknown or negative scale.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes={sizes} must hold at least an input and an output width, each at least 1")
    standard_deviation(scale, *sizes[:2])  # a wrong scale is an error here, not at the first use of init

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(sizes) - 1)
        return [
            {
                "weight": standard_deviation(scale, fan_in, fan_out) * jax.random.normal(key, (fan_in, fan_out)),
                "bias": jnp.zeros(fan_out),
            }
            for key, fan_in, fan_out in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]

    def apply(params: Params, x: jax.Array) -> jax.Array:
        *hidden, last = params
        for layer in hidden:
            x = activation(x @ layer["weight"] + layer["bias"])
        return x @ last["weight"] + last["bias"]

    return Model(init, apply)


def standard_deviation(scale: Scale, fan_in: int, fan_out: int) -> float:
    """Return the number that `scale` names for a layer of these widths.

    Raises:
        ValueError: for an unknown name or a negative number.
    """
    if scale == "he":
        return math.sqrt(2 / fan_in)
    if scale == "xavier":
        return math.sqrt(2 / (fan_in + fan_out))
    if isinstance(scale, str) or scale < 0:
        raise ValueError(f"scale={scale!r} must be 'he', 'xavier' or a standard deviation >= 0")
    return scale
