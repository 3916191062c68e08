"""Every example's gradient clipped: private training, and robustness to single examples.

An example contributes the gradient of w l, w its weight, times a factor that leaves it a norm of at most C. How the
contributions are added up, and why the bound holds to 1e-6 in every dtype, is said in `_contributions`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from gdjax._trees import compiled_alone, over
from gdjax.gradients._contributions import by_forming, by_weighting, is_linear
from gdjax.gradients._weights import (
    Estimate,
    Gradient,
    mean_loss,
    over_pieces,
    split,
    weigh,
)
from gdjax.problem import Batch, Loss, Params, Trainable, Weight

FORMED = 2**24
"""Numbers that the gradients of one piece may hold where they are formed: 64 MiB in float32."""


class Clipped(NamedTuple):
    """What clipping saw of the examples of a batch.

    Attributes:
        losses: [B], not weighted; zero for an example of weight 0.
        norms: [B], of the gradients of w l before clipping, over all trained parameters; with `groups`, {group: [B]}.
            In float32, of n parameters, a norm below sqrt(n) 2^-52 may be given as 0 where C is above that.
        weights: [B]; ones where there is no `weight`, and 0 for an example that was dropped.
        num_dropped: int32, examples of a positive weight that were dropped because their norm is not finite.
    """

    losses: jax.Array
    norms: Any
    weights: jax.Array
    num_dropped: jax.Array


def clipped(
    loss: Loss,
    max_norm: ArrayLike | Mapping[str, ArrayLike],
    *,
    weight: Weight | None = None,
    trainable: Trainable = None,
    groups: Callable[[str], str] | None = None,
    factor: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    noise_multiplier: ArrayLike = 0.0,
    noise_key: Callable[[Batch], jax.Array] | None = None,
    expected_batch_size: float | None = None,
    microbatch_size: int | None = None,
    drop_nonfinite: bool = False,
) -> Gradient:
    """Return `(params, batch) -> Estimate` with every example's gradient clipped, `aux` being `Clipped`.

    With u_i the gradient of w_i l_i, the gradient is (1 / L) (sum_i u_i / max(1, |u_i| / C) + N(0, (sigma C)^2 I)), the
    norm taken over all trained parameters (Abadi et al. 2016, arXiv 1607.00133, algorithm 1). It is added up in float32
    at least, noise and all, and rounded towards zero where the parameters are narrower. The loss is not clipped.

    Args:
        loss: (params, example) -> scalar.
        max_norm: C, positive; infinity clips nothing. It may be traced, as for a schedule, a sweep, or a bound that
            `next_max_norm` adapts. With `groups`, each of K groups has C / sqrt(K), so that C bounds them together; or
            {group: C of the group}, and then C = sqrt(sum of squares).
        weight, trainable: as in all estimators; leaves that are not trained do not count in the norm.
        groups: path -> name of the group that a leaf belongs to, the path as `jax.tree_util.keystr` writes it; each
            group has a norm and a factor of its own. `str` makes every leaf its own group (McMahan et al. 2018, arXiv
            1710.06963).
        factor: (norms [B], C) -> factors [B] in place of 1 / max(1, norm / C), for instance C / (norm + 0.01), which
            normalises rather than clips (Bu et al. 2023, arXiv 2206.07136). Where the factor would leave more than C,
            it is C / norm.
        noise_multiplier: sigma; it may be traced.
        noise_key: batch -> PRNG key of this batch's noise; needed where sigma > 0. The batch carries its randomness, so
            that a replayed stream replays the run.
        expected_batch_size: L; default sum w, which is the size of the batch where there is no `weight`. With Poisson
            batches it is N q, and has to be given where there is noise: the size that was drawn is a secret.
        microbatch_size: the most examples in memory at a time, as in `microbatched`: neither the result nor the noise
            depends on it.
        drop_nonfinite: treat an example whose loss or norm is not finite as one of weight 0, and count it.

    Raises:
        ValueError: for max_norm <= 0, a negative noise_multiplier, noise without a key, with infinite max_norm, or with
            `weight` or `drop_nonfinite` and no expected_batch_size; for expected_batch_size <= 0, microbatch_size < 1,
            and a mapping max_norm that does not name the groups.
    """
    _check_clipping(max_norm, groups, expected_batch_size, microbatch_size)
    is_noisy = not _is_zero(noise_multiplier)
    if is_noisy:
        _check_noise(noise_multiplier, noise_key, max_norm)
        if expected_batch_size is None and (weight is not None or drop_nonfinite):
            raise ValueError(
                f"noise_multiplier={noise_multiplier} with weight or drop_nonfinite needs expected_batch_size, a fixed "
                "denominator: the sum of the weights of a batch tells who is in it"
            )

    @compiled_alone
    def gradient(params: Params, batch: Batch) -> Estimate:
        of_train, train = split(loss, params, trainable)
        examples, weights = weigh(weight, batch)
        names = _group_names(train, groups)
        bounds = _bounds(max_norm, names)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), examples)
        size, way = microbatch_size, by_weighting
        if len(bounds) > 1 or not is_linear(of_train, train, one):
            fitting = max(FORMED // sum(jnp.size(leaf) for leaf in jax.tree.leaves(train)), 1)
            size, way = min(fitting, microbatch_size or fitting), by_forming
        clip = partial(way, of_train, train, names, bounds, factor or _one, drop_nonfinite)
        grad, (losses, norms, kept) = over_pieces(clip, examples, weights, size=size)
        denominator = jnp.sum(kept) if expected_batch_size is None else jnp.asarray(expected_batch_size, float)
        if is_noisy and noise_key is not None:
            bound = jnp.sqrt(sum(jnp.asarray(bound, float) ** 2 for bound in bounds.values()))
            sigma = jnp.asarray(noise_multiplier, float)
            deviation = jnp.where(sigma > 0, sigma * bound, 0)  # 0 infinity is no noise
            noise = optax.tree.random_like(noise_key(batch), grad, jax.random.normal)
            grad = jax.tree.map(lambda g, n: g + deviation.astype(g.dtype) * n, grad, noise)
        grad = jax.tree.map(lambda g, leaf: _towards_zero(over(g, denominator), leaf), grad, train)
        losses = jnp.where(kept > 0, losses, 0)
        norms = norms if groups else norms[""]
        num_dropped = jnp.sum((weights > 0) & (kept == 0), dtype=jnp.int32)
        return Estimate(mean_loss(losses, kept), grad, Clipped(losses, norms, kept, num_dropped))

    return gradient


def next_max_norm(
    max_norm: ArrayLike,
    seen: Clipped,
    *,
    quantile: float = 0.5,
    learning_rate: float = 0.2,
    deviation: ArrayLike = 0.0,
    key: jax.Array | None = None,
    expected_batch_size: float | None = None,
) -> jax.Array:
    """Return the bound for the next batch: C exp(-eta (b - gamma)), b being the fraction of examples within C.

    The bound tends to the gamma-quantile of the norms, geometrically from wherever it starts (Andrew et al. 2021, arXiv
    1905.03871, algorithm 1). It is the whole state, for the caller to carry from update to update.

    Args:
        max_norm: C of the batch that was seen.
        seen: `aux` of the estimate of that batch.
        quantile: gamma, the fraction of examples that are not to be clipped.
        learning_rate: eta.
        deviation: sigma_b, in examples, of the Gaussian noise that keeps the fraction private; one example changes the
            noised sum by 1 / 2. With gradients of noise multiplier z and counts of deviation sigma_b together, a batch
            is as private as with (z^-2 + (2 sigma_b)^-2)^(-1/2) alone.
        key: PRNG key of that noise.
        expected_batch_size: L, by which the count is divided; default the examples of positive weight in the batch.

    Raises:
        ValueError: for a quantile outside [0, 1], and for noise without a key or without expected_batch_size.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile={quantile} must be between 0 and 1")
    is_noisy = not _is_zero(deviation)
    if is_noisy and (key is None or expected_batch_size is None):
        raise ValueError(f"deviation={deviation} needs a key, and expected_batch_size, the L of `clipped`")
    max_norm = jnp.asarray(max_norm, float)
    counts = seen.weights > 0
    # 1 / 2 and -1 / 2, so that an example that comes or goes changes the sum by half as much as 0 and 1 would.
    excess = jnp.sum(jnp.where(counts, jnp.where(seen.norms.astype(float) <= max_norm, 0.5, -0.5), 0.0))
    if is_noisy and key is not None:
        excess = excess + jnp.asarray(deviation, float) * jax.random.normal(key, dtype=excess.dtype)
    size = jnp.asarray(counts.sum() if expected_batch_size is None else expected_batch_size, float)
    fraction = jnp.where(size > 0, excess / jnp.maximum(size, 1e-9) + 0.5, quantile)
    return max_norm * jnp.exp(-learning_rate * (fraction - quantile))


