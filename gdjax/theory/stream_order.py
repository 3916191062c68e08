"""What the order of the stream does to the noise floor, exactly, in one dimension.

The loss of example j is a (theta - c_j)^2 / 2, with mean c_j = 0 and s^2 = (1/N) sum c_j^2; SGD of constant rate
runs on batches of B cut from a stream of `batching`. An epoch has n = N / B updates; with q = 1 - eta a,
w_t = q^(n - 1 - t) and V = N / (N - 1) sum_t (w_t - mean w)^2 / B, the mean of theta^2 at the ends
of epochs, after many epochs, is

    with replacement   eta^2 a^2 s^2 / (B (1 - q^2))
    reshuffled         eta^2 a^2 s^2 V / (1 - q^(2n))
    shuffled once      eta^2 a^2 s^2 V / (1 - q^n)^2, on average over the one shuffle

>>> for variance in (with_replacement, shuffled_once, reshuffled):
...     print(f"{variance(0.1, 0.5, target_variance=1.0, num_examples=20):.5f}")
0.02564
0.00452
0.00214

Mishchenko et al. 2020 (arXiv 2006.05988) and Gurbuzbalaban et al. 2021 (arXiv 1510.08560) bound the same in general.
In D dimensions these hold for every eigenvalue a with the variance of the targets along it.
"""

import jax
import jax.numpy as jnp

from gdjax.theory._laws import Number, power_minus_one


def with_replacement(
    learning_rate: Number,
    eigenvalue: Number,
    *,
    target_variance: Number,
    num_examples: int,
    batch_size: int = 1,
) -> jax.Array:
    """Return the stationary E theta^2 under `batching.with_replacement`.

    Args:
        learning_rate: eta, below 2 / a.
        eigenvalue: a, a scalar.
        target_variance: s^2.
        num_examples: N, not used here: so that the three can stand in for one another.
        batch_size: B.
    """
    del num_examples
    x = jnp.asarray(learning_rate) * eigenvalue
    return x * target_variance / (batch_size * (2 - x))


def reshuffled(
    learning_rate: Number,
    eigenvalue: Number,
    *,
    target_variance: Number,
    num_examples: int,
    batch_size: int = 1,
) -> jax.Array:
    """Return the stationary E theta^2 at the ends of epochs under `batching.reshuffled`. Arguments as above.

    Raises:
        ValueError: where batch_size does not divide num_examples.
    """
    x, weights, lost = _weights(learning_rate, eigenvalue, num_examples, batch_size)
    spread = _spread(lost, num_examples, batch_size)
    return x * target_variance * spread / ((2 - x) * jnp.sum(weights**2))  # 1 - q^(2n) = x (2 - x) sum w^2


def shuffled_once(
    learning_rate: Number,
    eigenvalue: Number,
    *,
    target_variance: Number,
    num_examples: int,
    batch_size: int = 1,
) -> jax.Array:
    """Return the stationary E theta^2 at the ends of epochs under `batching.shuffled_once`, over all shuffles.

    Arguments as above.

    Raises:
        ValueError: where batch_size does not divide num_examples.
    """
    _, weights, lost = _weights(learning_rate, eigenvalue, num_examples, batch_size)
    return target_variance * _spread(lost, num_examples, batch_size) / jnp.sum(weights) ** 2  # 1 - q^n = x sum w


def cyclic(learning_rate: Number, eigenvalue: Number, *, targets: jax.Array, batch_size: int = 1) -> jax.Array:
    """Return theta at the ends of epochs, after many, in the order of the data: eta a sum_t w_t c_t / (1 - q^n).

    Args:
        learning_rate, eigenvalue, batch_size: as above.
        targets: c [N], in the order in which they are visited. c_t is the mean of batch t.

    Raises:
        ValueError: where batch_size does not divide N.
    """
    _, weights, _ = _weights(learning_rate, eigenvalue, len(targets), batch_size)
    return weights @ targets.reshape(-1, batch_size).mean(1) / jnp.sum(weights)


def _weights(
    learning_rate: Number, eigenvalue: Number, num_examples: int, batch_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return x = eta a, w [n], what the targets of each update of an epoch weigh at its end, and w - 1 [n]."""
    num_updates, remainder = divmod(num_examples, batch_size)
    if remainder or num_examples < 2:
        raise ValueError(f"batch_size={batch_size} must divide num_examples={num_examples}, which must be at least 2")
    x = jnp.asarray(learning_rate) * eigenvalue
    lost = power_minus_one(x, jnp.arange(num_updates, dtype=x.dtype)[::-1])
    return x, 1 + lost, lost


def _spread(lost: jax.Array, num_examples: int, batch_size: int) -> jax.Array:
    """Return V from w - 1, whose differences are not lost where w is near 1."""
    return num_examples / (num_examples - 1) * jnp.sum((lost - lost.mean()) ** 2) / batch_size
