import gc
import re
import weakref
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from sklearn.linear_model import SGDRegressor

from gdjax import batching, descent, gradients
from gdjax.descent import State
from gdjax.problem import Problem
from gdjax.problems import models

MODEL = models.mlp((3, 5, 2), activation=jnp.tanh)


def mlp_loss(params, example):
    x, y = example
    return ((MODEL.apply(params, x) - y) ** 2).sum()


def linear_loss(weights, example):
    x, y = example
    return 0.5 * (x @ weights - y) ** 2


@pytest.fixture
def regression(key):
    x_key, y_key = jax.random.split(key)
    return jax.random.normal(x_key, (12, 3)), jax.random.normal(y_key, (12,))


@pytest.fixture
def examples(key):
    x_key, y_key = jax.random.split(key)
    return jax.random.normal(x_key, (12, 3)), jax.random.normal(y_key, (12, 2))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol=1e-12):
    jax.tree.map(lambda a, b: precision.assert_close(a, b, rtol=rtol, atol=1e-13), a, b)


ESTIMATORS = {
    "mean": gradients.mean,
    "microbatched": lambda loss: gradients.microbatched(loss, microbatch_size=2),
    "per_example": gradients.per_example,
}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    "polyak": optax.polyak_sgd(),  # asks for `value`
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.slow
def test_a_method_is_init_and_step_and_a_step_equals_optax(estimator, optimizer, examples):
    method = descent.method(estimator(mlp_loss), optimizer)
    params = MODEL.init(jax.random.key(1))
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes int32 and float64
        state = method.init(params)
        after, info = method.step(state, examples)

        def mean_loss(params):
            return jnp.mean(
                jnp.stack([mlp_loss(params, jax.tree.map(lambda x, i=i: x[i], examples)) for i in range(12)])
            )

        value, grad = jax.value_and_grad(mean_loss)(params)
        extended = optax.with_extra_args_support(optimizer)
        update, opt_state = extended.update(grad, extended.init(params), params, value=value, grad=grad)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    assert (int(state.num_examples), int(after.num_examples)) == (0, 12)
    assert_close(tuple(after[:2]), (optax.apply_updates(params, update), opt_state))
    assert_close(tuple(info[:3]), (value, grad, update))


def test_frozen_leaves_pass_through_an_optimizer_that_keeps_moments():
    params = {"weight": jnp.asarray(1.0), "table": jnp.arange(3)}
    adam = optax.adam(0.5, b1=0.5, b2=0.75)  # powers of two: float32 keeps 5 digits of 1 - 0.999
    method = descent.method(gradients.mean(lambda p, i: p["weight"] * p["table"][i].astype(float)), adam)
    with jax.numpy_dtype_promotion("standard"):
        state, _ = method.step(method.init(params), jnp.asarray([1, 2]))
    precision.assert_close(state.params["weight"], 0.5)
    np.testing.assert_array_equal(state.params["table"], jnp.arange(3))
    assert state.params["table"].dtype == params["table"].dtype


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("batch_size", [1, 4, 12])
@pytest.mark.slow
def test_run_equals_a_python_loop(batch_size, examples, key):
    method = descent.method(gradients.mean(mlp_loss), optax.sgd(0.01, momentum=0.9))
    batches = batching.batches(batching.reshuffled(key, 12, num_epochs=3), batch_size)
    state, losses = descent.run(method, method.init(MODEL.init(key)), examples, batches)
    by_hand, expected = method.init(MODEL.init(key)), []
    for indices in batches:
        by_hand, info = method.step(by_hand, jax.tree.map(lambda x, i=indices: x[i], examples))
        expected.append(info.loss)
    assert_close(tuple(state), tuple(by_hand))
    assert_close(losses, jnp.stack(expected))
    assert int(state.num_examples) == 36


