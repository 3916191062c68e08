"""A problem: the loss of one example, a way to draw parameters, and data. Everything else is derived.

>>> import jax, jax.numpy as jnp
>>> problem = Problem(
...     init=lambda key: jnp.zeros(()),
...     loss=lambda mean, x: 0.5 * (mean - x) ** 2,
...     train=jnp.asarray([1.0, 2.0, 6.0]),
...     name="mean of three numbers",
... )
>>> problem.num_examples
3
>>> Problem(init=problem.init, loss=lambda mean, x: (mean - x) * jnp.ones(2), train=problem.train)
Traceback (most recent call last):
ValueError: loss must return one floating-point scalar for one example, but it returns float32[2]: reduce it, for \
instance with .mean()
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from gdjax._trees import kept, traced, weighted_mean
from gdjax._trees import merge as merge
from gdjax._trees import trainable as trainable

Params = Any
"""Parameters: any pytree of arrays. Leaves that are not floating-point are carried along and never trained."""
Example = Any
"""One example: any pytree of arrays."""
Batch = Any
"""An Example with a leading axis B on every leaf."""
Loss = Callable[[Params, Example], jax.Array]
"""The loss of one example, a floating-point scalar."""
Weight = Callable[[Example], jax.Array]
"""How much one example counts, a real scalar >= 0: the loss of a batch is sum w l / sum w."""
Trainable = Callable[[str], bool] | Any
"""Which leaves are trained: a predicate on `jax.tree_util.keystr(path)`, or a pytree of bools like the parameters."""

EVALUATED_AT_ONCE = 256  # examples


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What gdjax needs to know, checked when it is made.

    Attributes:
        init: key -> params.
        loss: (params, example) -> scalar, the loss of one example.
        train: the training examples; every leaf is [N, ...].
        test: further examples of the same shapes, or None.
        metrics: {name: (params, example) -> scalar}, averaged over examples when reported.
        weight: example -> scalar >= 0, how much an example counts (its number of tokens, 0 for padding, an importance):
            the loss of a batch is sum w l / sum w. None: every example counts 1. What makes an estimator of this
            problem passes it on: `gradients.mean(problem.loss, weight=problem.weight)`.
        name: how tables, figures and run folders call it.
        allow_nonfinite: accept NaN and infinity in the data.

    Raises:
        ValueError: for an empty data set, leaves that disagree about N, test examples unlike the training
            examples, NaN or infinity in the data, parameters with no floating-point leaf, and a loss, metric or weight
            that is not a scalar or that communicates with the other examples of a batch; and for weights of the data
            that are negative, not finite, or all zero.
    """

    init: Callable[[jax.Array], Params]
    loss: Loss
    train: Batch
    test: Batch | None = None
    metrics: Mapping[str, Callable[[Params, Example], jax.Array]] = dataclasses.field(default_factory=dict)
    weight: Weight | None = None
    name: str = "problem"
    allow_nonfinite: bool = False

    def __post_init__(self):
        params = _abstract_params(self.init)
        trainable(params)
        example = _example(self.train, "train")
        for name, data in (("train", self.train), ("test", self.test)):
            if data is None:
                continue
            if jax.tree.flatten(_example(data, name)) != jax.tree.flatten(example):
                raise ValueError(f"test examples are {_example(data, name)} but training examples are {example}")
            if not self.allow_nonfinite:
                _check_finite(data, name)
        check_loss(jax.eval_shape(_alone(self.loss), params, example))
        for name, metric in self.metrics.items():
            if name == "loss":
                raise ValueError("metric 'loss' must have another name: the loss is reported under that one")
            if jnp.shape(value := jax.eval_shape(_alone(metric), params, example)) != ():
                raise ValueError(f"metric {name!r} must return one scalar for one example, but returns {value}")
        for name, data in (("train", self.train), ("test", self.test)):
            if self.weight is not None and data is not None:
                _check_weights(self.weight, data, name)

    def __repr__(self) -> str:
        """Name the problem and count its examples; its arrays say nothing on a terminal."""
        tested = "" if self.test is None else f" and {num_examples(self.test)} for tests"
        measured = f", metrics {', '.join(self.metrics)}" if self.metrics else ""
        return f"Problem({self.name!r}, {self.num_examples} examples{tested}{measured})"

    @property
    def num_examples(self) -> int:
        """N, the number of training examples."""
        return num_examples(self.train)

    def evaluate(
        self, params: Params, on: str | Batch = "train", *, names: Sequence[str] | None = None
    ) -> dict[str, jax.Array]:
        """Return {"loss": mean loss, and the mean of every metric}, in chunks, so that memory does not grow with N.

        Means are weighted where the problem has weights.

        It is pure and works under `jit` and `vmap`. Examples that are given as an argument of a jitted function are an
        input of its program; those of the problem become constants of it, of which every program holds a copy.

        Args:
            params: the parameters.
            on: 'train', 'test', or other examples, every leaf [K, ...].
            names: of what to evaluate; default the loss and all metrics.

        Returns:
            Scalars, NaN where a parameter is NaN or infinite: an accuracy is finite even then.

        Raises:
            ValueError: for test examples where there are none, and a name that the problem does not have.
        """
        functions = {"loss": self.loss, **self.metrics}
        names = tuple(functions) if names is None else tuple(names)
        if unknown := [name for name in names if name not in functions]:
            raise ValueError(f"names={names}: {self.name} has no metric {unknown[0]!r}; it has {', '.join(functions)}")
        examples = {"train": self.train, "test": self.test}.get(on, on) if isinstance(on, str) else on
        if examples is None or isinstance(examples, str):
            parts = "'train'" if self.test is None else "'train' or 'test'"
            raise ValueError(f"on={on!r} must be {parts}, or examples, every leaf [K, ...]")
        examples = jax.tree.map(jnp.asarray, examples)
        num_examples(examples, "on")

        def make():
            return partial(_evaluate, {name: functions[name] for name in names}, self.weight)

        if traced(params, examples):
            return make()(params, examples)
        return kept(self, ("evaluate", names), lambda: jax.jit(make()))(params, examples)


