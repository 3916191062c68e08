"""The built-in convolutional network and transformer in PyTorch, as fast as eager PyTorch is: for experiments/races.py.

A `Net` holds the tensors to train and says how the parameters of `gdjax.problems.models` become them and come back:
kernels [out, in, 3, 3] and images with channels first, which is what PyTorch's convolutions are fastest in, and a head
whose rows are in that order; tokens as int64; attention by `scaled_dot_product_attention`.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from gdjax.problems import models

torch: Any = importlib.import_module("torch")  # not a dependency, so that a type checker does not find it
functional = torch.nn.functional
Leaves = list[np.ndarray]


class Net(NamedTuple):
    """A model for PyTorch.

    Attributes:
        loss: (tensors, batch of tensors) -> mean loss.
        enter: leaves of the parameters, as `jax.tree.leaves` orders them -> arrays of the tensors.
        leave: the same backwards.
        data: (features, labels) or tokens, arrays -> tensors.
    """

    loss: Callable
    enter: Callable[[Leaves], Leaves]
    leave: Callable[[Leaves], Leaves]
    data: Callable


def cnn(shape: tuple[int, int, int], *, num_classes: int = 10, num_groups: int = 8) -> Net:
    """Return the network of `models.cnn` for images whose height and width are even in every layer."""
    height, width = (size // 4 for size in shape[:2])  # two layers of stride 2

    def to_torch(leaves: Leaves) -> Leaves:
        head, *kernels = leaves
        rows = head.reshape(height, width, -1, num_classes).transpose(2, 0, 1, 3).reshape(-1, num_classes)
        return [rows, *(kernel.transpose(3, 2, 0, 1) for kernel in kernels)]

    def to_jax(leaves: Leaves) -> Leaves:
        head, *kernels = leaves
        rows = head.reshape(-1, height, width, num_classes).transpose(1, 2, 0, 3).reshape(-1, num_classes)
        return [rows, *(kernel.transpose(2, 3, 1, 0) for kernel in kernels)]

    def loss(tensors, batch):
        (head, *kernels), (x, labels) = tensors, batch
        for kernel in kernels:
            x = functional.conv2d(functional.pad(x, (0, 1, 0, 1)), kernel, stride=2)
            x = functional.relu(functional.group_norm(x, num_groups, eps=models.EPSILON))
        return functional.cross_entropy(x.flatten(1) @ head, labels)

    def data(arrays):
        x, labels = map(np.asarray, arrays)
        return torch.tensor(x.transpose(0, 3, 1, 2).copy()), torch.tensor(labels).long()

    return Net(loss, to_torch, to_jax, data)


def transformer(*, num_heads: int = 4) -> Net:
    """Return the language model of `models.transformer`: attend, down, mix, up of each block, then embed and head."""

    def loss(tensors, tokens):
        (*blocks, embed, head), x = tensors, tokens[:, :-1]
        (batch_size, length), width = x.shape, embed.shape[1]
        x, turn = embed[x], _rotation(length, width // num_heads)
        for attend, down, mix, up in zip(*(blocks[i::4] for i in range(4)), strict=True):
            heads = (_norm(x) @ attend).reshape(batch_size, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = heads
            out = functional.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
            x = x + out.transpose(1, 2).reshape(x.shape) @ mix
            x = x + functional.gelu(_norm(x) @ up, approximate="tanh") @ down
        logits = _norm(x) @ head
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return Net(loss, list, list, lambda tokens: torch.tensor(np.asarray(tokens)).long())


def _norm(x):
    return functional.rms_norm(x, x.shape[-1:], eps=models.EPSILON)


def _rotation(length: int, size: int) -> Callable:
    half = size // 2
    angles = torch.arange(length)[:, None] * models.ROTATION_BASE ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()

    def turn(x):
        low, high = x.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    return turn


def trained(net: Net, params, data, batches, *, rate: float, compiled: bool = False) -> Callable[[], Leaves]:
    """Return a function that makes all updates by `torch.optim.SGD` and returns the leaves of the parameters.

    Args:
        net: the model.
        params, data, batches: as `gdjax.descent.run` takes them.
        rate: of learning.
        compiled: whether loss and gradient go through `torch.compile`.
    """
    start, order = net.enter([np.asarray(leaf) for leaf in jax.tree.leaves(params)]), torch.tensor(np.asarray(batches))
    examples, order = net.data(data), order.long()
    loss = torch.compile(net.loss) if compiled else net.loss

    def take(indices):
        return tuple(x[indices] for x in examples) if isinstance(examples, tuple) else examples[indices]

    def run():
        tensors = [torch.tensor(np.ascontiguousarray(leaf)).requires_grad_() for leaf in start]
        optimizer = torch.optim.SGD(tensors, lr=rate)
        for indices in order:
            optimizer.zero_grad()
            loss(tensors, take(indices)).backward()
            optimizer.step()
        return net.leave([tensor.detach().numpy() for tensor in tensors])

    return run
