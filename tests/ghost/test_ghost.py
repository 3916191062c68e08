"""Every statistic of every kind of program against `vmap(grad)`, the oracle."""

import functools

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from flax import nnx
from jax import lax

from gdjax import ghost, problem
from gdjax.ghost import _flow as ghost_flow
from gdjax.problems import models

B = 5


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def oracle(loss, params, batch):
    """Return per-example losses and gradients of the floating-point leaves."""
    train, frozen = problem.trainable(params)
    return jax.vmap(
        lambda example: jax.value_and_grad(lambda train: loss(problem.merge(train, frozen), example))(train)
    )(batch)


def check(loss, params, batch, rtol=1e-12):
    """Compare norms, second moments and Gram matrices, leaf by leaf, in one program, which compiles faster."""
    measures = (ghost.sq_norms, ghost.second_moments, ghost.gram)

    @jax.jit
    def everything(params, batch):
        return oracle(loss, params, batch), [measure(loss)(params, batch) for measure in measures]

    (losses, grads), found = everything(params, batch)
    size = len(losses)
    expected = [
        jax.tree.map(lambda g: (g.reshape(size, -1) ** 2).sum(1), grads),
        jax.tree.map(lambda g: (g**2).mean(0), grads),
        jax.tree.map(lambda g: g.reshape(size, -1) @ g.reshape(size, -1).T, grads),
    ]
    mean = jax.tree.map(lambda g: g.mean(0), grads)

    def close(found, expected):
        assert found.shape == expected.shape
        scale = np.abs(expected).max(initial=0)
        precision.assert_close(found, expected, rtol=rtol, atol=rtol * scale + 1e-300)

    for (found_losses, found_mean, measured), wanted in zip(found, expected, strict=True):
        close(found_losses, losses)
        jax.tree.map(close, found_mean, mean)
        jax.tree.map(close, measured, wanted)


def square(x):
    return (x**2).sum()


# Programs: name -> (params, example-batch, loss). Each says what is hard about it.
PROGRAMS = {}


def program(make):
    PROGRAMS[make.__name__] = make
    return make


@program
def mlp():
    model = models.mlp((4, 6, 3), activation=jnp.tanh)

    def loss(params, example):
        return square(model.apply(params, example[0]) - example[1])

    return model.init(jax.random.key(0)), (normal(1, B, 4), normal(2, B, 3)), loss


@program
def mlp_with_weights_on_the_left():
    params = {"w": normal(0, 6, 4), "v": normal(1, 3, 6), "b": normal(2, 6)}
    return params, normal(3, B, 4), lambda p, x: square(p["v"] @ jnp.tanh(p["w"] @ x + p["b"]))


