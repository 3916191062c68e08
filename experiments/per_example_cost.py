"""What do the squared gradient norms of all examples cost, and does the cost model choose the cheapest way?

Question    Time and temporary memory of `ghost.sq_norms` over a plain mean gradient, for eight models and for common
            ways of writing a layer; and, for factors of many shapes, the time of the way that `ghost_cost` chooses over
            that of the fastest.
Prediction  Time at most 1.2 times a plain gradient for the dense networks, the recurrent one and the tied embedding,
            1.5 for the convolutional ones, 1.3 and 1.5 for the transformers, 1.5 for the layers, but 3 for a penalty,
            whose inner product with every gradient is a forward pass; dense networks at least 40 times faster than
            `vmap(grad)`. The chosen way is within 1.5 of the fastest for nine shapes in ten.
Cost        5 minutes on two CPU cores.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gdjax import ghost, gradients, timing
from gdjax import report as plots
from gdjax.commands import experiment
from gdjax.ghost import _cost as ghost_cost
from gdjax.ghost import _factors as ghost_factors
from gdjax.problems import models


def mlp(sizes, batch_size):
    model = models.mlp(sizes)
    batch = jax.random.normal(jax.random.key(1), (batch_size, sizes[0]))
    return model.init(jax.random.key(0)), batch, lambda params, x: _cross_entropy(model.apply(params, x))


def cnn(batch_size, side=28, channels=1, widths=(16, 32), stride=2):
    out = (side // stride**2) ** 2 * widths[1]
    params = _draw({"first": (3, 3, channels, widths[0]), "second": (3, 3, *widths), "dense": (out, 10)})
    params |= {"first_bias": jnp.zeros(widths[0]), "second_bias": jnp.zeros(widths[1]), "dense_bias": jnp.zeros(10)}
    strides, numbers = (stride, stride), ("NHWC", "HWIO", "NHWC")

    def layer(x, kernel, bias):
        x = lax.conv_general_dilated(x[None], kernel, strides, "SAME", dimension_numbers=numbers)[0]
        return jax.nn.relu(x + bias)

    def loss(p, x):
        x = layer(layer(x, p["first"], p["first_bias"]), p["second"], p["second_bias"])
        return _cross_entropy(x.reshape(-1) @ p["dense"] + p["dense_bias"])

    return params, jax.random.normal(jax.random.key(1), (batch_size, side, side, channels)), loss


def transformer(num_tokens, batch_size, width=128, num_layers=4, num_heads=4, vocabulary=65):
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    layers = [
        _draw(shapes, i) | {"scale": jnp.ones((2, width)), "bias": jnp.zeros(4 * width)} for i in range(num_layers)
    ]
    params = _draw({"embed": (vocabulary, width), "place": (num_tokens, width), "head": (width, vocabulary)}, 99)
    params |= {"layers": layers}
    causal = jnp.tril(jnp.ones((num_tokens, num_tokens), bool))

    def norm(x, scale):
        return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * scale

    def block(p, x):
        qkv = (norm(x, p["scale"][0]) @ p["qkv"]).reshape(num_tokens, 3, num_heads, -1)
        q, k, v = (qkv[:, i].swapaxes(0, 1) for i in range(3))
        weights = jnp.einsum("htd,hsd->hts", q, k) / np.sqrt(q.shape[-1])
        mixed = jnp.einsum("hts,hsd->thd", jax.nn.softmax(jnp.where(causal, weights, -1e9)), v)
        x = x + mixed.reshape(num_tokens, width) @ p["out"]
        return x + jax.nn.gelu(norm(x, p["scale"][1]) @ p["up"] + p["bias"]) @ p["down"]

    def loss(p, tokens):
        x = p["embed"][tokens] + p["place"]
        for layer in p["layers"]:
            x = block(layer, x)
        return jax.vmap(_cross_entropy)(x @ p["head"]).mean()

    return params, jax.random.randint(jax.random.key(1), (batch_size, num_tokens), 0, vocabulary), loss


def recurrent(num_steps=50, batch_size=64, width=128):
    params = _draw({"in": (64, width), "state": (width, width), "out": (width, 10)}) | {"bias": jnp.zeros(width)}

    def loss(p, xs):
        state = jnp.zeros(width)
        state, _ = lax.scan(lambda h, x: (jnp.tanh(x @ p["in"] + h @ p["state"] + p["bias"]), None), state, xs)
        return _cross_entropy(state @ p["out"])

    return params, jax.random.normal(jax.random.key(1), (batch_size, num_steps, 64)), loss


def tied(num_tokens=32, batch_size=64, vocabulary=500, width=128):
    """Two blocks with biases and LayerNorm between an embedding and its transpose."""
    blocks = [_draw({"up": (width, 4 * width), "down": (4 * width, width)}, i) for i in range(2)]
    vectors = {"scale": jnp.ones(width), "shift": jnp.zeros(width), "bias": jnp.zeros(4 * width)}
    params = _draw({"embed": (vocabulary, width)}, 9) | {"blocks": [block | vectors for block in blocks]}

    def loss(p, tokens):
        x = p["embed"][tokens[:-1]]
        for block in p["blocks"]:
            h = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
            x = x + jax.nn.gelu((h * block["scale"] + block["shift"]) @ block["up"] + block["bias"]) @ block["down"]
        logits = jax.nn.log_softmax(x @ p["embed"].T)
        return -jnp.take_along_axis(logits, tokens[1:, None], 1).mean()

    return params, jax.random.randint(jax.random.key(1), (batch_size, num_tokens + 1), 0, vocabulary), loss


def layer(function, batch_size=64, width=512, num_inputs=1):
    """A layer w of x, [num_inputs, width], written in some way."""
    batch = jax.random.normal(jax.random.key(1), (batch_size, num_inputs, width))
    return _draw({"w": (width, width)}), batch, lambda p, x: jnp.sum(jnp.tanh(function(p["w"], x)) ** 2)


def lookup(function, rows=5000, num_tokens=16, batch_size=64, width=128):
    """Rows of a table, found in some way, and a layer on top."""
    params = _draw({"table": (rows, width), "w": (width, width)})
    tokens = jax.random.randint(jax.random.key(1), (batch_size, num_tokens), 0, rows)
    return params, tokens, lambda p, i: jnp.sum(jnp.tanh(jnp.tanh(function(p["table"], i)) @ p["w"]) ** 2)


def penalised(batch_size=64, width=512):
    params, batch, loss = layer(lambda w, x: x @ w, batch_size, width)
    return params, batch, lambda p, x: loss(p, x) + 0.1 * jnp.sum(p["w"] ** 2)


def with_dead_code(batch_size=64, width=512):
    params, batch, loss = layer(lambda w, x: x @ w, batch_size, width)
    return params, batch, lambda p, x: (loss(p, x), jnp.linalg.norm(p["w"] @ x.T))[0]


def on_one_device(w):
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec("rows")))


MODELS = {
    "MLP 784-512-512-10, B = 256": (partial(mlp, (784, 512, 512, 10), 256), 1.2, 1.5),
    "MLP 784-1024-1024-10, B = 256": (partial(mlp, (784, 1024, 1024, 10), 256), 1.2, 1.5),
    "CNN on 28 x 28, B = 128": (partial(cnn, 128), 1.5, 2.0),
    "CNN on 32 x 32 x 3, no stride, B = 64": (partial(cnn, 64, 32, 3, (32, 32), 1), 1.5, 2.0),
    "transformer, T = 64, B = 32": (partial(transformer, 64, 32), 1.3, 1.5),
    "transformer, T = 256, B = 32": (partial(transformer, 256, 32), 1.5, 1.5),
    "recurrent, T = 50, B = 64": (recurrent, 1.2, 2.0),
    "tied embedding, T = 32, B = 64": (tied, 1.2, 1.5),
    "E[i] of one i": (partial(lookup, lambda e, i: e[i[0]], num_tokens=1), 1.5, 2.0),
    "vmap of E[i]": (partial(lookup, lambda e, i: jax.vmap(lambda j: e[j])(i)), 1.5, 2.0),
    "E[i], T = 512, 32 rows": (partial(lookup, lambda e, i: e[i], rows=32, num_tokens=512), 1.5, 1.5),
    "a layer twice": (partial(layer, lambda w, x: jnp.tanh(x[0] @ w) - jnp.tanh(x[1] @ w), num_inputs=2), 1.5, 1.5),
    "a layer three times": (
        partial(layer, lambda w, x: jnp.stack([jnp.tanh(row @ w) for row in x]), num_inputs=3),
        1.5,
        1.5,
    ),
    "a penalty on w": (penalised, 3.0, 10.0),
    "dead code": (with_dead_code, 1.5, 2.0),
    "w[None]": (partial(layer, lambda w, x: x @ w[None]), 1.5, 1.5),
    "with_sharding_constraint(w)": (partial(layer, lambda w, x: x @ on_one_device(w)), 1.5, 2.0),
    "optimization_barrier(w)": (partial(layer, lambda w, x: x @ lax.optimization_barrier(w)), 1.5, 2.0),
    "w / sqrt(n)": (partial(layer, lambda w, x: x @ (w / jnp.sqrt(512.0))), 1.5, 2.0),
    "split(w)": (partial(layer, lambda w, x: jnp.stack([x @ part for part in jnp.split(w, 4, 1)])), 1.5, 1.5),
}
"""Name: (model, goals for time and temporary memory over a plain gradient)."""
SHAPES = [(32, t, i, o) for t in (2, 8, 64, 256) for i, o in ((32, 32), (128, 65), (128, 512), (256, 256))]
SHAPES += [(128, 196, 9, 16), (128, 49, 144, 32)]


def vmapped(loss, total):
    """Return what `ghost.sq_norms(loss)` returns, from the gradients of all examples, added up by `total`."""

    def measured(params, batch):
        _, _, (losses, grads) = gradients.per_example(loss)(params, batch)
        mean = jax.tree.map(lambda g: total(g) / len(losses), grads)
        return losses, mean, jax.tree.map(ghost_factors.squared_norms, grads)

    return measured


def median_times(functions, arguments, repeats):
    """Return the compiled programs and the median seconds of each, timed in turn and in both orders."""
    programs = [timing.compiled(function, *arguments) for function in functions]
    return programs, timing.in_turn([partial(program, *arguments) for program in programs], repeats=repeats)


def cost_of_model(make, repeats):
    params, batch, loss = make()
    by_hand = [vmapped(loss, total) for total in (partial(jnp.sum, axis=0), ghost_factors.summed)]
    functions = gradients.mean(loss), ghost.sq_norms(loss), *by_hand
    programs, (plain, measured, *others) = median_times(functions, (params, batch), repeats)
    memory = [program.temporary_bytes or float("nan") for program in programs]
    materialised, its_memory = min(zip(others, memory[2:], strict=True))  # which is faster depends on the shapes
    return {
        "plain_ms": 1e3 * plain,
        "time": measured / plain,
        "memory": memory[1] / memory[0],
        "vmap_over_plain": materialised / plain,
        "vmap_over_ghost": materialised / measured,
        "vmap_memory": its_memory / memory[0],
    }


def cost_of_ways(shape, repeats, device) -> dict[str, float]:
    """Return the seconds of every way to take norms from factors of this shape [B, 1, T, I], [B, 1, T, O]."""
    batch_size, t, i, o = shape
    a = jax.random.normal(jax.random.key(0), (batch_size, 1, t, i))
    g = jax.random.normal(jax.random.key(1), (batch_size, 1, t, o))
    shape = ghost_cost.Sizes(batch_size, 1, t, i, o, x=t * i)
    sizes = {"in chunks": ghost_cost.chunk_size(shape, device), "one by one": 1, "all at once": batch_size}
    ways = {"gram": ghost_cost.Way("gram")} | {name: ghost_cost.Way("in chunks", size) for name, size in sizes.items()}

    def sum_alone(a, g):
        return jnp.einsum("bkti,bkto->kio", a, g)

    def total_and_norms(way, a, g):
        return ghost_factors.norms_by(way, lambda a, g: (a, g), shape, a, g, want_total=True)

    distinct = list(dict.fromkeys(ways.values()))  # one chunk may be the whole batch, which one name should not win
    _, times = median_times([sum_alone, *(partial(total_and_norms, way) for way in distinct)], (a, g), repeats)
    seconds = dict(zip(distinct, times[1:], strict=True))
    return {"sum alone": times[0]} | {name: seconds[way] for name, way in ways.items()}


def main(options: experiment.Options) -> experiment.Result:
    repeats = 1 if options.smoke else 7
    device = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    rows = []
    print(f"{'model':40}{'plain ms':>10}{'time':>8}{'memory':>8}{'vmap time':>11}{'vmap memory':>13}")
    for name, (make, time, memory) in list(MODELS.items())[:: 7 if options.smoke else 1]:
        row: dict[str, Any] = {"model": name} | cost_of_model(make, repeats)
        rows.append(row)
        row["missed"] = row["time"] > time or row["memory"] > memory
        ratios = f"{row['time']:>8.2f}{row['memory']:>8.2f}{row['vmap_over_plain']:>11.1f}"
        print(f"{name:40}{row['plain_ms']:>10.1f}{ratios}{row['vmap_memory']:>13.1f}")
    ways = []
    for b, t, i, o in SHAPES[: 3 if options.smoke else None]:
        sizes = ghost_cost.Sizes(b, 1, t, i, o, x=t * i)
        seconds = cost_of_ways((b, t, i, o), repeats, device)
        chosen = ghost_cost.cheapest(sizes, device).name
        fastest = min(time for name, time in seconds.items() if name != "sum alone")
        way: dict[str, Any] = {"shape": [b, t, i, o], "seconds": seconds, "chosen": chosen}
        for name, cost in ghost_cost.nanoseconds(sizes, device).items():
            way[f"predicted {name}"] = seconds["sum alone"] + 1e-9 * cost
            way[f"counts {name}"] = ghost_cost.counts(sizes, device)[name]
        ways.append(way | {"regret": seconds[chosen] / fastest})
    fitted = [*fit(ways, "gram"), *fit(ways, "in chunks")]
    print("coefficients in use", ghost_cost.NANOSECONDS[device], "fitted here", [float(f"{x:.2g}") for x in fitted])
    misses = [row["model"] for row in rows if row["missed"]]
    times, over = ([row[name] for row in rows] for name in ("time", "vmap_over_ghost"))
    regrets = np.array([way["regret"] for way in ways])
    verdict = (
        f"Time over a plain gradient {min(times):.2f} to {max(times):.2f}, "
        f"{'all targets met' if not misses else 'targets missed by ' + ', '.join(misses)}; vmap(grad) takes "
        f"{min(over):.1f} to {max(over):.0f} times as long. The way chosen is within 1.5 of the fastest for "
        f"{np.mean(regrets < 1.5):.0%} of shapes, {regrets.max():.1f} at worst."
    )
    points = {
        name: ([1e3 * way[f"predicted {name}"] for way in ways], [1e3 * way["seconds"][name] for way in ways])
        for name in ("gram", "in chunks")
    }
    figure = plots.agreement(points, xlabel="predicted milliseconds", ylabel="measured milliseconds", title=verdict)
    return experiment.Result([*rows, *ways, {"fitted": fitted}], verdict, figure)


def fit(ways, name):
    """Return the two coefficients of a way, in nanoseconds, by least squares of relative errors."""
    measured = np.array([way["seconds"][name] for way in ways])
    beside = 1e9 * (measured - [way["seconds"]["sum alone"] for way in ways])
    return np.linalg.lstsq(
        np.array([way[f"counts {name}"] for way in ways]) / measured[:, None], beside / measured, rcond=None
    )[0].tolist()


def _draw(shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _cross_entropy(logits):
    return jax.nn.logsumexp(logits) - logits[0]


if __name__ == "__main__":
    experiment.run(main)
