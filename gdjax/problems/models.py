"""Small pure models: `init(key) -> params` and `apply(params, x) -> output` for one example.

>>> import jax
>>> model = mlp((64, 128, 10), scale="he")
>>> params = model.init(jax.random.key(0))
>>> [layer["weight"].shape for layer in params]
[(64, 128), (128, 10)]
>>> model.apply(params, jax.numpy.ones(64)).shape
(10,)
>>> reader = transformer(num_tokens=65)
>>> reader.apply(reader.init(jax.random.key(0)), jax.numpy.arange(16)).shape
(16, 65)

Normalisations have no parameters and convolutions and attention no biases, so that `ghost` measures every leaf of
`cnn` and `transformer` by a rule; a learned scale before a ReLU or a matrix says nothing that the next weight cannot.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gdjax.problem import Params

Scale = Literal["he", "xavier"] | float
"""Standard deviation of Gaussian weights: "he", sqrt(2 / fan_in) (He et al. 2015, eq. 10); "xavier",
sqrt(2 / (fan_in + fan_out)) (Glorot & Bengio 2010, eq. 12); or the number itself."""

EPSILON = 1e-5  # added to variances
ROTATION_BASE = 10_000.0
HEAD_SCALE = 0.1  # deviation of a new model's logits


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


def cnn(
    shape: tuple[int, int, int], *, num_classes: int = 10, channels: tuple[int, ...] = (16, 32), num_groups: int = 8
) -> Model:
    """Return a convolutional network, image [height, width, colours] -> logits [num_classes].

    Each layer is a 3 x 3 `convolution` of stride 2, `group_norm` and a ReLU; a dense layer reads all positions.
    BatchNorm would couple the examples of a batch. Parameters are {"kernels": [[3, 3, in, out], ...], "head"}.

    Args:
        shape: of an image.
        num_classes: logits.
        channels: of each convolution.
        num_groups: of channels that are normalised together; it must divide each of `channels`.

    Raises:
        ValueError: where `num_groups` does not divide `channels`.
    """
    if any(width % num_groups for width in channels):
        raise ValueError(f"num_groups={num_groups} must divide each of channels={channels}")
    height, width, colours = shape
    for _ in channels:
        height, width = -(-height // 2), -(-width // 2)

    def init(key: jax.Array) -> Params:
        head_key, *keys = jax.random.split(key, 1 + len(channels))
        ways = zip(keys, (colours, *channels[:-1]), channels, strict=True)
        kernels = [_normal(key, (3, 3, fan_in, out), math.sqrt(2 / (9 * fan_in))) for key, fan_in, out in ways]
        return {"kernels": kernels, "head": _head(head_key, height * width * channels[-1], num_classes)}

    def apply(params: Params, x: jax.Array) -> jax.Array:
        for kernel in params["kernels"]:
            x = jax.nn.relu(group_norm(convolution(x, kernel, stride=2), num_groups=num_groups))
        return x.reshape(-1) @ params["head"]

    return Model(init, apply)


def transformer(*, num_tokens: int, width: int = 64, num_layers: int = 2, num_heads: int = 4) -> Model:
    """Return a causal language model, tokens int[T] -> logits [T, num_tokens] of each next token, for any T.

    Pre-norm blocks of attention and a GELU layer of 4 * width (Vaswani et al. 2017, arXiv 1706.03762; Radford et al.
    2019), positions by rotation (Su et al. 2021, arXiv 2104.09864). Logits at t depend on tokens 0 ... t alone.

    Args:
        num_tokens: size of the vocabulary.
        width: of the residual stream, an even multiple of `num_heads`.
        num_layers, num_heads: blocks, and heads of attention in each.

    Raises:
        ValueError: for a width that is not an even multiple of `num_heads`.
    """
    if width < 1 or width % (2 * num_heads):
        raise ValueError(f"width={width} must be a positive even multiple of num_heads={num_heads}")
    shapes = {"attend": (width, 3 * width), "mix": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    # What is added to the residual stream shrinks with depth (Radford et al. 2019, section 2.3).
    shrink = {name: 1 / math.sqrt(2 * num_layers) if name in ("mix", "down") else 1.0 for name in shapes}

    def init_block(key: jax.Array) -> Params:
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        return {name: _normal(keys[name], (i, o), shrink[name] / math.sqrt(i)) for name, (i, o) in shapes.items()}

    def init(key: jax.Array) -> Params:
        embed_key, head_key, *keys = jax.random.split(key, 2 + num_layers)
        embed = jax.random.normal(embed_key, (num_tokens, width))
        return {"embed": embed, "blocks": list(map(init_block, keys)), "head": _head(head_key, width, num_tokens)}

    def block(params: Params, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split((_rms_norm(x) @ params["attend"]).reshape(len(x), 3 * num_heads, -1), 3, axis=1)
        x = x + attention(rotated(q), rotated(k), v).reshape(x.shape) @ params["mix"]
        return x + jax.nn.gelu(_rms_norm(x) @ params["up"]) @ params["down"]

    def apply(params: Params, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        for layer in params["blocks"]:
            x = block(layer, x)
        return _rms_norm(x) @ params["head"]

    return Model(init, apply)


def convolution(x: jax.Array, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """Return the convolution of an image [H, W, in] with [K, L, in, out], [ceil(H / stride), ceil(W / stride), out].

    It is padded as "SAME" and computed as one product of the patches with the kernel. On a CPU that is 6 times faster
    than `lax.conv_general_dilated` where it matters: XLA has no fast gradient of a convolution inside a compiled loop
    there (https://github.com/jax-ml/jax/issues/12868). The patches take K L / stride^2 times the memory of the image.
    On a TPU it is `lax.conv_general_dilated`: as compiled for a v5e, an update of `cnn` at B = 256 starts 43 kernels
    that read and write 61 MB, by patches 78 and 208 MB. On a GPU that would be a call of a library, which XLA leaves
    out of the graph of the loop: patches, until one has been measured.
    """
    by_library = partial(_by_library, stride=stride)
    return lax.platform_dependent(x, kernel, tpu=by_library, default=partial(_by_patches, stride=stride))


def _by_library(x: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    axes = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x[None], kernel, (stride, stride), "SAME", dimension_numbers=axes)[0]


def _by_patches(x: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    rows, columns, _ = x.shape
    size = kernel.shape[0], kernel.shape[1]
    out = -(-rows // stride), -(-columns // stride)
    total = [max(0, (o - 1) * stride + k - n) for o, k, n in zip(out, size, (rows, columns), strict=True)]
    x = jnp.pad(x, [(total[0] // 2, -(-total[0] // 2)), (total[1] // 2, -(-total[1] // 2)), (0, 0)])
    shifts = [(i, j) for i in range(size[0]) for j in range(size[1])]
    span = [(o - 1) * stride + 1 for o in out]
    patches = [x[i : i + span[0] : stride, j : j + span[1] : stride] for i, j in shifts]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])


def group_norm(x: jax.Array, *, num_groups: int) -> jax.Array:
    """Shift and scale each group of channels of x [height, width, C] to mean 0, variance 1 (Wu & He 2018, eq. 1-2).

    Means are taken over positions first and then over the channels of a group, so that channels stay the last axis
    throughout; positions are one axis where x is centred and two where it is scaled. On a CPU the network takes half
    the time of one mean over positions and channels at B = 256 and 2/3 at B = 32, but 4/3 at B = 1. The variance is
    that of centred values: mean squares less squared means lose it where the mean is large.
    """
    channels = x.shape[-1]

    def mean(x: jax.Array) -> jax.Array:
        """Return the mean over the group of every channel, [C], of x [positions, C]."""
        of_groups = x.mean(0).reshape(num_groups, -1).mean(1)
        return jnp.repeat(of_groups, channels // num_groups)

    flat = x.reshape(-1, channels)
    centred = flat - mean(flat)[None]
    return centred.reshape(x.shape) * lax.rsqrt(mean(centred**2) + EPSILON)[None, None]


@jax.custom_vjp
def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Return causal attention of queries, keys and values, all [T, heads, D] (Vaswani et al. 2017, eq. 1).

    Position t has the mean of v at 0 ... t with weights softmax(q_t . k_s / sqrt(D)).

    The backward pass is written out: it computes the weights again instead of keeping them, [heads, T, T] of every
    example, and sums a softmax's cotangent over D numbers in place of T, with <g_t, o_t> (Dao et al. 2022, arXiv
    2205.14135, section B.2). It is exact and can be differentiated again; forward-mode derivatives (`jax.jvp`) of this
    function itself are not defined, those of its gradient are.
    """
    return _attend(q, k, v)[0]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array):
    q, k, v = (x.swapaxes(0, 1) for x in (q / math.sqrt(q.shape[-1]), k, v))
    out = _causal_weights(q, k) @ v
    return out.swapaxes(0, 1), (q, k, v, out)