@program
def dense_over_tokens():
    params = {"w": normal(0, 4, 9), "b": normal(1, 9), "v": normal(2, 9, 2)}
    return params, normal(3, B, 7, 4), lambda p, x: square(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"])


@program
def dense_over_few_tokens_and_wide_layers():
    params = {"w": normal(0, 30, 40), "v": normal(2, 40, 30)}
    return params, normal(3, B, 2, 30), lambda p, x: square(jnp.tanh(x @ p["w"]) @ p["v"])


@program
def dense_one_by_one():
    params = {"w": normal(0, 16, 16), "v": normal(2, 16, 16)}
    return params, normal(3, B, 9, 16), lambda p, x: square(jnp.tanh(x @ p["w"]) @ p["v"])


@program
def einsum_with_several_free_axes():
    params = {"w": normal(0, 3, 4, 2, 5), "v": normal(1, 2, 5, 3)}

    def loss(p, x):
        y = jnp.tanh(jnp.einsum("stij,ijhd->hstd", x, p["w"]))
        return square(jnp.einsum("hstd,hdk->tks", y, p["v"]))

    return params, normal(2, B, 2, 3, 3, 4), loss


@program
def batched_dot_general():
    params = {"w": normal(0, 3, 4, 5), "v": normal(1, 3, 4, 4)}

    def loss(p, x):
        y = lax.dot_general(x, p["w"], (((2,), (1,)), ((0,), (0,))))
        z = lax.dot_general(p["v"], x, (((1,), (2,)), ((0,), (0,))))
        return square(jnp.tanh(y)) + square(jnp.tanh(z))

    return params, normal(2, B, 3, 2, 4), loss


def convolution(dimension, layout, *, groups=1, stride=1, padding="SAME", dilation=1, channels=4, input_dilation=1):
    spatial = (6, 5)[:dimension]
    spec = {1: {"first": ("NCH", "OIH", "NCH"), "last": ("NHC", "HIO", "NHC")}}.get(
        dimension, {"first": ("NCHW", "OIHW", "NCHW"), "last": ("NHWC", "HWIO", "NHWC")}
    )[layout]
    shapes = {"first": (channels, *spatial), "last": (*spatial, channels)}
    window, inside, out = (3, 2)[:dimension], channels // groups, 6
    kernel = normal(0, *((out, inside, *window) if layout == "first" else (*window, inside, out)))

    def loss(params, x):
        y = lax.conv_general_dilated(
            x[None],
            params["kernel"],
            (stride,) * dimension,
            padding,
            lhs_dilation=(input_dilation,) * dimension,
            rhs_dilation=(dilation,) * dimension,
            dimension_numbers=spec,
            feature_group_count=groups,
        )
        bias = params["bias"].reshape((-1, *[1] * dimension)) if layout == "first" else params["bias"]
        return square(jnp.tanh(y + jnp.broadcast_to(bias, y.shape)))

    return {"kernel": kernel, "bias": normal(1, out)}, normal(2, B, *shapes[layout]), loss


for _name, _options in {
    "plain": {},
    "strided": {"stride": 2},
    "padded_unevenly": {"padding": [(2, 0), (1, 3)]},
    "valid": {"padding": "VALID"},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4, "channels": 4} | {"groups": 2, "stride": 2},
    "transposed": {"input_dilation": 2, "padding": [(1, 1), (1, 1)]},
}.items():
    for _dimension, _layouts in {1: ("first",), 2: ("first", "last")}.items():
        for _layout in _layouts:
            _chosen = dict(_options)
            if isinstance(_chosen.get("padding"), list):
                _chosen["padding"] = _chosen["padding"][:_dimension]
            PROGRAMS[f"convolution_{_dimension}d_{_name}_channels_{_layout}"] = functools.partial(
                convolution, _dimension, _layout, **_chosen
            )


def layer_norm(x, scale, bias=0.0):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias


def spread(vector, like):
    return jnp.broadcast_to(vector, like.shape)


@program
def normalisations():
    params = {
        "w": normal(0, 4, 8),
        "scale": normal(1, 8),
        "bias": normal(2, 8),
        "rms": normal(3, 8),
        "group": normal(4, 2),
    }

    def loss(p, x):
        y = x @ p["w"]
        y = layer_norm(y, spread(p["scale"], y), spread(p["bias"], y))
        y = jnp.tanh(y)
        y = y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * spread(p["rms"], y)
        grouped = y.reshape(-1, 2, 4)
        grouped = layer_norm(grouped, spread(p["group"][None, :, None], grouped))
        return square(jnp.sin(grouped))

    return params, normal(5, B, 3, 4), loss


@program
def embedding_with_repeated_tokens():
    params = {"table": normal(0, 5, 3), "one": normal(1, 5, 2, 3)}
    tokens = jax.random.randint(jax.random.key(2), (B, 6), 0, 5)

    def loss(p, tokens):
        return square(jnp.cumsum(jnp.tanh(p["table"][tokens]), 0)) + square(jnp.sin(p["one"][tokens[0]]))

    return params, tokens, loss


@program
def embedding_by_take_with_indices_outside():
    params = {"fill": normal(0, 5, 3), "clip": normal(1, 5, 3), "wrap": normal(2, 5, 3)}
    tokens = jax.random.randint(jax.random.key(2), (B, 6), -7, 9)

    def loss(p, tokens):
        taken = [jnp.take(p[mode], tokens, axis=0, mode=mode, fill_value=0.5) for mode in ("fill", "clip", "wrap")]
        return sum(square(jnp.cumsum(jnp.tanh(x), 0)) for x in taken)

    return params, tokens, loss


