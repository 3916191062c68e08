"""Values that depend on neither the example nor the state of a loop: see `_flow`.

Their equations are taken out of all loops. The counter of a loop is among them, as an array of which each iteration
takes its own number, so that what it decides is known to be the same for all examples.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gdjax.ghost._jaxpr import concrete, custom_rules, differentiable, function_of, is_real, is_rounding, literal
from gdjax.ghost._moves import moved
from gdjax.ghost._plan import Kind, Step, Top

ARITHMETIC = ("add", "sub", "mul", "neg", "max", "min", "lt", "ge", "select_n", "convert_element_type", "iota")
"""Primitives of which the numbers that follow from constants are worked out while a loss is planned."""


class Tops:
    """Numbers slots, and collects the steps between Top values."""

    def __init__(self):
        self.constants: dict[int, Any] = {}
        self.steps: list[Step] = []
        self.functions: dict[Any, Callable] = {}
        self.arithmetic: dict[int, Step] = {}
        self.slots = itertools.count()
        self.lengths: list[int] = []
        self.sliced: list[set[int]] = []

    def local(self) -> int:
        return next(self.slots)

    def top(self, **attributes) -> Top:
        loops = attributes.pop("loops", tuple((length, False) for length in self.lengths))
        return Top(next(self.slots), loops=loops, **attributes)

    def constant(self, value) -> Top:
        top = self.top()
        self.constants[top.slot] = value
        return top

    def slot(self, kind: Kind) -> int:
        """Return the slot of a value that an action reads, and tell the loops around that take slices of it."""
        if isinstance(kind, int):
            return kind
        for depth, (_, is_sliced) in enumerate(kind.loops):
            if is_sliced:
                self.sliced[depth].add(kind.slot)
        return kind.slot

    def kinds(self, equation, ins: Sequence[Kind | None]) -> list[Kind]:
        """Return the kinds of all operands of an equation, of literals too."""
        pairs = zip(equation.invars, ins, strict=True)
        return [self.constant(literal(v)) if kind is None else kind for v, kind in pairs]

    def step(self, jaxpr, equation, ins) -> Sequence[Kind]:
        """Take an equation between Top values out of all loops, for all their iterations at once."""
        places, function = function_of(jaxpr, equation, self.functions)
        tops = [ins[i] for i in places]
        loops, function = self.over_loops(function, tops)
        leaves = frozenset().union(*(top.leaves for top in tops))
        if equation.primitive.name == "stop_gradient":
            leaves = frozenset()
        custom = any(top.custom for top in tops if top.leaves) or any(custom_rules(jaxpr, [equation]))
        views, strides, scales, move = moved(equation, ins, function, tops, self.constant, self.known)
        outs: list[Top] = []
        is_low = any(top.is_low for top in tops if top.leaves) or is_rounding(equation)
        for v, view in zip(equation.outvars, views, strict=True):
            of = leaves if differentiable(v.aval) else frozenset()
            isometric = bool(of) and move is not None and is_real(v.aval)
            where = {"isometric": isometric, "view": view, "strides": strides, "scales": scales}
            outs.append(self.top(leaves=of, loops=loops, custom=custom, is_low=is_low, **where))
        self.steps.append(Step(leaves, function, tuple(t.slot for t in tops), tuple(out.slot for out in outs), move))
        if equation.primitive.name in ARITHMETIC:
            self.arithmetic[outs[0].slot] = self.steps[-1]
        return outs

    def over_loops(self, function: Callable, tops: Sequence[Top]) -> tuple[tuple[tuple[int, bool], ...], Callable]:
        """Return (the loops around, of which the result has slices, a function for all iterations at once)."""
        loops = tuple((length, any(top.loops[depth][1] for top in tops)) for depth, length in enumerate(self.lengths))
        for depth in reversed(range(len(loops))):
            if loops[depth][1]:
                function = jax.vmap(function, [0 if top.loops[depth][1] else None for top in tops])
        return loops, function

    def renamed(self, top: Top) -> Top:
        """Return the value in a slot of its own, for a loop that takes slices of it and also reads it as a whole."""
        other = top._replace(slot=next(self.slots))
        self.steps.append(Step(top.leaves, same, (top.slot,), (other.slot,), same))
        return other

    def known(self, slot: int) -> np.ndarray | None:
        """Return the numbers of a Top value that follows from constants by a little arithmetic."""
        if slot in self.constants:
            return concrete(self.constants[slot])
        if slot not in self.arithmetic:
            return None
        step = self.arithmetic[slot]
        values = [self.known(i) for i in step.ins]
        if any(value is None for value in values):
            return None
        with jax.ensure_compile_time_eval(), jax.disable_jit():
            return np.asarray(step.function(*values)[0])

    def counter(self, start: Kind, by, length: int, is_reversed: bool) -> Top | None:
        """Return the values of an integer that a loop adds `by` to, as what each iteration takes a slice of."""
        if by is None or isinstance(start, int):
            return None
        times = np.arange(length, dtype=by.dtype)[:: -1 if is_reversed else 1]
        loops, function = self.over_loops(lambda start: [start + by * times], [start])
        top = self.top(loops=loops)
        self.steps.append(Step(frozenset(), function, (start.slot,), (top.slot,), None))
        self.arithmetic[top.slot] = self.steps[-1]
        return top


def same(x):
    return [x]


def detached(top: Top) -> Top:
    """Return the value as one that no gradient comes back to."""
    return top._replace(leaves=frozenset(), isometric=False, view=None, strides=())


def entered(kind: Kind, length: int, is_sliced: bool) -> Kind:
    """Return what a loop's body sees of a value."""
    if isinstance(kind, int):
        return kind
    view, strides = kind.view, kind.strides
    if is_sliced and view is not None:
        view, strides = (view[0], (*strides, view.strides[0])) if length else (None, ())
    return kind._replace(loops=(*kind.loops, (length, is_sliced)), view=view, strides=strides)
