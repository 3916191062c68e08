"""Kinds of programs crossed with what programs are put into: loops, vmap, checkpoints, bfloat16, sharded batches."""

import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gdjax import ghost

pytestmark = pytest.mark.slow  # hundreds of programs are compiled

B, T, D, V = 4, 3, 4, 5


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def square(x):
    return jnp.sum(jnp.abs(x) ** 2)


@jax.custom_vjp
def quantise(w):
    return jnp.round(w * 4) / 4


quantise.defvjp(lambda w: (quantise(w), w), lambda w, g: (jnp.where(jnp.abs(w) < 1, g, 0),))


@jax.custom_gradient
def doubled_backwards(w):
    return jnp.sin(w), lambda g: 2 * g * jnp.cos(w)


@jax.custom_vjp
def clip_cotangent(x):
    return x


clip_cotangent.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_vjp
def scaled_by_table(w, x, table):
    return (x @ w) * table[0]


scaled_by_table.defvjp(
    lambda w, x, table: (scaled_by_table(w, x, table), (w, x, table)),
    lambda kept, g: (
        jnp.outer(kept[1], g) * kept[2].at[0].get(),
        kept[0] @ g * kept[2].at[1].get(),
        jnp.zeros_like(kept[2]),
    ),
)


def host_norm(w):
    shape = jax.ShapeDtypeStruct((), w.dtype)
    return jax.pure_callback(
        lambda v: np.linalg.norm(np.asarray(v, float)).astype(v.dtype), shape, w, vmap_method="sequential"
    )


def layer_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-3) * scale + bias


def convolved(x, kernel, groups=1):
    return lax.conv_general_dilated(
        x[None], kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=groups
    )[0]


def rnn(p, x):
    return lax.scan(lambda h, row: (jnp.tanh(row @ p["w"] + h @ p["u"] + p["b"]),) * 2, jnp.zeros(D, x.dtype), x)[1]


def looped(p, x):
    """Slices of a stack of weights, picked by the counter of a loop, and rows of one picked by data in a loop."""

    def body(i, h):
        return jnp.tanh(h @ p["s"][i]) + p["w"][jnp.argmax(h[0])]

    return lax.fori_loop(0, 3, body, x)


def layers(p, x):
    def layer(h, w):
        return jnp.tanh(jnp.tanh(h @ w) @ w.T) @ quantise(w), None

    return lax.scan(layer, x, p["s"])[0]


def argmax_row(x):
    return jnp.argmax(x[0])


