"""What DP-SGD promises: (epsilon, delta) differential privacy of `gradients.clipped` on Poisson batches.

The numbers are those of Google's dp-accounting, of which these are thin calls; it is not imported before one is made.
They hold for the neighbours 'add or remove one example', for batches of `batching.poisson`, and for gradients of
`gradients.clipped` with a fixed `expected_batch_size`, noise of a fresh key in every update, and parameters as all that
is published. Tuning a learning rate on the same data, and publishing a loss, are further leaks that are not counted.

>>> round(epsilon(noise_multiplier=1.5, num_examples=1440, batch_size=32, num_updates=1350, delta=1e-4), 2)
2.21
>>> round(noise_multiplier(epsilon=2.21, num_examples=1440, batch_size=32, num_updates=1350, delta=1e-4), 2)
1.5
"""

import math
from collections.abc import Callable
from typing import Any

from gdjax import batching

ACCOUNTANTS = ("pld", "rdp")


def epsilon(
    *,
    noise_multiplier: float,
    num_examples: int,
    batch_size: float,
    num_updates: int,
    delta: float,
    stream: Callable = batching.poisson,
    accountant: str = "pld",
) -> float:
    """Return the epsilon of T updates, at this delta.

    Args:
        noise_multiplier: sigma, the deviation of the noise over the clipping norm.
        num_examples: N.
        batch_size: B, the expected examples of a batch, q = B / N.
        num_updates: T.
        delta: below 1 / N, as a rule.
        stream: what the batches come from; anything but `batching.poisson` is refused.
        accountant: 'pld', which composes privacy loss distributions and is nearly tight, or 'rdp', which goes by Rényi
            divergences and gives a larger epsilon.

    Raises:
        ValueError: for another stream than `batching.poisson`, and for numbers out of range.
        ModuleNotFoundError: without dp-accounting.
    """
    _check(stream, accountant, num_examples, batch_size, num_updates, delta)
    if not noise_multiplier >= 0:
        raise ValueError(f"noise_multiplier={noise_multiplier} must be at least 0")
    if noise_multiplier == 0:
        return math.inf
    dp = _dp_accounting()
    account = _accountant(dp, accountant)
    return float(
        account.compose(_event(dp, noise_multiplier, batch_size / num_examples, num_updates)).get_epsilon(delta)
    )


def noise_multiplier(
    *,
    epsilon: float,
    num_examples: int,
    batch_size: float,
    num_updates: int,
    delta: float,
    stream: Callable = batching.poisson,
    accountant: str = "pld",
) -> float:
    """Return the least sigma with which T updates are (epsilon, delta) private, to 10^-4; the inverse of `epsilon`."""
    _check(stream, accountant, num_examples, batch_size, num_updates, delta)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon} must be positive and finite")
    dp = _dp_accounting()
    return float(
        dp.calibrate_dp_mechanism(
            lambda: _accountant(dp, accountant),
            lambda sigma: _event(dp, sigma, batch_size / num_examples, num_updates),
            epsilon,
            delta,
            dp.LowerEndpointAndGuess(0, 1),
            tol=1e-4,
        )
    )


def _check(stream, accountant, num_examples, batch_size, num_updates, delta) -> None:
    if stream is not batching.poisson:
        raise ValueError(
            f"stream={getattr(stream, '__name__', stream)} must be batching.poisson: no accountant's bound holds for "
            "other orders of the examples; the amplification by sampling is that of independent draws"
        )
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant={accountant!r} must be one of {', '.join(ACCOUNTANTS)}")
    if not 0 < batch_size <= num_examples:
        raise ValueError(f"batch_size={batch_size} must be positive and at most num_examples={num_examples}")
    if num_updates < 1:
        raise ValueError(f"num_updates={num_updates} must be at least 1")
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} must be between 0 and 1")


def _dp_accounting() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("epsilon is computed by dp-accounting: pip install 'gdjax[privacy]'") from error
    return dp_accounting


def _accountant(dp: Any, name: str) -> Any:
    return dp.pld.PLDAccountant() if name == "pld" else dp.rdp.RdpAccountant()


def _event(dp: Any, sigma: float, rate: float, num_updates: int) -> Any:
    update = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma))
    return dp.SelfComposedDpEvent(update, num_updates)