def _evaluate(
    functions: Mapping[str, Callable], weight: Weight | None, params: Params, examples: Batch
) -> dict[str, jax.Array]:
    """Return the means of functions of (params, example) over examples, NaN where a parameter is not finite."""
    count = num_examples(examples)
    values = lax.map(
        lambda example: {name: jnp.asarray(function(params, example)) for name, function in functions.items()},
        examples,
        batch_size=min(EVALUATED_AT_ONCE, count),
    )
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(trainable(params)[0])]).all()
    shares = None if weight is None else weights(weight, examples)
    return {name: jnp.where(finite, _mean(value, shares), jnp.nan) for name, value in values.items()}


def _mean(values: jax.Array, shares: jax.Array | None) -> jax.Array:
    """Return the mean of values [N], weighted by shares [N] in any unit; a value of share 0 may be NaN."""
    if shares is None:
        return values.mean()
    dtype = values.dtype if jnp.issubdtype(values.dtype, jnp.floating) else jnp.result_type(float)  # not of a bool
    mean = weighted_mean(values.astype(dtype), shares)
    return jnp.where(shares.max() > 0, mean, jnp.nan).astype(dtype)


def num_examples(data: Batch, name: str = "data") -> int:
    """Return the length of the leading axis that every leaf of `data` shares.

    Raises:
        ValueError: where there is no leaf, a leaf has no axis, leaves disagree, or there is no example.
    """
    lengths = {
        jax.tree_util.keystr(path): np.shape(leaf)[:1] for path, leaf in jax.tree_util.tree_leaves_with_path(data)
    }
    if not lengths:
        raise ValueError(f"{name} has no arrays: expected a pytree of arrays [N, ...]")
    if () in lengths.values() or len(set(lengths.values())) > 1:
        sizes = ", ".join(f"{name}{path}: {length[0] if length else 'scalar'}" for path, length in lengths.items())
        raise ValueError(f"every leaf of {name} must have the same leading axis, one entry an example: {sizes}")
    [(length,)] = set(lengths.values())
    if length == 0:
        raise ValueError(f"{name} is empty: it has 0 examples")
    return length


