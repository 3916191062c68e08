"""Can a language model be trained at batch size one, and by which optimiser?

Question    A transformer of characters, one pass over 16384 examples, at B = 1 to 128: how does the held-out loss
            depend on B for SGD, momentum 0.9, and Adam with b2 = 0.95 at every B or with b2's half-life fixed in tokens
            (Marek et al. 2025, arXiv 2507.07101)? As there, rates rise over the first 5 % of the updates and fall to
            zero as a cosine. They are tuned, by factors of 2, on one seed and half of the held-out text; five other
            seeds and the other half are reported.
Prediction  The gap between the worst and the best optimiser shrinks with B: below 0.1 nats at B = 1, above 0.3 at 128.
            At B = 1 momentum changes SGD's loss by less than 0.03 nats, and a fixed half-life takes at least 0.01 off
            Adam's. Gradients accumulated over 128 examples are those of B = 128: every optimiser loses at least 0.1
            nats by accumulating, against B = 1 on the same tokens.
Cost        2 minutes on two CPU cores: width 16, one block, 16 characters an example, drawn from a Markov chain of
            second order. --full, 8 minutes: width 32, two blocks, 32 characters of Tiny Shakespeare an example.
"""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, compare, datasets, descent, experiment, gradients, models, plots, problems, theory

NUM_EXAMPLES, NUM_HELD_OUT = 16384, 1024
BATCH_SIZES = (1, 8, 32, 128)
REFERENCE, B2 = 32, 0.95  # the batch size at which both Adams are the same
RATE_FACTORS = 2.0 ** np.arange(-2, 3)  # as many as seeds are reported, so that one program does both
WARM_UP = 0.05  # of the updates
FAMILIES = {
    "SGD": lambda rate, memory: optax.sgd(rate, momentum=memory),
    "Adam": lambda rate, memory: optax.adam(rate, b2=memory),
}
OPTIMIZERS = {  # family, memory at a batch size, and the rate to begin with at B = 8: from there it goes as sqrt(B)
    "SGD": ("SGD", lambda size: 0.0, 2.0),
    "momentum": ("SGD", lambda size: 0.9, 0.4),
    "Adam, b2 fixed": ("Adam", lambda size: B2, 0.02),
    "Adam, half-life fixed": ("Adam", lambda size: theory.same_half_life(B2, size / REFERENCE), 0.02),
}
ALPHABET = 16  # of the drawn text


class Setting(NamedTuple):
    """A text, its alphabet, and the model that reads it."""

    text: str
    alphabet: int
    num_tokens: int
    width: int
    num_layers: int


DRAWN = Setting("a Markov chain", ALPHABET, 16, 16, 1)
REAL = Setting("Tiny Shakespeare", datasets.NUM_SHAKESPEARE_CHARACTERS, 32, 32, 2)


def drawn_text(key, length):
    """Draw a text in which each character depends on the two before it, which predict it well."""
    table_key, text_key = jax.random.split(key)
    logits = 2.5 * jax.random.normal(table_key, (ALPHABET, ALPHABET, ALPHABET))

    def step(last, key):
        new = jax.random.categorical(key, logits[last])
        return (last[1], new), new

    start = jnp.zeros((), int), jnp.zeros((), int)
    return np.asarray(jax.jit(partial(jax.lax.scan, step))(start, jax.random.split(text_key, length))[1])


def reader(setting, key):
    """Return the problem of predicting the text."""
    if setting is REAL:
        data = datasets.tiny_shakespeare(num_tokens=setting.num_tokens)
    else:
        length = 10 * (NUM_EXAMPLES + 1) * setting.num_tokens // 9
        data = datasets.windows(drawn_text(key, length), num_tokens=setting.num_tokens)
    model = models.transformer(
        num_tokens=setting.alphabet, width=setting.width, num_layers=setting.num_layers, num_heads=2
    )
    return problems.language_model(model, data, num_tokens=setting.alphabet)


def train(problem, family, batch_size, num_examples, memory, params, stream, peak_rate):
    """Return the held-out loss of one half, to choose the rate by, and of the other, to report."""
    batches = batching.cut(stream[:num_examples], batch_size)
    warm_up = max(1, int(WARM_UP * len(batches)))
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warm_up, len(batches))
    optimizer = FAMILIES[family](lambda update: peak_rate * shape(update), memory)
    method = descent.method(gradients.mean(problem.loss), optimizer)
    state, _ = descent.run(method, method.init(params), problem.train, batches, every=len(batches))
    losses = jax.vmap(problem.loss, (None, 0))(state.params, problem.test[:NUM_HELD_OUT])
    return losses[::2].mean(), losses[1::2].mean()