PARAMS = {"w": (D, D), "u": (D, D), "b": (D,), "e": (V, D), "s": (3, D, D), "k": (2, D, D), "g": (2, 2, D), "t": ()}
# Of one example x [T, D] of numbers and i [T] of integers below V.
KINDS = {
    "dense": lambda p, x, i: jnp.tanh(x @ p["w"] + p["b"]) @ p["u"],
    "dense_of_one_position": lambda p, x, i: jnp.tanh(x[0] @ p["w"] + p["b"]) @ p["u"],
    "left": lambda p, x, i: p["w"] @ jnp.tanh(p["u"] @ x.T),
    "complex_features": lambda p, x, i: (
        jnp.fft.fft(x.astype(jnp.float32), axis=0).astype(jnp.complex64) @ p["w"].astype(jnp.float32)
    ),
    "complex_table": lambda p, x, i: (
        p["e"].astype(jnp.complex64)[i] * jnp.exp(1j * jnp.arange(3.0))[:, None].astype(jnp.complex64)
    ),
    "complex_signal": lambda p, x, i: convolved((x * (1 + 2j)).astype(jnp.complex64), p["k"].astype(jnp.complex64)),
    "complex_bias": lambda p, x, i: (x * (1 + 2j)).astype(jnp.complex64) + p["b"].astype(jnp.complex64),
    "quantised": lambda p, x, i: jnp.tanh(x @ quantise(p["w"])),
    "custom_gradient": lambda p, x, i: jnp.tanh(x @ doubled_backwards(p["w"]) + doubled_backwards(p["b"])),
    "quantised_twice": lambda p, x, i: jnp.tanh(x @ quantise(p["w"])) @ quantise(p["w"]).T + p["w"][0],
    "custom_rule_with_a_constant": lambda p, x, i: scaled_by_table(p["w"], x[0], jnp.array([2.0, 3.0], x.dtype)),
    "callback": lambda p, x, i: x @ (p["w"] / host_norm(lax.stop_gradient(p["w"]))),
    "callback_and_custom_rule": lambda p, x, i: x @ (quantise(p["w"]) * host_norm(lax.stop_gradient(p["u"]))),
    "clipped_cotangent": lambda p, x, i: 10 * clip_cotangent(x @ p["w"]),
    "clipped_cotangent_of_weight": lambda p, x, i: jnp.tanh(x @ clip_cotangent(p["w"])) + clip_cotangent(p["b"]),
    "lookup": lambda p, x, i: jnp.tanh(p["e"][i[0]] * x[0]),
    "lookup_of_two_rows": lambda p, x, i: jnp.tanh(p["e"][i[0]]) * p["e"][i[1]],
    "lookup_in_vmap": lambda p, x, i: jnp.cumsum(jnp.tanh(jax.vmap(lambda j: p["e"][j])(i)), 0),
    "lookup_of_entries": lambda p, x, i: jnp.tanh(jax.vmap(lambda j: p["e"][j, 1])(i)) + p["w"][1, argmax_row(x)],
    "lookup_of_columns": lambda p, x, i: jnp.tanh(x.T @ p["w"][:3, argmax_row(x)][:, None]),
    "table": lambda p, x, i: jnp.cumsum(jnp.tanh(p["e"][i]), 0),
    "long_lookup": lambda p, x, i: jnp.cumsum(jnp.tanh(p["w"][jnp.tile(jnp.abs(i) % D, 9)]), 0),
    "window": lambda p, x, i: x[:2] * lax.dynamic_slice(p["e"], (i[0], 0), (2, D)),
    "siamese": lambda p, x, i: jnp.tanh(x @ p["w"]) - jnp.tanh(x[::-1] @ p["w"]),
    "triplet": lambda p, x, i: [jnp.tanh(row @ p["w"] + p["b"]) for row in (x[0], x[1], 2 * x[2])],
    "there_and_back": lambda p, x, i: jnp.tanh(x @ p["w"]) @ p["w"].T,
    "one_layer_five_times": lambda p, x, i: [x := jnp.tanh(x @ p["w"]) for _ in range(5)][-1],
    "penalty": lambda p, x, i: [jnp.tanh(x @ p["w"]), 0.3 * p["w"]],
    "penalties": lambda p, x, i: [
        jnp.tanh(x @ p["w"] + p["b"]),
        0.3 * p["w"],
        jnp.sqrt(square(p["b"]) + square(p["e"])),
    ],
    "penalty_times_the_example": lambda p, x, i: [
        jnp.tanh(p["e"][i]),
        x.sum() * square(p["e"]),
        x[0] @ p["w"] * p["t"],
    ],
    "penalty_alone": lambda p, x, i: [p["u"], x],
    "dead_code": lambda p, x, i: [jnp.tanh(x @ p["w"]), (jnp.tanh(p["w"].T @ p["u"] @ x.T), 0)[1]],
    "unit_axes": lambda p, x, i: jnp.tanh(x[None] @ p["w"][None]) + jnp.squeeze(p["u"][:, None], 1)[0],
    "barrier": lambda p, x, i: jnp.tanh(x @ lax.optimization_barrier((p["w"], p["b"]))[0]),
    "scaled": lambda p, x, i: jnp.tanh(x @ (p["w"] / jnp.sqrt(jnp.asarray(4.0, x.dtype)))) @ (-p["w"] * 0.5),
    "split": lambda p, x, i: sum(jnp.tanh(x @ part.T).sum() * (n + 1) for n, part in enumerate(jnp.split(p["w"], 2))),
    "overlapping_slices": lambda p, x, i: jnp.tanh(x @ p["w"][:, :3]) + jnp.tanh(x @ p["w"][:, 1:]),
    "slices_twice": lambda p, x, i: [jnp.tanh(x @ p["w"][:, :2]), jnp.sin(x @ p["w"][:, :2]), x @ p["w"][:, 2:]],
    "reshaped_and_plain": lambda p, x, i: (
        jnp.tanh(x @ p["w"]) + x @ p["w"].reshape(2, 2, 4).swapaxes(0, 1).reshape(4, 4)
    ),
    "reversed": lambda p, x, i: jnp.tanh(x @ p["w"][::-1]) + x @ p["w"],
    "rnn": lambda p, x, i: rnn(p, x),
    "by_the_counter_of_a_loop": lambda p, x, i: looped(p, x),
    "layers_in_a_loop": lambda p, x, i: layers(p, x),
    "layer_norm": lambda p, x, i: jnp.sin(layer_norm(x @ p["w"], p["b"], p["u"][0])),
    "tied": lambda p, x, i: jax.nn.log_softmax(jnp.tanh(p["e"][i]) @ p["e"].T),
    "tied_and_scaled": lambda p, x, i: jnp.tanh(p["e"][i] * 2 + p["b"]) @ (p["e"].T / 3),
    "convolution_twice": lambda p, x, i: convolved(jnp.tanh(convolved(x, p["k"])), p["k"]),
    "grouped_convolution_twice": lambda p, x, i: convolved(jnp.tanh(convolved(x, p["g"], 2)), p["g"], 2),
    "masked_weight": lambda p, x, i: jnp.tanh(x @ (p["w"] * jnp.eye(D, dtype=x.dtype) + p["u"])),
    "weight_norm": lambda p, x, i: jnp.tanh(x @ (p["t"] * p["w"] / jnp.linalg.norm(p["w"]))),
    "token_in_front": lambda p, x, i: jnp.tanh(jnp.concatenate([p["b"][None], x, p["u"][:1]]) @ p["w"]),
    "choice_of_entries": lambda p, x, i: jnp.where(x > 0, jnp.broadcast_to(p["b"], x.shape), x * p["t"]),
    "choice_of_layers": lambda p, x, i: lax.cond(
        x[0, 0] > 0, lambda: jnp.tanh(x @ p["w"]), lambda: x @ p["u"] * p["t"]
    ),
    "empty_features": lambda p, x, i: jnp.tanh(x @ p["w"]) + (x[:, :0] @ p["w"][:0]) + (x @ p["u"][:, :0]).sum(),
}