def check_loss(losses: Any, shape: tuple[int, ...] = ()) -> None:
    """Raise ValueError unless `losses` is a floating-point array of this shape: () for an example, (B,) for a batch."""
    advice = {False: "", True: ": reduce it, for instance with .mean()"}
    if not hasattr(losses, "shape") or not hasattr(losses, "dtype"):
        found, reducible = f"a {type(losses).__name__}; return extra outputs as metrics", False
    else:
        own_shape = losses.shape[len(shape) :]
        found = f"{losses.dtype}[{','.join(map(str, own_shape))}]"
        if own_shape == () and jnp.issubdtype(losses.dtype, jnp.floating):
            return
        reducible = own_shape != ()
    raise ValueError(
        f"loss must return one floating-point scalar for one example, but it returns {found}{advice[reducible]}"
    )


def checked(loss: Loss) -> Loss:
    """Return `loss` with a `ValueError` that says what to do, where what it returns is not the loss of one example."""
    alone = _alone(loss)

    def of_one_example(params: Params, example: Example) -> jax.Array:
        value = alone(params, example)
        check_loss(value)
        return value

    return of_one_example


def weights(weight: Weight, batch: Batch) -> jax.Array:
    """Return the weights [B] of the examples of a batch, in float32 at least.

    Raises:
        ValueError: where `weight` does not return one real scalar for one example.
    """
    found = jax.vmap(_alone(weight))(batch)
    if not hasattr(found, "dtype") or found.ndim != 1 or jnp.issubdtype(found.dtype, jnp.complexfloating):
        raise ValueError(
            "weight must return one real scalar for one example, but it returns "
            + (f"{found.dtype}{list(found.shape[1:])}" if hasattr(found, "dtype") else f"a {type(found).__name__}")
        )
    wide = jnp.issubdtype(found.dtype, jnp.floating) and jnp.finfo(found.dtype).bits >= 32
    return found if wide else found.astype(float)


def _abstract_params(init: Callable[[jax.Array], Params]) -> Params:
    try:
        return jax.eval_shape(init, jax.random.key(0))
    except TypeError as error:
        raise ValueError(
            "init must return a pytree of arrays and work under jax.jit; an Equinox model keeps its functions apart "
            f"with eqx.partition(model, eqx.is_array). What jax says: {error}"
        ) from error


def _alone(function: Callable) -> Callable:
    """Return `function`, of one example, with a message of its own where it asks for the other examples."""

    def of_one_example(*arguments):
        try:
            return function(*arguments)
        except NameError as error:
            if "unbound axis name" not in str(error):
                raise
            raise ValueError(
                "a loss of one example cannot depend on the others of its batch, as BatchNorm in training mode does: "
                f"use its running averages, or GroupNorm or LayerNorm. What jax says: {error}"
            ) from error

    return of_one_example


def _check_weights(weight: Weight, data: Batch, name: str) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(data)):
        jax.eval_shape(lambda data: weights(weight, data), data)
        return
    found = jax.jit(lambda data: weights(weight, data))(data)
    if bad := int(jnp.sum(~(jnp.isfinite(found) & (found >= 0)))):
        raise ValueError(f"weight must be finite and at least 0, but is not for {bad} examples of {name}")
    if not bool(jnp.any(found > 0)):
        raise ValueError(f"weight is 0 for every example of {name}")


def _example(data: Batch, name: str) -> Any:
    num_examples(data, name)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[1:], jnp.result_type(leaf)), data)


def _check_finite(data: Batch, name: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if isinstance(leaf, Tracer) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        with jax.ensure_compile_time_eval():  # a problem may be changed within a traced function
            bad = int(jnp.sum(~jnp.isfinite(leaf)))
        if bad:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} holds {bad} values that are NaN or infinite: clean the data, or "
                "pass allow_nonfinite=True"
            )
