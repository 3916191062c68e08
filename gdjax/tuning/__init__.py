"""Runs of every learning rate and seed at one batch size, and the rate that is best."""

from gdjax.tuning._histories import of_lanes
from gdjax.tuning._lanes import Lanes, Optimizer, Runs, runs
from gdjax.tuning._optimizers import OPTIMIZERS, named
from gdjax.tuning._pilots import Pilot, search, tune
from gdjax.tuning._targets import Budget, Goal, Target, parse_target

__all__ = [
    "OPTIMIZERS",
    "Budget",
    "Goal",
    "Lanes",
    "Optimizer",
    "Pilot",
    "Runs",
    "Target",
    "named",
    "of_lanes",
    "parse_target",
    "runs",
    "search",
    "tune",
]
