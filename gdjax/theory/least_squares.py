"""Linear least squares, where the noise shrinks with the error: what SGD does on average, exactly.

The loss of an example is (x.w - y)^2 / 2, and delta = w - w*. Constant-rate SGD on independent batches moves the second
moments of delta by a linear map, which is known

- for features x ~ N(0, H) and labels x.w* + noise: `gaussian_step`, stable up to `max_learning_rate`;
- for any finite data set and any labels, batches drawn with or without replacement: `finite_step`;
- within bounds, where the data can be fitted exactly (interpolation): `interpolation_contraction`.

>>> import jax.numpy as jnp
>>> eigenvalues = jnp.geomspace(1.0, 0.01, 20)
>>> for batch_size in (1, 10, 100, 10000):  # the largest stable rate: proportional to B, then 2 / lambda_max
...     largest = max_learning_rate(eigenvalues, batch_size=batch_size)
...     risk = stationary_risk(0.1, eigenvalues, batch_size=batch_size, label_noise=1.0)
...     print(f"{batch_size:5} {largest:.3f} {risk:.5f}")
    1 0.343 0.16185
   10 1.536 0.01219
  100 1.959 0.00119
10000 2.000 0.00001
"""

import jax
import jax.numpy as jnp
from jax import lax

from gdjax.theory._laws import Number, finite_population


def gaussian_step(
    second_moment: jax.Array,
    hessian: jax.Array,
    *,
    learning_rate: Number,
    batch_size: Number,
    label_noise: Number,
) -> jax.Array:
    """Return C = E delta delta' after one more update on B fresh examples with x ~ N(0, H).

    C' = C - eta (HC + CH) + eta^2 [(1 + 1/B) HCH + (tr(HC) + sigma^2) H / B], from E xx'Cxx' = 2HCH + tr(HC) H. The
    excess risk is tr(HC) / 2.

    Args:
        second_moment: C [D, D].
        hessian: H [D, D], the covariance of the features.
        learning_rate: eta.
        batch_size: B.
        label_noise: sigma^2, the variance of the labels' noise.
    """
    drift = hessian @ second_moment
    both = drift @ hessian
    kick = (1 + 1 / batch_size) * both + (jnp.trace(drift) + label_noise) / batch_size * hessian
    return second_moment - learning_rate * (drift + drift.T) + learning_rate**2 * kick


def isotropic_factor(learning_rate: Number, dimension: int, *, batch_size: Number) -> jax.Array:
    """Return the factor of E|delta|^2 in an update for H = I: 1 - 2 eta + eta^2 (1 + (D + 1) / B).

    `gaussian_step` then adds eta^2 sigma^2 D / B. It is 1 at `max_learning_rate`, 2B / (B + D + 1).
    """
    return 1 - 2 * jnp.asarray(learning_rate) + learning_rate**2 * (1 + (dimension + 1) / batch_size)


def kappa(learning_rate: Number, eigenvalues: jax.Array, *, batch_size: Number, momentum: Number = 0.0) -> jax.Array:
    """Return kappa = (eta / B) sum_i l_i / (2 (1 - beta) - eta l_i ((1 - beta) / (1 + beta) + 1/B)), l = eigenvalues.

    `gaussian_step`, and `momentum.gaussian_step` for heavy-ball momentum beta, are stable if and only if kappa < 1: the
    part of the excess risk that its own noise makes anew. Infinity where a denominator is <= 0.
    """
    gaps = 2 * (1 - momentum) - learning_rate * eigenvalues * ((1 - momentum) / (1 + momentum) + 1 / batch_size)
    total = learning_rate / batch_size * jnp.sum(eigenvalues / gaps)
    return jnp.where(jnp.all(gaps > 0), total, jnp.inf)


