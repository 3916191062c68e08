"""Noise of examples made of parts: does a batch need longer sequences, or more of them?

In a document of J sequences of K tokens a token has the gradient g_dst = G + a_d + b_ds + c_dst, in independent
deviations with the variances (traces of the covariances) s_d, s_s and s_t. Of n documents E|G_n|^2 = |G|^2 +
s_d/n + s_s/(nJ) + s_t/(nJK). The mean squared norms of the gradients of tokens, sequences, documents and the batch are
four equations for the four unknowns: the nested analysis of variance, whose estimates are unbiased (Searle, Casella &
McCulloch 1992, Variance Components).

>>> import jax, jax.numpy as jnp
>>> keys = jax.random.split(jax.random.key(0), 2)
>>> documents = 1 + jax.random.normal(keys[0], (2000, 1)) + 3 * jax.random.normal(keys[1], (2000, 16))  # s 1 and 9
>>> losses = lambda w, tokens: w * tokens  # a token's gradient is what it is
>>> print(components(losses, jnp.asarray(0.0), documents, jax.random.key(1), num_examples=500))
level 0 (examples): 0.987 +- 0.0988
level 1 (16 in each): 8.89 +- 0.143
9 of level 1 (90 % interval 7.6 to 11) are as noisy as what they are in
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from gdjax import batching, ghost, problem
from gdjax.curvature import unit
from gdjax.noise import _intervals as intervals
from gdjax.noise._measure import NUM_GROUPS, group_sums
from gdjax.noise._sample import Groups, split
from gdjax.noise._scale import check_confidence
from gdjax.problem import Batch, Example, Params


class Components(NamedTuple):
    """Variances of nested levels, the whole example first; L levels.

    Attributes:
        grad_sq_norm: |G|^2, unbiased.
        variances: [L], what each level adds to the variance of the gradient of one innermost part, unbiased: they can
            come out negative where they are small.
        errors: [L], their standard errors.
        enough: [L - 1], variances[l + 1] over the sum of the variances up to l: so many parts of level l + 1 add as
            much noise, averaged, as what they are in; more of them help little, more of what they are in does.
        low, high: [L - 1], ends of its confidence interval; `high` is infinite where the outer variance may be zero.
        confidence: of the interval.
        sizes: [L - 1], parts of each level in one of the level before.
    """

    grad_sq_norm: jax.Array
    variances: jax.Array
    errors: jax.Array
    enough: jax.Array
    low: jax.Array
    high: jax.Array
    confidence: float
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        if jnp.ndim(self.grad_sq_norm) or isinstance(self.grad_sq_norm, Tracer):
            return repr(self)
        names = ["examples", *(f"{size} in each" for size in self.sizes)]
        rows = zip(names, self.variances, self.errors, strict=True)
        lines = [f"level {i} ({name}): {value:.3g} +- {error:.3g}" for i, (name, value, error) in enumerate(rows)]
        percent = f"{100 * self.confidence:g} %"
        for i, (value, low, high) in enumerate(zip(self.enough, self.low, self.high, strict=True)):
            lines.append(
                f"{value:.3g} of level {i + 1} ({percent} interval {low:.3g} to {high:.3g}) are as noisy as what they "
                "are in"
            )
        return "\n".join(lines)


def components(
    losses: Callable[[Params, Example], jax.Array],
    params: Params,
    data: Batch,
    key: jax.Array,
    *,
    num_examples: int,
    microbatch_size: int = 64,
    confidence: float = 0.9,
) -> Components:
    """Measure how the variance of the gradient divides over the levels of nested examples.

    Examples and parts are taken as drawn from endless ones: of a longer document, more would have come. The interval
    comes from a jackknife over groups of examples. Every part costs an evaluation of its whole example, so that n J K
    of them are made; `losses` may leave most tokens out.

    Args:
        losses: (params, example) -> the losses of its parts, [J], [J, K], ...; the loss of an example is their mean.
        params, data, key: as in `noise.measure`; the examples are the documents.
        num_examples: n, documents drawn, without replacement.
        microbatch_size: examples, or parts of one example, that are evaluated at a time.
        confidence: of the intervals, two-sided.

    Raises:
        ValueError: for losses without an axis or with an axis of one, for fewer than two examples, and for more than
            there are.
    """
    population = problem.num_examples(data)
    check_confidence(confidence)
    if not 2 <= num_examples <= population:
        raise ValueError(f"num_examples={num_examples} must be at least 2, and at most the {population} of the data")
    if microbatch_size < 1:
        raise ValueError(f"microbatch_size={microbatch_size} must be at least 1")
    params = jax.tree.map(jnp.asarray, params)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), data)
    sizes = jax.eval_shape(losses, params, example).shape
    if not sizes or min(sizes) < 2:
        raise ValueError(f"losses must return [J, ...], two parts or more at every level, but returns {list(sizes)}")

    size = min(microbatch_size, max(1, num_examples // NUM_GROUPS))
    indices, present = split(batching.reshuffled(key, population, length=num_examples), size)
    groups = Groups(data, indices, present)
    sums = group_sums(lambda params, example: losses(params, example).mean(), params, groups)
    of_parts = lax.map(partial(_norms_of_parts, losses, params, data, sizes, microbatch_size), indices.reshape(-1))
    of_parts = of_parts.reshape(*indices.shape, len(sizes)) * present[:, :, None]
    # Mean squared norms of the gradients of examples and of the parts of every level, and of the batch.
    norms = jnp.concatenate([sums.norms[:, :, -1:], of_parts], 2).sum(1) / num_examples  # [K, L]
    st, ss = sums.st[:, -1], sums.ss[:, -1]

    def estimate(norms, of_mean, share):
        """Return (|G|^2, variances), [1 + L]; sums over a share of the n examples, divided by n and n^2."""
        norms, of_mean = norms / share, of_mean / share**2
        count = share * num_examples
        # The variance of the means of a level's parts within what they are in, from the norms of both.
        outer = jnp.append(of_mean, norms[:-1])
        within = (norms - outer) / (1 - 1 / jnp.append(count, jnp.asarray(sizes, float)))
        averaged = jnp.append(within[1:] / jnp.asarray(sizes, float), 0)
        return jnp.append(norms[0] - within[0], within - averaged)

    whole = estimate(norms.sum(0), st.sum(), jnp.ones(()))
    shares = 1 - groups.sizes / num_examples
    without = jax.vmap(lambda norm, st_, ss_, share: estimate(norms.sum(0) - norm, st.sum() - 2 * st_ + ss_, share))
    deviations = intervals.delete_a_group(whole, without(norms, st, ss, shares), groups.sizes)
    quantile = intervals.student(len(indices) - 1, confidence=confidence)
    outer, of_outer = jnp.cumsum(whole[1:-1]), jnp.cumsum(deviations[:, 1:-1], 1)
    pairs = jnp.stack([of_outer, deviations[:, 2:]], 1)
    interval = intervals.ratio_interval(whole[2:], outer, pairs, quantile=quantile)
    size = unit(whole)
    errors = jnp.sqrt(jnp.sum((deviations / size) ** 2, 0)) * size
    return Components(whole[0], whole[1:], errors[1:], *interval, confidence, sizes)


def _norms_of_parts(losses, params: Params, data: Batch, sizes, microbatch_size: int, index) -> jax.Array:
    """Return the mean squared norms of the gradients of the parts of one example, level by level, [L - 1]."""
    example = batching.take(data, index)

    def loss(params, both):
        example, share = both
        values = losses(params, example)
        return jnp.sum(values * share.astype(values.dtype))

    def of_level(level: int) -> jax.Array:
        count, inner = math.prod(sizes[: level + 1]), math.prod(sizes[level + 1 :])
        shares = jnp.repeat(jnp.eye(count) / inner, inner, axis=1).reshape(count, *sizes)
        chunk = max(size for size in range(1, microbatch_size + 1) if count % size == 0)
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (chunk, *x.shape)), example)

        def norms(shares):
            squares = ghost.sq_norms(loss)(params, (copies, shares))[2]
            return sum(jnp.asarray(leaf, float) for leaf in jax.tree.leaves(squares))

        return lax.map(norms, shares.reshape(-1, chunk, *sizes)).mean()

    return jnp.stack([of_level(level) for level in range(len(sizes))])
