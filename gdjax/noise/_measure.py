"""Gradient noise scales, with an interval and a verdict: how many examples it takes to see the gradient.

With g the gradient of one example, G = E g and S = Cov(g), a batch of B examples estimates G with variance tr(S)/B.
McCandlish et al. 2018 (arXiv 1812.06162) call B_simple = tr(S)/|G|^2 the batch size at which noise and signal are
equal, and B_noise = tr(HS)/(G'HG) the one that matters to a step on a loss with Hessian H.

Everything here rests on one identity: the mean gradient of B examples has E|G_B|^2 = |G|^2 + f(B) tr(S), f(B) = 1/B, or
(N - B)/(B (N - 1)) for B distinct examples out of N. Two batch sizes make two equations for the two unknowns, and the
pair (1, n), which the norms of single examples provide, has the least variance.

>>> import jax, jax.numpy as jnp
>>> loss = lambda mean, x: 0.5 * (mean - x) ** 2
>>> data = jax.random.normal(jax.random.key(0), (1000,))
>>> scale = measure(loss, jnp.asarray(0.5), data, jax.random.key(1), num_examples=500)
>>> print(scale)
B_simple = 3.63 (90 % interval 2.89 to 4.83): ok
>>> print(measure(loss, jnp.asarray(0.5), data, jax.random.key(1), num_examples=1000))  # all there are: no doubt left
B_simple = 3.83 (90 % interval 3.83 to 3.83): ok
>>> print(measure(loss, jnp.asarray(0.02), data, jax.random.key(1), num_examples=100))
B_simple = inf (90 % interval 66.6 to inf): not identified
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from gdjax import batching, curvature, ghost, gradients, problem, theory
from gdjax._trees import wide
from gdjax.noise import _intervals as intervals
from gdjax.problem import Batch, Loss, Params

TOO_WIDE = 4.0
"""An interval whose ends differ by more than this factor, two doublings of the batch size, is 'too noisy'."""
NUM_GROUPS = 16  # of a small sample, at least; Student's t for 15 degrees of freedom is 7 % wider than the normal's


class NoiseScale(NamedTuple):
    """A measured noise scale; all fields are scalars, or carry the axes that the measurement was mapped over.

    Attributes:
        grad_sq_norm: |G|^2, unbiased; it can come out negative where it is small against its error.
        trace_cov: tr(S), unbiased.
        b_simple: their ratio, in examples; infinite where `grad_sq_norm` is not positive.
        low, high: ends of its confidence interval (Fieller 1954), in examples; `high` is infinite where the interval
            of `grad_sq_norm` reaches zero.
        confidence: the nominal confidence of the interval.
        per_leaf: a pytree like the trainable parameters, a NoiseScale of each leaf alone.
    """

    grad_sq_norm: jax.Array
    trace_cov: jax.Array
    b_simple: jax.Array
    low: jax.Array
    high: jax.Array
    confidence: float
    per_leaf: Any = None

    @property
    def verdict(self) -> Any:
        """'ok', 'too noisy' (`high` > 4 `low`) or 'not identified' (`high` is infinite); an array for arrays."""
        return _verdict(self.low, self.high)

    def __str__(self) -> str:
        return _sentence("B_simple", self.b_simple, self)


class HessianNoiseScale(NamedTuple):
    """B_noise and what it is made of; fields as those of `NoiseScale`, with curvature G'HG and trace tr(HS)."""

    grad_curvature: jax.Array
    trace_hess_cov: jax.Array
    b_noise: jax.Array
    low: jax.Array
    high: jax.Array
    confidence: float

    @property
    def verdict(self) -> Any:
        """As `NoiseScale.verdict`; also 'not identified' where the curvature along the gradient is not positive."""
        return _verdict(self.low, self.high)

    def __str__(self) -> str:
        return _sentence("B_noise", self.b_noise, self)


def unbiased(small, large, *, batch_sizes: tuple[Any, Any], num_examples: int | None = None):
    """Return unbiased (|G|^2, tr(S)) from squared norms of mean gradients at two batch sizes.

    With x_b = |G_b|^2 and f as above: tr(S) = (x_b - x_B)/(f(b) - f(B)), |G|^2 = (f(b) x_B - f(B) x_b)/(f(b) - f(B)).
    (McCandlish et al. 2018, appendix A.1; there for independent examples.)

    Args:
        small, large: x_b and x_B, mean squared norms of the mean gradient of b and of B examples.
        batch_sizes: (b, B), b < B.
        num_examples: N, where the examples of a batch are distinct, drawn without replacement out of N. None: with
            replacement, or fresh from a distribution.

    Raises:
        ValueError: for sizes that are numbers and not 1 <= b < B <= N.
    """
    if not any(isinstance(x, jax.Array) for x in batch_sizes) and not (
        1 <= batch_sizes[0] < batch_sizes[1] <= (num_examples or batch_sizes[1])
    ):
        limit = "" if num_examples is None else f" and at most num_examples={num_examples}"
        raise ValueError(f"batch_sizes={batch_sizes} must be (b, B) with b < B, at least 1{limit}")
    f, g = (
        (1.0 if num_examples is None else theory.finite_population(size, num_examples)) / size for size in batch_sizes
    )
    return (f * large - g * small) / (f - g), (small - large) / (f - g)