@program
def tied_embedding():
    def loss(p, tokens):
        hidden = jnp.tanh(p["table"][tokens])
        return -jax.nn.log_softmax(hidden @ p["table"].T)[:, 0].sum()

    return {"table": normal(0, 5, 3)}, jax.random.randint(jax.random.key(2), (B, 4), 0, 5), loss


@program
def same_layer_twice():
    return {"w": normal(0, 4, 4)}, normal(1, B, 4), lambda p, x: square(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]))


def attention(p, x, heads=2):
    q, k, v = (jnp.einsum("td,dhk->htk", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("htk,hsk->hts", q, k) / np.sqrt(q.shape[-1]), axis=-1)
    return jnp.einsum("hts,hsk,hkd->td", weights, v, p["o"])


def transformer_params(seed, width=4, heads=2):
    shapes = dict.fromkeys("qkv", (width, heads, width // heads)) | {"o": (heads, width // heads, width)}
    shapes |= {
        "up": (width, 3 * width),
        "down": (3 * width, width),
        "up_bias": (3 * width,),
        "s1": (width,),
        "s2": (width,),
    }
    return {name: normal(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def transformer_block(p, x):
    x = x + attention(p, layer_norm(x, spread(p["s1"], x)))
    hidden = layer_norm(x, spread(p["s2"], x)) @ p["up"]
    return x + jax.nn.gelu(hidden + spread(p["up_bias"], hidden)) @ p["down"]


@program
def transformer():
    params = {
        "embed": normal(0, 7, 4),
        "position": normal(1, 6, 4),
        "block": transformer_params(2),
        "head": normal(20, 4, 7),
    }

    def loss(p, tokens):
        x = transformer_block(p["block"], p["embed"][tokens[:-1]] + p["position"][: len(tokens) - 1])
        logits = x @ p["head"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()

    return params, jax.random.randint(jax.random.key(30), (B, 6), 0, 7), loss


@program
def scan_over_stacked_layers():
    params = jax.tree.map(lambda *layers: jnp.stack(layers), *(transformer_params(100 * i) for i in range(3)))

    def loss(p, x):
        out, norms = lax.scan(lambda x, layer: (transformer_block(layer, x), square(x)), x, p)
        return square(jnp.sin(out)) + norms.sum()

    return params, normal(1, B, 3, 4), loss


@program
def scan_over_stacked_layers_with_checkpoints():
    params, batch, _ = scan_over_stacked_layers()

    def loss(p, x):
        block = jax.checkpoint(transformer_block)
        return square(jnp.sin(lax.scan(lambda x, layer: (block(layer, x), None), x, p)[0]))

    return params, batch, loss


@program
def rnn():
    params = {"w": normal(0, 3, 4), "u": 0.5 * normal(1, 4, 4), "b": normal(2, 4), "start": normal(3, 4)}

    def loss(p, xs):
        def step(h, x):
            h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
            return h, square(h)

        h, outs = lax.scan(step, p["start"], xs)
        return square(jnp.sin(h)) + outs.sum()

    return params, normal(4, B, 6, 3), loss


@program
def gru_run_backwards():
    params = {
        name: normal(i, 3 if name[0] == "w" else 4, 4) for i, name in enumerate(["wz", "uz", "wr", "ur", "wh", "uh"])
    }

    def loss(p, xs):
        def step(h, x):
            z = jax.nn.sigmoid(x @ p["wz"] + h @ p["uz"])
            r = jax.nn.sigmoid(x @ p["wr"] + h @ p["ur"])
            return (1 - z) * h + z * jnp.tanh(x @ p["wh"] + (r * h) @ p["uh"]), None

        return square(lax.scan(step, jnp.zeros(4), xs, reverse=True)[0])

    return params, normal(9, B, 5, 3), loss


@program
def scan_with_a_counter_and_stacked_weights_by_index():
    def loss(p, x):
        def step(carry, _):
            i, h = carry
            return (i + 1, jnp.tanh(h @ p["w"][i])), p["scale"][i] * h

        (_, h), hs = lax.scan(step, (0, x), None, length=3)
        return square(h) + square(hs)

    return {"w": normal(0, 3, 4, 4), "scale": normal(1, 3)}, normal(2, B, 4), loss


@program
def scan_over_parameters_alone():
    """Power iteration: a loop that sees no example, and whose result scales the weight."""

    def loss(p, x):
        vector, _ = lax.scan(lambda v, _: (p["w"] @ v / jnp.linalg.norm(p["w"] @ v), None), jnp.ones(4), None, length=3)
        return square(jnp.tanh(x @ (p["w"] / (vector @ p["w"] @ vector))))

    return {"w": normal(0, 4, 4) + 3 * jnp.eye(4)}, normal(1, B, 4), loss


@program
def fori_loop():
    def loss(p, x):
        return square(lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]) + i.astype(h.dtype) * p["b"], x))

    return {"w": normal(0, 4, 4), "b": normal(1, 4)}, normal(2, B, 4), loss


@program
def cond_on_the_example():
    def loss(p, x):
        y = lax.cond(x[0] > 0, lambda: x @ p["yes"], lambda: jnp.sin(x @ p["no"]))
        return square(y) + square(lax.switch(jnp.asarray(1), [lambda: x * p["a"], lambda: x * p["b"]]))

    params = {"yes": normal(0, 4, 2), "no": normal(1, 4, 2), "a": normal(2, 4), "b": normal(3, 4)}
    return params, normal(4, B, 4), loss


@program
def checkpoint():
    params, batch, inner = mlp()
    return params, batch, jax.checkpoint(inner, policy=jax.checkpoint_policies.dots_saveable)


@jax.custom_jvp
def clipped_slope(x):
    return jnp.maximum(x, 0)


clipped_slope.defjvp(lambda primals, tangents: (clipped_slope(*primals), 0.3 * tangents[0]))


@jax.custom_vjp
def scaled_product(w, x):
    return x @ w


scaled_product.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (2 * jnp.outer(kept[1], g), 3 * kept[0] @ g))


@program
def custom_derivatives():
    """Rules that disagree with the function they belong to, so that losing one shows."""
    params = {"w": normal(0, 4, 3), "v": normal(1, 3, 2), "t": normal(2, 4)}

    def loss(p, x):
        hidden = clipped_slope(scaled_product(p["w"], x * clipped_slope(p["t"])))
        return square(hidden @ p["v"])

    return params, normal(3, B, 4), loss


@program
def reparametrised_weights():
    """Weight normalisation, a mask, a symmetrised weight, a slice, a temperature."""
    mask = (normal(9, 4, 4) > 0).astype(float)
    params = {
        "v": normal(0, 4, 4),
        "g": normal(1, 4),
        "m": normal(2, 4, 4),
        "s": normal(3, 4, 4),
        "wide": normal(4, 4, 6),
    }
    params |= {"temperature": jnp.asarray(0.7)}

    def loss(p, x):
        v = p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True) * p["g"][None]
        h = jnp.tanh(x @ v) @ (p["m"] * mask)
        h = jnp.tanh(h @ (p["s"] + p["s"].T)) @ p["wide"][:, 1:5]
        return jax.nn.logsumexp(h / p["temperature"])

    return params, normal(5, B, 4), loss


@program
def isometric_reshapes():
    def loss(p, x):
        return square(jnp.tanh(x @ p["w"].reshape(4, 6).T.reshape(6, 4)[::-1])) + square(x @ jnp.squeeze(p["v"]))

    return {"w": normal(0, 2, 12), "v": normal(1, 1, 6, 3)}, normal(2, B, 6), loss


@program
def regulariser_and_unused():
    params = {"w": normal(0, 4, 3), "only": normal(1, 3), "unused": normal(2, 2), "b": normal(3, 3)}
    return (
        params,
        normal(4, B, 4),
        lambda p, x: square(jnp.tanh(x @ p["w"] + p["b"])) + 0.1 * square(p["w"]) + square(p["only"]),
    )


@program
def loss_that_sees_no_example():
    return {"w": normal(0, 3)}, normal(1, B, 2), lambda p, x: square(p["w"])


@program
def mixture_of_experts_by_gather():
    params = {"router": normal(0, 4, 3), "experts": normal(1, 3, 4, 2), "scale": normal(2, 3)}

    def loss(p, x):
        gates = jax.nn.softmax(x @ p["router"])
        chosen = jnp.argmax(gates)
        return square(gates[chosen] * (x @ p["experts"][chosen]) * p["scale"][chosen])

    return params, normal(3, B, 4), loss


@program
def frozen_leaves():
    params = {"w": normal(0, 4, 3), "order": jnp.asarray([2, 0, 1]), "on": jnp.asarray(True), "nothing": None}

    def loss(p, x):
        return jnp.where(p["on"], square(jnp.tanh(x @ p["w"])[p["order"]] * jnp.arange(3.0)), 0.0)

    return params, normal(1, B, 4), loss


@program
def outer_product_of_two_parameters_and_an_example():
    params = {"a": normal(0, 4), "b": normal(1, 3)}
    return params, normal(2, B, 4, 3), lambda p, x: jnp.einsum("i,ij,j->", p["a"], jnp.tanh(x), p["b"]) ** 2


@program
def zero_gradients():
    return {"w": normal(0, 4, 3)}, normal(1, B, 2, 4), lambda p, x: square(jax.nn.relu(x @ p["w"] - 100))


@program
def gradient_stopped():
    params = {"w": normal(0, 4, 3), "v": normal(1, 4, 3)}
    return params, normal(2, B, 4), lambda p, x: square(x @ p["w"]) + square(x @ lax.stop_gradient(p["v"]))


@program
def flax_linen():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(3, (3, 3), param_dtype=float)(x)
            x = linen.LayerNorm(param_dtype=float)(x).reshape(-1)
            return linen.Dense(2, param_dtype=float)(linen.gelu(x))

    net, x = Net(), normal(1, B, 4, 4, 2)
    params = net.init(jax.random.key(0), x[0])
    return params, x, lambda p, x: square(jnp.tanh(net.apply(p, x)))


@program
def flax_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 6, param_dtype=float, rngs=rngs)
            self.norm = nnx.RMSNorm(6, param_dtype=float, rngs=rngs)
            self.second = nnx.Linear(6, 2, param_dtype=float, rngs=rngs)

        def __call__(self, x):
            return self.second(self.norm(nnx.relu(self.first(x))))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    return state, normal(1, B, 4), lambda state, x: square(jnp.tanh(nnx.merge(graph, state)(x)))


