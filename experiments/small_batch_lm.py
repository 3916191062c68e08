"""Can a language model be trained at batch size one, and by which optimiser?

Question    A transformer of characters, one pass over 16384 examples, at B = 1 to 128: how does the held-out loss
            depend on B for SGD, momentum 0.9, and Adam with b2 = 0.95 at every B or with b2's half-life fixed in tokens
            (Marek et al. 2025, arXiv 2507.07101)? As there, rates rise over the first 5 % of the updates and fall to
            zero as a cosine. They are tuned, by factors of 2, on half of the held-out text; the other half is reported,
            on five other seeds.
Prediction  The gap between the worst and the best optimiser shrinks with B: below 0.1 nats at B = 1, above 0.3 at 128.
            At B = 1 momentum changes SGD's loss by less than 0.03 nats, and a fixed half-life takes at least 0.01 off
            Adam's. Gradients accumulated over 128 examples are those of B = 128: every optimiser loses at least 0.1
            nats by accumulating, against B = 1 on the same tokens.
Cost        2 minutes on two CPU cores: width 16, one block, 16 characters an example, drawn from a Markov chain of
            second order. --full, 6 minutes: width 32, one block, 32 characters of Tiny Shakespeare an example.
"""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import descent, problems, report, sweep, theory, tuning
from gdjax.commands import experiment
from gdjax.problems import datasets, models

NUM_EXAMPLES, NUM_HELD_OUT = 16384, 1024
BATCH_SIZES = (1, 8, 32, 128)
REFERENCE, B2 = 32, 0.95  # the batch size at which both Adams are the same
RATE_FACTORS = 2.0 ** np.arange(-2, 3)
NUM_SEEDS = len(RATE_FACTORS)  # that are reported: one program for as many runs does both
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
    """A text, its alphabet, the model that reads it, and the number of seeds that rates are tuned on."""

    text: str
    alphabet: int
    num_tokens: int
    width: int
    num_layers: int
    num_tuned: int


DRAWN = Setting("a Markov chain", ALPHABET, num_tokens=16, width=16, num_layers=1, num_tuned=3)
REAL = Setting("Tiny Shakespeare", datasets.NUM_SHAKESPEARE_CHARACTERS, 32, width=32, num_layers=1, num_tuned=1)


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


def train(problem, family, batch_size, num_examples, point):
    """Return the held-out loss of one half, to choose the rate by, and of the other, to report."""
    num_updates = num_examples // batch_size
    warm_up = max(1, int(WARM_UP * num_updates))
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warm_up, num_updates)
    optimizer = FAMILIES[family](lambda update: point["rate"] * shape(update), point["memory"])
    run = partial(descent.train, problem, optimizer, key=point["key"], batch_size=batch_size, num_updates=num_updates)
    state, _ = run(record=lambda state, info: (), every=num_updates)
    losses = jax.vmap(problem.loss, (None, 0))(state.params, problem.test[:NUM_HELD_OUT])
    return losses[::2].mean(), losses[1::2].mean()


def tuned(run, memory, keys, num_tuned, middle):
    """Return the losses of the seeds to report [S] at the best rate, and what was tuned."""

    def losses_at(rates):
        return run(sweep.grid(memory=[memory], key=keys[:num_tuned], rate=rates))[0][0].mean(0)

    found = tuning.minimise(losses_at, middle * RATE_FACTORS)
    _, losses = run(sweep.grid(memory=[memory], key=keys[num_tuned:], rate=[found.rate]))
    return losses.reshape(-1), found


