"""Arrays and pytrees of them: what several modules ask of a leaf."""

import functools
import weakref
from collections.abc import Callable, Hashable
from types import MethodType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_key(leaf: Any) -> bool:
    """Return whether a leaf is an array of typed PRNG keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def wide(x: jax.Array) -> jax.Array:
    """Return x in float32 at least: squares of bfloat16 do not add up."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def scaled(weights: jax.Array, *, num_examples: int = 1) -> jax.Array:
    """Return the weights times a power of two, exactly, so that a sum over `num_examples` of them is below 1.

    Sums of gradients then are no larger than their mean, which in float16 keeps them from infinity.
    """
    _, exponent = jnp.frexp(weights.max())
    return jnp.ldexp(weights, -exponent - (num_examples - 1).bit_length())


def filled(batch: Any, weights: jax.Array) -> Any:
    """Return the batch [B, ...] with its example of largest weight in place of those of weight zero.

    One example is read for it, so that a batch that is sharded over devices moves no more than that.
    """
    chosen = jnp.argmax(weights)

    def choose(x):
        keep = jnp.expand_dims(weights > 0, range(1, x.ndim))
        return jnp.where(keep, x, x[chosen][None])

    return jax.tree.map(choose, batch)


def over(total: jax.Array, weight: jax.Array) -> jax.Array:
    """Return total / weight, and zero where the weight is."""
    positive = weight > 0
    return jnp.where(positive, total / jnp.where(positive, weight, 1).astype(total.dtype), 0)


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Return sum w v / sum w of values [N], in float32 at least, and zero where all weights are.

    The weights may be in any unit, and a value of weight zero may be NaN.
    """
    values = wide(values)
    weights = scaled(weights).astype(values.dtype)
    return over(jnp.sum(jnp.where(weights > 0, values, 0) * weights), weights.sum())


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


def concrete(*trees: Any) -> bool:
    """Return whether all leaves are arrays whose numbers are known, as those of a call outside of any program."""
    return not traced(trees) and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(trees))


def compiled_alone(function: Callable) -> Callable:
    """Return a pure function of pytrees that, called outside of any program, compiles once for the same shapes.

    Loops over closures of its own would be compiled at every call. Within a program it is the function itself, and so
    it is for leaves that are no arrays, of which it says more than `jax.jit` does.
    """
    program = jax.jit(function)

    @functools.wraps(function)
    def call(*arguments, **named):
        return (program if concrete(arguments, named) else function)(*arguments, **named)

    return call


def bare(tree: Any) -> Any:
    """Return the tree with the array itself in place of what holds one, such as a variable of Flax NNX."""
    return jax.tree.map(lambda leaf: leaf.__jax_array__() if _holds_one(leaf) else leaf, tree, is_leaf=_holds_one)


def _holds_one(leaf: Any) -> bool:
    return hasattr(leaf, "__jax_array__") and not isinstance(leaf, jax.Array)  # as a tracer is


def trainable(params: Any, only: Any = None) -> tuple[Any, Any]:
    """Split parameters into (the leaves to train, all other leaves), each with None where the other has a leaf.

    The floating-point leaves are trained, or those among them that `only` chooses. Gradients, optimisers and statistics
    see the first part alone; `merge` puts the two together again.

    >>> trainable({"weight": 1.5, "steps": 3})
    ({'steps': None, 'weight': 1.5}, {'steps': 3, 'weight': None})
    >>> trainable({"body": 1.5, "head": 0.5}, lambda path: "head" in path)
    ({'body': None, 'head': 0.5}, {'body': 1.5, 'head': None})

    Args:
        params: the parameters.
        only: path -> bool, the path as `jax.tree_util.keystr` writes it; or bools in a pytree like `params`, in which
            one bool may stand for all leaves below it. None: all floating-point leaves.

    Raises:
        ValueError: where a leaf is no array or complex, where no leaf is left to train, and where `only` does not have
            the structure of the parameters.
    """
    floating = jax.tree_util.tree_map_with_path(_is_floating, params)
    if not any(jax.tree.leaves(floating)):
        names = [str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params)]
        raise ValueError(f"params must have a floating-point leaf to train, but its leaves are {names}")
    chosen = floating if only is None else jax.tree.map(lambda a, b: a and b, floating, _mask(only, params))
    if not any(jax.tree.leaves(chosen)):
        paths = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(floating) if leaf]
        raise ValueError(f"trainable={only} chooses none of the floating-point leaves of params, {paths}")
    train = jax.tree.map(lambda leaf, is_chosen: leaf if is_chosen else None, params, chosen)
    frozen = jax.tree.map(lambda leaf, is_chosen: None if is_chosen else leaf, params, chosen)
    return train, frozen


def merge(train: Any, frozen: Any) -> Any:
    """Undo `trainable`."""
    return jax.tree.map(lambda a, b: b if a is None else a, train, frozen, is_leaf=lambda leaf: leaf is None)


def _is_floating(path, leaf) -> bool:
    try:
        dtype = jnp.result_type(leaf)
    except TypeError as error:
        raise ValueError(
            f"params must be a pytree of arrays, but its leaf at {jax.tree_util.keystr(path)} is a "
            f"{type(leaf).__name__}: an Equinox model keeps its functions apart with eqx.partition(model, eqx.is_array)"
        ) from error
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError("params must be real: keep a complex leaf as its real and imaginary parts")
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _mask(only: Any, params: Any) -> Any:
    """Return bools like the parameters."""
    if callable(only):
        return jax.tree_util.tree_map_with_path(lambda path, _: bool(only(jax.tree_util.keystr(path))), params)
    try:
        return jax.tree.map(lambda chosen, below: jax.tree.map(lambda _: bool(chosen), below), only, params)
    except (ValueError, TypeError) as error:
        raise ValueError(f"trainable must be a predicate or bools in a pytree like params: {error}") from error
