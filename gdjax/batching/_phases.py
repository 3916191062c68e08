"""Batch sizes as a schedule: phases of so many updates, each at a batch size, in one stream without a seam.

>>> ramp = Phases.of([(3, 2), (2, 4)])
>>> [ramp.examples(updates) for updates in (0, 3, 4, 7)]  # the last phase goes on
[0, 6, 10, 22]
>>> ramp.at(2), ramp.at(3)  # the batch size of the next update, and where its phase begins and ends
((2, 0, 3), (4, 3, None))
>>> [ramp.updates(examples) for examples in (5, 6, 13, 22)]
[2, 3, 4, 7]
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Phases(NamedTuple):
    """A checked schedule of batch sizes; the last one goes on beyond its updates.

    Attributes:
        parts: ((num_updates, B), ...).
    """

    parts: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, schedule: "int | Sequence[tuple[int, int]] | Phases") -> "Phases":
        """Return the phases of [(num_updates, B), ...], or of one batch size.

        Raises:
            ValueError: for no phase, for what is no pair of integers, and for a number of updates or a B below 1.
        """
        if isinstance(schedule, Phases):
            return schedule
        try:
            pairs: Any = [(1, schedule)] if hasattr(schedule, "__index__") else list(schedule)  # pyright: ignore
            parts = tuple((operator.index(num_updates), operator.index(size)) for num_updates, size in pairs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"schedule={schedule!r} must be [(num_updates, batch_size), ...], integers") from error
        if not parts or min(min(part) for part in parts) < 1:
            raise ValueError(f"schedule={schedule!r} must have at least one phase, numbers from 1 on")
        return cls(parts)

    @property
    def num_updates(self) -> int:
        """T, of all phases together."""
        return sum(count for count, _ in self.parts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes, each once, ascending."""
        return tuple(sorted({size for _, size in self.parts}))

    @property
    def identity(self) -> int | str:
        """What makes this schedule another one: all but how long the last phase is."""
        *before, (_, last) = self.parts
        return ", ".join([*(f"{size} for {count} updates" for count, size in before), f"{last}"]) if before else last

    def examples(self, num_updates: int) -> int:
        """Return the position in the stream after so many updates."""
        seen = 0
        for count, size in self.parts[:-1]:
            if num_updates <= count:
                break
            seen, num_updates = seen + count * size, num_updates - count
        else:
            size = self.parts[-1][1]
        return seen + num_updates * size

    def updates(self, num_examples: int) -> int:
        """Return how many whole updates so many examples are."""
        done = 0
        for count, size in self.parts[:-1]:
            if num_examples < count * size:
                return done + num_examples // size
            done, num_examples = done + count, num_examples - count * size
        return done + num_examples // self.parts[-1][1]

    def at(self, num_updates: int) -> tuple[int, int, int | None]:
        """Return (B of the update after so many, the updates after which its phase begins, and ends or None)."""
        begin = 0
        for count, size in self.parts[:-1]:
            if num_updates < begin + count:
                return size, begin, begin + count
            begin += count
        return self.parts[-1][1], begin, None

    def batches(self, stream: jax.Array) -> list[jax.Array]:
        """Cut a stream int32[S] into int32[num_updates, B], one for each phase: what `descent.run` goes through.

        Raises:
            ValueError: where S is not what the phases take.
        """
        total = self.examples(self.num_updates)
        if stream.shape != (total,):
            raise ValueError(f"stream must have the {total} entries that the phases take, but has shape {stream.shape}")
        cut, start = [], 0
        for count, size in self.parts:
            cut.append(stream[start : start + count * size].reshape(count, size))
            start += count * size
        return cut

    def counted(self, num_updates: jax.typing.ArrayLike) -> jax.Array:
        """Return `examples` as a float, for a traced number: what an optax schedule of examples is made of.

        >>> import optax
        >>> rate = optax.cosine_decay_schedule(0.1, decay_steps=14)  # 14 examples
        >>> optimizer = optax.sgd(lambda count: rate(Phases.of([(3, 2), (2, 4)]).counted(count)))
        """
        t = jnp.asarray(num_updates, float)
        *before, (_, last) = self.parts
        seen, t = jnp.zeros_like(t), t
        for count, size in before:
            here = jnp.minimum(t, count)
            seen, t = seen + here * size, t - here
        return seen + t * last