def max_learning_rate(eigenvalues: jax.Array, *, batch_size: Number, momentum: Number = 0.0) -> jax.Array:
    """Return the rate below which `gaussian_step` is stable, that of kappa = 1, by bisection.

    It has two plateaus: eta tr H / B = 2 (1 - beta) for small batches of many features, which momentum lowers, and
    eta lambda_max = 2 (1 + beta) for large batches, which momentum raises.
    """
    highest = 2 * (1 - momentum) / (jnp.max(eigenvalues) * ((1 - momentum) / (1 + momentum) + 1 / batch_size))

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        stable = kappa(middle, eigenvalues, batch_size=batch_size, momentum=momentum) < 1
        return jnp.where(stable, middle, low), jnp.where(stable, high, middle)

    low, high = lax.fori_loop(0, 80, halve, (jnp.zeros_like(highest), highest))
    return (low + high) / 2


def stationary_risk(
    learning_rate: Number,
    eigenvalues: jax.Array,
    *,
    batch_size: Number,
    label_noise: Number,
    momentum: Number = 0.0,
) -> jax.Array:
    """Return the excess risk after many updates, sigma^2 kappa / (2 (1 - kappa)); infinity where it is not stable."""
    k = kappa(learning_rate, eigenvalues, batch_size=batch_size, momentum=momentum)
    return jnp.where(k < 1, label_noise * k / (2 * (1 - k)), jnp.inf)


def gradient_covariance(delta: jax.Array, hessian: jax.Array, *, label_noise: Number) -> jax.Array:
    """Return Sigma = H delta delta' H + (delta'H delta + sigma^2) H, the covariance of one example's gradient.

    Features x ~ N(0, H); the mean gradient is H delta. Arguments as `gaussian_step`, and delta [D] = w - w*.
    """
    grad = hessian @ delta
    return grad[:, None] * grad[None] + (delta @ grad + label_noise) * hessian


def b_simple(delta: jax.Array, hessian: jax.Array, *, label_noise: Number) -> jax.Array:
    """Return tr(Sigma) / |G|^2 = 1 + (delta'H delta + sigma^2) tr(H) / delta'H^2 delta, in examples.

    Arguments as `gradient_covariance`; the noise scale of McCandlish et al. 2018 (arXiv 1812.06162), equation 2.9.
    """
    grad = hessian @ delta
    return 1 + (delta @ grad + label_noise) * jnp.trace(hessian) / (grad @ grad)


def b_noise(delta: jax.Array, hessian: jax.Array, *, label_noise: Number) -> jax.Array:
    """Return tr(H Sigma) / G'HG = 1 + (delta'H delta + sigma^2) tr(H^2) / delta'H^3 delta, in examples.

    Arguments as `gradient_covariance`; the noise scale of McCandlish et al. 2018, equation 2.8.
    """
    grad = hessian @ delta
    return 1 + (delta @ grad + label_noise) * jnp.sum(hessian * hessian) / (grad @ hessian @ grad)


def finite_step(
    second_moment: jax.Array,
    data: tuple[jax.Array, jax.Array],
    *,
    learning_rate: Number,
    batch_size: int,
    replace: bool,
) -> jax.Array:
    """Return Z = E z z', z = [delta; 1], after one more update on a fresh batch of a finite data set.

    With A_i z = [gradient of example i; 0], A = mean A_i and M = mean A_i Z A_i',

        Z' = Z - eta (A Z + Z A') + eta^2 [M / B + (1 - 1/B) X],

    X = A Z A' for draws with replacement and (N A Z A' - M) / (N - 1) for a batch of distinct examples. Batches are
    independent of one another: with `replace=False` this is not the stream that visits every example once an epoch.

    Args:
        second_moment: Z [D + 1, D + 1]. It must be symmetric: the map does not damp an antisymmetric part, so that a
            long recursion should symmetrise what rounding leaves.
        data: (x [N, D], r [N]), features and residuals r_i = y_i - x_i.w* at the w* that delta is measured from.
        learning_rate: eta.
        batch_size: B.
        replace: whether the examples of a batch are drawn independently.

    Raises:
        ValueError: where a batch has more distinct examples than there are.
    """
    mean_map, noise = finite_gradient(second_moment, data, batch_size=batch_size, replace=replace)
    drift = mean_map @ second_moment
    return second_moment - learning_rate * (drift + drift.T) + learning_rate**2 * noise


