"""Critical batch sizes along a run of the noisy quadratic, and of branches."""

import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest
from scipy import optimize

from gdjax import theory
from gdjax.theory import critical, least_squares, schedules

H = jnp.asarray(1 / np.arange(1.0, 101.0))
QUADRATIC = schedules.noisy_quadratic(H, H, start=jnp.ones(100))


@pytest.fixture(scope="module")
def checkpoint():
    """Return E theta^2 after 1024 examples at B = 4."""
    return jax.jit(schedules.run)(QUADRATIC, jnp.full(256, 0.1), jnp.full(256, 4.0))[0]


def gain_per_example(second, batch_size):
    """Return by what the best update lowers the loss, an example."""
    rate = optimize.minimize_scalar(
        lambda rate: float(H @ ((1 - rate * H) ** 2 * second + rate**2 * H / batch_size) / 2)
    )
    return (float(H @ second) / 2 - rate.fun) / batch_size


def test_noise_scales_and_gains_at_a_checkpoint(checkpoint):
    scale = critical.b_noise(QUADRATIC, checkpoint)
    precision.assert_close([critical.b_simple(QUADRATIC, checkpoint), scale], [158.27, 101.71], rtol=3e-5)
    for size, expected in ((8, 0.936195), (64, 0.619816), (512, 0.167358)):
        gain = gain_per_example(checkpoint, size) / gain_per_example(checkpoint, 1)
        np.testing.assert_allclose([gain, critical.fraction_kept(size, 1, scale)], expected, rtol=3e-6)
    delta, hessian = jnp.asarray([0.5, -1.0]), jnp.diag(jnp.asarray([1.0, 0.3]))
    features = schedules.gaussian_least_squares(jnp.asarray([1.0, 0.3]), label_noise=0.7, start=delta**2)
    for found, known in ((critical.b_simple, least_squares.b_simple), (critical.b_noise, least_squares.b_noise)):
        precision.assert_close(found(features, delta**2), known(delta, hessian, label_noise=0.7), rtol=1e-12)


def test_the_batch_size_that_keeps_a_fraction_is_the_inverse_and_agrees_with_the_law_of_an_update():
    for fraction in (1.0, 0.9, 0.3):
        size = critical.batch_size_keeping(fraction, 4, 100)
        precision.assert_close(critical.fraction_kept(size, 4, 100), fraction, rtol=1e-12)
        rates = [theory.best_learning_rate(b, 100, full_batch=1.0) / b for b in (size, 4)]
        precision.assert_close(rates[0] / rates[1], fraction, rtol=1e-12)
    precision.assert_close(critical.fraction_of(0.01, 0.1), 0.9, rtol=1e-12)
    with pytest.raises(ValueError, match=r"progress=0\.01 must be above tolerance=0\.02"):
        critical.fraction_of(0.02, 0.01)


@pytest.mark.parametrize(("rate", "exact", "small", "scale"), [(0.02, 16.26, 16.69, 977), (0.1, 6.34, 6.54, 244)])
def test_at_the_floor_branches_measure_curvature(rate, exact, small, scale):
    options = {"noise": H, "learning_rate": rate}
    found = critical.batch_size_at_floor(0.01, 4, H, **options)
    np.testing.assert_allclose(found, exact, rtol=1e-3)
    limit = 4 * (1 + 2 * 0.01 * H.sum() / (rate * (H @ H)))
    np.testing.assert_allclose(limit, small, rtol=1e-3)
    second, _ = jax.jit(schedules.run)(QUADRATIC, jnp.full(4096, rate), jnp.full(4096, 4.0))
    np.testing.assert_allclose(critical.b_simple(QUADRATIC, second), scale, rtol=2e-3)
    noisier = critical.batch_size_at_floor(0.01, 4, H, noise=9 * H, learning_rate=rate)
    precision.assert_close(noisier, found, rtol=1e-12)  # nine times the noise makes no difference


def test_the_largest_branch_that_is_no_worse():
    factors, losses = [4, 1, 2, 8], [1.015, 1.01, 1.0, 1.03]
    assert critical.largest_branch(factors, losses, start=1.5, tolerance=0.02) == 4
    assert critical.largest_branch(factors, losses, start=1.5, tolerance=0.001) == 2
    assert critical.largest_branch(factors, losses, start=1.5, tolerance=0.05) == 8
    assert critical.largest_branch([1, 2, 4], [1.0, np.nan, 1.0], start=2.0, tolerance=0.1) == 4
    assert critical.largest_branch([1, 2, 4], [1.0, 1.0, np.nan], start=2.0, tolerance=0.1) == 2
    with pytest.raises(ValueError, match="make the branches longer"):
        critical.largest_branch(factors, losses, start=1.02, tolerance=0.02)
