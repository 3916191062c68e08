"""Which batch size reaches a target first on this device: predicted, then verified."""

from gdjax.advise._advise import advise
from gdjax.advise._answer import Advice
from gdjax.advise._figure import advice

__all__ = [
    "Advice",
    "advice",
    "advise",
]