def prepared(name):
    """Return params, batch and loss of a kind: the parameters that it uses, and one that it does not."""
    function = KINDS[name]

    class Seen(dict):
        def __getitem__(self, key):
            used.add(key)
            return super().__getitem__(key)

    used = {"b"}
    params = {key: normal(n, *shape) for n, (key, shape) in enumerate(PARAMS.items())}
    batch = normal(9, B, T, D), jax.random.randint(jax.random.key(10), (B, T), -V, V)
    one = jax.tree.map(lambda x: x[0], batch)
    jax.eval_shape(lambda p, e: function(Seen(p), *e), params, one)
    return (
        {key: params[key] for key in sorted(used)},
        batch,
        lambda p, e: sum(map(square, jax.tree.leaves(function(p, *e)))),
    )


def in_scan(loss):
    """Three times in a loop, of parameters that the loop closes over; its state depends on all before."""
    return lambda p, e: lax.fori_loop(
        0, 3, lambda _, s: s + loss(p, (e[0] + 0.1 * jnp.tanh(s), e[1])), jnp.zeros((), e[0].dtype)
    )


def in_vmap(loss):
    """Mean over three positions, each with its own example."""
    return lambda p, e: jax.vmap(lambda shift: loss(p, (e[0] + shift, e[1])))(jnp.arange(3.0, dtype=e[0].dtype)).mean()