def tuned(run, starts, middle):
    """Return the losses of the seeds to report [S] at the best rate, that rate, and whether it is inside the grid."""
    one = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x[1:].shape), starts)
    others = jax.tree.map(lambda x: x[1:], starts)
    found = compare.tune(lambda rates: np.asarray(run(*one, jnp.asarray(rates))[0]), middle * RATE_FACTORS)
    rate = compare.best_rate(found)
    _, report = run(*others, jnp.full(len(RATE_FACTORS), rate))
    return np.asarray(report), rate, min(found) < rate < max(found)


def judge(rows, name):
    loss = {(row["optimizer"], row["batch_size"]): row["loss"] for row in rows}
    sizes = sorted({row["batch_size"] for row in rows})
    gaps = [np.ptp([loss[optimizer, size] for optimizer in OPTIMIZERS]) for size in sizes]
    momentum = abs(loss["momentum", 1] - loss["SGD", 1])
    half_life = loss["Adam, b2 fixed", 1] - loss["Adam, half-life fixed", 1]
    wasted = [loss[optimizer, sizes[-1]] - loss[optimizer, 1] for optimizer in OPTIMIZERS]
    checks = {
        "a gap below 0.1 nats at B = 1": gaps[0] < 0.1,
        f"a gap above 0.3 nats at B = {sizes[-1]}": gaps[-1] > 0.3,
        "momentum changes little at B = 1": momentum < 0.03,
        "a fixed half-life helps at B = 1": half_life > 0.01,
        "accumulation costs every optimiser 0.1 nats": min(wasted) > 0.1,
        "all best rates are inside the grid": all(row["inside_grid"] for row in rows),
    }
    spans = ", ".join(f"{gap:.2f} at B = {size}" for gap, size in zip(gaps, sizes, strict=True))
    least = min(rows, key=lambda row: row["loss"])
    error = max(float(np.std(row["losses"], ddof=1) / np.sqrt(len(row["losses"]))) for row in rows)
    return experiment.verdict(
        checks,
        f"On {name} the best and the worst optimiser are {spans} nats apart. At B = 1 momentum changes SGD's loss by "
        f"{momentum:.3f} and a fixed half-life takes {half_life:.3f} off Adam's; accumulating {sizes[-1]} examples "
        f"costs {min(wasted):.2f} to {max(wasted):.2f}. The least loss is {least['loss']:.3f}: {least['optimizer']}, "
        f"B = {least['batch_size']}. Standard errors over seeds are {error:.3f} at most.",
    )


def main(options: experiment.Options) -> experiment.Result:
    text_key, init_key, stream_key = jax.random.split(jax.random.key(options.seed), 3)
    setting = REAL if options.full else DRAWN
    problem = reader(setting, text_key)
    sizes, num_examples = (BATCH_SIZES[:1], 32) if options.smoke else (BATCH_SIZES, NUM_EXAMPLES)
    num_starts = 1 + len(RATE_FACTORS)
    draw_stream = partial(batching.reshuffled, num_examples=problem.num_examples, length=num_examples)
    params = jax.jit(jax.vmap(problem.init))(jax.random.split(init_key, num_starts))
    starts = params, jax.jit(jax.vmap(draw_stream))(jax.random.split(stream_key, num_starts))
    rows = []
    for size, family in itertools.product(sizes, FAMILIES):
        lanes = jax.vmap(partial(train, problem, family, size, num_examples), (None, 0, 0, 0))
        run = jax.jit(lanes)
        for optimizer, (its_family, memory, middle) in OPTIMIZERS.items():
            if its_family == family:
                of_memory = partial(run, jnp.asarray(memory(size)))
                losses, rate, inside = tuned(of_memory, starts, middle * np.sqrt(size / 8))
                row = {"text": setting.text, "optimizer": optimizer, "batch_size": size, "peak_learning_rate": rate}
                rows.append(row | {"inside_grid": inside, "losses": losses.tolist(), "loss": float(losses.mean())})
    return experiment.Result(rows, judge(rows, setting.text), draw(rows, setting))


def draw(rows, setting):
    title = f"A model of characters after one pass over {setting.text}, by batch size and optimiser"
    figure, [left, right] = plots.panels(2, title=title, width=5.5)
    for i, optimizer in enumerate(OPTIMIZERS):
        shown = [row for row in rows if row["optimizer"] == optimizer]
        sizes = [row["batch_size"] for row in shown]
        plots.band(left, sizes, np.array([row["losses"] for row in shown]).T, optimizer, i)
        plots.band(right, sizes, np.array([[row["peak_learning_rate"] for row in shown]]), optimizer, i)
    left.set(ylabel="held-out loss (nats a character)")
    right.set(ylabel="best peak learning rate", yscale="log")
    for axis in (left, right):
        axis.set(xscale="log", xlabel=f"batch size (examples of {setting.num_tokens} characters)")
        axis.set_xticks(BATCH_SIZES, list(map(str, BATCH_SIZES)))
        axis.minorticks_off()
    left.legend(frameon=False)
    return figure


if __name__ == "__main__":
    experiment.run(main)
