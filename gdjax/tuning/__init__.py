"""One machine for rates and seeds: every learning rate is run with every seed, at one batch size, until it is known.

>>> import jax
>>> from gdjax import problems
>>> tuned = tune(problems.least_squares(), batch_size=64, num_epochs=4, key=jax.random.key(0))
>>> f"{tuned.rate:.3f}", tuned.at_edge, tuned.costs.shape
('1.125', False, (5, 3))
>>> tuned = tune(problems.digits_mlp(), batch_size=32, target="loss<=0.1", key=jax.random.key(0), num_seeds=2)
>>> f"{tuned.rate:.2f}", [round(float(updates), -1) for updates in tuned.costs[tuned.best]]
('0.36', [50.0, 60.0])
"""

from gdjax.tuning._goals import Budget, Goal, Target, evaluation_examples, parse_target
from gdjax.tuning._optimizers import Optimizer, made, named
from gdjax.tuning._runs import trainer
from gdjax.tuning._search import Search, minimise, search, search_grid, widen
from gdjax.tuning._speed import Speed, estimator, microbatch_sizes, speeds
from gdjax.tuning._tune import grid, searching, training, tune
from gdjax.tuning._tuning import Tuning

__all__ = [
    "Budget",
    "Goal",
    "Optimizer",
    "Search",
    "Speed",
    "Target",
    "Tuning",
    "estimator",
    "evaluation_examples",
    "grid",
    "made",
    "microbatch_sizes",
    "minimise",
    "named",
    "parse_target",
    "search",
    "search_grid",
    "searching",
    "speeds",
    "trainer",
    "training",
    "tune",
    "widen",
]