def measure(
    loss: Loss,
    params: Params,
    data: Batch,
    key: jax.Array,
    *,
    num_examples: int,
    replace: bool = False,
    microbatch_size: int | None = None,
    preconditioner: Params | None = None,
    confidence: float = 0.9,
) -> NoiseScale:
    """Measure B_simple of the data set `data` at `params` from a sample of its examples.

    Two passes over the sample, of a gradient each, in memory that does not grow with it. The interval comes from a
    jackknife over groups of examples (Busing et al. 1999, for groups of unequal size), times the finite-population
    factor, and Fieller's theorem for the ratio. Its nominal 90 % held the true value in 87 to 93 % of 400 draws on
    least squares.

    Args:
        loss, params: the loss of one example, and where to measure.
        data: the population, N examples, every leaf [N, ...].
        key: draws the sample.
        num_examples: n, examples in the sample. All N of them, without replacement, give the exact value.
        replace: draw with replacement.
        microbatch_size: examples held in memory at a time, and the jackknife's groups; default min(64, n / 16).
        preconditioner: positive weights P shaped like the trainable parameters, for updates along P g: norms become
            g'Pg, and the scale tr(PS)/(G'PG). For Adam, P = 1 / (sqrt(nu) + eps).
        confidence: of the interval, two-sided.

    Raises:
        ValueError: for n < 2 or N < 2, and for n > N without replacement.
    """
    population = problem.num_examples(data)
    _check_confidence(confidence)
    if num_examples < 2 or population < 2:
        raise ValueError(f"num_examples={num_examples} of {population} must be at least 2: one shows no variance")
    if num_examples > population and not replace:
        raise ValueError(f"num_examples={num_examples} exceeds the {population} of the data: use replace=True or fewer")
    if microbatch_size is None:
        microbatch_size = min(64, max(1, num_examples // NUM_GROUPS))
    if not 1 <= microbatch_size <= num_examples // 2:
        raise ValueError(
            f"microbatch_size={microbatch_size} must be between 1 and {num_examples // 2}, half the sample"
        )
    draw = batching.with_replacement if replace else batching.reshuffled
    indices, weights = _groups(draw(key, population, length=num_examples), microbatch_size)
    sums = _group_sums(loss, params, data, indices, weights, preconditioner)
    (signal, noise), cov = _estimates(sums, weights.sum(1), None if replace else population)
    if not replace:
        cov = cov * (1 - num_examples / population)

    quantile = intervals.student(len(weights) - 1, confidence=confidence)
    ratio, low, high = intervals.fieller(noise, signal, cov, quantile=quantile)
    scales = [
        NoiseScale(signal[i], noise[i], ratio[i], low[i], high[i], confidence=confidence) for i in range(len(ratio))
    ]
    structure = jax.tree.structure(problem.trainable(params)[0])
    return scales[-1]._replace(per_leaf=jax.tree.unflatten(structure, scales[:-1]))


def measure_hessian(
    loss: Loss,
    params: Params,
    data: Batch,
    key: jax.Array,
    *,
    batch_size: int,
    num_pairs: int,
    confidence: float = 0.9,
) -> HessianNoiseScale:
    """Measure B_noise = tr(HS)/(G'HG) from pairs of mini-batches, at one Hessian-vector product a mini-batch.

    For independent mini-batch gradients a, b and the Hessian H of a third batch, (a - b)'H(a - b) B/2 has the mean
    tr(HS), and a'Hb has the mean G'HG. All batches are drawn with replacement, so that both hold exactly.

    Args:
        loss, params, data, key: as in `measure`.
        batch_size: B, examples in each of the three batches of a pair.
        num_pairs: pairs; the interval comes from the spread between them.
        confidence: of the interval, two-sided.
    """
    _check_confidence(confidence)
    if batch_size < 1 or num_pairs < 2:
        raise ValueError(f"batch_size={batch_size} must be at least 1 and num_pairs={num_pairs} at least 2")
    gradient, product = gradients.mean(loss), curvature.hvp(loss)
    stream = batching.with_replacement(key, problem.num_examples(data), length=num_pairs * 3 * batch_size)

    def pair(indices):
        a, b = (gradient(params, batching.take(data, batch)).grad for batch in indices[:2])
        batch = batching.take(data, indices[2])
        image_a, image_b = product(params, batch, a), product(params, batch, b)
        difference = jax.tree.map(jnp.subtract, a, b), jax.tree.map(jnp.subtract, image_a, image_b)
        return curvature.inner(a, image_b), curvature.inner(*difference) * batch_size / 2

    values = jnp.stack(lax.map(pair, stream.reshape(num_pairs, 3, batch_size)))  # [2, pairs]
    signal, noise = values.mean(1)
    cov = jnp.cov(values) / num_pairs
    quantile = intervals.student(num_pairs - 1, confidence=confidence)
    return HessianNoiseScale(signal, noise, *intervals.fieller(noise, signal, cov, quantile=quantile), confidence)


def _groups(indices: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Cut indices [n] into groups [K, size]; the last one is filled up by examples of weight [K, size] zero."""
    num_groups = -(-len(indices) // size)
    filling = num_groups * size - len(indices)
    weights = jnp.ones(len(indices))
    indices = jnp.concatenate([indices, jnp.broadcast_to(indices[:1], (filling,))])
    return indices.reshape(num_groups, size), jnp.pad(weights, (0, filling)).reshape(num_groups, size)


def _group_sums(loss: Loss, params: Params, data: Batch, indices, weights, preconditioner: Params | None):
    """Return, for each group and leaf [K, L], what the jackknife needs without holding the gradients of the groups.

    These are the sums of g'g over the group's examples, and with s the sum of the group's gradients and t the sum of
    all, s't and s's.
    """
    train, _ = problem.trainable(jax.tree.map(jnp.asarray, params))
    size = indices.shape[1]

    def weighted(params, example):
        example, weight = example
        value = loss(params, example)
        return value * weight.astype(value.dtype)

    if preconditioner is None:
        scales = [1.0] * len(jax.tree.leaves(train))
        measured, of_squares = ghost.sq_norms(weighted), lambda norms, scale: norms.sum()
    else:
        if jax.tree.map(jnp.shape, preconditioner) != jax.tree.map(jnp.shape, train):
            raise ValueError("preconditioner must have the structure and the shapes of the trainable parameters")
        scales = jax.tree.leaves(jax.tree.map(lambda p, leaf: jnp.asarray(p, wide(leaf).dtype), preconditioner, train))
        measured, of_squares = ghost.second_moments(weighted), lambda means, scale: size * (scale * means).sum()

    def inner(x, y):
        return _stack(jnp.sum(scale * a * b) for a, b, scale in zip(x, y, scales, strict=True))

    def total(grad):  # over the group, in float32 at least
        return [size * wide(leaf) for leaf in jax.tree.leaves(grad)]

    def first_pass(grad_sum, group):
        _, grad, squares = measured(params, (batching.take(data, group[0]), group[1]))
        squares = _stack(of_squares(*pair) for pair in zip(jax.tree.leaves(squares), scales, strict=True))
        return [a + b for a, b in zip(grad_sum, total(grad), strict=True)], squares

    def second_pass(group):
        grad = total(gradients.mean(weighted)(params, (batching.take(data, group[0]), group[1])).grad)
        return inner(grad, grad_sum), inner(grad, grad)

    zeros = [jnp.zeros_like(wide(leaf)) for leaf in jax.tree.leaves(train)]
    grad_sum, squares = lax.scan(first_pass, zeros, (indices, weights))
    return squares, *lax.map(second_pass, (indices, weights))


def _estimates(sums, sizes, num_examples: int | None):
    """Return (|G|^2, tr(S)) [2, L + 1], of every leaf and of all together, and their covariances [2, 2, L + 1].

    Without a group, |t - s|^2 = |t|^2 - 2 s't + |s|^2.
    """
    squares, products, sq_norms = (jnp.c_[x, x.sum(1)] for x in sums)

    def estimate(square, sq_norm, size):
        return jnp.stack(unbiased(square / size, sq_norm / size**2, batch_sizes=(1, size), num_examples=num_examples))

    square, sq_norm, size = squares.sum(0), products.sum(0), sizes.sum()

    def without(group_square, group_product, group_sq_norm, group_size):
        return estimate(square - group_square, sq_norm - 2 * group_product + group_sq_norm, size - group_size)

    whole = estimate(square, sq_norm, size)
    left_out = jax.vmap(without)(squares, products, sq_norms, sizes)
    return whole, intervals.delete_a_group(whole, left_out, sizes)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1, for instance 0.9")


def _stack(scalars) -> jax.Array:
    return jnp.stack([jnp.asarray(x, float) for x in scalars])  # leaves may differ in their dtypes


def _verdict(low, high) -> Any:
    return np.select([~np.isfinite(high), np.asarray(high > TOO_WIDE * low)], ["not identified", "too noisy"], "ok")[()]


def _sentence(name: str, value, scale) -> str:
    if jnp.ndim(value) or isinstance(value, Tracer):
        return repr(scale)
    percent = f"{100 * scale.confidence:g} %"
    return f"{name} = {value:.3g} ({percent} interval {scale.low:.3g} to {scale.high:.3g}): {scale.verdict}"
