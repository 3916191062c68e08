"""Fast JAX on a CPU, inside one loop: what does the form of an operation cost?

Question    The same mathematics can be written in ways that XLA compiles to a CPU very differently, above all the
            backward pass. In a loop of gradient steps over 32 examples, how long do usual forms take over those of
            `gdjax.problems.models`: a dense layer of [T, D], whose gradient is a product over two axes; group norm by
            one mean over positions and channels; attention as autodiff differentiates it; a convolution by the
            library? And what does `descent.run`, which rewrites products by `kernels.for_cpu`, save over a
            hand-written scan of the same step, for a transformer of Equinox and one of Flax NNX?
Prediction  Every usual form takes at least 1.3 times as long; `descent.run` is nowhere slower, and saves at least a
            tenth of both transformers' time.
Cost        A minute on two CPU cores.
"""

import jax
import jax.numpy as jnp
import optax

from gdjax import batching, descent, gradients, kernels, report, timing
from gdjax.commands import experiment
from gdjax.problem import Problem
from gdjax.problems import models

B, T, WIDTH, HEADS, TOKENS = 32, 128, 64, 4, 65
STEPS, RATE = 4, 1e-6
AIM, SAVED = 1.3, 1.1


def forms(key):
    """Return {form: (what it is elsewhere, usual, ours, weights, shape of an example)}, both (weights, x) -> array."""
    axes = ("NHWC", "HWIO", "NHWC")

    def dense(w, x):
        return jax.nn.gelu(x @ w)

    def usual_norm(w, x):
        x = x * w
        groups = x.reshape(-1, 8, x.shape[-1] // 8)
        centred = groups - groups.mean((0, 2), keepdims=True)
        variance = (centred**2).mean((0, 2), keepdims=True)
        return (centred * jax.lax.rsqrt(variance + models.EPSILON)).reshape(x.shape)

    def usual_attention(w, x):
        q, k, v = jnp.moveaxis((x @ w).reshape(T, 3, HEADS, -1), 1, 0)
        scores = jnp.einsum("thd,shd->hts", q, k) / (WIDTH // HEADS) ** 0.5
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf))
        return jnp.einsum("hts,shd->thd", weights, v)

    def attention(w, x):
        return models.attention(*jnp.moveaxis((x @ w).reshape(T, 3, HEADS, -1), 1, 0))

    def by_library(w, x):
        return jax.lax.conv_general_dilated(x[None], w, (2, 2), "SAME", dimension_numbers=axes)

    square, three, kernel = (
        jax.random.normal(key, shape) / 8 for shape in ((WIDTH, WIDTH), (WIDTH, 3 * WIDTH), (3, 3, 16, 32))
    )
    return {
        "dense layer": ("product over two axes", dense, kernels.for_cpu(dense), square, (T, WIDTH)),
        "group norm": (
            "one mean",
            usual_norm,
            lambda w, x: models.group_norm(x * w, num_groups=8),
            jnp.ones(16),
            (14, 14, 16),
        ),
        "attention": ("differentiated by jax", usual_attention, attention, three, (T, WIDTH)),
        "convolution": (
            "lax.conv_general_dilated",
            by_library,
            lambda w, x: models.convolution(x, w, stride=2),
            kernel,
            (14, 14, 16),
        ),
    }


def loop(form, rewritten: bool):
    """Return the program (weights, x) -> the weights after some steps down the mean square of what `form` returns."""

    def run(w, x):
        def step(i, w):
            return w - RATE * jax.grad(lambda w: (jax.vmap(form, (None, 0))(w, x) ** 2).mean())(w)

        return jax.lax.fori_loop(0, STEPS, step, w)

    return kernels.for_cpu(run) if rewritten else run


