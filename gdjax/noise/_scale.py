"""What a measured noise scale says: its value, its interval, a verdict, and the identity that it rests on.

>>> signal, variance = unbiased(17.0, 2.0, batch_sizes=(1, 16))  # mean |g_1|^2 and |g_16|^2
>>> signal, variance
(1.0, 16.0)
>>> import jax.numpy as jnp
>>> print(NoiseScale(signal, variance, jnp.float32(16), jnp.float32(9), jnp.float32(31), 0.9, False, 500))
B_simple = 16 (90 % interval 9 to 31): ok, outliers rarer than 3/500 not excluded
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gdjax import gradients, theory
from gdjax._trees import wide

TOO_WIDE = 4.0
"""An interval whose ends differ by more than this factor, two doublings of the batch size, is 'too noisy'."""

NEGLIGIBLE = 1e-3
"""In examples. An interval below it is not 'too noisy': one example shows the gradient to 3 %, whatever it is."""

ULPS = 64  # of the dtype: nearer numbers are the same, but for the order of a sum


class NoiseScale(NamedTuple):
    """A measured noise scale; all fields are scalars, or carry the axes that the measurement was mapped over.

    Attributes:
        grad_sq_norm: |G|^2, unbiased; it can come out negative where it is small against its error.
        trace_cov: tr(S), unbiased. Either is zero or infinite where its dtype does not hold it; the ratio is not.
        b_simple: their ratio, in examples; infinite where `grad_sq_norm` is not positive.
        low, high: ends of its confidence interval (Fieller 1954), in examples; `high` is infinite where the interval
            of `grad_sq_norm` reaches zero.
        confidence: the nominal confidence of the interval.
        heavy_tail: bool, whether so few examples make up tr(S) that the interval cannot be trusted.
        num_examples: n, examples in the sample: outliers rarer than 3/n of all can be absent from it (with probability
            exp(-3)). Zero where the sample is all of the data.
        per_leaf: a pytree like the trainable parameters, a NoiseScale of each leaf alone.
    """

    grad_sq_norm: jax.Array
    trace_cov: jax.Array
    b_simple: jax.Array
    low: jax.Array
    high: jax.Array
    confidence: float
    heavy_tail: Any = False
    num_examples: Any = 0
    per_leaf: Any = None

    @property
    def verdict(self) -> Any:
        """The first that holds, an array for arrays.

        'not finite' (a gradient of the sample is not), 'not identified' (`high` is infinite), 'heavy tail'
        (`heavy_tail`), 'too noisy' (`high` > 4 `low`) or 'ok'.
        """
        return verdict(
            self.low, self.high, {"heavy tail": self.heavy_tail}, first=not_finite(self.grad_sq_norm, self.trace_cov)
        )

    def __str__(self) -> str:
        return sentence("B_simple", self.b_simple, self)

    def __repr__(self) -> str:
        """Leave out what every leaf has: `per_leaf` holds as many numbers as there are leaves."""
        fields = {name: x for name, x in self._asdict().items() if name != "per_leaf"}
        return f"NoiseScale({', '.join(f'{name}={x!r}' for name, x in fields.items())})" if self._many() else str(self)

    def _many(self) -> bool:
        return bool(jnp.ndim(self.b_simple)) or isinstance(self.b_simple, Tracer)


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
        return verdict(self.low, self.high, first=not_finite(self.grad_curvature, self.trace_hess_cov))

    def __str__(self) -> str:
        return sentence("B_noise", self.b_noise, self)


def unbiased(small, large, *, batch_sizes: tuple[Any, Any], num_examples: int | None = None):
    """Return unbiased (|G|^2, tr(S)) from squared norms of mean gradients at two batch sizes.

    With x_b = |G_b|^2 and f(b) = 1/b, or (N - b)/(b (N - 1)) for b distinct examples out of N, E x_b = |G|^2 +
    f(b) tr(S). So tr(S) = (x_b - x_B)/(f(b) - f(B)), |G|^2 = (f(b) x_B - f(B) x_b)/(f(b) - f(B)). (McCandlish et al.
    2018, appendix A.1; there for independent examples.)

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
    return solve(small, large, *(variance_factor(size, num_examples) for size in batch_sizes))


def solve(small, large, f, g):
    """Return (|G|^2, tr(S)) from small = |G|^2 + f tr(S) and large = |G|^2 + g tr(S)."""
    return (f * large - g * small) / (f - g), (small - large) / (f - g)


def variance_factor(size, num_examples: int | None):
    """Return f(size), the variance of a mean of `size` examples over that of one; N as in `unbiased`."""
    return (1.0 if num_examples is None else theory.finite_population(size, num_examples)) / size


def sq_norm(tree) -> jax.Array:
    """Return the squared norm of a pytree, added up in float32 at least; leaves may differ in their dtypes."""
    leaves = [wide(jnp.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
    return sum((jnp.vdot(leaf, leaf).astype(float) for leaf in leaves), jnp.zeros(()))


def check_confidence(confidence: float) -> None:
    """Raise ValueError unless `confidence` is a share."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1, for instance 0.9")


def check_population(num_examples: int | None) -> None:
    """Raise ValueError for an N of which no two examples could differ."""
    if num_examples is not None and num_examples < 2:
        raise ValueError(
            f"num_examples={num_examples} must be at least 2, the examples of the data: one shows no variance. None is "
            "for data without end"
        )


def check_unweighted(measured: gradients.SquaredNorms, name: str) -> None:
    """Raise ValueError for norms of weighted examples.

    Of sum |w (g - G)|^2 = sum w^2 |g|^2 - 2 G' sum w^2 g + |G|^2 sum w^2, neither the norms nor the mean gradient know
    the middle.
    """
    if measured.weights is not None:
        raise ValueError(
            f"{name} comes from gradients.with_sq_norms(weight=): norms of gradients and their weighted mean do not "
            "determine the noise of that mean. Measure apart, with noise.measure(weight=), or leave out weight"
        )


def not_finite(*estimates) -> dict[str, Any]:
    """Return {'not finite': bool} of estimates that are NaN where a gradient was NaN or infinite."""
    return {"not finite": np.any([np.isnan(estimate) for estimate in estimates], axis=0)}


def verdict(low, high, reasons=None, *, first=None) -> Any:
    """Return the first of `first`, 'not identified', `reasons` {word: bool} and 'too noisy' that holds, or 'ok'."""
    unknown, wide = {"not identified": ~np.isfinite(high)}, {"too noisy": (high > TOO_WIDE * low) & (high > NEGLIGIBLE)}
    reasons = (first or {}) | unknown | (reasons or {}) | wide
    conditions = np.broadcast_arrays(*(np.asarray(condition) for condition in reasons.values()))
    return np.select(conditions, list(reasons), "ok")[()]


def sentence(name: str, value, scale) -> str:
    """Return 'B_simple = 3.6 (90 % interval 2.9 to 4.8): ok', and what `scale` could not have seen; repr for arrays."""
    if jnp.ndim(value) or isinstance(value, Tracer):
        return repr(scale)
    percent = f"{100 * scale.confidence:g} %"
    drawn = getattr(scale, "num_examples", 0)
    unseen = f", outliers rarer than 3/{int(drawn)} not excluded" if drawn else ""
    return f"{name} = {value:.3g} ({percent} interval {scale.low:.3g} to {scale.high:.3g}): {scale.verdict}{unseen}"
