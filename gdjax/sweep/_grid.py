"""The points of a sweep: a product of axes, tables of what was found at them, and the best of them.

>>> rates = grid(rate=[0.125, 0.5], seed=[0, 1])
>>> rates.table({"loss": np.asarray([[3.0, np.nan], [1.5, 2.0]])})[2]
{'rate': 0.5, 'seed': 0, "['loss']": 1.5}
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdjax._trees import is_key, kept
from gdjax.sweep import _programs


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """A full product of axes, made by `grid`. Its length is the number of its points.

    Attributes:
        axes: {name: pytree of arrays and typed keys [A, ...]}, the entries of each axis.
        programs: {name: {label: value}}, axes before these whose values are no numbers of a program, but make one each.
    """

    axes: dict[str, Any]
    programs: dict[str, dict[Any, Any]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes, [A1, A2, ...]: the leading axes of the results of `map`."""
        lengths = [num_points_of(axis, name) for name, axis in self.axes.items()]
        return (*map(len, self.programs.values()), *lengths)

    @property
    def points(self) -> dict[str, Any]:
        """The points of one program, a dict of arrays [P, ...], P = A1 A2 ...; row-major: the last varies fastest."""
        rows = np.indices(self.shape[len(self.programs) :]).reshape(len(self.axes), -1)
        return {
            name: jax.tree.map(lambda leaf, row=row: leaf[row], axis)
            for (name, axis), row in zip(self.axes.items(), rows, strict=True)
        }

    def table(self, results: Any) -> list[dict[str, Any]]:
        """Return a row for every point, for `csv.DictWriter` or `pandas.DataFrame`: its entries, and its results.

        An axis of numbers gives its number, one of programs its label, any other the position on it. Results, as `map`
        returns them, are numbers, or lists of them, under their path in the pytree, `result` where they are one array.
        """
        found = {named(path) or "result": x for path, x in jax.tree_util.tree_leaves_with_path(results)}
        entries = {name: [*axis] for name, axis in self.programs.items()}
        entries |= {name: _entries(axis) for name, axis in self.axes.items()}
        return [
            {name: entries[name][i] for name, i in zip(entries, index, strict=True)}
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


def grid(programs: Mapping[str, Any] | None = None, /, **axes: Any) -> Grid:
    """Return the full product of named axes.

    >>> import optax
    >>> optimizers = {"sgd": optax.sgd, "adam": optax.adam}
    >>> grid({"batch_size": [8, 64], "optimizer": optimizers}, rate=[0.1, 0.2, 0.4]).shape
    (2, 2, 3)

    Args:
        programs: axes that change shapes or code, the first of the grid. `map` compiles a program for each of their
            combinations. Lists of numbers and strings, or {label: value} of hashable values, such as functions.
        axes: sequences of numbers, arrays [A] or [A, ...], typed keys [A], or pytrees of arrays that share the axis A.

    Raises:
        ValueError: without an axis, for an axis that is empty, a scalar or not numbers, and for programs that cannot be
            told apart by their labels.
    """
    if not axes:
        raise ValueError("grid needs an axis, for instance grid(learning_rate=[0.1, 0.3])")
    arrays = {
        name: _programs.numbers(axis, name) if type(axis) in (list, tuple, range, np.ndarray) else axis
        for name, axis in axes.items()
    }
    for name, axis in arrays.items():
        num_points_of(axis, name)
    labelled = {name: _labelled(name, axis) for name, axis in (programs or {}).items()}
    if twice := sorted(labelled.keys() & axes.keys()):
        raise ValueError(f"{twice[0]} is an axis of programs and one of numbers: give it once")
    return Grid({name: jax.tree.map(jnp.asarray, axis) for name, axis in arrays.items()}, labelled)


def functions(grid: Grid, fn: Callable[[Any], Any]) -> dict[str, Callable[[Any], Any]]:
    """Return {name: function of a point of the other axes} of every program, row-major; kept with `fn`."""
    if not grid.programs:
        return {"": fn}
    found = {}
    for chosen in itertools.product(*(axis.items() for axis in grid.programs.values())):
        values = {name: value for name, (_, value) in zip(grid.programs, chosen, strict=True)}
        title = ",".join(f"{name}={label}" for name, (label, _) in zip(grid.programs, chosen, strict=True))
        same = tuple((name, type(value), value) for name, value in values.items())
        found[title] = kept(fn, ("program", same), partial(_bound, fn, values))
    return found


def _bound(fn: Callable[[Any], Any], values: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda point: fn(values | point)


def _labelled(name: str, axis: Any) -> dict[Any, Any]:
    """Return {label: value} of an axis of programs; labels name folders."""
    try:
        entries = dict(axis) if isinstance(axis, Mapping) else {value: value for value in axis}
        hash(tuple(entries.values()))
    except TypeError as error:
        raise ValueError(f"programs[{name!r}] must be a list or a dict of hashable values: {error}") from error
    wrong = [label for label in (name, *entries) if not re.fullmatch(r"[\w.+-]+", str(label))]
    if not entries or len(entries) < len(axis) or wrong:
        raise ValueError(
            f"programs[{name!r}]={axis!r} must be numbers and words, each once, or {{label: value}} with such labels"
        )
    return entries


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
