"""Which batch size reaches a target first on this device, and which rule carries hyperparameters: both verified.

>>> from gdjax import problems
>>> advice = batch_size(problems.least_squares(), "loss<=0.01", seconds=60)
>>> advice.batch_size in (1, 2, 4, 8, 16, 32, 64), advice.tuned is not None, len(advice.choices)
(True, True, 11)

And whether a growing batch, a falling rate, both or neither reaches it first: `schedule`.
"""

from gdjax.advise._advise import batch_size
from gdjax.advise._answer import Advice
from gdjax.advise._choices import Choice, default_batch_sizes
from gdjax.advise._figure import advice, regrets
from gdjax.advise._outcomes import Rules
from gdjax.advise._rules import rules
from gdjax.advise._schedule import schedule

__all__ = ["Advice", "Choice", "Rules", "advice", "batch_size", "default_batch_sizes", "regrets", "rules", "schedule"]
