"""A plan: what is done once for a batch, what for one example, and where parameters meet it. `_flow` makes it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from gdjax.ghost._jaxpr import Jaxpr


class Top(NamedTuple):
    """A value that depends on neither the example nor the state of a loop.

    Attributes:
        slot: its number.
        leaves: the parameter leaves it depends on, differentiably.
        loops: (length, whether each iteration sees a slice of its own) of every loop around, outermost first.
        isometric: whether it is some entries of one leaf, each once, in any order, times a scalar.
        view: which entries, as a view of an array like that leaf; None where no view can say so. Of slices that loops
            take, those of the first iteration,
        strides: and for every such loop, how many bytes further those of the next are.
        scales: (primitive, slot) of the scalars that it was multiplied with or divided by.
        custom: whether a custom derivative rule is on the way, which need not be linear.
        is_low: whether it was rounded to less than float32 on the way, as its cotangent is.
    """

    slot: int
    leaves: frozenset[int] = frozenset()
    loops: tuple[tuple[int, bool], ...] = ()
    isometric: bool = False
    view: np.ndarray | None = None
    strides: tuple[int, ...] = ()
    scales: tuple[tuple[str, int], ...] = ()
    custom: bool = False
    is_low: bool = False


Kind = Top | int
"""A Top value, or the slot of a value that depends on the example or on a loop."""


class Step(NamedTuple):
    """An equation between Top values. `move` does to an array of any dtype what it does to the entries of a leaf."""

    leaves: frozenset[int]
    function: Callable
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    move: Any


class Action(NamedTuple):
    """What is done for one example: slots read and written, and what the name of the action needs beside."""

    name: str
    function: Any
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    inner: Any = None


class Site(NamedTuple):
    """An equation where parameters meet an example.

    Attributes:
        function: operands, each once and without literals -> outputs.
        operands: their kinds.
        weights: places of the parameters among them.
        out: shapes of the outputs.
        rules: for each parameter, the rule or None, and why there is none.
        lengths: of the loops around.
        primitive: its name.
        inside: whether it stands in a loop or a rematerialised block, whose memory should stay small.
        avals: shapes of the parameters there.
        num_read: the numbers that the operands which are no parameters have, in all iterations.
    """

    function: Callable
    operands: tuple[Kind, ...]
    weights: tuple[int, ...]
    out: tuple[jax.ShapeDtypeStruct, ...]
    rules: tuple[tuple[Any, str], ...]
    lengths: tuple[int, ...]
    primitive: str
    inside: bool
    avals: tuple[jax.ShapeDtypeStruct, ...]
    num_read: int


class Choice(NamedTuple):
    """The inner part of a branch that is the same for all examples: for each case, its actions and what it returns."""

    cases: list[tuple[list[Action], list[int]]]
    sites: range


class Scan(NamedTuple):
    """The inner part of a scan: actions, slots of its carry and of its scanned inputs, what it returns, its options."""

    actions: list[Action]
    carry: list[int]
    xs: list[int]
    sliced: list[int]
    outs: list[int]
    sites: range
    options: dict[str, Any]


class Plan(NamedTuple):
    """The plan of a loss: constants by slot, steps, sites, actions, slots of the example and of the loss."""

    constants: dict[int, Any]
    steps: list[Step]
    sites: list[Site]
    actions: list[Action]
    example: list[int]
    loss: int
    jaxpr: Jaxpr
