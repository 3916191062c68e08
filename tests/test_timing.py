"""A clock that moves only when a test moves it: what is measured is then known exactly."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest
from scipy import stats

from gdjax import timing


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Waiting:
    """A result that is ready some seconds after it was asked for, as an array on a device is."""

    def __init__(self, clock, duration):
        self.clock, self.duration = clock, duration

    def block_until_ready(self):
        self.clock.now += self.duration
        return self


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_timed_waits_for_the_result(clock):
    result, elapsed = timing.timed(lambda duration: [Waiting(clock, duration)], 3.0)
    assert (result[0].duration, elapsed) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("durations", "limits", "expected"),
    [
        ((100.0, 1.0, 5.0, 2.0), {"budget": 1000.0, "repeats": 3}, 2.0),  # the median: neither lowest nor mean
        ((100.0, 3.0, 3.5), {"budget": 4.0, "repeats": 10}, 3.25),  # 3 s leave some of the budget, 6.5 s do not
        ((100.0, 7.0), {"budget": 0.0}, 7.0),  # at least one run
    ],
)
def test_seconds_is_the_median_of_the_runs_after_the_first(clock, durations, limits, expected):
    """A run too many would find no duration left, one too few would leave some."""
    left = list(durations)
    assert timing.seconds(lambda: Waiting(clock, left.pop(0)), **limits) == expected
    assert left == []


def test_compiled_traces_once_and_counts_that_as_compilation(clock):
    def function(x):
        clock.now += 2.0  # only while it is traced
        return x @ x

    x = jnp.arange(64.0).reshape(8, 8)
    program = timing.compiled(function, x)
    assert program.compile_seconds == 2.0
    np.testing.assert_allclose(program(x), np.asarray(x) @ np.asarray(x), rtol=1e-12)
    assert clock.now == 2.0
    assert program.flops == 2 * 8**3  # a multiplication and an addition each; the CPU's compiler does count


def test_functions_in_turn_run_forwards_and_backwards_as_often_as_asked():
    calls = []
    times = timing.in_turn([lambda: calls.append("a"), lambda: (calls.append("b"), time.sleep(0.01))], repeats=3)
    assert calls in (list("abbaabba"), list("baabbaab"))
    assert times[1] >= 0.01 > times[0]


def wait_for(clock, durations):
    """Return a function of one argument whose n-th result is ready after durations[n], and the arguments it got."""
    left, seen = list(durations), []

    def function(x):
        seen.append(x)
        return Waiting(clock, left.pop(0))

    return function, seen


@pytest.mark.parametrize(
    ("durations", "limits", "expected"),
    [
        # One turn warms up; six equal runs are enough.
        ((9.0, *[2.0] * 6), {"budget": 100.0}, (2.0, 2.0, 2.0, 6)),
        # 3 % on either side of the median is not within 2 %, so it goes on to the end of the budget: 16.06 s.
        ((9.0, 2.0, 2.06, 2.06, 2.0, 1.94, 2.0, 2.0, 2.0), {"budget": 16.0}, (2.0, 1.94, 2.06, 8)),
        ((9.0, 2.0, 2.06, 2.06, 2.0, 1.94, 2.0), {"budget": 100.0, "within": 0.04}, (2.0, 1.94, 2.06, 6)),
        ((9.0, *[2.0] * 6), {"budget": 1.1}, (2.0, 2.0, 2.0, 6)),  # ten budgets for the six that give an interval
        ((9.0, *[2.0] * 4), {"budget": 0.8}, (2.0, 2.0, 2.0, 4)),
        ((9.0, 5.0), {"budget": 0.0}, (5.0, 5.0, 5.0, 1)),  # at least one run
    ],
)
def test_a_function_runs_until_its_median_is_known_or_the_budget_ends(clock, durations, limits, expected):
    function, seen = wait_for(clock, durations)
    [times] = timing.measured_in_turn([function], [[("a",), ("b",)]], **limits)
    np.testing.assert_allclose(timing.spread(times), expected, rtol=1e-12)
    assert seen == (["a", "b"] * len(seen))[: len(durations)]


def test_the_first_function_runs_in_every_turn_of_the_others(clock):
    """It is known after six turns, the second after eight; by then the third has left with its budget used up."""
    order = []

    def function(name, durations):
        left = list(durations)
        return lambda: (order.append(name), Waiting(clock, left.pop(0)))[1]

    unsteady = [9.0, 2.0, 2.06, 2.06, 2.0, 1.94, 2.0, 2.0, 2.0]
    three = function("a", [9.0, *[1.0] * 8]), function("b", unsteady), function("c", [9.0, *[60.0] * 3])
    first, second, third = timing.measured_in_turn(three, [[()]] * 3, budget=16.0)
    assert (len(first), len(second), len(third)) == (8, 8, 3)
    assert "".join(order) == "abc" + "cba" + "abc" + "cba" + "ab" + "ba" + "ab" + "ba" + "ab"
    assert timing.ratio(third, first) == (60.0, 60.0, 60.0, 3)


def test_all_end_when_the_first_has_used_up_the_budgets_of_all(clock):
    """The second, a thousand times as fast and never known, would otherwise make the first run 10 000 times."""
    unsteady = iter([0.001, 0.002] * 10_000)
    slow, fast = (lambda: Waiting(clock, 1.0)), (lambda: Waiting(clock, next(unsteady)))
    first, second = timing.measured_in_turn([slow, fast], [[()]] * 2, budget=10.0)
    assert (len(first), len(second)) == (20, 20)


@pytest.mark.parametrize("n", range(1, 60))
def test_the_interval_of_a_median_is_the_narrowest_that_covers_95_percent(n):
    """By the binomial law; below 6 values none covers that, and the range is what there is."""
    low, high = timing.spread(list(range(1, n + 1))[::-1])[1:3]
    assert low + high == n + 1

    def coverage(r):
        return 1 - 2 * stats.binom.cdf(r - 1, n, 0.5)

    assert coverage(low) >= 0.95 or low == 1
    assert coverage(low + 1) < 0.95
    assert (coverage(1) >= 0.95) == (n >= timing.MIN_RUNS)


def test_an_interval_covers_the_median_as_often_as_it_says():
    """200 samples of 15 lognormal times: coverage by the binomial law is 0.965, 4 standard errors are 0.052."""
    samples = np.random.default_rng(0).lognormal(size=(200, 15))
    covered = [low <= 1 <= high for _, low, high, _ in map(timing.spread, samples.tolist())]
    exact = 1 - 2 * stats.binom.cdf(3, 15, 0.5)
    assert abs(np.mean(covered) - exact) <= 4 * np.sqrt(exact * (1 - exact) / 200)


def test_ratios_are_taken_within_a_turn(clock):
    """The ratios are 2, 2 and 3; that of the medians would be 8 / 3."""
    one, _ = wait_for(clock, [9.0, 2.0, 8.0, 9.0])
    two, _ = wait_for(clock, [9.0, 1.0, 4.0, 3.0])
    [ratio] = timing.ratios_in_turn([lambda: one(0), lambda: two(0)], repeats=3)
    assert ratio == (2.0, 2.0, 3.0, 3)


def test_counts_of_a_loop_are_those_of_one_iteration():
    """So that a caller multiplies by the iterations; if the compiler began to count them, this would say so."""

    def loop(x, *, length):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=length)[0]

    x = jnp.ones((16, 16))
    few, many = (timing.compiled(partial(loop, length=length), x) for length in (3, 300))
    assert few.flops is not None
    assert few.flops == pytest.approx(many.flops)
    assert few.flops == pytest.approx(2 * 16**3, rel=0.01)
    negative = timing.compiled(jnp.negative, jnp.ones(1000))
    assert negative.bytes_accessed == (16_000 if precision.X64 else 8_000)  # read and written, 8 or 4 bytes each


class Uncounted:
    """A program of a device whose compiler has no analyses, in the ways that occur."""

    def __init__(self, counts):
        self.counts = counts

    def cost_analysis(self):
        if self.counts == "raises":
            raise NotImplementedError
        return self.counts

    def memory_analysis(self):
        return None


@pytest.mark.parametrize("counts", [None, {}, {"flops": -1.0, "bytes accessed": -1.0}, "raises"])
def test_a_missing_analysis_is_none(counts):
    program = timing.Compiled(Uncounted(counts), 0.0)
    assert (program.flops, program.bytes_accessed, program.temporary_bytes) == (None, None, None)
    assert timing.Peaks(1.0, 1.0).least_seconds(program.flops, 1.0) is None


def test_the_roofline_is_the_slower_of_arithmetic_and_memory():
    peaks = timing.Peaks(flops_per_second=100.0, bytes_per_second=10.0)
    assert peaks.least_seconds(500.0, 10.0) == 5.0
    assert peaks.least_seconds(500.0, 200.0) == 20.0


def test_peaks_count_the_work_of_the_fastest_run(monkeypatch):
    """A product of n x n takes 2 n^3 operations, a copy reads and writes 4 bytes a number."""
    durations = iter([3.0, 2.0, 9.0, 4.0, 5.0, 6.0])  # the budget of 14 ends each after three
    monkeypatch.setattr(timing, "timed", lambda function, *args: (function(*args), next(durations)))
    assert timing.peaks(product_size=10, copy_size=100, budget=14.0) == (2000 / 2.0, 800 / 4.0)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="values is empty"):
        timing.spread([])
    for functions, inputs in (([], []), ([len], [[]])):
        with pytest.raises(ValueError, match="at least one function, and for each at least one tuple"):
            timing.measured_in_turn(functions, inputs)
