"""What the code promises of itself: the way imports go, that files are no programs, that a key is used once."""

import ast
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import gdjax
from gdjax import batching, curvature, descent, gradients, noise
from gdjax.problems import datasets, models

FOLDER = Path(gdjax.__file__).parent
FILES = {
    path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*.py") if path.parent / path.stem != FOLDER
}
# A room imports from those of the lines above its own, and from those before it in its own.
FLOORS = """
    _trees _files
    problem batching theory
    ghost kernels privacy
    gradients
    descent curvature
    timing report problems noise sweep training
    tuning
    compare advise bench
    commands
"""
ROOMS = FLOORS.split()


def room_of(name):
    return name.split("/")[0].removesuffix(".py")


def tree(name):
    return ast.parse(FILES[name].read_text())


def imported(nodes):
    """Yield the modules and names of gdjax that these statements import, as dotted paths."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gdjax":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "gdjax")


def test_the_map_of_the_package_names_every_room():
    assert sorted({room_of(name) for name in FILES} - {"__init__"}) == sorted(ROOMS)
    public = sorted(room for room in ROOMS if not room.startswith("_"))
    assert sorted(re.findall(r"^    (\w+)  ", gdjax.__doc__ or "", re.MULTILINE)) == public == sorted(gdjax.__all__)


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"__init__.py"}))
def test_a_room_imports_only_from_those_before_it(name):
    above = {*ROOMS[: ROOMS.index(room_of(name))], room_of(name)}
    found = {path.split(".")[1] for path in imported(ast.walk(tree(name)))}
    assert found <= above, found - above


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


@pytest.mark.slow
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
        batches = batching.batches(batching.reshuffled(next(keys), 6, num_epochs=1), 2)
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


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"__init__.py"}))
def test_what_begins_with_an_underscore_is_private_to_its_package(name):
    for path in imported(ast.walk(tree(name))):
        _, *parts = path.split(".")
        private = [part for part in parts[1:] if part.startswith("_")]
        assert not private or parts[0] == room_of(name), path


def public_names(module):
    names = getattr(module, "__all__", None)
    if names is not None:
        return names
    return [
        name for name, x in vars(module).items() if name[0] != "_" and getattr(x, "__module__", None) == module.__name__
    ]


def test_faces_do_not_grow_unnoticed():
    """180 is the aim. The weights, the noise scale in any loop, optimisers, rules and schedules went beyond it."""
    rooms = [importlib.import_module(f"gdjax.{room}") for room in gdjax.__all__]
    assert sum(len(public_names(room)) for room in rooms) < 240


def test_the_package_has_at_most_24_entries():
    entries = {path.name for path in FOLDER.iterdir()} - {"__init__.py", "__pycache__", "py.typed"}
    assert len(entries) <= 24