def _check_clipping(max_norm, groups, expected_batch_size, microbatch_size) -> None:
    if isinstance(max_norm, Mapping) and groups is None:
        raise ValueError(f"max_norm={max_norm} has a bound for each group: give groups, which names them by path")
    if not all(_allows(bound, lambda x: x > 0) for bound in _each(max_norm)):
        raise ValueError(f"max_norm={max_norm} must be positive")
    if expected_batch_size is not None and not _allows(expected_batch_size, lambda x: x > 0):
        raise ValueError(f"expected_batch_size={expected_batch_size} must be positive")
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size={microbatch_size} must be at least 1")


def _check_noise(noise_multiplier, noise_key, max_norm) -> None:
    if not _allows(noise_multiplier, lambda x: x >= 0):
        raise ValueError(f"noise_multiplier={noise_multiplier} must be at least 0")
    if noise_key is None or not all(_allows(bound, np.isfinite) for bound in _each(max_norm)):
        raise ValueError(f"noise_multiplier={noise_multiplier} needs a noise_key and a finite max_norm={max_norm}")


def _each(max_norm) -> list:
    return list(max_norm.values()) if isinstance(max_norm, Mapping) else [max_norm]


def _allows(number: ArrayLike, condition: Callable) -> bool:
    """Whether a number fulfils a condition, or is known only when the program runs."""
    return isinstance(number, Tracer) or bool(np.all(condition(np.asarray(number))))


