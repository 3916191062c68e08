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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

Params = Any
"""Parameters: any pytree of arrays. Leaves that are not floating-point are carried along and never trained."""
Example = Any
"""One example: any pytree of arrays."""
Batch = Any
"""An Example with a leading axis B on every leaf."""
Loss = Callable[[Params, Example], jax.Array]
"""The loss of one example, a floating-point scalar."""

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
        name: how tables, figures and run folders call it.
        allow_nonfinite: accept NaN and infinity in the data.

    Raises:
        ValueError: for an empty data set, leaves that disagree about N, test examples unlike the training
            examples, NaN or infinity in the data, parameters with no floating-point leaf, and a loss or metric
            that is not a scalar or that communicates with the other examples of a batch.
    """

    init: Callable[[jax.Array], Params]
    loss: Loss
    train: Batch
    test: Batch | None = None
    metrics: Mapping[str, Callable[[Params, Example], jax.Array]] = dataclasses.field(default_factory=dict)
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
        check_loss(_abstract(self.loss, params, example))
        for name, metric in self.metrics.items():
            if name == "loss":
                raise ValueError("metric 'loss' must have another name: the loss is reported under that one")
            if jnp.shape(value := _abstract(metric, params, example)) != ():
                raise ValueError(f"metric {name!r} must return one scalar for one example, but returns {value}")

    @property
    def num_examples(self) -> int:
        """N, the number of training examples."""
        return num_examples(self.train)

    def evaluate(
        self, params: Params, on: str | Batch = "train", *, names: Sequence[str] | None = None
    ) -> dict[str, jax.Array]:
        """Return {"loss": mean loss, and the mean of every metric}, in chunks, so that memory does not grow with N.

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

        def one(example):
            return {name: functions[name](params, example) for name in names}

        values = lax.map(one, examples, batch_size=min(EVALUATED_AT_ONCE, num_examples(examples, "on")))
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(trainable(params)[0])]).all()
        return {name: jnp.where(finite, value.mean(), jnp.nan) for name, value in values.items()}


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


def trainable(params: Params) -> tuple[Params, Params]:
    """Split parameters into (floating-point leaves, all other leaves), each with None where the other has a leaf.

    Gradients, optimisers and statistics see the first part alone; `merge` puts the two together again.

    >>> trainable({"weight": 1.5, "steps": 3})
    ({'steps': None, 'weight': 1.5}, {'steps': 3, 'weight': None})

    Raises:
        ValueError: where no leaf is floating-point, so that there is nothing to train.
    """
    dtypes = jax.tree.map(jnp.result_type, params)
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in jax.tree.leaves(dtypes)):
        raise ValueError("params must be real: keep a complex leaf as its real and imaginary parts")
    floating = jax.tree.map(lambda dtype: jnp.issubdtype(dtype, jnp.floating), dtypes)
    if not any(jax.tree.leaves(floating)):
        names = [str(dtype) for dtype in jax.tree.leaves(dtypes)]
        raise ValueError(f"params must have a floating-point leaf to train, but its leaves are {names}")
    train = jax.tree.map(lambda leaf, is_floating: leaf if is_floating else None, params, floating)
    frozen = jax.tree.map(lambda leaf, is_floating: None if is_floating else leaf, params, floating)
    return train, frozen


def merge(train: Params, frozen: Params) -> Params:
    """Undo `trainable`."""
    return jax.tree.map(lambda a, b: b if a is None else a, train, frozen, is_leaf=lambda leaf: leaf is None)


def _abstract_params(init: Callable[[jax.Array], Params]) -> Params:
    try:
        return jax.eval_shape(init, jax.random.key(0))
    except TypeError as error:
        raise ValueError(
            "init must return a pytree of arrays and work under jax.jit; an Equinox model keeps its functions apart "
            f"with eqx.partition(model, eqx.is_array). What jax says: {error}"
        ) from error


def _abstract(function: Callable[[Params, Example], Any], params: Params, example: Any) -> Any:
    try:
        return jax.eval_shape(function, params, example)
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        raise ValueError(
            "a loss of one example cannot depend on the others of its batch, as BatchNorm in training mode does: use "
            f"its running averages, or GroupNorm or LayerNorm. What jax says: {error}"
        ) from error


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
