"""How near is equal, in the precision that the tests run in: float64, or float32 with JAX_ENABLE_X64=0."""

import jax
import numpy as np
import pytest

X64 = bool(jax.config.jax_enable_x64)
LIMITS = np.finfo(np.float64 if X64 else np.float32)
EPS, LARGEST = float(LIMITS.eps), float(LIMITS.max)
float64_only = pytest.mark.skipif(not X64, reason="says something in float64 only")


def assert_close(found, expected, *, rtol=1e-7, atol=0.0, ulps=32):
    """Compare two arrays: to `rtol` and `atol` in float64, as numpy does.

    In float32 to `ulps` units in the last place of the largest number expected, which is the error of a sum. More of
    them than usual have a reason: updates that pass errors on, or a number that is the small difference of large ones.
    """
    if not X64:
        finite = np.where(np.isfinite(expected), expected, 0)
        rtol, atol = 0.0, max(atol, ulps * EPS * float(np.abs(finite).max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)
