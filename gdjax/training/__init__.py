"""One long run from the host: progress, checkpoints, exact resume, many devices."""

from gdjax.training._run import run

__all__ = [
    "run",
]
