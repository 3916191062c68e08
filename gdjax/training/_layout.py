"""Where the leaves of a state lie on a mesh: in shards, by a rule, for what one device cannot hold.

>>> import jax.numpy as jnp
>>> mesh = jax.make_mesh((1,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
>>> layout = of(mesh, "fsdp")
>>> jax.tree.map(lambda sharding: sharding.spec, layout({"w": jnp.zeros((10, 64)), "b": jnp.zeros(())}))
{'b': P(), 'w': P(None, 'devices')}
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gdjax.descent import Method, State

Rule = Callable[[str], PartitionSpec]
Layout = Callable[[Any], Any]
"""pytree of arrays, or of their shapes -> pytree of shardings."""


def of(mesh: Mesh | None, rule: str | Rule | None) -> Layout | None:
    """Return the layout of a rule, None without one; see `training.run`.

    Raises:
        ValueError: for a rule without a mesh, over several processes, and for a word that is no rule.
    """
    if rule is None:
        return None
    if mesh is None:
        raise ValueError(f"sharded={rule!r} says how a state lies on a mesh: give mesh=jax.make_mesh(...)")
    if jax.process_count() > 1:
        raise ValueError(f"sharded={rule!r} is for the devices of one process, but there are {jax.process_count()}")
    if rule != "fsdp" and not callable(rule):
        raise ValueError(f"sharded={rule!r} must be 'fsdp', or a function from a leaf's path to its PartitionSpec")

    def spec(path: Any, x: Any) -> NamedSharding:
        made = rule(jax.tree_util.keystr(path)) if callable(rule) else _longest(x.shape, mesh)
        return NamedSharding(mesh, made)

    return lambda tree: jax.tree_util.tree_map_with_path(spec, tree)


def _longest(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Share the longest axis that all devices can share equally; a leaf without one is replicated."""
    lengths = [length if length % mesh.size == 0 else 0 for length in shape]
    if not any(lengths):
        return PartitionSpec()
    axis = int(np.argmax(lengths))
    return PartitionSpec(*[None] * axis, mesh.axis_names)


def begun(layout: Layout | None, init: Callable[[jax.Array], State], key: jax.Array) -> State:
    """Return `init(key)`, with a layout so that no device ever holds it whole."""
    if layout is None:
        return init(key)
    return jax.jit(init, out_shardings=layout(jax.eval_shape(init, key)))(key)


def kept_in(layout: Layout, method: Method) -> Method:
    """Return the method with its state in the layout after every update."""

    def step(state, batch):
        state, info = method.step(state, batch)
        return lax.with_sharding_constraint(state, layout(state)), info

    return Method(method.init, step)
