"""The gradient noise scale along a run of `descent`, from norms that the training computes anyway.

>>> import jax, jax.numpy as jnp, optax
>>> from gdjax import batching, descent, gradients
>>> loss = lambda mean, x: 0.5 * (mean - x) ** 2
>>> data = jax.random.normal(jax.random.key(0), (1000,))
>>> method = descent.method(gradients.with_sq_norms(loss), optax.sgd(0.0))
>>> method = track(method, half_life=5000, num_examples=1000)
>>> batches = batching.batches(batching.reshuffled(jax.random.key(1), 1000, num_epochs=20), 50)
>>> record = lambda state, info: info.aux.noise_scale.b_simple
>>> state, scales = descent.run(method, method.init(0.5), data, batches, record, every=100)
>>> [f"{scale:.2f}" for scale in scales]  # of the whole data: 3.83
['3.84', '3.86', '3.89', '3.80']
>>> print(reading(state))
B_simple = 3.8 (90 % interval 3.59 to 4.04): ok, of the last 5e+03 examples
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdjax import batching, descent, gradients, problem
from gdjax.descent import Info, Method
from gdjax.noise._running import Reading, Running, push, reading, start
from gdjax.noise._scale import check_population, check_unweighted, solve, sq_norm, variance_factor
from gdjax.problem import Batch, Params


class State(NamedTuple):
    """The fields of `descent.State`, and `noise`, the running noise scale, which `noise.reading` reads."""

    params: Params
    opt_state: Any
    num_examples: batching.Count
    noise: Running


class Tracked(NamedTuple):
    """What `track` leaves in `Info.aux`: the noise scale of the recent past, and what the method itself left there."""

    noise_scale: Reading
    aux: Any


def track(
    method: Method, *, half_life: float, num_examples: int | None, stream: Callable = batching.reshuffled
) -> Method:
    """Return `method` with the running noise scale in its state and in `Info.aux`, at no extra backward pass.

    A batch of distinct examples is less noisy than one of independent examples, (N - B) / (N - 1) as much: with the
    wrong one of the two, |G|^2 is wrong by tr(S) / (N - 1), which is most of it where B_simple is near N. Which one it
    is follows from the stream. A batch that spans epochs is counted as its pieces.

    Batches of a reshuffled stream are independent of parameters that do not move. Parameters that do have just been
    fitted to the other examples of the epoch: where B_simple is beyond N, |G|^2 of what is still to come is larger than
    that of the data, and the running scale too small. `batching.with_replacement` has no such memory.

    Args:
        method: made with `gradients.with_sq_norms`, without `weight`.
        half_life: in examples.
        num_examples: N of the data; None where there is no end of them, so that all are independent.
        stream: where the batches come from, a function of `batching`.

    Raises:
        ValueError: where the method does not measure norms or weighs examples, for batches of one example, for N < 2,
            and for a stream that is not known.
    """
    check_population(num_examples)
    blank = start(half_life=half_life)
    spans = _spans(stream) if num_examples is not None else _independent

    def init(params: Params) -> Any:  # State: a method's own may have more fields than descent's
        return State(*method.init(params), noise=blank)

    def step(state: Any, batch: Batch) -> tuple[Any, Info]:
        after, info = method.step(descent.State(*state[:3]), batch)
        if not isinstance(info.aux, gradients.SquaredNorms):
            raise ValueError(f"method must be made with gradients.with_sq_norms, but its aux is {type(info.aux)}")
        check_unweighted(info.aux, "method")
        batch_size = problem.num_examples(batch, "batch")
        if batch_size < 2:
            raise ValueError(f"batch_size={batch_size} shows no noise: it must be at least 2")
        norms = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), info.aux.sq_norms)
        of_one = jax.tree.reduce(jnp.add, norms).mean()
        of_batch = sq_norm(info.grad)
        factor = spans(state.num_examples, batch_size, num_examples)
        running = push(state.noise, *solve(of_one, of_batch, 1.0, factor), batch_size=batch_size)
        return State(*after, noise=running), info._replace(aux=Tracked(reading(running), info.aux))

    return Method(init, step)


def _spans(stream: Callable) -> Callable:
    """Return `(position, B, N) -> f(B)` for the batch that begins at this position of the stream."""
    known = {
        "reshuffled": _epochs,
        "shuffled_once": _distinct,
        "cyclic": _distinct,
        "with_replacement": _independent,
        "poisson": _independent,
    }
    name = getattr(stream, "__name__", repr(stream))
    if getattr(batching, name, None) is not stream or name not in known:
        raise ValueError(
            f"stream={name} must be one of batching's, {', '.join(known)}: of others it is not known how their "
            "examples depend on one another"
        )
    return known[name]


def _independent(position, batch_size: int, num_examples: int | None):
    return 1 / batch_size


def _distinct(position, batch_size: int, num_examples: int):
    if batch_size > num_examples:
        raise ValueError(f"batch_size={batch_size} exceeds the num_examples={num_examples} of an order that repeats")
    return variance_factor(batch_size, num_examples)


def _epochs(position, batch_size: int, num_examples: int):
    """Return the factor of pieces of independent orders: a whole epoch has no noise, a piece of k has f(k) (k/B)^2."""
    place = divmod(position, num_examples)[1].astype(jnp.int32)  # of the first example in its epoch
    first = jnp.minimum(num_examples - place, batch_size)
    last = (batch_size - first) % num_examples
    pieces = jnp.stack([first, last]).astype(float)
    return jnp.sum(pieces * (num_examples - pieces)) / (batch_size**2 * max(num_examples - 1, 1))
