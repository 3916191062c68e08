"""Gradient noise scales, with an interval and a verdict: how many examples it takes to see the gradient.

With g the gradient of one example, G = E g and S = Cov(g), a batch of B examples estimates G with variance tr(S)/B.
McCandlish et al. 2018 (arXiv 1812.06162) call B_simple = tr(S)/|G|^2 the batch size at which noise and signal are
equal, and B_noise = tr(HS)/(G'HG) the one that matters to a step on a loss with Hessian H.

Everything here rests on one identity: the mean gradient of B examples has E|G_B|^2 = |G|^2 + f(B) tr(S), f(B) = 1/B, or
(N - B)/(B (N - 1)) for B distinct examples out of N. Two batch sizes make two equations for the two unknowns, and the
pair (1, n), which the norms of single examples provide, has the least variance.

`measure` draws a sample, and says what it cannot know.

>>> import jax, jax.numpy as jnp, optax
>>> from gdjax import batching, descent, gradients, noise
>>> loss = lambda mean, x: 0.5 * (mean - x) ** 2
>>> data = jax.random.normal(jax.random.key(0), (1000,))
>>> print(noise.measure(loss, jnp.asarray(0.5), data, jax.random.key(1), num_examples=500))
B_simple = 3.63 (90 % interval 2.89 to 4.83): ok, outliers rarer than 3/500 not excluded
>>> print(noise.measure(loss, jnp.asarray(0.02), data, jax.random.key(1), num_examples=100))
B_simple = inf (90 % interval 66.6 to inf): not identified, outliers rarer than 3/100 not excluded

`track` follows a run of `descent`, `watch` and `probe` are optax transformations for a loop of your own; `reading`
reads what they found.

>>> method = descent.method(gradients.with_sq_norms(loss), optax.sgd(0.0))
>>> method = noise.track(method, half_life=5000, num_examples=1000)
>>> batches = batching.batches(batching.reshuffled(jax.random.key(1), 1000, num_epochs=20), 50)
>>> state, _ = descent.run(method, method.init(0.5), data, batches)
>>> print(noise.reading(state))
B_simple = 3.8 (90 % interval 3.59 to 4.04): ok, of the last 5e+03 examples
"""

from gdjax.noise._geometry import Bracket
from gdjax.noise._hessian import measure_hessian
from gdjax.noise._intervals import fieller, student
from gdjax.noise._measure import measure
from gdjax.noise._nested import Components, components
from gdjax.noise._running import Reading, Running, reading
from gdjax.noise._scale import HessianNoiseScale, NoiseScale, unbiased
from gdjax.noise._tracking import track
from gdjax.noise._watch import Parts, parts, probe, watch

__all__ = [
    "Bracket",
    "Components",
    "HessianNoiseScale",
    "NoiseScale",
    "Parts",
    "Reading",
    "Running",
    "components",
    "fieller",
    "measure",
    "measure_hessian",
    "parts",
    "probe",
    "reading",
    "student",
    "track",
    "unbiased",
    "watch",
]
