"""Does a model of another library train in gdjax as it is, and as its formula written out does?

Question    Digits, MLP 64-32-10, three batch sizes: do models of Flax NNX, Flax Linen and Equinox follow the plain one
            (`models.mlp`, a list of arrays) that starts from the same numbers and sees the same stream?
Prediction  To rounding: the loss at the start and at every record of four epochs is the same to 1e-5 of itself.
Cost        20 s on two CPU cores. Flax and Equinox: pip install flax equinox; without one, its rows are left out.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, descent, gradients, problems
from gdjax import report as plots
from gdjax.commands import experiment
from gdjax.problems import datasets, models

SIZES = 64, 32, 10
LEARNING_RATE = 0.05
TOLERANCE = 1e-5  # relative; float32 rounds to 6e-8


# Each library: (init(key) -> params, apply(params, x) -> logits, params -> the same numbers as models.mlp holds them).


def flax_nnx():
    from flax import nnx

    def make(key):
        rngs = nnx.Rngs(key)
        return nnx.split(
            nnx.Sequential(nnx.Linear(*SIZES[:2], rngs=rngs), jax.nn.relu, nnx.Linear(*SIZES[1:], rngs=rngs))
        )

    graph, _ = make(jax.random.key(0))

    def plain(params):
        layers = nnx.to_pure_dict(params)["layers"]
        return [{"weight": layers[i]["kernel"], "bias": layers[i]["bias"]} for i in (0, 2)]

    return lambda key: make(key)[1], lambda params, x: nnx.merge(graph, params)(x), plain


def flax_linen():
    from flax import linen

    model = linen.Sequential([linen.Dense(SIZES[1]), jax.nn.relu, linen.Dense(SIZES[2])])

    def plain(params):
        layers = [params["params"][f"layers_{i}"] for i in (0, 2)]
        return [{"weight": layer["kernel"], "bias": layer["bias"]} for layer in layers]

    return lambda key: model.init(key, jnp.ones(SIZES[0])), model.apply, plain


def equinox():
    import equinox as eqx

    def make(key):
        return eqx.partition(eqx.nn.MLP(SIZES[0], SIZES[2], SIZES[1], depth=1, key=key), eqx.is_array)

    _, static = make(jax.random.key(0))

    def plain(params):
        return [{"weight": layer.weight.T, "bias": layer.bias} for layer in params.layers]

    return lambda key: make(key)[0], lambda params, x: eqx.combine(params, static)(x), plain


LIBRARIES = {"Flax NNX": flax_nnx, "Flax Linen": flax_linen, "Equinox": equinox}


def train(problem, stream, batch_size, params):
    """Return the training loss at the start and after each quarter of an epoch, or each epoch if longer, [1 + E]."""
    method = descent.method(gradients.mean(problem.loss), optax.sgd(LEARNING_RATE))
    batches = batching.batches(stream, batch_size)

    def train_loss(state, info=None):
        return jax.vmap(problem.loss, (None, 0))(state.params, problem.train).mean()

    start = method.init(params)
    every = max(1, problem.num_examples // batch_size // 4)
    _, losses = descent.run(method, start, problem.train, batches, train_loss, every=every)
    return jnp.concatenate([train_loss(start)[None], losses])


def main(options: experiment.Options) -> experiment.Result:
    data = datasets.digits()
    num_examples = len(data.train[1])
    init_key, stream_key = jax.random.split(jax.random.key(options.seed))
    stream = batching.reshuffled(stream_key, num_examples, num_epochs=1 if options.smoke else 4)
    batch_sizes = (32,) if options.smoke else (8, 32, num_examples)

    def trainers(model):
        problem = problems.classification(model, data, num_classes=SIZES[-1])
        return {batch_size: jax.jit(partial(train, problem, stream, batch_size)) for batch_size in batch_sizes}

    own = trainers(models.mlp(SIZES))
    rows, points, missing = [], {}, []
    for name, library in LIBRARIES.items():
        try:
            init, apply, plain = library()
        except ModuleNotFoundError as error:
            missing.append(f"{name} is left out: pip install {error.name}")
            continue
        params = init(init_key)
        for batch_size, trainer in trainers(models.Model(init, apply)).items():
            found, expected = np.asarray(trainer(params)), np.asarray(own[batch_size](plain(params)))
            error = np.abs(found / expected - 1)
            rows.append({"library": name, "batch_size": batch_size, "start": error[0], "run": error.max()})
            rows[-1] |= {"losses": found, "plain_losses": expected}
        mine = [row for row in rows if row["library"] == name]
        points[name] = tuple(np.concatenate([row[key] for row in mine]) for key in ("plain_losses", "losses"))
    if not rows:
        raise ValueError("; ".join(missing))
    start, run = (max(row[part] for row in rows) for part in ("start", "run"))
    agree = max(start, run) < TOLERANCE
    verdict = (
        f"{'As predicted' if agree else 'Not as predicted'}: the loss of {len(LIBRARIES) - len(missing)} libraries at "
        f"B = {', '.join(map(str, batch_sizes))} against that of the plain model: relative differences are at most "
        f"{start:.1g} at the start and {run:.1g} in training. " + ". ".join(missing)
    ).strip()
    figure = plots.agreement(
        points, xlabel="training loss, plain pytrees (nats)", ylabel="training loss, library (nats)", title=verdict
    )
    return experiment.Result(rows, verdict, figure)


if __name__ == "__main__":
    experiment.run(main)
