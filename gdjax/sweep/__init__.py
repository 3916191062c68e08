"""Many runs in one program, in chunks that survive a crash: a function of one grid point, mapped over a grid.

>>> from gdjax import sweep
>>> rates = sweep.grid(rate=[0.1, 0.5], start=[1.0, 2.0, 3.0])
>>> rates.shape, sweep.map(lambda point: point["start"] * (1 - point["rate"]), rates).shape
((2, 3), (2, 3))
"""

from gdjax.sweep._grid import Grid, grid
from gdjax.sweep._lanes import at_once, vmap
from gdjax.sweep._programs import free_bytes
from gdjax.sweep._sweep import map  # noqa: A004

__all__ = [
    "Grid",
    "at_once",
    "free_bytes",
    "grid",
    "map",
    "vmap",
]
