"""What a long run trains: of a problem, or of the parts that somebody made."""

import dataclasses
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import numpy as np

from gdjax import descent, gradients
from gdjax._trees import is_key, kept
from gdjax.descent import Method, State
from gdjax.problem import Batch
from gdjax.training import _layout, _updates


class Task(NamedTuple):
    """What is trained: a method from a state on data, and the record, which is given `examples`.

    Attributes:
        of: the record or, for the default one, its problem: hashable, so that programs are found again.
    """

    method: Method
    state: State
    data: Batch
    key: jax.Array
    record_of: _updates.RecordOf
    examples: Any
    every: int
    of: Hashable


def of_problem(problem, optimizer, data, key, phases, gradient, record, layout) -> Task:
    """Return the task of a problem, as `descent.train` begins it; the method is kept with the problem."""
    if data is not None:
        raise ValueError("data comes with a method: a problem has its own; run(problem, optimizer, key=...)")
    if isinstance(optimizer, State) or not hasattr(optimizer, "update"):
        raise ValueError(f"optimizer={optimizer!r} must be an optax transformation: run(problem, optimizer, key=...)")
    if phases.sizes[-1] > problem.num_examples:
        raise ValueError(
            f"batch_size={phases.sizes[-1]} must be between 1 and N={problem.num_examples}, the training examples"
        )
    if record is None and any(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(problem.train)):
        raise ValueError(
            "record=None would evaluate all training examples on the device, but they are memory-mapped: give a record "
            "of what fits, such as record=descent.batch_loss"
        )
    gradient = gradient or gradients.mean

    def make():
        return descent.method(gradient(problem.loss), optimizer)

    def evaluation(examples):
        train, test = examples
        return descent.evaluation(dataclasses.replace(problem, train=train, test=test))

    method = kept(problem, ("training", optimizer, gradient), make)
    _check_key(key)
    init_key, stream_key = jax.random.split(key)
    state = _layout.begun(layout, lambda key: method.init(problem.init(key)), init_key)
    every = max(1, problem.num_examples * phases.num_updates // phases.examples(phases.num_updates))
    if record is not None:
        return Task(method, state, problem.train, stream_key, lambda _: record, (), every, record)
    return Task(method, state, problem.train, stream_key, evaluation, (problem.train, problem.test), every, problem)


def of_method(method, state, data, key, gradient, record) -> Task:
    if not isinstance(method, Method):
        raise ValueError(
            f"problem_or_method={method!r} must be a Problem, in run(problem, optimizer, key=...), or a method from "
            "descent.method, in run(method, state, data, key=...)"
        )
    if not isinstance(state, State) or data is None:
        raise ValueError("a method comes with a state and data: run(method, method.init(params), data, key=...)")
    if gradient is not None:
        raise ValueError("gradient comes with a problem: the method has its own, see descent.method")
    _check_key(key)
    record = record or descent.batch_loss
    return Task(method, state, data, key, lambda _: record, (), 1, record)


def _check_key(key) -> None:
    if not is_key(key):
        raise ValueError(f"key={key} must be a typed key, from jax.random.key(seed)")
