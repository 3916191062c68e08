"""The optimiser that a command is asked for. Nothing heavy is imported before it runs."""

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

from gdjax.commands import _specs

if TYPE_CHECKING:
    from gdjax.tuning import Optimizer


@dataclasses.dataclass(frozen=True)
class Descent:
    """The optimiser, and what goes with it."""

    optimizer: str = "sgd"
    """sgd, momentum, nesterov, adam, adamw, lion, rmsprop, adafactor, muon, or package.module:factory, a function
    learning_rate, or (learning_rate, num_updates), -> optax transformation. It must take a rate that jax traces."""
    weight_decay: float | None = None
    """Decoupled weight decay, multiplied by the learning rate. Default: 0.1 for adamw, lion and muon, else none."""
    clip: float | None = None
    """Largest norm of a batch's gradient. Default: none."""
    schedule: Literal["constant", "cosine", "wsd", "linear"] = "constant"
    """Learning rate over the share of the run that is over; wsd is constant, and falls to zero over the last fifth.
    With a target, for how many updates the schedule is made is tuned too: the fewest that reach it count."""
    warmup: float = 0.0
    """Share of the run in which the learning rate rises from zero."""

    def factory(self) -> "str | Optimizer":
        """Return what the library is given.

        Raises:
            ValueError: for an optimiser that there is not or that cannot be used, and for numbers out of range.
        """
        from gdjax import tuning

        options = {"weight_decay": self.weight_decay, "clip": self.clip}
        return tuning.named(_specs.optimizer(self.optimizer), schedule=self.schedule, warmup=self.warmup, **options)[0]


def half_life(ema: str | None) -> float | None:
    """Read --ema: a half-life in examples, or 'mean', which is an infinite one.

    Raises:
        ValueError: for what is neither.
    """
    if ema is None or ema == "mean":
        return ema and math.inf
    try:
        value = float(ema)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise ValueError(f"ema={ema!r} must be a half-life in examples, a positive number, or 'mean'")
    return value