def by_equinox(key) -> Problem:
    import equinox as eqx

    class Reader(eqx.Module):
        embed: jax.Array
        norms: list
        attend: eqx.nn.MultiheadAttention
        up: eqx.nn.Linear
        down: eqx.nn.Linear
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 5)
            self.embed = jax.random.normal(keys[0], (TOKENS, WIDTH))
            self.norms = [eqx.nn.LayerNorm(WIDTH) for _ in range(2)]
            self.attend = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[1])
            self.up = eqx.nn.Linear(WIDTH, 4 * WIDTH, key=keys[2])
            self.down = eqx.nn.Linear(4 * WIDTH, WIDTH, key=keys[3])
            self.head = eqx.nn.Linear(WIDTH, TOKENS, key=keys[4])

        def __call__(self, tokens):
            x = self.embed[tokens]
            y = jax.vmap(self.norms[0])(x)
            x = x + self.attend(y, y, y, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
            x = x + jax.vmap(lambda x: self.down(jax.nn.gelu(self.up(self.norms[1](x)))))(x)
            return jax.vmap(self.head)(x)

    params, static = eqx.partition(Reader(key), eqx.is_inexact_array)
    return reading(params, lambda params, tokens: eqx.combine(params, static)(tokens), "Equinox", key)


def by_nnx(key) -> Problem:
    from flax import nnx

    class Reader(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
            self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
            self.attend = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
            self.head = nnx.Linear(WIDTH, TOKENS, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = x + self.attend(self.norms[0](x), mask=jnp.tril(jnp.ones((1, len(x), len(x)), bool)))
            return self.head(x + self.down(jax.nn.gelu(self.up(self.norms[1](x)))))

    graph, params, rest = nnx.split(Reader(nnx.Rngs(0)), nnx.Param, ...)
    return reading(params, lambda params, tokens: nnx.merge(graph, params, rest)(tokens), "Flax NNX", key)


def reading(params, apply, name, key) -> Problem:
    def loss(params, tokens):
        of_labels = jax.nn.one_hot(tokens[1:], TOKENS) * jax.nn.log_softmax(apply(params, tokens[:-1]))
        return -of_labels.sum(-1).mean()

    return Problem(lambda _: params, loss, jax.random.randint(key, (B, T + 1), 0, TOKENS), name=name)


def race(problem: Problem, seconds: float) -> timing.Spread:
    """Return the time of a hand-written scan over that of `descent.run`, which end alike."""
    method = descent.method(gradients.mean(problem.loss), optax.sgd(1e-3))
    params = problem.init(jax.random.key(0))
    batches = batching.batches(batching.reshuffled(jax.random.key(0), B, num_epochs=STEPS), B)

    def by_hand(params, data, batches):
        def step(carry, indices):
            params, state = carry
            grads = jax.grad(lambda p: jax.vmap(problem.loss, (None, 0))(p, data[indices]).mean())(params)
            updates, state = optax.sgd(1e-3).update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optax.sgd(1e-3).init(params)), batches)[0][0]

    def ours(params, data, batches):
        return descent.run(method, method.init(params), data, batches, lambda *_: (), every=STEPS)[0].params

    given = params, problem.train, batches
    return raced([timing.compiled(ours, *given), timing.compiled(by_hand, *given)], given, seconds)


def raced(programs, given, seconds: float) -> timing.Spread:
    ours, usual = (jax.tree.leaves(program(*given)) for program in programs)
    if not all(jnp.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, usual, strict=True)):
        raise ValueError("the two ways end at different parameters")
    times = timing.measured_in_turn(programs, [[given], [given]], budget=seconds)
    return timing.ratio(times[1], times[0])


def main(options: experiment.Options) -> experiment.Result:
    key, seconds = jax.random.key(options.seed), 0.01 if options.smoke else 3.0
    rows = []
    for name, (elsewhere, usual, ours, w, shape) in forms(key).items():
        given = w, jax.random.normal(key, (B, *shape))
        # The dense layer alone is a matter of the product; the others have theirs rewritten on both sides.
        pair = loop(ours, True), loop(usual, name != "dense layer")
        found = raced([timing.compiled(run, *given) for run in pair], given, seconds)
        rows.append({"form": name, "elsewhere": elsewhere, "over_ours": found._asdict()})
    for problem in (by_equinox(key), by_nnx(key)):
        found = race(problem, seconds)
        rows.append({"form": problem.name, "elsewhere": "hand-written scan", "over_ours": found._asdict()})
    ratios = {row["form"]: row["over_ours"]["median"] for row in rows}
    *single, equinox, nnx = ratios.values()
    checks = {
        "every form 1.3 times": min(single) >= AIM,
        "descent.run nowhere slower": min(equinox, nnx) >= 1,
        "a tenth saved": min(equinox, nnx) >= SAVED,
    }
    numbers = "; ".join(f"{name}: {ratio:.2f} times as long" for name, ratio in ratios.items())
    verdict = experiment.verdict(checks, f"{numbers}.")
    return experiment.Result(rows, verdict, figure(rows, verdict))


def figure(rows, title):
    drawn, [axis] = report.panels(1, title=title, width=7)
    report.bars(axis, {f"{row['form']}: {row['elsewhere']}": row["over_ours"] for row in rows})
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="time over that of the form here, with 95 % intervals")
    return drawn


if __name__ == "__main__":
    experiment.run(main)
