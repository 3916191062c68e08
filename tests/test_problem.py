import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdjax import problem, problems
from gdjax.problem import Problem

VALID = {
    "init": lambda key: {"weight": jnp.zeros(2)},
    "loss": lambda params, example: (params["weight"] @ example[0] - example[1]) ** 2,
    "train": (jnp.ones((5, 2)), jnp.ones(5)),
}


def test_a_valid_problem_counts_its_examples():
    assert Problem(**VALID).num_examples == 5
    assert Problem(**VALID, test=(np.ones((1, 2)), np.ones(1))).num_examples == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ()}, "train has no arrays"),
        ({"train": (jnp.ones((0, 2)), jnp.ones(0))}, "train is empty: it has 0 examples"),
        ({"train": (jnp.ones((5, 2)), jnp.ones(4))}, r"every leaf of train .* train\[0\]: 5, train\[1\]: 4"),
        ({"train": (jnp.ones((5, 2)), 1.0)}, r"train\[1\]: scalar"),
        ({"test": (jnp.ones((5, 3)), jnp.ones(5))}, "test examples are .* but training examples are"),
        ({"test": (jnp.ones((5, 2)), jnp.ones(5, int))}, r"test examples are .*int\d+.* but training .*float\d+"),
        ({"test": (jnp.ones((2, 2)), jnp.ones(3))}, r"every leaf of test .* test\[0\]: 2, test\[1\]: 3"),
        (
            {"train": (np.diag([1.0, np.nan]), np.ones(2))},
            r"train\[0\] holds 1 values .* allow_nonfinite",
        ),
        ({"train": (jnp.ones((5, 2)), jnp.full(5, jnp.inf))}, r"train\[1\] holds 5 values"),
        ({"test": (jnp.ones((5, 2)), jnp.full(5, -jnp.inf))}, r"test\[1\] holds 5 values"),
        ({"init": lambda key: {"weight": jnp.zeros(2, int)}}, "params must have a floating-point leaf"),
        ({"init": lambda key: {}}, "params must have a floating-point leaf"),
        ({"init": lambda key: {"weight": jnp.zeros(2), "activation": jnp.tanh}}, "init must return a pytree of arrays"),
        (
            {"loss": lambda params, example: params["weight"]},
            r"loss must return one .* returns float\d+\[2\]: reduce it",
        ),
        ({"loss": lambda params, example: 1}, "loss must return one"),
        (
            {"loss": lambda params, example: (params["weight"] @ jax.lax.pmean(example[0], "batch")) ** 2},
            "a loss of one example cannot depend on the others of its batch",
        ),
        ({"loss": lambda params, example: (params["weight"].sum(), 0.0)}, "it returns a tuple"),
        ({"metrics": {"margin": lambda params, example: params["weight"]}}, "metric 'margin' must return one scalar"),
    ],
)
def test_bad_input_is_refused_when_the_problem_is_made(change, message):
    with pytest.raises(ValueError, match=message):
        Problem(**(VALID | change))


def test_nonfinite_data_are_accepted_when_asked_for():
    train = (np.diag([1.0, np.nan]), np.ones(2))
    assert Problem(**(VALID | {"train": train}), allow_nonfinite=True).num_examples == 2


def test_a_problem_can_be_made_under_vmap():
    """Its data are then traced, so that their values cannot be checked."""
    count = jax.vmap(lambda x: jnp.asarray(Problem(**(VALID | {"train": (x, jnp.ones(5))})).num_examples))
    np.testing.assert_array_equal(count(jnp.ones((3, 5, 2))), [5, 5, 5])


def test_a_problem_can_be_changed_within_a_traced_function():
    quadratic = problems.noisy_quadratic()

    def start(scale):
        return dataclasses.replace(quadratic, init=lambda key: scale * quadratic.init(key)).init(jax.random.key(1))

    np.testing.assert_allclose(jax.jit(start)(2.0), 2 * quadratic.init(jax.random.key(1)), rtol=1e-6)