def judge(rows, name):
    losses = {(row["optimizer"], row["batch_size"]): np.array(row["losses"]) for row in rows}
    sizes = sorted({row["batch_size"] for row in rows})
    means = {size: [losses[optimizer, size].mean() for optimizer in OPTIMIZERS] for size in sizes}
    gaps = {size: max(of_size) - min(of_size) for size, of_size in means.items()}

    def change(first, second):
        """Return by how much the loss falls from the first run to the second, and its standard error over seeds."""
        return experiment.mean_and_error(losses[first] - losses[second])

    momentum = change(("SGD", 1), ("momentum", 1))
    half_life = change(("Adam, b2 fixed", 1), ("Adam, half-life fixed", 1))
    wasted = {optimizer: change((optimizer, sizes[-1]), (optimizer, 1)) for optimizer in OPTIMIZERS}
    checks = {
        "a gap below 0.1 nats at B = 1": gaps[1] < 0.1,
        f"a gap above 0.3 nats at B = {sizes[-1]}": gaps[sizes[-1]] > 0.3,
        "momentum changes little at B = 1": abs(momentum[0]) < 0.03,
        "a fixed half-life helps at B = 1": half_life[0] > 0.01,
        "accumulation costs every optimiser 0.1 nats": min(wasted.values())[0] > 0.1,
        "all best rates are inside the grid": all(row["inside_grid"] for row in rows),
    }
    spans = ", ".join(f"{gap:.2f} at B = {size}" for size, gap in gaps.items())
    costs = ", ".join(f"{cost:.2f} ({error:.2f}) for {optimizer}" for optimizer, (cost, error) in wasted.items())
    least = min(rows, key=lambda row: row["loss"])
    return experiment.verdict(
        checks,
        f"On {name} the best and the worst optimiser are {spans} nats apart. At B = 1 momentum takes "
        f"{momentum[0]:.3f} ({momentum[1]:.3f}) off SGD's loss and a fixed half-life {half_life[0]:.3f} "
        f"({half_life[1]:.3f}) off Adam's, with standard errors over seeds; accumulating {sizes[-1]} examples costs "
        f"{costs}. The least loss is {least['loss']:.3f}: {least['optimizer']}, B = {least['batch_size']}.",
    )


def main(options: experiment.Options) -> experiment.Result:
    text_key, run_key = jax.random.split(jax.random.key(options.seed))
    setting = REAL if options.full else DRAWN
    problem = reader(setting, text_key)
    sizes, num_examples = (BATCH_SIZES[:1], 32) if options.smoke else (BATCH_SIZES, NUM_EXAMPLES)
    keys = jax.random.split(run_key, setting.num_tuned + NUM_SEEDS)
    rows = []
    for size, family in itertools.product(sizes, FAMILIES):
        run = partial(sweep.map, partial(train, problem, family, size, num_examples), chunk_size=NUM_SEEDS)
        for optimizer, (_, memory, middle) in ((n, o) for n, o in OPTIMIZERS.items() if o[0] == family):
            losses, found = tuned(run, memory(size), keys, setting.num_tuned, middle * np.sqrt(size / 8))
            row = {"text": setting.text, "optimizer": optimizer, "batch_size": size, "peak_learning_rate": found.rate}
            rows.append(row | {"inside_grid": not found.at_edge, "losses": losses.tolist(), "loss": losses.mean()})
    return experiment.Result(rows, judge(rows, setting.text), draw(rows, setting))


def draw(rows, setting):
    title = f"A model of characters after one pass over {setting.text}, by batch size and optimiser"
    figure, [left, right] = report.panels(2, title=title, width=5.5)
    for i, optimizer in enumerate(OPTIMIZERS):
        shown = [row for row in rows if row["optimizer"] == optimizer]
        sizes = [row["batch_size"] for row in shown]
        report.band(left, sizes, np.array([row["losses"] for row in shown]).T, optimizer, i)
        report.band(right, sizes, np.array([[row["peak_learning_rate"] for row in shown]]), optimizer, i)
    right.set(yscale="log")
    for axis, label in (left, "held-out loss (nats a character)"), (right, "best peak learning rate"):
        axis.set(xscale="log", xlabel=f"batch size (examples of {setting.num_tokens} characters)", ylabel=label)
        axis.set_xticks(BATCH_SIZES, list(map(str, BATCH_SIZES)))
        axis.minorticks_off()
    left.legend(frameon=False)
    return figure


if __name__ == "__main__":
    experiment.run(main)
