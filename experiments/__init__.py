"""Experiments: each a question, a prediction, and a verdict that its numbers can contradict."""

import sys

from gdjax.commands import _session as command

if sys.argv[0] == "-m":  # run, and not imported by another program
    command.end_at_interruption()
