"""The points of a sweep: a product of axes, tables of what was found at them, and the best of them.

>>> rates = grid(rate=[0.125, 0.5], seed=[0, 1])
>>> rates.table({"loss": np.asarray([[3.0, np.nan], [1.5, 2.0]])})[2]
{'rate': 0.5, 'seed': 0, "['loss']": 1.5}
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdjax._trees import is_key
from gdjax.sweep import _programs as programs


class Grid(NamedTuple):
    """A full product of axes, made by `grid`.

    Attributes:
        axes: {name: pytree of arrays and typed keys [A, ...]}, the entries of each axis.
    """

    axes: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes, [A1, A2, ...]: the leading axes of the results of `map`."""
        return tuple(num_points_of(axis, name) for name, axis in self.axes.items())

    @property
    def points(self) -> dict[str, Any]:
        """All points, a dict of arrays [P, ...], P = A1 A2 ...; row-major: the last axis varies fastest."""
        rows = np.indices(self.shape).reshape(len(self.axes), -1)
        return {
            name: jax.tree.map(lambda leaf, row=row: leaf[row], axis)
            for (name, axis), row in zip(self.axes.items(), rows, strict=True)
        }

    def table(self, results: Any) -> list[dict[str, Any]]:
        """Return a row for every point, for `csv.DictWriter` or `pandas.DataFrame`: its entries, and its results.

        An axis of numbers gives its number, any other the position on it. Results, as `map` returns them, are numbers,
        or lists of them, under their path in the pytree, `result` where they are one array.
        """
        found = {named(path) or "result": x for path, x in jax.tree_util.tree_leaves_with_path(results)}
        entries = {name: _entries(axis) for name, axis in self.axes.items()}
        return [
            {name: entries[name][i] for name, i in zip(self.axes, index, strict=True)}
            | {name: np.asarray(x[index]).tolist() for name, x in found.items()}
            for index in np.ndindex(*self.shape)
        ]

    def best(self, values: Any, *, largest: bool = False) -> tuple[int, ...]:
        """Return where `values`, [A1, A2, ...], are least, or `largest`, among those that are finite.

        >>> losses = [[np.nan, 0.3], [0.2, np.inf]]
        >>> grid(rate=[0.1, 0.5], seed=[0, 1]).best(losses)
        (1, 0)

        Raises:
            ValueError: for values of another shape, and where none is finite.
        """
        array = np.asarray(values, float)
        if array.shape != self.shape:
            raise ValueError(f"values have the shape {array.shape}, but the grid has {self.shape}: reduce them to it")
        if not np.isfinite(array).any():
            raise ValueError(f"none of the {array.size} values is finite")
        ranked = np.where(np.isfinite(array), -array if largest else array, np.inf)
        return tuple(int(i) for i in np.unravel_index(ranked.argmin(), self.shape))


def grid(**axes: Any) -> Grid:
    """Return the full product of named axes.

    Args:
        axes: sequences of numbers, arrays [A] or [A, ...], typed keys [A], or pytrees of arrays that share the axis A.

    Raises:
        ValueError: without an axis, and for an axis that is empty, a scalar or not numbers.
    """
    if not axes:
        raise ValueError("grid needs an axis, for instance grid(learning_rate=[0.1, 0.3])")
    arrays = {
        name: programs.numbers(axis, name) if type(axis) in (list, tuple, range, np.ndarray) else axis
        for name, axis in axes.items()
    }
    for name, axis in arrays.items():
        num_points_of(axis, name)
    return Grid({name: jax.tree.map(jnp.asarray, axis) for name, axis in arrays.items()})


def num_points_of(points: Any, name: str) -> int:
    """Return the length of the leading axis that all leaves share; `name` is what an error calls them."""
    sizes = {f"{name}{named(path)}": np.shape(x)[:1] for path, x in jax.tree_util.tree_leaves_with_path(points)}
    shown = ", ".join(f"{path}: {size[0] if size else 'scalar'}" for path, size in sizes.items())
    if not sizes or () in sizes.values() or len(set(sizes.values())) > 1:
        raise ValueError(
            f"every leaf of {name} must be an array with the same leading axis, but found {shown or 'no array'}"
        )
    [(num_points,)] = set(sizes.values())
    if num_points == 0:
        raise ValueError(f"{name} has 0 entries on its leading axis ({shown}): nothing to run")
    return num_points


def _entries(axis: Any) -> list[Any]:
    """Return an entry of a table for each of an axis: its number, or its position where it is more than one."""
    if isinstance(axis, jax.Array) and axis.ndim == 1 and not is_key(axis):
        return axis.tolist()
    return list(range(num_points_of(axis, "axis")))


def named(path: Any) -> str:
    """Return a path in a pytree as text."""
    return jax.tree_util.keystr(path)
