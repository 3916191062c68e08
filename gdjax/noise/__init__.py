"""Gradient noise scales, with an interval and a verdict: how many examples it takes to see the gradient."""

from gdjax.noise._intervals import fieller, student
from gdjax.noise._measure import HessianNoiseScale, NoiseScale, measure, measure_hessian, unbiased
from gdjax.noise._tracking import Tracked, noise_scale

__all__ = [
    "HessianNoiseScale",
    "NoiseScale",
    "Tracked",
    "fieller",
    "measure",
    "measure_hessian",
    "noise_scale",
    "student",
    "unbiased",
]
