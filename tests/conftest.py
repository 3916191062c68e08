"""Tests run in float64, with implicit rank and dtype promotion forbidden, so that a formula is checked as written.

`JAX_ENABLE_X64=0 python -m pytest tests/test_properties.py` checks in float32: the tolerances there are those of the
dtypes. With GDJAX_TEST_DEVICE=1 programs are optimised and run where jax finds a device: for experiments/on_device.py.
"""

import os
import signal

import hypothesis
import jax
import pytest

os.environ["MATPLOTLIBRC"] = os.path.join(os.path.dirname(__file__), "matplotlibrc")  # of processes started here too
on_device = os.environ.get("GDJAX_TEST_DEVICE") == "1"
if not on_device:
    jax.config.update("jax_num_cpu_devices", 2)  # for the tests of sharding; all else runs on the first
jax.config.update("jax_enable_x64", os.environ.get("JAX_ENABLE_X64", "1") != "0")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Programs here are small and run once: half of the time would go into optimising them.
jax.config.update("jax_disable_most_optimizations", not on_device)
# The first example of a shape compiles; the examples are the same every time, so that a failure can be repeated.
hypothesis.settings.register_profile("gdjax", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)
hypothesis.settings.load_profile("gdjax")


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def nans():
    """Let NaN be: the test makes it on purpose. For runs with JAX_DEBUG_NANS=1."""
    with jax.debug_nans(False):
        yield


@pytest.fixture
def replays():
    """Let keys be used again: the test compares runs of one draw. For runs with JAX_DEBUG_KEY_REUSE=1."""
    with jax.debug_key_reuse(False):
        yield


@pytest.fixture
def listening():
    """Hear Ctrl-C and a lost terminal, which a shell or nohup may have told the processes to ignore."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)
