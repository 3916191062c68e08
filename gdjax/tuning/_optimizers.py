"""Optimisers by name, each with the hyperparameters to begin with, and the shape of the rate over a run.

>>> recipe, rate = named("adamw", schedule="cosine", warmup=0.1)
>>> rate, recipe.hyperparameters.weight_decay, needs_num_updates(recipe)
(0.003, 0.1, True)
>>> [round(float(recipe.shape(jnp.asarray(share))), 2) for share in (0.0, 0.05, 0.1, 0.55, 1.0)]
[0.0, 0.5, 1.0, 0.5, 0.0]

A factory of one's own is learning_rate -> optax transformation, or (learning_rate, num_updates) -> one. The rate is
traced, so that one program serves all rates: what branches on its value is refused, with what to write instead.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax.theory import plans
from gdjax.theory.rules import Hyperparameters

Optimizer = Callable[..., optax.GradientTransformation]
"""learning_rate -> optax transformation, or (learning_rate, num_updates) -> one; the rate is traced."""

STABLE = 0.8  # share of 'wsd' after which the rate falls to zero
ADDED_UP = 64  # the most batches whose gradients an optimiser is expected to add up for one update
LATE = 2**20, 2**30  # updates, far beyond any schedule of fixed length that was meant for one run


class Kind(NamedTuple):
    """An optimiser.

    Attributes:
        make: hyperparameters -> the optax transformation at a rate of 1, without weight decay.
        usual: the hyperparameters to begin with; the first grid of rates has this one in its middle.
    """

    make: Callable[[Hyperparameters], optax.GradientTransformation]
    usual: Hyperparameters


def _adam(h: Hyperparameters) -> optax.GradientTransformation:
    return optax.adam(1.0, b1=h.b1, b2=h.b2, eps=h.eps)  # pyright: ignore


OPTIMIZERS: dict[str, Kind] = {
    "sgd": Kind(lambda h: optax.sgd(1.0), Hyperparameters(0.2)),
    "momentum": Kind(lambda h: optax.sgd(1.0, momentum=h.momentum), Hyperparameters(0.03, momentum=0.9)),
    "nesterov": Kind(lambda h: optax.sgd(1.0, momentum=h.momentum, nesterov=True), Hyperparameters(0.03, momentum=0.9)),
    "adam": Kind(_adam, Hyperparameters(0.003, b1=0.9, b2=0.999, eps=1e-8)),
    "adamw": Kind(_adam, Hyperparameters(0.003, weight_decay=0.1, b1=0.9, b2=0.999, eps=1e-8)),
    "lion": Kind(
        lambda h: optax.lion(1.0, b1=h.b1, b2=h.b2, weight_decay=0.0),  # pyright: ignore
        Hyperparameters(0.0005, weight_decay=0.1, b1=0.9, b2=0.99),
    ),
    "rmsprop": Kind(
        lambda h: optax.rmsprop(1.0, decay=h.b2, eps=h.eps),  # pyright: ignore
        Hyperparameters(0.001, b2=0.9, eps=1e-8),
    ),
    "adafactor": Kind(lambda h: optax.adafactor(1.0), Hyperparameters(0.03)),
    "muon": Kind(
        lambda h: optax.contrib.muon(1.0, beta=h.momentum),  # pyright: ignore
        Hyperparameters(0.01, weight_decay=0.1, momentum=0.95),
    ),
}
"""From optax. Matrices are Muon's; what has not two axes goes by its Adam, at the same rate."""

SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "constant": plans.constant,
    "linear": plans.linear,
    "cosine": plans.cosine,
    "wsd": lambda share: jnp.minimum(1.0, (1 - share) / (1 - STABLE)),
}
"""From the share of the run that is over, after the warm-up, to the share of the rate."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An optimiser by name, with the hyperparameters that are asked for: (learning_rate, num_updates) -> optax.

    The update is -eta s(u) (d + lambda w): d is the direction of the optimiser at a rate of 1, s the schedule at the
    share u of the run that is over, and lambda the decoupled weight decay of all parameters.

    Attributes:
        name: of OPTIMIZERS.
        hyperparameters: those to begin with.
        clip: largest norm of the gradient, or None.
        schedule: of SCHEDULES.
        warmup: share of the run in which the rate rises from zero in a straight line.
    """

    name: str
    hyperparameters: Hyperparameters
    clip: float | None = None
    schedule: str = "constant"
    warmup: float = 0.0

    @property
    def scheduled(self) -> bool:
        """Whether the rate changes along the run, whose length it must then be told."""
        return self.schedule != "constant" or self.warmup > 0

    def __call__(self, learning_rate: Any, num_updates: Any = None) -> optax.GradientTransformation:
        """Return the transformation at a learning rate, for a run of so many updates; both may be traced."""
        return self.at(self.hyperparameters._replace(learning_rate=learning_rate), num_updates)

    def at(self, hyperparameters: Hyperparameters, num_updates: Any = None) -> optax.GradientTransformation:
        """Return the transformation at other hyperparameters, traced or not."""
        rate, decay = hyperparameters.learning_rate, hyperparameters.weight_decay
        parts = [] if self.clip is None else [optax.clip_by_global_norm(self.clip)]
        parts.append(OPTIMIZERS[self.name].make(hyperparameters))
        if decay is not None:
            parts.append(optax.add_decayed_weights(-decay))  # pyright: ignore
        if not self.scheduled:
            return optax.chain(*parts, optax.scale(rate))  # pyright: ignore
        if num_updates is None:
            raise ValueError(f"schedule={self.schedule!r}, warmup={self.warmup}: give num_updates, what they are of")

        def scheduled(count: Any) -> jax.Array:
            share = jnp.asarray(count, float) / jnp.asarray(num_updates, float)
            return rate * self.shape(share)

        return optax.chain(*parts, optax.scale_by_schedule(scheduled))

    def shape(self, share: jax.Array) -> jax.Array:
        """Return the share of the rate at a share of the run, zero after its end."""
        rising = share / self.warmup if self.warmup else jnp.ones_like(share)
        left = SCHEDULES[self.schedule](jnp.clip((share - self.warmup) / (1 - self.warmup), 0.0, 1.0))
        return jnp.minimum(rising, 1.0) * left


def named(
    optimizer: str | Optimizer,
    *,
    weight_decay: float | None = None,
    clip: float | None = None,
    schedule: str = "constant",
    warmup: float = 0.0,
) -> tuple[Optimizer, float]:
    """Return (the optimiser's factory, a learning rate to begin with).

    Args:
        optimizer: a name from OPTIMIZERS, or a factory, which takes none of the options below.
        weight_decay: decoupled, multiplied by the rate; default 0.1 for adamw, lion and muon, 0 for others.
        clip: largest norm of the gradient.
        schedule: of the rate over the share of the run: 'constant', 'cosine', 'wsd' (constant, over the last fifth to
            zero) or 'linear'.
        warmup: share of the run in which the rate rises from zero.

    Raises:
        ValueError: for a name that is not in OPTIMIZERS or SCHEDULES, numbers out of range, options beside a factory,
            a factory that does not take a traced rate, and one whose schedule has a fixed length.
    """
    options = {"weight_decay": weight_decay, "clip": clip, "schedule": schedule, "warmup": warmup}
    given = [name for name, value in options.items() if value != _DEFAULTS[name]]
    if not isinstance(optimizer, str):
        if given:
            raise ValueError(f"{given[0]}={options[given[0]]} is of an optimiser by name; yours sees to it itself")
        if isinstance(optimizer, Recipe):
            return optimizer, float(optimizer.hyperparameters.learning_rate)
        _check_factory(optimizer)
        return optimizer, 0.03
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is not one of {', '.join(OPTIMIZERS)}, or module:factory")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup={warmup} is a share of the run: from 0 to below 1")
    if weight_decay is not None and not 0 <= weight_decay < np.inf:
        raise ValueError(f"weight_decay={weight_decay} must be zero or positive, and finite")
    if clip is not None and not 0 < clip < np.inf:
        raise ValueError(f"clip={clip}, the largest norm of a gradient, must be positive and finite")
    usual = OPTIMIZERS[optimizer].usual
    if weight_decay is not None:
        usual = usual._replace(weight_decay=weight_decay)
    return Recipe(optimizer, usual, clip, schedule, warmup), float(usual.learning_rate)