def test_merge_undoes_trainable():
    params = {"a": jnp.ones(2), "b": (jnp.arange(3), None), "c": jnp.asarray(True), "key": jax.random.key(3)}
    train, frozen = problem.trainable(params)
    assert jax.tree.leaves(train)[0] is params["a"]
    assert len(jax.tree.leaves(train)) == 1
    merged = problem.merge(train, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (jnp.asarray([0, 1, 2]), r"labels must be in \[0, 2\), but example 2 has 2 \(1 such examples\)"),
        (jnp.asarray([0, -1, -1]), r"labels must be in \[0, 2\), but example 1 has -1 \(2 such"),
        (jnp.asarray([0.0, 1.0, 1.0]), "labels must be integers, but are float"),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("make", ["logistic", "classification"])
def test_labels_outside_the_classes_are_refused(make, part, labels, message):
    from gdjax.problems import datasets, models

    good = (jnp.ones((3, 2)), jnp.asarray([0, 1, 1]))
    data = datasets.Split(**({"train": good, "test": good} | {part: (jnp.ones((3, 2)), labels)}))
    classification = functools.partial(problems.classification, models.mlp((2, 2)), num_classes=2)
    with pytest.raises(ValueError, match=f"{part} {message}"):
        {"logistic": problems.logistic, "classification": classification}[make](data)


def test_a_problem_is_evaluated_in_chunks_as_in_one_piece():
    """600 examples are two chunks and a rest; each has another loss, so that none is lost or counted twice."""
    data = jnp.arange(600.0) ** 2
    problem = Problem(
        lambda key: jnp.zeros(()), lambda w, x: (w - x) ** 2, data, test=data[:7], metrics={"far": lambda w, x: x > w}
    )
    found = jax.jit(jax.vmap(problem.evaluate))(jnp.asarray([1.0, 300.0]))
    expected = [float(np.mean((w - np.asarray(data)) ** 2)) for w in (1.0, 300.0)]
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["far"], [np.mean(data > w) for w in (1.0, 300.0)], rtol=1e-6)
    assert problem.evaluate(5.0, on="test", names=["far"]).keys() == {"far"}
    np.testing.assert_allclose(problem.evaluate(5.0, on="test")["far"], 4 / 7, rtol=1e-6)
    np.testing.assert_allclose(problem.evaluate(5.0, on=data[3:5])["loss"], (4**2 + 11**2) / 2, rtol=1e-6)


@pytest.mark.parametrize("dtype", [bool, int, jnp.float16, float])
@pytest.mark.parametrize("unit", [1.0, 1e38, 1e-37])
def test_means_are_weighted_whatever_a_metric_returns_and_weights_are_measured_in(dtype, unit):
    """Labels 1 and 0 weigh one and three: a quarter of the weight is on ones."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        ones = jnp.asarray([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
        weighed = Problem(
            init=lambda key: jnp.zeros(()),
            loss=lambda w, e: (w - e) ** 2,
            train=ones,
            metrics={"one": lambda w, e: (e == 1).astype(dtype)},
            weight=lambda e: jnp.where(e == 1, 1.0, 3.0) * unit,
        )
        found = weighed.evaluate(jnp.zeros(()))
    np.testing.assert_allclose([found["one"], found["loss"]], [0.25, 0.25], rtol=1e-6)


@pytest.mark.usefixtures("nans")
def test_parameters_that_are_not_finite_have_no_metric():
    problem = Problem(
        lambda key: jnp.zeros(2), lambda w, x: (w[0] - x) ** 2, jnp.arange(6.0), metrics={"one": lambda w, x: x * 0 + 1}
    )
    found = problem.evaluate(jnp.asarray([0.0, jnp.nan]))
    assert np.isnan(found["one"])
    assert np.isnan(found["loss"])
    assert problem.evaluate(jnp.zeros(2))["one"] == 1


def test_what_cannot_be_evaluated_is_named():
    problem = Problem(lambda key: jnp.zeros(()), lambda w, x: (w - x) ** 2, jnp.arange(6.0), name="numbers")
    with pytest.raises(ValueError, match="on='test' must be 'train', or examples"):
        problem.evaluate(0.0, on="test")
    with pytest.raises(ValueError, match="numbers has no metric 'accuracy'; it has loss"):
        problem.evaluate(0.0, names=["accuracy"])
