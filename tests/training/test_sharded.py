"""A state in shards on the devices of a mesh: the same run as on one, to rounding, and resumed on fewer."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from jax.sharding import AxisType, PartitionSpec

from gdjax import training
from gdjax.problem import Problem

X = np.random.default_rng(0).normal(size=(48, 16))


def init(key):
    return {"w": jax.random.normal(key, (16, 8)), "v": jnp.ones((8, 3)) / 4, "b": jnp.zeros(3)}


def loss(params, x):
    return ((jnp.tanh(x @ params["w"]) @ params["v"] + params["b"] - x[:3]) ** 2).sum()


PROBLEM = Problem(init, loss, jnp.asarray(X))
OPTIMIZER = optax.sgd(0.002, momentum=0.9)


def run(num_devices, num_updates=20, **options):
    options = {"key": jax.random.key(0), "batch_size": 8, "chunk_updates": 10, "ema": 100.0} | options
    if num_devices:
        options["mesh"] = jax.make_mesh(
            (num_devices,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices]
        )
    return training.run(PROBLEM, OPTIMIZER, num_updates=num_updates, **options)


def assert_same(found, expected):
    found, expected = ((x.state.params, x.state.opt_state, x.ema.params, x.history) for x in (found, expected))
    jax.tree.map(
        lambda x, y: precision.assert_close(np.asarray(x), np.asarray(y), rtol=1e-9, atol=1e-11), found, expected
    )


def shards(tree):
    """Return the shape of what the first device holds of every leaf, by the end of its path."""
    return {
        jax.tree_util.keystr(path)[-5:]: x.addressable_shards[0].data.shape
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def by_path(path):
    return PartitionSpec("devices") if path.endswith("['w']") else PartitionSpec()


def check(folder, many, fewer):
    """Compare runs on one device, on many, and on many and then fewer."""
    expected, found = run(None), run(many, sharded="fsdp")
    assert_same(found, expected)
    for tree in (found.state.params, found.state.opt_state, found.ema.params):
        of_tree = shards(tree)
        assert {name: of_tree[name] for name in ("['w']", "['v']", "['b']")} == {
            "['w']": (16 // many, 8),
            "['v']": (8 // many, 3),
            "['b']": (3,),
        }
    run(many, 10, sharded="fsdp", folder=folder)
    assert (folder / "10" / "arrays" / "_sharding").exists()  # orbax has been given what lies on the devices
    resumed = run(fewer, sharded="fsdp", folder=folder)
    assert_same(resumed, expected)
    assert shards(resumed.state.params)["['w']"] == (16 // fewer, 8)
    with pytest.raises(ValueError, match=r"holds another run: sharded was 'fsdp' and is None, first state was None"):
        run(many, folder=folder)


def test_a_state_in_shards_by_a_rule_of_paths_trains_as_on_one_device():
    found = run(2, sharded=by_path, num_updates=10)
    assert_same(found, run(None, num_updates=10))
    assert shards(found.state.opt_state)["['w']"] == (8, 8)
    assert shards(found.state.params)["['v']"] == (8, 3)


@pytest.mark.parametrize(
    ("num_devices", "rule", "message"),
    [
        (None, "fsdp", "sharded='fsdp' says how a state lies on a mesh: give mesh="),
        (2, "zero", "sharded='zero' must be 'fsdp', or a function"),
    ],
)
def test_rules_that_lay_out_nothing_are_refused(num_devices, rule, message):
    with pytest.raises(ValueError, match=message):
        run(num_devices, sharded=rule)


CHILD = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)
sys.path[:0] = ["tests", "tests/training"]
import test_sharded
test_sharded.check(Path(sys.argv[1]) / "4", 8, 4)
test_sharded.check(Path(sys.argv[1]) / "1", 8, 1)
"""


@pytest.mark.slow
def test_eight_devices_and_then_four_or_one_train_as_one(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", CHILD, tmp_path]
    subprocess.run(command, cwd=root, timeout=300, check=True)
