"""What the code promises of itself: the way imports go, that files are no programs, that a key is used once."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import gdjax
from gdjax import batching, curvature, datasets, descent, gradients, models, noise

FOLDER = Path(gdjax.__file__).parent
FILES = {path.stem: path for path in FOLDER.glob("*.py") if path.stem != "__init__"}
ORDER = re.findall(r"^    (\w+)  ", gdjax.__doc__ or "", re.MULTILINE)


def tree(name):
    return ast.parse(FILES[name].read_text())


def imported(nodes):
    """Return the modules of gdjax that these statements import."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "gdjax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gdjax."):
            yield (node.module or "").split(".")[1]


def parts_of(names):
    """Return the files of modules that are one in the table: ghost_rules of ghost."""
    return {file for file in FILES if file not in ORDER and any(file.startswith(f"{name}_") for name in names)}


def test_the_table_of_contents_names_every_module_once():
    assert sorted([*ORDER, *parts_of(ORDER)]) == sorted(FILES)
    assert sorted({*ORDER, *gdjax.__all__}) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_what_stands_above_it(name):
    above = set(ORDER[: ORDER.index(name)])
    assert set(imported(tree(name).body)) <= above | parts_of({*above, name}) | {"__version__"}


def test_nothing_that_a_file_holds_is_executed():
    forbidden = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml"}
    for name in FILES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not {part.split(".")[0] for part in names} & {*forbidden, "experiments"}, name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "__import__"}, name
                if called in {"np.load", "np.save", "numpy.load", "numpy.save"}:
                    assert "allow_pickle=False" in ast.unparse(node), name


def test_no_key_is_used_twice():
    """By whatever takes one or draws parameters, data, streams, signs or noise."""
    batch, square = jnp.linspace(0.0, 1.0, 6), lambda w, x: (w * x - 1) ** 2
    keyed = lambda w, both: square(w, both[0]) + jax.random.normal(both[1], dtype=w.dtype)  # noqa: E731
    method = descent.with_keys(descent.method(gradients.mean(keyed), optax.sgd(0.1)), jax.random.key(0))
    noisy = gradients.clipped(square, 1.0, noise_multiplier=1.0, noise_key=lambda batch: jax.random.key(0))
    w = jnp.asarray(1.0)

    def everything(key):
        keys = iter(jax.random.split(key, 16))
        for stream in (batching.reshuffled, batching.shuffled_once, batching.with_replacement):
            yield stream(next(keys), 6, num_epochs=3)
        batches = batching.cut(batching.reshuffled(next(keys), 6, num_epochs=1), 2)
        yield descent.run(method, method.init(w), batch, batches)
        yield noisy(w, batch)
        yield noise.measure(square, w, batch, next(keys), num_examples=4).b_simple
        yield noise.measure_hessian(square, w, batch, next(keys), batch_size=2, num_pairs=2).b_noise
        yield curvature.trace(square, num_samples=2)(w, batch, next(keys))
        yield curvature.random_vectors(next(keys), w, num_vectors=1)
        yield datasets.gaussian_regression(next(keys), num_examples=2, dimension=2)
        yield datasets.gaussian_classification(next(keys), num_examples=2, dimension=2)
        yield models.mlp((2, 3, 1)).init(next(keys))
        yield models.cnn((4, 4, 1)).init(next(keys))
        yield models.transformer(num_tokens=3).init(next(keys))

    with jax.debug_key_reuse(True):
        assert jax.tree.leaves(jax.jit(lambda key: list(everything(key)))(jax.random.key(1)))
        with pytest.raises(jax.errors.KeyReuseError):  # that it would be seen
            jax.jit(lambda key: jax.random.normal(key) + jax.random.uniform(key))(jax.random.key(1))
