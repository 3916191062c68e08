"""Standard error, and standard output where it holds a result alone."""

import io
import os
import sys
from typing import Any


class Aside(io.TextIOBase):
    """Standard output that goes where `say` says it."""

    def write(self, text: str) -> int:
        say(text, end="")
        return len(text)


def say(text: str, end: str = "\n") -> None:
    """Print to standard error; where that is full or gone, the exit status alone has to tell."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        silenced(sys.stderr)


def silenced(stream: Any) -> None:
    """Lead a stream nowhere, so that nothing is left to fail when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