_DEFAULTS = {"weight_decay": None, "clip": None, "schedule": "constant", "warmup": 0.0}


def needs_num_updates(optimizer: Optimizer) -> bool:
    """Return whether a factory asks for the length of the run: it has a second argument without a default."""
    if isinstance(optimizer, Recipe):
        return optimizer.scheduled
    try:
        parameters = list(inspect.signature(optimizer).parameters.values())
    except (TypeError, ValueError):  # built in, without a signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and (positional[1].default is positional[1].empty or positional[1].name == "num_updates")


def made(optimizer: Optimizer, learning_rate: Any, num_updates: Any) -> optax.GradientTransformation:
    """Call a factory with what it asks for."""
    return optimizer(learning_rate, num_updates) if needs_num_updates(optimizer) else optimizer(learning_rate)


def _check_factory(optimizer: Optimizer) -> None:
    """Raise ValueError where a factory cannot take a traced rate, or has a schedule that ends before long runs do."""
    if not callable(optimizer):
        kind = type(optimizer).__name__
        raise ValueError(
            f"optimizer is a {kind}, not a name or a function of the rate, as lambda rate: optax.sgd(rate)"
        )

    def check(learning_rate: jax.Array) -> jax.Array:
        found = made(optimizer, learning_rate, 100)
        if not (hasattr(found, "init") and hasattr(found, "update")):
            raise ValueError(f"optimizer returns a {type(found).__name__}, not an optax.GradientTransformation")
        return learning_rate

    try:
        jax.eval_shape(check, jnp.asarray(0.1))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise ValueError(
            "optimizer: it branches on the learning rate, which is traced, so that one program serves all rates; a "
            "schedule of optax does. Give that a peak of 1 and multiply: lambda learning_rate, num_updates: "
            "optax.chain(optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1.0, num_updates // 10, num_updates)), "
            "optax.scale(learning_rate))"
        ) from error
    if not needs_num_updates(optimizer) and (end := _dead_after(optimizer(0.1))):
        raise ValueError(
            f"optimizer: after {end} updates it makes none at all, but runs of different batch sizes make very "
            "different numbers of them: take (learning_rate, num_updates), and let its schedule be of that length"
        )


def _dead_after(optimizer: optax.GradientTransformation) -> int:
    """Return the power of two of updates after which all are zero, or 0 where they go on or cannot be told."""
    params = {"weight": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    update = optax.with_extra_args_support(optimizer).update

    @jax.jit
    def size_after(count):
        """Return the norms of the next ADDED_UP updates, added up."""
        state = jax.tree.map(
            lambda x: jnp.full_like(x, count) if jnp.issubdtype(jnp.result_type(x), jnp.integer) else x,
            optimizer.init(params),
        )

        def one(state, _):
            updates, state = update(params, state, params, value=jnp.ones(()), grad=params)
            return state, optax.tree.norm(updates)

        return jax.lax.scan(one, state, length=ADDED_UP)[1].sum()

    try:
        # A rate of zero may be the difference of two others.
        least = 2 * float(jnp.finfo(jnp.float32).eps) * size_after(0)
        if any(size_after(count) > least for count in LATE):
            return 0
        return next((2**k for k in range(20) if size_after(2**k) <= least < size_after(2**k // 2)), 0)
    except Exception:  # it trains parameters of one form only; that is seen to where it does
        return 0
