import functools
import gc
import weakref

import jax

from gdjax import _trees as trees


def counted(owner, made, key="key"):
    return trees.kept(owner, key, lambda: made.append(owner) or len(made))


def test_what_is_kept_is_made_once_for_each_key_and_only_for_its_own_function():
    """Wrapping a function copies its attributes, and with them what was kept for it."""

    def function(x):
        return x

    made = []
    assert [counted(function, made), counted(function, made), counted(function, made, "other")] == [1, 1, 2]
    wrapped = functools.wraps(function)(lambda x: 2 * x)
    assert [counted(wrapped, made), counted(jax.vmap(function), made)] == [3, 4]
    assert [counted(wrapped, made), counted(function, made)] == [3, 1]


def test_nothing_is_kept_of_a_method_whose_attributes_are_those_of_its_class():
    class Scale:
        def __call__(self, x):
            return x

        def times(self, x):
            return x

    made = []
    one, two = Scale(), Scale()
    assert counted(one.times, made) != counted(two.times, made)
    assert counted(one, made) != counted(two, made)
    assert counted(one, made) == 3


def test_what_is_kept_goes_with_its_function_and_is_bounded():
    def make():
        def function(x):
            return x

        for key in range(3 * trees.MAX_KEPT):
            trees.kept(function, key, lambda: function)
        assert len(function.__dict__[trees.KEPT][1]) == trees.MAX_KEPT
        return weakref.ref(function)

    reference = make()
    gc.collect()
    assert reference() is None
