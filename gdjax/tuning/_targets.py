"""What a run is to reach, or to spend, and the examples that it is judged on.

>>> target = Target("loss", "train", "<=", 0.05)
>>> print(target)
train_loss<=0.05
>>> target.reached(0.04), best_value(np.asarray([0.3, np.nan, 0.2]), target)
(True, 0.2)
"""

import dataclasses
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax import batching
from gdjax.problem import Batch, Params, Problem, trainable

NUM_EVALUATED = 2048  # examples that a target is judged on, at most
CHUNK = 256  # examples evaluated at once


@dataclasses.dataclass(frozen=True)
class Target:
    """A metric and the value to reach.

    Attributes:
        metric: 'loss' or the name of one of the problem's metrics.
        on: 'train' or 'test'.
        relation: '<=' or '>='.
        value: to reach.
    """

    metric: str
    on: str
    relation: str
    value: float

    def __str__(self) -> str:
        return f"{self.on}_{self.metric}{self.relation}{self.value:g}"

    def reached(self, value: Any) -> Any:
        """Return where `value` meets the target; NaN does not."""
        return value <= self.value if self.relation == "<=" else value >= self.value

    def easier(self, value: float) -> "Target":
        """Return the target at `value` in two digits, rounded to where more runs arrive."""
        if value != 0:
            unit = 10.0 ** (math.floor(math.log10(abs(value))) - 1)
            value = float(f"{(math.ceil if self.relation == '<=' else math.floor)(value / unit) * unit:.2g}")
        return dataclasses.replace(self, value=value)


@dataclasses.dataclass(frozen=True)
class Budget:
    """The least training loss after a number of examples.

    Attributes:
        num_examples: E; at batch size B a run makes E // B updates.
    """

    num_examples: int
    metric: ClassVar[str] = "loss"
    on: ClassVar[str] = "train"
    relation: ClassVar[str] = "<="

    def __str__(self) -> str:
        return f"train_loss after {self.num_examples} examples"


Goal = Target | Budget


def parse_target(text: str, problem: Problem) -> Target:
    """Read 'loss<=0.05' or 'test_accuracy>=0.95'.

    The loss is that of the training examples and other metrics are those of the test examples, where there are any,
    unless 'train_' or 'test_' says otherwise.

    Raises:
        ValueError: for another form, and for a metric that does not exist, with those that do.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*(\S+)\s*", text)
    if not match:
        raise ValueError(f"target={text!r} is not of the form 'loss<=0.05' or 'accuracy>=0.95'")
    name, relation, number = match.groups()
    metric = re.sub("^(train|test)_", "", name)
    metrics = ("loss", *problem.metrics)
    parts = ("train",) if problem.test is None else ("train", "test")
    on = name.removesuffix(f"_{metric}") if metric != name else parts[0 if metric == "loss" else -1]
    if metric not in metrics or on not in parts:
        known = ", ".join(f"{part}_{metric}" for part in parts for metric in metrics)
        raise ValueError(f"target={text!r}: {problem.name} has no metric {name!r}; it has {known}")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"target={text!r}: {number!r} is not a finite number")
    return Target(metric, on, relation, value)


def evaluation_examples(problem: Problem, on: str) -> Batch:
    """Return the examples that a metric is judged on: all of its part, or NUM_EVALUATED of it, always the same ones.

    Near the least loss, another draw would be another target, and one that may be out of reach.
    """
    data = problem.train if on == "train" else problem.test
    length = len(jax.tree.leaves(data)[0])
    if length <= NUM_EVALUATED:
        return data
    return batching.take(data, batching.reshuffled(jax.random.key(0), length, length=NUM_EVALUATED))


def evaluation(problem: Problem, metric: str) -> Callable[[Params, Batch], jax.Array]:
    """Return `(params, examples) -> scalar`, the mean of a metric, NaN where a parameter is not finite."""
    function = problem.loss if metric == "loss" else problem.metrics[metric]

    def evaluate(params: Params, examples: Batch) -> jax.Array:
        value = lax.map(partial(function, params), examples, batch_size=CHUNK).mean()
        # An accuracy is finite even where the parameters are not.
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(trainable(params)[0])]).all()
        return jnp.where(finite, value, jnp.nan)

    return evaluate


def best_value(values: np.ndarray, goal: Goal) -> float:
    """Return the best value for this goal, NaN where none is finite."""
    finite = np.asarray(values)[np.isfinite(values)]
    if not len(finite):
        return math.nan
    return float(finite.min() if goal.relation == "<=" else finite.max())
