"""Noise scales in the norm that an optimiser measures gradients by: diagonal, sign, spectral.

An update that minimises G'd + |d|^2 / 2 in some norm gains by the dual norm of the gradient, ||G||, and noise counts by
how it enlarges that. In a quadratic norm (Adam with a settled second moment) the noise scale is the usual one in other
coordinates. In the l1 norm (sign descent, Adam without memory) and the nuclear norm (Muon) it is (noise(1) / ||G||)^2
with noise(1) what one example adds, sum_j sigma_j and tr(S^(1/2)). Norm and standard deviation are no polynomials of
the distribution, so nothing unbiased exists; but ||G|| is at most E||g_n|| and at least that less sqrt(f(n)) noise(1).

>>> import jax, jax.numpy as jnp
>>> from gdjax import noise
>>> g = jnp.asarray([[1.0, 2], [-1, 0], [0.5, -1.5], [2, 1], [-0.5, 0.5], [0, -1]])
>>> linear = lambda w, g: w @ g
>>> scale = noise.measure(linear, jnp.zeros(2), g, jax.random.key(0), num_examples=6, geometry="sign")
>>> print(scale)  # all there are, so that the bracket has no width: (1.083 + 1.081)^2 / 0.5^2
noise scale between 18.7 and 18.7 (90 % interval 18.7 to 18.7): ok
>>> print(f"{widest(94.4, 1 / 256):.0f}")  # of a Gaussian whose true scale is 100
612
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer

from gdjax import ghost, gradients, problem
from gdjax._trees import bare, wide
from gdjax.curvature import unit
from gdjax.noise import _intervals as intervals
from gdjax.noise._scale import ULPS, not_finite, variance_factor, verdict
from gdjax.problem import Loss, Params

BRACKETED = ("sign", "spectral")
EPS = 1e-8  # optax's default in adam, adamw, amsgrad and rmsprop


class Bracket(NamedTuple):
    """Between what a noise scale without an unbiased estimator lies; scalars, or with the axes that were mapped over.

    Attributes:
        grad_norm: ||g_n||, of the mean gradient of the sample.
        noise: noise(1), what one example adds.
        b_simple: (noise / grad_norm)^2 in examples, the lower end of the bracket; infinite where `grad_norm` is zero.
        most: its upper end, infinite where the sample cannot tell G from zero.
        low, high: the bracket widened by the jackknife's error of log b_simple; `high` may be infinite.
        confidence: nominal, of that widening.
        num_examples: n, or zero where the sample is all of the data.
        per_leaf: a pytree like the trainable parameters, a Bracket of each leaf alone.
    """

    grad_norm: jax.Array
    noise: jax.Array
    b_simple: jax.Array
    most: jax.Array
    low: jax.Array
    high: jax.Array
    confidence: float
    num_examples: Any = 0
    per_leaf: Any = None

    @property
    def verdict(self) -> Any:
        """'not finite', 'not identified', 'too noisy' or 'ok', as of a `NoiseScale`; an array for arrays."""
        return verdict(self.low, self.high, first=not_finite(self.grad_norm, self.noise))

    def __str__(self) -> str:
        if jnp.ndim(self.low) or isinstance(self.low, Tracer):
            return repr(self)
        interval = f"{100 * self.confidence:g} % interval {self.low:.3g} to {self.high:.3g}"
        return f"noise scale between {self.b_simple:.3g} and {self.most:.3g} ({interval}): {self.verdict}"


def diagonal(opt_state: Any) -> Params:
    """Return P, shaped like the gradient, from the one state of Adam, AMSGrad or RMSProp that `opt_state` holds.

    1/(sqrt(nu) + eps), and 1/sqrt(nu + eps) for RMSProp, as optax has it. The correction of Adam's bias is a common
    factor, which no noise scale feels, and left out; eps is optax's default of 1e-8.

    Raises:
        ValueError: for no such state, for several, and for one that has seen no gradient.
    """
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=_has_moment) if _has_moment(x)]
    if len(states) != 1:
        names = [type(state).__name__ for state in states]
        raise ValueError(
            "geometry must hold one state with second moments, of optax.adam, adamw, amsgrad or rmsprop, "
            f"but has {names}"
        )
    [state] = bare(states)
    count = state.count if "count" in state._fields else None
    if count is not None and not isinstance(count, Tracer) and not jnp.any(count > 0):
        raise ValueError("geometry is the state of an optimiser before its first update: it has no second moments yet")
    if isinstance(state, optax.ScaleByRmsState):
        return jax.tree.map(lambda nu: lax.rsqrt(wide(nu) + EPS), state.nu)
    moments = state.nu_max if isinstance(state, optax.ScaleByAmsgradState) else state.nu
    return jax.tree.map(lambda nu: 1 / (jnp.sqrt(wide(nu)) + EPS), moments)


def in_coordinates(loss: Loss, params: Params, geometry: Any) -> tuple[Loss, Params]:
    """Return loss and parameters in whose coordinates the norm is Euclidean: w + P^(1/2) v at v = 0.

    Those of a norm that has a name are the parameters' own.
    """
    if isinstance(geometry, str):
        if geometry in ("euclidean", *BRACKETED):
            return loss, params
        names = ", ".join(repr(name) for name in ("euclidean", *BRACKETED))
        raise ValueError(f"geometry={geometry!r} must be {names}, an optimiser's state, or P like the parameters")
    train, frozen = problem.trainable(jax.tree.map(jnp.asarray, params))
    states = any(_has_moment(x) for x in jax.tree.leaves(geometry, is_leaf=_has_moment))
    weights = diagonal(geometry) if states else bare(geometry)
    if jax.tree.map(jnp.shape, weights) != jax.tree.map(jnp.shape, bare(train)):
        raise ValueError(
            "geometry must be a state of optax.adam, adamw, amsgrad or rmsprop for these parameters, or have the "
            f"structure and the shapes of the trainable ones, {jax.tree.map(jnp.shape, train)}"
        )
    weights = jax.tree.unflatten(jax.tree.structure(train), jax.tree.leaves(weights))
    roots = jax.tree.map(lambda p, leaf: jnp.sqrt(jnp.asarray(p, wide(leaf).dtype)), weights, train)

    def moved(shift: Params, example):
        shift, _ = problem.trainable(shift)
        there = jax.tree.map(lambda w, root, v: w + (root * v).astype(w.dtype), train, roots, shift)
        return loss(problem.merge(there, frozen), example)

    return moved, problem.merge(jax.tree.map(lambda leaf: jnp.zeros_like(wide(leaf)), train), frozen)


def bracket(
    loss: Loss,
    params: Params,
    groups: Any,
    *,
    num_examples: int,
    drawn_from: int | None,
    norm: str,
    confidence: float,
    loss_unit: jax.Array,
) -> Bracket:
    """Return the Bracket of `_sample.Groups` of `num_examples`, in one of BRACKETED; N as in `noise.unbiased`.

    Its `grad_norm` and `noise` come out times `loss_unit`.
    """
    params = jax.tree.map(jnp.asarray, params)
    train, _ = problem.trainable(params)
    rank = max(
        min(leaf.size // leaf.shape[-1], leaf.shape[-1]) if leaf.ndim > 1 and leaf.size else 1
        for leaf in jax.tree.leaves(train)
    )
    if norm == "spectral" and num_examples <= rank:
        raise ValueError(
            f"num_examples={num_examples} must be above {rank}, the smaller side of the largest matrix: the root of a "
            "covariance from fewer is too small"
        )
    sizes = groups.sizes
    moments, norms_of = {"sign": (_squares, _l1), "spectral": (_products, _nuclear)}[norm]

    def sums(group):
        batch, present = groups.examples(group)
        return moments(loss, params, batch, present)

    def add(total, group):
        return jax.tree.map(jnp.add, total, sums(group)), None

    inputs = groups.inputs
    shapes = jax.eval_shape(sums, jax.tree.map(lambda x: x[0], inputs))
    total, _ = lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), inputs)

    def norms(total, size):
        """Return ||mean|| and noise(1), [2, L + 1]."""
        share = 1 - variance_factor(size, drawn_from)
        means = jax.tree.map(lambda x: x / size.astype(x.dtype), total)
        found = jnp.stack([norms_of(mean, moment, share) for mean, moment in zip(*means, strict=True)], axis=1)
        return jnp.append(found, found.sum(1, keepdims=True), axis=1)

    def without(group):
        return _logarithm(norms(jax.tree.map(jnp.subtract, total, sums(group)), sizes.sum() - group[1].sum()))

    whole = norms(total, sizes.sum())
    log = _logarithm(whole)
    deviations = intervals.delete_a_group(log, lax.map(without, inputs), sizes)
    # Without noise no part of the sample has any.
    error = jnp.where(jnp.isneginf(log), 0, jnp.sqrt(jnp.sum(deviations**2, 0)))
    f = variance_factor(num_examples, drawn_from)
    if drawn_from is not None:
        error = error * jnp.sqrt(1 - num_examples / drawn_from) if num_examples < drawn_from else jnp.zeros_like(error)
    margin = jnp.exp(intervals.student(len(sizes) - 1, confidence=confidence) * error)
    least = jnp.exp(log)
    low = jnp.where(jnp.isfinite(margin), least / margin, 0)
    ends = widest(least, f), low, widest(least * margin, f)
    drawn = 0 if num_examples == drawn_from else num_examples
    brackets = [
        Bracket(*(x[i] for x in (*(whole * loss_unit), least, *ends)), confidence=confidence, num_examples=drawn)
        for i in range(whole.shape[1])
    ]
    return brackets[-1]._replace(per_leaf=jax.tree.unflatten(jax.tree.structure(train), brackets[:-1]))


def widest(least, f):
    """Return the upper end B / (1 - sqrt(B f))^2 of the bracket above B = `least`, infinite for B f >= 1; f = f(n)."""
    far = jnp.sqrt(least * f)
    return jnp.where(far < 1, least / jnp.where(far < 1, 1 - far, 1) ** 2, jnp.inf)


def _logarithm(norms):
    norm, noise = norms
    return jnp.where(norm > 0, 2 * (jnp.log(noise) - jnp.log(jnp.where(norm > 0, norm, 1))), jnp.inf)


def _squares(loss, params, batch, present):
    """Return the sums over the examples that count of g and of its elementwise square, lists of leaves."""

    def counted(params, both):
        value = loss(params, both[0])
        return value * both[1].astype(value.dtype)

    _, grad, squares = ghost.second_moments(counted)(params, (batch, present))
    return tuple([len(present) * wide(leaf) for leaf in jax.tree.leaves(tree)] for tree in (grad, squares))


def _l1(mean, square, share):
    variance = _beyond_rounding(square - mean**2, square) / jnp.asarray(share, mean.dtype)
    return jnp.stack([jnp.abs(mean).sum(), jnp.sqrt(variance).sum()]).astype(float)


def _products(loss, params, batch, present):
    """Return the sums over the examples that count of g and of gg', matrices with the smaller side first."""
    gathered = [], []
    for leaf in jax.tree.leaves(gradients.per_example(loss)(params, batch).aux.grads):
        rows = wide(leaf).reshape(len(leaf), -1, leaf.shape[-1] if leaf.ndim > 2 and leaf.size else 1)
        rows = rows if rows.shape[1] <= rows.shape[2] else rows.mT
        rows = rows * present.astype(rows.dtype)[:, None, None]
        gathered[0].append(rows.sum(0))
        gathered[1].append(jnp.einsum("brc,bsc->rs", rows, rows))
    return gathered


def _nuclear(mean, square, share):
    if not mean.size:
        return jnp.zeros(2)
    size = unit(jnp.abs(square).reshape(-1))
    eigenvalues = _beyond_rounding(jnp.linalg.eigvalsh((square - mean @ mean.T) / size), 1.0)
    of_noise = jnp.sqrt(eigenvalues / jnp.asarray(share, mean.dtype)).sum() * jnp.sqrt(size)
    return jnp.stack([jnp.linalg.norm(mean, "nuc"), of_noise]).astype(float)


def _beyond_rounding(difference, minuend):
    """Return the difference, zero where it may be what rounding has left of the minuend."""
    return jnp.where(difference <= ULPS * jnp.finfo(difference.dtype).eps * minuend, 0, difference)


def _has_moment(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "nu")