def finite_gradient(
    second_moment: jax.Array, data: tuple[jax.Array, jax.Array], *, batch_size: int, replace: bool
) -> tuple[jax.Array, jax.Array]:
    """Return A and E g g' [D + 1, D + 1] of a batch's gradient g, E g = A E z. Arguments as `finite_step`."""
    x, residuals = data
    num_examples = len(x)
    share = noise_share(batch_size, num_examples, replace=replace)
    # A_i = u_i v_i', u_i = [x_i; 0], v_i = [x_i; -r_i].
    u = jnp.concatenate([x, jnp.zeros_like(residuals)[:, None]], 1)
    v = jnp.concatenate([x, -residuals[:, None]], 1)
    mean_map = u.T @ v / num_examples
    of_one = (u * jnp.sum(v @ second_moment * v, 1, keepdims=True)).T @ u / num_examples
    of_all = mean_map @ second_moment @ mean_map.T
    return mean_map, of_all + share * (of_one - of_all)


def noise_share(batch_size: int, num_examples: int, *, replace: bool) -> Number:
    """Return the variance of the mean of a batch over that of one example: 1 / B, or (N - B) / (B (N - 1)).

    Raises:
        ValueError: where a batch has more distinct examples than there are.
    """
    if not replace and batch_size > num_examples:
        raise ValueError(f"batch_size={batch_size} must be at most the {num_examples} examples, or replace=True")
    return (1.0 if replace else finite_population(batch_size, num_examples)) / batch_size


def interpolation_batch_size(max_sq_norm: Number, *, largest: Number, smallest: Number) -> jax.Array:
    """Return m* = beta / (lambda_1 - lambda_k) + 1, up to which the updates needed fall in proportion to 1 / B.

    For data that can be fitted exactly (Ma, Bassily & Belkin 2018, arXiv 1712.06559).

    Args:
        max_sq_norm: beta, the largest |x_i|^2.
        largest, smallest: lambda_1 and lambda_k, the largest and the smallest non-zero eigenvalue of H = mean x_i x_i'.
    """
    return jnp.asarray(max_sq_norm) / (jnp.asarray(largest) - smallest) + 1


def interpolation_contraction(
    learning_rate: Number,
    *,
    max_sq_norm: Number,
    largest: Number,
    smallest: Number,
    batch_size: Number,
) -> jax.Array:
    """Bound the factor of E|delta|^2 in an update on data that can be fitted exactly (Ma, Bassily & Belkin 2018).

    The larger of (1 - eta lambda)^2 + eta^2 lambda (beta - lambda) / B at lambda_1 and lambda_k, for batches drawn with
    replacement and delta in the span of the examples; attained where all |x_i|^2 are beta. Arguments as
    `interpolation_batch_size`.
    """

    def factor(value):
        return (1 - learning_rate * value) ** 2 + learning_rate**2 * value * (max_sq_norm - value) / batch_size

    return jnp.maximum(factor(jnp.asarray(largest)), factor(jnp.asarray(smallest)))


def interpolation_learning_rate(
    batch_size: Number, *, max_sq_norm: Number, largest: Number, smallest: Number
) -> jax.Array:
    """Return the rate of the least `interpolation_contraction` (Ma, Bassily & Belkin 2018).

    B / (beta + (B - 1) lambda_k) up to m*, and 2B / (beta + (B - 1) (lambda_1 + lambda_k)) above. Arguments as there.
    """
    below = batch_size / (max_sq_norm + (jnp.asarray(batch_size) - 1) * smallest)
    above = 2 * batch_size / (max_sq_norm + (jnp.asarray(batch_size) - 1) * (jnp.asarray(largest) + smallest))
    linear = batch_size <= interpolation_batch_size(max_sq_norm, largest=largest, smallest=smallest)
    return jnp.where(linear, below, above)
