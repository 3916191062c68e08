"""Does a model of another library train in gdjax as it is, and as its formula written out does?

Question    Digits, MLP 64-32-10, three batch sizes: do models of Flax NNX, Flax Linen and Equinox follow the plain one
            (`models.mlp`, a list of arrays) that starts from the same numbers and sees the same stream?
Prediction  To rounding: the loss at the start and at every record of four epochs is the same to 1e-5 of itself.
Cost        20 s on two CPU cores. Flax and Equinox: pip install flax equinox; without one, its rows are left out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import descent, problems
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


def train(apply, params, data, batch_size, num_epochs, key):
    """Return the training loss at the start and after each quarter of an epoch, or update if longer, [1 + E]."""
    problem = problems.classification(models.Model(lambda key: params, apply), data, num_classes=SIZES[-1])
    every = max(1, problem.num_examples // batch_size // 4)
    sgd = optax.sgd(LEARNING_RATE)
    _, history = descent.train(problem, sgd, key=key, batch_size=batch_size, num_epochs=num_epochs, every=every)
    return np.append(problem.evaluate(params)["loss"], history["loss"])


def main(options: experiment.Options) -> experiment.Result:
    data = datasets.digits()
    init_key, key = jax.random.split(jax.random.key(options.seed))
    num_epochs, batch_sizes = (1, (32,)) if options.smoke else (4, (8, 32, len(data.train[1])))
    rows, points, missing = [], {}, []
    for name, library in LIBRARIES.items():
        try:
            init, apply, plain = library()
        except ModuleNotFoundError as error:
            missing.append(f"{name} is left out: pip install {error.name}.")
            continue
        params, mine = init(init_key), []
        for batch_size in batch_sizes:
            found = train(apply, params, data, batch_size, num_epochs, key)
            expected = train(models.mlp(SIZES).apply, plain(params), data, batch_size, num_epochs, key)
            error = np.abs(found / expected - 1)
            mine.append({"library": name, "batch_size": batch_size, "start": error[0], "run": error.max()})
            mine[-1] |= {"losses": found, "plain_losses": expected}
        points[name] = tuple(np.concatenate([row[key] for row in mine]) for key in ("plain_losses", "losses"))
        rows += mine
    if not rows:
        raise ValueError(" ".join(missing))
    start, run = (max(row[part] for row in rows) for part in ("start", "run"))
    verdict = experiment.verdict(
        {"the same loss at the start": start < TOLERANCE, "and at every record": run < TOLERANCE},
        f"The loss of {len(points)} libraries at B = {', '.join(map(str, batch_sizes))} differs from that of the plain "
        f"model by {start:.1g} of it at the start and {run:.1g} in training, at most. {' '.join(missing)}".strip(),
    )
    labels = {"xlabel": "training loss, plain pytrees (nats)", "ylabel": "training loss, library (nats)"}
    return experiment.Result(rows, verdict, plots.agreement(points, title=verdict, **labels))


if __name__ == "__main__":
    experiment.run(main)
