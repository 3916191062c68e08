"""One long run from the host: progress, checkpoints, exact resume, many devices.

>>> import tempfile
>>> import jax, jax.numpy as jnp, optax
>>> from gdjax.problem import Problem
>>> data = jnp.asarray([1.0, 2.0, 6.0, 7.0])
>>> numbers = Problem(lambda key: jnp.zeros(()), lambda mean, x: 0.5 * (mean - x) ** 2, data)
>>> with tempfile.TemporaryDirectory() as folder:
...     state, history = run(
...         numbers, optax.sgd(0.1), key=jax.random.key(0), batch_size=4, num_epochs=40, folder=folder
...     )
...     print(progress(folder).num_updates, progress(folder).total, progress(folder).ended)
40 40 budget
>>> print(history["loss"][[0, 19, 39]], state.params)  # towards half the variance, and the mean
[9.73      3.368247  3.2517476] 3.9408767
"""

from gdjax.training import average
from gdjax.training._progress import Progress, progress
from gdjax.training._run import Trained, run

__all__ = [
    "Progress",
    "Trained",
    "average",
    "progress",
    "run",
]