def in_remat(loss):
    return lambda p, e: jax.checkpoint(lambda p, x: loss(p, (x, e[1])))(p, jnp.tanh(e[0]))


def in_bfloat16(loss):
    def low(p, e):
        p, x = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (p, e[0]))
        return loss(p, (x, e[1])).astype(jnp.float32)

    return low


WRAPPERS = {"plain": lambda loss: loss, "scan": in_scan, "vmap": in_vmap, "remat": in_remat, "bfloat16": in_bfloat16}
WRAPPERS |= {"sharding": lambda loss: loss}

# In bfloat16 a product with complex values is refused by JAX, and a cotangent that is clipped may go either way.
LEFT_OUT = {("bfloat16", name) for name in KINDS if name.startswith(("complex", "clipped"))}
# XLA splits this convolution wrongly between devices, for vmap(grad) as well.
LEFT_OUT |= {("sharding", "complex_signal")}
# Every kind runs in one of the wrappers each time, in one more in the slow tests, and in the others at night.
SLOW, NIGHTLY = [pytest.mark.slow], [pytest.mark.slow, pytest.mark.nightly]
PROGRAMS = [
    pytest.param(wrapper, name, marks=([], SLOW, NIGHTLY, NIGHTLY, NIGHTLY, NIGHTLY)[(i + j) % len(WRAPPERS)])
    for i, wrapper in enumerate(WRAPPERS)
    for j, name in enumerate(KINDS)
    if (wrapper, name) not in LEFT_OUT
]


@pytest.fixture(autouse=True)
def promotions():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(("wrapper", "name"), PROGRAMS)
def test_norms_are_those_of_the_gradients_of_all_examples(wrapper, name):
    params, batch, loss = prepared(name)
    loss = WRAPPERS[wrapper](loss)
    single = precision.EPS if wrapper != "bfloat16" else 2.0**-8
    tolerance = 1e4 * (2.0**-24 if name.startswith("complex") else single) if wrapper != "bfloat16" else 0.04

    def oracle(params, batch):
        return jax.vmap(jax.value_and_grad(loss), (None, 0))(params, batch)

    losses, grads = jax.jit(oracle)(params, batch)
    if wrapper == "sharding":
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    found = jax.jit(ghost.sq_norms(loss))(params, batch)
    # In bfloat16 a small loss is the difference of large numbers.
    spread = tolerance * float(losses.max()) if wrapper == "bfloat16" else 0.0
    precision.assert_close(found.losses, losses, rtol=tolerance, atol=spread)
    for key, leaf in grads.items():
        leaf = np.asarray(leaf, float)
        norms = (leaf.reshape(B, -1) ** 2).sum(1)
        np.testing.assert_allclose(
            found.sq_norms[key], norms, rtol=tolerance, atol=tolerance * norms.max(), err_msg=key
        )
        scale = tolerance * np.abs(leaf).max()
        np.testing.assert_allclose(found.grad[key], leaf.mean(0), rtol=tolerance, atol=scale, err_msg=key)


# In which rules take every parameter that is used, so that nothing the size of a weight is formed for each example.
RULED = """dense left lookup lookup_in_vmap lookup_of_entries table long_lookup siamese triplet there_and_back penalty
one_layer_five_times penalties dead_code unit_axes barrier scaled split slices_twice rnn layer_norm tied tied_and_scaled
convolution_twice grouped_convolution_twice"""


@pytest.mark.parametrize("name", RULED.split())
def test_rules_take_every_use(name):
    params, batch, loss = prepared(name)
    rows = ghost.coverage(loss, params, jax.tree.map(lambda x: x[0], batch)).rows
    assert [row for row in rows if row[2] == "materialised" and row[0] != "['b']"] == []
