"""What results say of themselves fits on a line or two, and dumps no array."""

import html

import jax
import jax.numpy as jnp
import pytest

from gdjax import advise, noise, problems
from gdjax.problem import Problem


def loss(mean, x):
    return 0.5 * (mean - x) ** 2


@pytest.fixture
def numbers():
    return Problem(
        init=lambda key: jnp.zeros(()),
        loss=loss,
        train=jnp.linspace(1.0, 3.0, 100),
        test=jnp.ones(7),
        metrics={"squared": loss},
        name="numbers",
    )


def test_a_problem_counts_its_examples(numbers):
    assert repr(numbers) == "Problem('numbers', 100 examples and 7 for tests, metrics squared)"


@pytest.mark.slow
def test_a_noise_scale_is_its_sentence_and_of_many_its_fields(numbers):
    found = noise.measure(loss, jnp.zeros(()), numbers.train, jax.random.key(0), num_examples=100)
    assert repr(found) == str(found)
    assert repr(found).startswith("B_simple = ")
    many = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), found)
    assert repr(many) == str(many)
    assert "b_simple=Array(" in repr(many)
    assert "per_leaf" not in repr(many)
    seen = []
    jax.jit(lambda x: seen.append(repr(found._replace(b_simple=x))))(1.0)
    assert seen[0].startswith("NoiseScale(")


@pytest.mark.slow
def test_advice_is_a_table_in_a_notebook():
    found = advise.batch_size(problems.least_squares(), "loss<=0.01", sizes=(1, 16, 256), seconds=150)
    page = found._repr_html_()
    assert page.count("<tr>") == 1 + len(found.choices)
    assert html.unescape(page).startswith(f"<p>{found.sentence()}</p>")