def test_stochastic_descent_equals_a_loop_written_by_hand(regression, key):
    method = descent.method(gradients.mean(linear_loss), optax.sgd(0.05))
    stream = batching.reshuffled(key, 12, num_epochs=2)
    state, _ = descent.run(method, method.init(jnp.zeros(3)), regression, batching.batches(stream, 1))
    weights, (x, y) = np.zeros(3), map(np.asarray, regression)
    for i in np.asarray(stream):
        weights -= 0.05 * (x[i] @ weights - y[i]) * x[i]
    precision.assert_close(state.params, weights, rtol=1e-12)


def test_stochastic_descent_equals_scikit_learn(regression):
    x, y = map(np.asarray, regression)
    model = SGDRegressor(
        penalty=None, fit_intercept=False, learning_rate="constant", eta0=0.05, shuffle=False, max_iter=3, tol=None
    ).fit(x, y)
    method = descent.method(gradients.mean(linear_loss), optax.sgd(0.05))
    batches = batching.batches(batching.cyclic(jax.random.key(0), 12, num_epochs=3), 1)
    state, _ = descent.run(method, method.init(jnp.zeros(3)), regression, batches)
    precision.assert_close(state.params, model.coef_, rtol=1e-10)


@pytest.mark.parametrize("stream", [batching.reshuffled, batching.cyclic])
def test_batch_descent_is_deterministic_gradient_descent_whatever_the_order(stream, regression, key):
    """On least squares, w_t - w* = (I - eta H)^t (w_0 - w*)."""
    x, y = map(np.asarray, regression)
    hessian = x.T @ x / 12
    optimum = np.linalg.solve(hessian, x.T @ y / 12)
    expected = optimum - np.linalg.matrix_power(np.eye(3) - 0.3 * hessian, 7) @ optimum
    method = descent.method(gradients.mean(linear_loss), optax.sgd(0.3))
    batches = batching.batches(stream(key, 12, num_epochs=7), 12)
    state, _ = descent.run(method, method.init(jnp.zeros(3)), regression, batches)
    precision.assert_close(state.params, expected, rtol=1e-11)


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.slow
def test_a_run_in_chunks_is_bit_for_bit_the_run_in_one_piece(batch_size, examples, key):
    """The chunks draw their own windows of the stream, which cross the ends of epochs."""
    method = descent.method(gradients.mean(mlp_loss), optax.sgd(0.01, momentum=0.9))
    run = jax.jit(lambda state, batches: descent.run(method, state, examples, batches))
    start = method.init(MODEL.init(key))
    whole = batching.batches(batching.reshuffled(key, 12, length=60), batch_size)
    straight, losses = run(start, whole)

    state, pieces, position = start, [], 0
    for updates in (1, 4, 6):
        length = updates * batch_size
        window = batching.reshuffled(key, 12, start=position, length=length)
        state, piece = run(state, batching.batches(window, batch_size))
        pieces.append(piece)
        position += length
    _, expected = run(start, whole[: position // batch_size])
    rest = batching.reshuffled(key, 12, start=position, length=60 - position)
    state, piece = run(state, batching.batches(rest, batch_size))
    assert_equal(tuple(state), tuple(straight))
    assert_equal(jnp.concatenate([*pieces, piece]), losses)
    assert_equal(jnp.concatenate(pieces), expected)


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("every", [1, 3, 4, 5, 9, 100])
@pytest.mark.slow
def test_records_are_taken_every_so_many_updates_and_at_the_end(every, examples, key):
    method = descent.method(gradients.mean(mlp_loss), optax.sgd(0.1))
    batches = batching.batches(batching.reshuffled(key, 12, num_epochs=3), 4)
    start = method.init(MODEL.init(key))
    end, full = descent.run(method, start, examples, batches, lambda state, info: (state, info))
    state, history = descent.run(method, start, examples, batches, lambda state, info: (state, info), every=every)
    kept = sorted({*range(every - 1, 9, every), 8})
    assert_close(jax.tree.map(lambda x: x, history), jax.tree.map(lambda x: x[np.asarray(kept)], full))
    assert_close(tuple(state), tuple(end))


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize(("every", "unroll", "expected"), [(1, 2, ["2"]), (4, 3, ["1", "3"]), (3, 9, ["3", "3"])])
def test_unrolling_changes_neither_updates_nor_records(every, unroll, expected, examples, key):
    method = descent.method(gradients.mean(mlp_loss), optax.sgd(0.1))
    batches = batching.batches(batching.reshuffled(key, 12, num_epochs=3), 4)
    start = method.init(MODEL.init(key))
    run = partial(descent.run, method, start, examples, batches, lambda state, info: (state, info), every=every)
    assert_close(jax.tree.map(lambda x: x, run(unroll=unroll)), jax.tree.map(lambda x: x, run()))
    loops = re.findall(r" unroll=(\d+)", str(jax.make_jaxpr(partial(run, unroll=unroll))()))
    assert sorted(loops) == sorted(expected)


@pytest.mark.usefixtures("replays")
def test_the_step_is_traced_once_for_any_number_of_updates_rates_and_seeds(examples, key):
    @chex.assert_max_traces(n=1)
    def loss(params, example):
        return mlp_loss(params, example)

    def train(key, learning_rate):
        method = descent.method(gradients.mean(loss), optax.sgd(learning_rate))
        stream = batching.reshuffled(key, 12, num_epochs=10)
        state = method.init(MODEL.init(key))
        return descent.run(method, state, examples, batching.batches(stream, 2), every=6)[1]

    chex.clear_trace_counter()
    over_rates = jax.vmap(train, (None, 0))
    losses = jax.jit(jax.vmap(over_rates, (0, None)))(jax.random.split(key, 3), jnp.asarray([0.01, 0.1]))
    assert losses.shape == (3, 2, 10)


@pytest.mark.usefixtures("nans", "replays")
def test_a_diverging_lane_leaves_its_neighbours_as_they_are(examples, key):
    def train(learning_rate):
        method = descent.method(gradients.mean(mlp_loss), optax.sgd(learning_rate))
        batches = batching.batches(batching.reshuffled(key, 12, num_epochs=20), 3)
        return descent.run(method, method.init(MODEL.init(key)), examples, batches)[1]

    lanes = jax.jit(jax.vmap(train))
    mixed, calm = lanes(jnp.asarray([0.01, 1e6, 0.02])), lanes(jnp.asarray([0.01, 0.015, 0.02]))
    assert not jnp.isfinite(mixed[1, -1])
    np.testing.assert_array_equal(mixed[jnp.asarray([0, 2])], calm[jnp.asarray([0, 2])])


@pytest.mark.parametrize(
    ("data", "batches", "arguments", "message"),
    [
        (
            (jnp.ones((4, 3)), jnp.ones(5)),
            jnp.zeros((2, 1), int),
            {},
            r"every leaf of data .* data\[0\]: 4, data\[1\]: 5",
        ),
        ((jnp.ones((0, 3)), jnp.ones(0)), jnp.zeros((2, 1), int), {}, "data is empty"),
        ((jnp.ones((4, 3)), jnp.ones(4)), jnp.zeros((2, 1), int), {"every": 0}, "every=0 must be at least 1"),
        ((jnp.ones((4, 3)), jnp.ones(4)), jnp.zeros((2, 1), int), {"unroll": 0}, "unroll=0 must be at least 1"),
        ((jnp.ones((4, 3)), jnp.ones(4)), jnp.zeros(2, int), {}, r"batches must be int\[T, B\].*\(2,\)"),
        ((jnp.ones((4, 3)), jnp.ones(4)), jnp.zeros((2, 1)), {}, r"batches must be int\[T, B\].*float\d+"),
    ],
)
def test_run_refuses_data_and_batches_it_cannot_use(data, batches, arguments, message):
    method = descent.method(gradients.mean(linear_loss), optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        descent.run(method, method.init(jnp.zeros(3)), data, batches, **arguments)


def bowl(params, center):
    return 0.5 * ((params - center) ** 2).sum()


def full_loss(state: State, info):
    return bowl(state.params, jnp.zeros(2))


CENTERS = jnp.zeros((1, 2))
RULES = {
    "loss": descent.loss_at_most(0.01, full_loss),
    "gradient": descent.gradient_norm_at_most(0.2),
    "diverged": descent.diverged(full_loss),
    "no improvement": descent.no_improvement(3, full_loss),
}


def descend_until(learning_rate, rules, every=1):
    """From |theta| = 1, theta is multiplied by (1 - rate) at every update, so every ending is known beforehand."""
    method = descent.method(gradients.mean(bowl), optax.sgd(learning_rate))
    state = method.init(jnp.asarray([0.6, 0.8]))
    return descent.until(method, state, CENTERS, jnp.zeros((60, 1), int), rules, every=every)


@pytest.mark.parametrize(
    ("names", "learning_rate", "expected", "num_updates"),
    [
        # loss after t updates is 0.5 * 0.25^t: 0.0078 at t = 3
        (["loss"], 0.5, "loss", 3),
        # the gradient of update t has norm 0.5^(t - 1): 0.125 at t = 4
        (["gradient"], 0.5, "gradient", 4),
        (["gradient", "loss"], 0.5, "loss", 3),
        # |1 - 3| = 2: three evaluations, none below the first
        (["no improvement"], 3.0, "no improvement", 4),
        # 0.5 * 1e40^t overflows float64 at t = 8, and float32 at once
        (["loss", "diverged"], 1e20, "diverged", 8 if precision.X64 else 1),
        (["loss"], 1e-3, "budget", 60),
        ([], 0.5, "budget", 60),
    ],
)
def test_until_ends_by_the_rule_that_holds_first(names, learning_rate, expected, num_updates):
    rules = {name: RULES[name] for name in names}
    state, ending = descend_until(learning_rate, rules)
    assert (*rules, "budget")[int(ending.rule)] == expected
    assert int(ending.num_updates) == num_updates
    precision.assert_close(state.params, np.asarray([0.6, 0.8]) * (1 - learning_rate) ** num_updates, rtol=1e-12)


def test_the_gradient_rule_looks_at_the_gradient_it_is_given():
    """After update t that of all data has norm 0.5^t: 0.125 at t = 3, one update before the batch's own."""
    _, ending = descend_until(
        0.5, {"full gradient": descent.gradient_norm_at_most(0.2, lambda state, info: state.params)}
    )
    assert int(ending.num_updates) == 3


@pytest.mark.parametrize(
    ("values", "num_updates"),
    [
        ([2.0, 1.0, 1.0, 1.0, 1.0], 5),  # staying level is no improvement
        ([2.0, np.nan, 1.0, 1.5, 1.5, 1.5], 6),  # NaN is none either, but 1 after it is
    ],
)
@pytest.mark.usefixtures("nans")
def test_no_improvement_counts_the_values_in_a_row_that_are_not_below_the_best(values, num_updates):
    values = jnp.asarray(values)
    rule = descent.no_improvement(3, lambda state, info: values[state.num_examples.low - 1])
    _, ending = descend_until(0.5, {"no improvement": rule})
    assert int(ending.num_updates) == num_updates


def test_until_looks_only_every_so_many_updates():
    _, ending = descend_until(0.5, {"loss": RULES["loss"]}, every=2)
    assert int(ending.num_updates) == 4


@pytest.mark.slow
def test_until_ends_every_lane_at_its_own_time():
    rates = jnp.asarray([0.5, 3.0, 1e-3, 0.25])
    state, ending = jax.jit(jax.vmap(lambda rate: descend_until(rate, RULES)))(rates)
    for lane, rate in enumerate(rates):
        alone, its_ending = descend_until(rate, RULES)
        assert_equal(jax.tree.map(lambda x, lane=lane: x[lane], tuple(ending)), tuple(its_ending))
        assert_close(jax.tree.map(lambda x, lane=lane: x[lane], tuple(state)), tuple(alone))
    assert [(*RULES, "budget")[rule] for rule in ending.rule] == ["loss", "no improvement", "budget", "loss"]


@pytest.mark.usefixtures("replays")
def test_until_is_the_same_loop_as_run(examples, key):
    method = descent.method(gradients.mean(mlp_loss), optax.sgd(0.01, momentum=0.9))
    batches = batching.batches(batching.reshuffled(key, 12, num_epochs=4), 4)
    start = method.init(MODEL.init(key))
    state, ending = descent.until(method, start, examples, batches, {}, every=3)
    assert int(ending.num_updates) == 12
    assert_close(tuple(state), tuple(descent.run(method, start, examples, batches)[0]))


def test_until_refuses_a_budget_that_evaluations_do_not_divide():
    with pytest.raises(ValueError, match="every=7 must divide the budget of 60 updates"):
        descend_until(0.5, {}, every=7)
    with pytest.raises(ValueError, match="num_evaluations=0 must be at least 1"):
        descent.no_improvement(0)


def dropped_out(params, example_and_key):
    """Least squares whose features are dropped, half of them, by the key of the example."""
    (x, y), key = example_and_key
    mask = jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
    return 0.5 * ((2 * mask * x) @ params - y) ** 2


KEYED_DATA = jnp.arange(1.0, 25.0).reshape(6, 4) / 10, jnp.arange(6.0)
KEYED_ESTIMATORS = {
    "mean": gradients.mean,
    "microbatched": partial(gradients.microbatched, microbatch_size=2),
    "per_example": gradients.per_example,
    "with_sq_norms": gradients.with_sq_norms,
    "clipped": partial(gradients.clipped, max_norm=1e9),
}


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("estimator", KEYED_ESTIMATORS.values(), ids=KEYED_ESTIMATORS)
def test_each_position_of_the_stream_has_its_own_key_whoever_takes_the_gradient(estimator, key):
    """Against a loop by hand; 24 entries of 6 examples, so that each is visited again."""
    stream = batching.reshuffled(key, 6, num_epochs=4)
    method = descent.with_keys(descent.method(estimator(dropped_out), optax.sgd(0.01)), key)
    state, losses = descent.run(method, method.init(jnp.ones(4)), KEYED_DATA, batching.batches(stream, 4))
    params, expected = jnp.ones(4), []
    for t in range(6):
        values = []
        for p in range(4 * t, 4 * t + 4):
            example = jax.tree.map(lambda x, p=p: x[stream[p]], KEYED_DATA)
            values.append(jax.value_and_grad(dropped_out)(params, (example, jax.random.fold_in(key, p))))
        expected.append(sum(value for value, _ in values) / 4)
        params = params - 0.01 * sum(grad for _, grad in values) / 4
    precision.assert_close(losses, jnp.stack(expected), rtol=1e-12)
    precision.assert_close(state.params, params, rtol=1e-12)


@pytest.mark.usefixtures("replays")
def test_the_keys_of_far_positions_are_folded_in_by_halves(key):
    """Across 2^32, up to which a key is that of `fold_in` alone, and across 2^33."""
    method = descent.with_keys(descent.method(gradients.per_example(dropped_out), optax.sgd(0.0)), key)
    batch = jax.tree.map(lambda x: x[:4], KEYED_DATA)
    for first in (2**32 - 2, 2**33 - 2):
        state = method.init(jnp.ones(4))._replace(num_examples=batching.Count.of(first))
        state, info = jax.jit(method.step)(state, batch)
        assert int(state.num_examples) == first + 4
        for i, p in enumerate(range(first, first + 4)):
            base = jax.random.fold_in(key, p >> 32) if p >> 32 else key
            example = jax.tree.map(lambda x, i=i: x[i], batch), jax.random.fold_in(base, np.uint32(p % 2**32))
            precision.assert_close(info.aux.losses[i], dropped_out(jnp.ones(4), example), rtol=1e-12)


def test_a_run_with_keys_that_is_cut_in_two_is_the_run_in_one_piece(key):
    batches = batching.batches(batching.reshuffled(key, 6, num_epochs=4), 3)
    method = descent.with_keys(descent.method(gradients.mean(dropped_out), optax.sgd(0.05, momentum=0.9)), key)
    run = jax.jit(lambda state, batches: descent.run(method, state, KEYED_DATA, batches)[0])
    start = method.init(jnp.ones(4))
    halves = run(run(start, batches[:4]), batches[4:])
    jax.tree.map(np.testing.assert_array_equal, halves, run(start, batches))
    other = descent.with_keys(
        descent.method(gradients.mean(dropped_out), optax.sgd(0.05, momentum=0.9)), jax.random.key(1)
    )
    assert (descent.run(other, start, KEYED_DATA, batches)[0].params != halves.params).all()


def test_every_batch_size_sees_the_same_keys(key):
    """With a learning rate of zero the losses of the stream are the same numbers, cut at different points."""
    stream = batching.reshuffled(key, 6, num_epochs=2)
    method = descent.with_keys(descent.method(gradients.per_example(dropped_out), optax.sgd(0.0)), key)
    losses = [
        descent.run(
            method,
            method.init(jnp.ones(4)),
            KEYED_DATA,
            batching.batches(stream, size),
            lambda state, info: info.aux.losses,
        )[1].reshape(-1)
        for size in (1, 4, 6)
    ]
    precision.assert_close(losses[1], losses[0], rtol=1e-12)
    precision.assert_close(losses[2], losses[0], rtol=1e-12)
    assert len(set(np.asarray(losses[0]).tolist())) > 8  # 6 examples, seen twice, with different masks


def test_a_run_that_is_called_again_compiles_nothing(key):
    traces = []

    def counted(center, x):
        traces.append(x)
        return 0.5 * (center - x) ** 2

    method = descent.method(gradients.mean(counted), optax.sgd(0.1))
    data, batches = jnp.arange(6.0), batching.batches(batching.cyclic(key, 6, num_epochs=2), 3)
    state, first = descent.run(method, method.init(jnp.zeros(())), data, batches)
    rules = {"low": descent.loss_at_most(0.01)}
    descent.until(method, state, data, batches, rules)
    count = len(traces)
    state, second = descent.run(method, state, data, batches)
    descent.until(method, state, data, batches, rules)
    assert len(traces) == count
    assert second[0] < first[0]
    descent.run(method, state, data, batches, every=2)  # another program
    assert len(traces) > count


def test_programs_of_a_method_go_with_it(key):
    def make():
        loss = lambda center, x: 0.5 * (center - x) ** 2  # noqa: E731
        method = descent.method(gradients.mean(loss), optax.sgd(0.1))
        descent.run(method, method.init(0.0), jnp.arange(6.0), jnp.zeros((2, 1), int))
        return weakref.ref(method.step)

    gone = make()
    gc.collect()
    assert gone() is None


def test_batches_may_be_anything_that_can_be_scanned(key):
    """Here the examples themselves, which a fetch takes as they come, against batches cut by index."""
    method = descent.method(gradients.mean(lambda center, x: 0.5 * (center - x) ** 2), optax.sgd(0.1))
    data, indices = jnp.arange(6.0), batching.batches(batching.reshuffled(key, 6, num_epochs=2), 3)
    streamed = {"x": data[indices]}
    state, losses = descent.run(method, method.init(0.0), data, streamed, every=3, fetch=lambda data, batch: batch["x"])
    expected_state, expected = descent.run(method, method.init(0.0), data, indices, every=3)
    np.testing.assert_array_equal(losses, expected)
    np.testing.assert_array_equal(state.params, expected_state.params)


def test_a_budget_may_be_traced_and_begin_anywhere(key):
    method = descent.method(gradients.mean(lambda center, x: 0.5 * (center - x) ** 2), optax.sgd(0.1))
    data, batches = jnp.arange(6.0), batching.batches(batching.reshuffled(key, 6, num_epochs=4), 3)
    start = method.init(0.0)
    counted = jax.jit(
        lambda first, count: descent.until(method, start, data, batches, first=first, num_updates=count)[0]
    )
    for first, count in ((0, 8), (2, 3), (7, 1), (3, 0)):
        expected = descent.run(method, start, data, batches[first : first + count])[0] if count else start
        np.testing.assert_array_equal(counted(first, count).params, expected.params)
        assert int(counted(first, count).num_examples) == 3 * count
    with pytest.raises(ValueError, match="every=2 must be 1 where num_updates is traced"):
        jax.jit(lambda count: descent.until(method, start, data, batches, every=2, num_updates=count))(4)


def test_train_is_the_loop_written_out_and_can_be_mapped_over_keys_and_rates(key):
    problem = Problem(
        init=jax.random.normal,
        loss=lambda center, x: 0.5 * (center - x) ** 2,
        train=jnp.arange(6.0),
        metrics={"error": lambda center, x: jnp.abs(center - x)},
    )

    def train(key, rate):
        return descent.train(problem, optax.sgd(rate), key=key, batch_size=2, num_epochs=3)

    keys, rates = jax.random.split(key, 2), jnp.asarray([0.1, 0.3])
    states, history = jax.jit(jax.vmap(jax.vmap(train, (None, 0)), (0, None)))(keys, rates)
    assert history["loss"].shape == (2, 2, 3)
    np.testing.assert_array_equal(np.asarray(history["examples"])[1, 1], [6, 12, 18])
    init_key, stream_key = jax.random.split(keys[1])
    center, stream = float(problem.init(init_key)), batching.reshuffled(stream_key, 6, num_epochs=3)
    for t, indices in enumerate(np.asarray(stream).reshape(-1, 2), 1):
        center -= 0.3 * (center - indices.mean())
        if t % 3 == 0:
            precision.assert_close(
                history["loss"][1, 1, t // 3 - 1], np.mean((center - np.arange(6)) ** 2) / 2, rtol=1e-12
            )
            precision.assert_close(
                history["metrics"]["error"][1, 1, t // 3 - 1], np.abs(center - np.arange(6)).mean(), rtol=1e-12
            )
    precision.assert_close(states.params[1, 1], center, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give num_updates=None or num_epochs=None, one of the two"),
        ({"num_updates": 3, "num_epochs": 1}, "give num_updates=3 or num_epochs=1, one of the two"),
        ({"num_updates": 0}, "num_updates=0, num_epochs=None: there must be at least one update"),
        ({"num_epochs": 1, "batch_size": 7}, "batch_size=7 must be between 1 and N=6"),
    ],
)
def test_train_says_what_is_missing(key, options, message):
    problem = Problem(lambda key: jnp.zeros(()), lambda center, x: (center - x) ** 2, jnp.arange(6.0))
    with pytest.raises(ValueError, match=message):
        descent.train(problem, optax.sgd(0.1), key=key, **{"batch_size": 2} | options)


def test_moments_of_bfloat16_stay_so_where_the_hyperparameters_are_traced():
    data = jnp.linspace(-1.0, 1.0, 8, dtype=jnp.bfloat16)
    gradient = gradients.mean(lambda w, x: (w * x - x) ** 2)
    batches = batching.batches(batching.cyclic(jax.random.key(0), 8, num_epochs=1), 4)

    def final(b1, learning_rate):
        method = descent.method(gradient, optax.adam(learning_rate, b1=b1))
        return descent.run(method, method.init(jnp.zeros((), jnp.bfloat16)), data, batches)[0]

    with jax.numpy_dtype_promotion("standard"):
        state, expected = jax.jit(final)(jnp.float32(0.9), jnp.float32(0.1)), jax.jit(lambda: final(0.9, 0.1))()
    assert {leaf.dtype for leaf in (state.params, *state.opt_state[0][1:])} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(float(state.params), float(expected.params), rtol=0.02)
