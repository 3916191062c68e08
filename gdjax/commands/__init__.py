"""The command line: `gdjax compare`, `advise` and `bench`, and how an experiment is run."""

from gdjax.commands._cli import main

__all__ = ["main"]