def _attend_backward(kept, g: jax.Array):
    """With P the weights and dP = G V', the scores' cotangent is P * (dP - sum_s P dP), and the sum is <G, PV>."""
    (q, k, v, out), g = kept, g.swapaxes(0, 1)
    weights = _causal_weights(q, k)
    by_weight = jnp.einsum("htd,hsd->hts", g, v)
    by_score = weights * (by_weight - (g * out).sum(-1, keepdims=True))
    by_q = jnp.einsum("hts,hsd->thd", by_score, k) / math.sqrt(q.shape[-1])
    # Sums over t, with the smaller factor on the left and transposed: that of a CPU's library copies nothing larger.
    by_k, by_v = (jnp.einsum("hdt,hts->shd", x.swapaxes(1, 2), y) for x, y in ((q, by_score), (g, weights)))
    return by_q, by_k, by_v


attention.defvjp(_attend, _attend_backward)


def _causal_weights(q: jax.Array, k: jax.Array) -> jax.Array:
    """Return softmax(q . k) over the past, [heads, T, T], of q and k [heads, T, D]."""
    scores = jnp.einsum("htd,hsd->hts", q, k)
    past = jnp.tril(jnp.ones((1, *scores.shape[1:]), bool))
    return jax.nn.softmax(jnp.where(past, scores, -jnp.inf))


def rotated(x: jax.Array) -> jax.Array:
    """Turn channels i and i + D/2 of x [T, heads, D] at position t by t * 10000^(-2i/D) (Su et al. 2021, eq. 15)."""
    half = x.shape[-1] // 2
    frequencies = ROTATION_BASE ** (-jnp.arange(half, dtype=x.dtype) / half)
    angles = jnp.arange(len(x), dtype=x.dtype)[:, None, None] * frequencies[None, None]
    low, high = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _rms_norm(x: jax.Array) -> jax.Array:
    """Scale x [..., D] to a mean square of 1 over D (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + EPSILON)


def _normal(key: jax.Array, shape: tuple[int, ...], deviation: float) -> jax.Array:
    return deviation * jax.random.normal(key, shape)


def _head(key: jax.Array, fan_in: int, num_classes: int) -> jax.Array:
    """Draw the last layer small, so that a new model gives every class nearly the same probability."""
    return _normal(key, (fan_in, num_classes), HEAD_SCALE / math.sqrt(fan_in))


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
