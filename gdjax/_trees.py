"""Arrays and pytrees of them: what several modules ask of a leaf."""

import weakref
from collections.abc import Callable, Hashable
from types import MethodType
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def is_key(leaf: Any) -> bool:
    """Return whether a leaf is an array of typed PRNG keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def wide(x: jax.Array) -> jax.Array:
    """Return x in float32 at least: squares of bfloat16 do not add up."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def varying(*trees: Any) -> frozenset[str]:
    """Return the mesh axes along which a leaf may differ between devices, as `jax.shard_map` knows it."""
    kinds = map(jax.typeof, jax.tree.leaves(trees))
    types = (getattr(kind, "manual_axis_type", None) or kind for kind in kinds)
    return frozenset().union(*(getattr(kind, "varying", None) or getattr(kind, "vma", ()) for kind in types))


def made_varying(tree: Any, axes: frozenset[str]) -> Any:
    """Return the tree with leaves that count as different between devices along these axes of the mesh."""

    def make(x):
        missing = tuple(sorted(axes - varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(make, tree)


KEPT, MAX_KEPT = "__gdjax_kept__", 64  # an attribute; programs of one owner


def kept(owner: Any, key: Hashable, make: Callable[[], Any]) -> Any:
    """Return `make()`, made once for each key and kept as long as `owner`, a function or a problem, lives.

    What is made usually refers to `owner`, a compiled program to the function that it was made from. So it is kept in
    the attributes of the owner itself, where Python's garbage collector finds the cycle, and not in a table, which
    would keep both for ever. The latest MAX_KEPT are kept. Nothing is kept of a callable without attributes of its own,
    as a method of an object is. `functools.wraps`, and `jax.vmap` with it, copies the attributes of one function to
    another: what is there counts only where it was made for `owner`.
    """
    attributes = getattr(owner, "__dict__", None)
    if not isinstance(attributes, dict) or isinstance(owner, MethodType):
        return make()
    made_for, found = attributes.get(KEPT, (lambda: None, {}))
    if made_for() is not owner:
        found = {}
        attributes[KEPT] = weakref.ref(owner), found
    value = found.pop(key) if key in found else make()
    found[key] = value  # the last used comes last
    if len(found) > MAX_KEPT:
        del found[next(iter(found))]
    return value


def traced(*trees: Any) -> bool:
    """Return whether an array in these trees is known only when the program runs that JAX is tracing."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def bare(tree: Any) -> Any:
    """Return the tree with the array itself in place of what holds one, such as a variable of Flax NNX."""
    return jax.tree.map(lambda leaf: leaf.__jax_array__() if _holds_one(leaf) else leaf, tree, is_leaf=_holds_one)


def _holds_one(leaf: Any) -> bool:
    return hasattr(leaf, "__jax_array__") and not isinstance(leaf, jax.Array)  # as a tracer is
