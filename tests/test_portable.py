"""Every central program lowers for GPUs and TPUs, and what is meant for a CPU stays there."""

import jax
import jax.numpy as jnp
import programs
import pytest
from jax import export

from gdjax import problems
from gdjax.problems import models
from gdjax.problems.datasets import Split

ELSEWHERE = ("cuda", "tpu", "rocm")
MARKS = ("xla_cpu", "custom_call @lapack")


def small():
    x, y = jnp.ones((40, 6, 6, 1)), jnp.zeros(40, jnp.int32)
    tokens = jnp.zeros((40, 9), jnp.int32)
    return {
        "mlp": problems.classification(models.mlp((36, 8, 3)), Split((x.reshape(40, 36), y), None), num_classes=3),
        "cnn": problems.classification(
            models.cnn((6, 6, 1), channels=(2, 4), num_groups=2, num_classes=3), Split((x, y), None), num_classes=3
        ),
        "transformer": problems.language_model(
            models.transformer(num_tokens=5, width=8, num_layers=1, num_heads=2), Split(tokens, None), num_tokens=5
        ),
    }


PROBLEMS = small()
LOOPS = [
    *programs.of_loops("mlp", PROBLEMS["mlp"]),
    *programs.of_streams(),
    *programs.of_variants(PROBLEMS["mlp"]),
    *programs.of_gradients("mlp", PROBLEMS["mlp"]),
]
REST = [
    *(program for name in ("cnn", "transformer") for program in programs.of_loops(name, PROBLEMS[name])),
    *(program for name in ("cnn", "transformer") for program in programs.of_gradients(name, PROBLEMS[name])),
]


def lowered(function, arguments):
    return export.export(jax.jit(function), platforms=ELSEWHERE)(*arguments).mlir_module()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [pytest.param(*rest, id=name) for name, *rest in LOOPS]
    + [pytest.param(*rest, id=name, marks=pytest.mark.slow) for name, *rest in REST],
)
def test_a_program_lowers_for_every_platform_and_no_mark_of_a_cpu_is_in_it(function, arguments):
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam counts updates in integers
        text = lowered(function, arguments)
    assert not [mark for mark in MARKS if mark in text]
