"""What do the squared gradient norms of all examples cost, and does the cost model choose the cheapest way?

Question    Time and temporary memory of `ghost.sq_norms` over a plain mean gradient, for six models; and, for factors
            of many shapes, the time of the way that `ghost_cost` chooses over that of the fastest.
Prediction  Time at most 1.2 times a plain gradient for the dense networks, 1.5 for the convolutional ones, 1.3 and 1.5
            for the transformers; dense networks at least 40 times faster than `vmap(grad)`. The chosen way is within
            1.5 of the fastest for nine shapes in ten.
Cost        3 minutes on two CPU cores.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdjax import ghost, gradients, timing
from gdjax import report as plots
from gdjax.commands import experiment
from gdjax.ghost import _cost as ghost_cost
from gdjax.ghost import _rules as ghost_rules
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


MODELS = {
    "MLP 784-512-512-10, B = 256": partial(mlp, (784, 512, 512, 10), 256),
    "MLP 784-1024-1024-10, B = 256": partial(mlp, (784, 1024, 1024, 10), 256),
    "CNN on 28 x 28, B = 128": partial(cnn, 128),
    "CNN on 32 x 32 x 3, no stride, B = 64": partial(cnn, 64, 32, 3, (32, 32), 1),
    "transformer, T = 64, B = 32": partial(transformer, 64, 32),
    "transformer, T = 256, B = 32": partial(transformer, 256, 32),
}
TIME_TARGETS = (1.2, 1.2, 1.5, 1.5, 1.3, 1.5)
MEMORY_TARGETS = (1.5, 1.5, 2.0, 2.0, 1.5, 1.5)
SHAPES = [(32, t, i, o) for t in (2, 8, 64, 256) for i, o in ((32, 32), (128, 65), (128, 512), (256, 256))]
SHAPES += [(128, 196, 9, 16), (128, 49, 144, 32)]


def vmapped(loss, total):
    """Return what `ghost.sq_norms(loss)` returns, from the gradients of all examples, added up by `total`."""

    def measured(params, batch):
        _, _, (losses, grads) = gradients.per_example(loss)(params, batch)
        mean = jax.tree.map(lambda g: total(g) / len(losses), grads)
        return losses, mean, jax.tree.map(ghost_rules.squared_norms, grads)

    return measured


def median_times(functions, arguments, repeats):
    """Return the compiled programs and the median seconds of each, timed in turn and in both orders."""
    programs = [timing.compiled(function, *arguments) for function in functions]
    return programs, timing.in_turn([partial(program, *arguments) for program in programs], repeats=repeats)


def cost_of_model(make, repeats):
    params, batch, loss = make()
    by_hand = [vmapped(loss, total) for total in (partial(jnp.sum, axis=0), ghost_rules.summed)]
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
    chunk_size = ghost_cost.chunk_size(a.shape, g.shape, t * i, device)
    sizes = {"in chunks": chunk_size, "one by one": 1, "all at once": batch_size}
    ways = {"gram": ghost_cost.Way("gram")} | {name: ghost_cost.Way("in chunks", size) for name, size in sizes.items()}

    def sum_alone(a, g):
        return jnp.einsum("bkti,bkto->kio", a, g)

    def total_and_norms(way, a, g):
        total, norms = ghost_rules.norms_by(way, lambda a, g: (a, g), a, g)
        return sum_alone(a, g) if total is None else total, norms

    distinct = list(dict.fromkeys(ways.values()))  # one chunk may be the whole batch, which one name should not win
    _, times = median_times([sum_alone, *(partial(total_and_norms, way) for way in distinct)], (a, g), repeats)
    seconds = dict(zip(distinct, times[1:], strict=True))
    return {"sum alone": times[0]} | {name: seconds[way] for name, way in ways.items()}


def main(options: experiment.Options) -> experiment.Result:
    repeats = 1 if options.smoke else 7
    device = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    rows = []
    print(f"{'model':40}{'plain ms':>10}{'time':>8}{'memory':>8}{'vmap time':>11}{'vmap memory':>13}")
    for name, make in list(MODELS.items())[: 1 if options.smoke else None]:
        row: dict[str, Any] = {"model": name} | cost_of_model(make, repeats)
        rows.append(row)
        ratios = f"{row['time']:>8.2f}{row['memory']:>8.2f}{row['vmap_over_plain']:>11.1f}"
        print(f"{name:40}{row['plain_ms']:>10.1f}{ratios}{row['vmap_memory']:>13.1f}")
    ways = []
    for b, t, i, o in SHAPES[: 3 if options.smoke else None]:
        shapes = (b, 1, t, i), (b, 1, t, o), t * i
        seconds = cost_of_ways((b, t, i, o), repeats, device)
        chosen = ghost_cost.cheapest(*shapes, device).name
        fastest = min(time for name, time in seconds.items() if name != "sum alone")
        way: dict[str, Any] = {"shape": [b, t, i, o], "seconds": seconds, "chosen": chosen}
        for name, cost in ghost_cost.nanoseconds(*shapes, device).items():
            way[f"predicted {name}"] = seconds["sum alone"] + 1e-9 * cost
            way[f"counts {name}"] = ghost_cost.counts(*shapes, device)[name]
        ways.append(way | {"regret": seconds[chosen] / fastest})
    fitted = [*fit(ways, "gram"), *fit(ways, "in chunks")]
    print("coefficients in use", ghost_cost.NANOSECONDS[device], "fitted here", [float(f"{x:.2g}") for x in fitted])
    misses = [
        row["model"]
        for row, time, memory in zip(rows, TIME_TARGETS, MEMORY_TARGETS, strict=False)
        if row["time"] > time or row["memory"] > memory
    ]
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
