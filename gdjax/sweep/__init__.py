"""Many runs in one program, in chunks that survive a crash."""

from gdjax.sweep._programs import free_bytes
from gdjax.sweep._sweep import grid, run

__all__ = [
    "free_bytes",
    "grid",
    "run",
]
