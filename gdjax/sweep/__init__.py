"""Many runs in one program, in chunks that survive a crash."""

from gdjax.sweep._sweep import grid, run

__all__ = [
    "grid",
    "run",
]
