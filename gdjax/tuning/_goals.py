"""What runs are to reach or to spend, the examples that they are judged on, and when they are looked at.

>>> target = Target("loss", "train", "<=", 0.05)
>>> print(target)
train_loss<=0.05
>>> target.reached(0.04), target.best([0.3, np.nan, 0.2])
(True, 0.2)
>>> print(Budget(8192))
train_loss after 8192 examples
"""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from gdjax import batching
from gdjax.problem import Batch, Problem

NUM_EVALUATED = 2048  # examples that runs are judged on, at most
GROWTH = 0.05  # of a run between evaluations: the error of an updates-to-target before interpolation
# Of the cost of training that evaluations may take, unless they were rarer than that. It binds where a run is short,
# for smaller batches first; near the least loss those who look less often find the target later.
EVALUATION_SHARE = 1.0
EARLY_GROWTH = 1.0  # of a run between its first evaluations
EARLIEST = 16  # the first one, in parts of the updates that an evaluation is worth


class _Goal:
    """What both goals share. `costs` are updates to the target, or the loss after the examples that may be spent."""

    relation: str

    def best(self, values: Any) -> float:
        """Return the best of these values for this goal, NaN where none is finite."""
        finite = np.asarray(values, float)
        finite = finite[np.isfinite(finite)]
        if not len(finite):
            return math.nan
        return float(finite.min() if self.relation == "<=" else finite.max())


@dataclasses.dataclass(frozen=True)
class Target(_Goal):
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
    ASTRAY = 3.0  # a seed that needs this many times the updates of the median counts as one that does not arrive

    @staticmethod
    def astray(costs: np.ndarray) -> Any:
        """Return which seeds, the last axis of `costs`, do not arrive, or take ASTRAY times the median."""
        with np.errstate(invalid="ignore"):
            median = np.median(costs, axis=-1, keepdims=True)
            return ~(np.isfinite(costs) & (costs <= Target.ASTRAY * median))

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

    def max_updates(self, phases: batching.Phases, max_examples: int) -> int:
        """Return how many updates a run may make."""
        return max(1, phases.updates(max_examples))

    def check_start(self, values: np.ndarray) -> None:
        """Raise ValueError where every run [S, R] meets the target before any update."""
        if self.reached(values).all():
            raise ValueError(f"target={self} is met before any update, at {self.best(values):.4g}: ask for more")

    def waiting(self, costs: np.ndarray, latest: float, done: int) -> np.ndarray:
        """Return which rates [R] are waited for after `done` updates, of costs [R] that are infinite until known.

        All are, until one arrives with every seed; then those beside it, which its parabola goes through, and not
        beyond `latest` updates.
        """
        wanted = np.ones(len(costs), bool)
        if np.isfinite(costs).any():
            wanted = np.abs(np.arange(len(costs)) - costs.argmin()) <= 1
        return wanted & (done <= latest)

    def next_look(self, done: int, *, batch_size: int, num_examples: int, num_evaluated: int) -> int:
        """Return how many updates to make before runs are evaluated: an example costs a third of training on it."""
        early = math.ceil(EARLY_GROWTH * done)
        fewest = num_evaluated / (3 * EVALUATION_SHARE * batch_size)
        return max(1, math.ceil(GROWTH * done), round(min(fewest, max(early, fewest / EARLIEST))))

    def note(self, costs: np.ndarray, active: np.ndarray, before: Any, after: Any, *, ended: bool) -> None:
        """Fill in the costs [S, R] of runs that arrived between two looks, (updates made, values [S, R]) each."""
        del ended
        (start, previous), (end, values) = before, after
        here = self.reached(values) & active
        costs[here] = _crossing(start, end, previous[here], values[here], self.value)


@dataclasses.dataclass(frozen=True)
class Budget(_Goal):
    """The least training loss after a number of examples.

    Attributes:
        num_examples: E; at batch size B a run makes E // B updates.
    """

    num_examples: int
    metric = "loss"
    on = "train"
    relation = "<="

    def __str__(self) -> str:
        return f"train_loss after {self.num_examples} examples"

    def max_updates(self, phases: batching.Phases, max_examples: int) -> int:
        """Return how many updates a run makes, whatever `max_examples`."""
        del max_examples
        return max(1, phases.updates(self.num_examples))

    def check_start(self, values: np.ndarray) -> None:
        """Nothing is reached before the end."""

    def waiting(self, costs: np.ndarray, latest: float, done: int) -> np.ndarray:
        """Return that all rates are waited for."""
        del latest, done
        return np.ones(len(costs), bool)

    def next_look(self, done: int, *, batch_size: int, num_examples: int, num_evaluated: int) -> int:
        """Return how many updates to make before runs are evaluated: only what diverges must be known on the way."""
        del num_evaluated
        return max(1, min(math.ceil(EARLY_GROWTH * done), num_examples // batch_size))

    def note(self, costs: np.ndarray, active: np.ndarray, before: Any, after: Any, *, ended: bool) -> None:
        """Fill in the losses [S, R] of the runs that came to the end."""
        del before
        _, values = after
        here = active & np.isfinite(values) & ended
        costs[here] = values[here]


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
    """Return the examples that runs are judged on: all of this part, or NUM_EVALUATED of it, always the same ones.

    Near the least loss, another draw would be another target, and one that may be out of reach.
    """
    data = problem.train if on == "train" else problem.test
    length = len(jax.tree.leaves(data)[0])
    if length <= NUM_EVALUATED:
        return data
    return batching.take(data, batching.reshuffled(jax.random.key(0), length, length=NUM_EVALUATED))


def _crossing(start: int, end: int, before: np.ndarray, after: np.ndarray, value: float) -> np.ndarray:
    """Return where between `start` and `end` updates a line from `before` to `after` meets `value`, 1 at least.

    The line is straight over the logarithm of the updates, as learning curves nearly are, but from the first update.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        part = (value - before) / (after - before)
    part = np.where((part > 0) & (part <= 1), part, 1.0)
    return start * (end / start) ** part if start else np.maximum(end * part, 1.0)