@program
def equinox():
    net = eqx.nn.MLP(4, 2, 6, 2, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_array)
    return params, normal(1, B, 4), lambda p, x: square(jnp.tanh(eqx.combine(p, static)(x)))


# These compile for long, or differ in little from others.
SLOW = {"transformer", "scan_over_stacked_layers", "scan_over_stacked_layers_with_checkpoints", "flax_linen", "equinox"}
SLOW |= {
    name for name in PROGRAMS if name.startswith("convolution") and "strided" not in name and "depthwise" not in name
}
SLOW |= {"mlp_with_weights_on_the_left", "dense_over_tokens", "gru_run_backwards", "normalisations"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PROGRAMS]
)
def test_every_statistic_equals_that_of_the_gradients_of_all_examples(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params, batch, loss = PROGRAMS[name]()
        check(loss, params, batch)


def test_layers_that_are_alike_share_functions_that_are_differentiated_once():
    """So that tracing thousands of layers costs about what `vmap(grad)` does; a literal makes a difference."""

    def loss(weights, x):
        for i, weight in enumerate(weights):
            x = jnp.tanh(x @ weight) * (1.0 + i % 2)
        return jnp.sum(x)

    plan = ghost_flow.plan(loss, [jnp.eye(3)] * 10, jnp.ones(3))
    assert len({action.function for action in plan.actions}) == 5  # products, tanh, times 1, times 2, the sum
    assert len(plan.actions) == 31


@pytest.mark.slow
def test_no_tracer_outlives_its_trace(key):
    """A loop's backward pass is kept by what was traced; it must hold nothing of the trace itself."""

    def loss(weight, x):
        return lax.fori_loop(0, 2, lambda i, state: jnp.tanh(i * weight @ state), x).sum()

    with jax.checking_leaks():
        _, _, found = ghost.sq_norms(loss)(jnp.eye(3), jnp.ones((4, 3)))
    assert found.shape == (4,)