def _is_zero(number: ArrayLike) -> bool:
    return not isinstance(number, Tracer) and _allows(number, lambda x: x == 0)


def _one(norm: jax.Array, max_norm: jax.Array) -> jax.Array:
    return jnp.ones_like(norm)  # what would leave more than C becomes C / norm


def _group_names(train: Params, groups: Callable[[str], str] | None) -> list[str]:
    """Return the name of the group of every leaf."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(train)]
    return ["" if groups is None else groups(path) for path in paths]


def _bounds(max_norm, names: list[str]) -> dict[str, Any]:
    """Return {group: C of the group}."""
    groups = list(dict.fromkeys(names))
    if not isinstance(max_norm, Mapping):
        return dict.fromkeys(groups, max_norm / len(groups) ** 0.5)
    if missing := set(groups) ^ set(max_norm):
        raise ValueError(f"max_norm={dict(max_norm)} must name the groups {groups}: {sorted(missing)} is not in both")
    return {group: max_norm[group] for group in groups}


def _towards_zero(x: jax.Array, leaf: jax.Array) -> jax.Array:
    """Cast to the dtype of the leaf; where that rounds, so that no magnitude, and with it no norm, increases."""
    dtype = jnp.result_type(leaf)
    near = x.astype(dtype)
    if dtype == x.dtype:
        return near
    return jnp.where(jnp.abs(near).astype(x.dtype) > jnp.abs(x), jnp.nextafter(near, jnp.zeros_like(near)), near)
