"""A run in phases of different batch sizes is one loop after another in one stream, however it is cut and resumed."""

from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gdjax import batching, descent, gradients, training
from gdjax.problem import Problem
from gdjax.training import _run

SCHEDULE = [(5, 2), (3, 4), (4, 1)]
X_KEY, Y_KEY = jax.random.split(jax.random.key(1))
DATA = jax.random.normal(X_KEY, (12, 3)), jax.random.normal(Y_KEY, (12,))


def loss(w, example):
    x, y = example
    return 0.5 * (x @ w - y) ** 2


METHOD = descent.method(gradients.mean(loss), optax.sgd(optax.exponential_decay(0.05, 3, 0.5), momentum=0.9))
KEY = jax.random.key(3)


def start():
    return METHOD.init(jnp.asarray([1.0, -2.0, 0.5]))


def record(state, info):
    return {"loss": info.loss, "w": state.params, "seen": state.num_examples}


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, tuple(a), tuple(b))


@pytest.fixture(scope="module")
def by_hand():
    """One batch after another, from one stream that is cut by hand."""
    stream, step, state, seen = batching.reshuffled(KEY, 12, num_epochs=3), jax.jit(METHOD.step), start(), []
    first = 0
    for size in [2] * 5 + [4] * 3 + [1] * 4:
        state, info = step(state, batching.take(DATA, stream[first : first + size]))
        first += size
        seen.append(record(state, info))
    return state, jax.tree.map(lambda *x: jnp.stack(x), *seen)


def run(data=DATA, schedule=SCHEDULE, **options):
    return training.run(METHOD, start(), data, key=KEY, schedule=schedule, **{"record": record, "every": 1} | options)


@pytest.mark.parametrize("chunk_updates", [1000, 4, 1])
def test_a_schedule_is_one_stream_without_a_seam(by_hand, chunk_updates):
    assert_equal(run(chunk_updates=chunk_updates), by_hand)


@pytest.mark.slow
def test_records_may_lie_across_phases(by_hand):
    state, history = by_hand
    assert_equal(run(every=4, chunk_updates=3), (state, jax.tree.map(lambda x: x[3::4], history)))


@pytest.mark.slow
def test_data_in_host_memory_and_phases_of_the_loop_are_the_same(by_hand):
    pytest.importorskip("grain")
    assert_equal(run(data=jax.tree.map(np.asarray, DATA), chunk_updates=3), by_hand)
    phases = batching.Phases.of(SCHEDULE)
    batches = phases.batches(batching.reshuffled(KEY, 12, length=phases.examples(phases.num_updates)))
    assert_equal(descent.run(METHOD, start(), DATA, batches, record), by_hand)


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("last", [5, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 6, 11))])
def test_a_run_in_phases_is_resumed_bit_for_bit(by_hand, tmp_path, monkeypatch, last):
    made, collect = [], _run.Journal.collect

    def cut(journal, *given):
        if len(made) == last:
            raise PowerCutError
        made.append(given)
        return collect(journal, *given)

    with monkeypatch.context() as patch:
        patch.setattr(_run.Journal, "collect", cut)
        with pytest.raises(PowerCutError):
            run(folder=tmp_path, checkpoint_seconds=0, chunk_updates=1)
    assert training.progress(tmp_path).num_saved == last
    assert_equal(run(folder=tmp_path, chunk_updates=1), by_hand)
    longer = [*SCHEDULE[:2], (6, 1)]
    assert_equal(run(schedule=longer, folder=tmp_path), run(schedule=longer))
    with pytest.raises(ValueError, match="batch_size was '2 for 5 updates, 4 for 3 updates, 1' and is '2 for"):
        run(schedule=[(5, 2), (10, 2)], folder=tmp_path)


def test_what_a_batch_size_compiles_it_compiles_once():
    @chex.assert_max_traces(n=3)
    def traced(w, example):
        return loss(w, example)

    chex.clear_trace_counter()
    method = descent.method(gradients.mean(cast(Any, traced)), optax.sgd(0.01))
    schedule = [(4, 2), (4, 1), (4, 2), (4, 4), (4, 1)]
    for _ in range(2):
        training.run(method, method.init(jnp.ones(3)), DATA, key=KEY, schedule=schedule, chunk_updates=4)


def test_a_problem_is_recorded_about_once_an_epoch():
    problem = Problem(lambda key: jnp.zeros(3), loss, DATA)
    history = training.run(problem, optax.sgd(0.1), key=KEY, schedule=[(12, 1), (6, 4)]).history
    assert len(history["loss"]) == 3  # of 36 examples
    np.testing.assert_array_equal(history["examples"].low[[0, 2]], [6, 36])


def test_a_schedule_of_the_rate_counts_updates_or_examples():
    """By a loss w: what a run has moved is the sum of the rates."""
    method = descent.method(
        gradients.mean(lambda w, x: w),
        optax.sgd(lambda count: batching.Phases.of([(2, 1), (3, 4)]).counted(count)),
    )
    state, _ = training.run(method, method.init(0.0), jnp.ones(4), key=KEY, schedule=[(2, 1), (3, 4)])
    assert float(state.params) == -(0 + 1 + 2 + 6 + 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2}, "give batch_size=2 with num_updates or num_epochs, or schedule="),
        ({"num_updates": 2}, "one of the two"),
        ({"schedule": None}, "one of the two"),
        ({"schedule": []}, r"schedule=\[\] must have at least one phase"),
        ({"schedule": [(0, 4)]}, "numbers from 1 on"),
        ({"schedule": [(2, 4.5)]}, "integers"),
        ({"schedule": [(1, 2), (1, 4)], "record": lambda state, info: info.aux}, "same shapes at every batch size"),
    ],
)
def test_what_is_no_schedule_is_refused(options, message):
    method = descent.method(gradients.per_example(loss), optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        training.run(method, method.init(jnp.ones(3)), DATA, key=KEY, **{"schedule": SCHEDULE} | options)
