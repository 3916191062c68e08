"""How far ahead does the quadratic twin of a problem predict its training?

Question    From three checkpoints of a run at a tuned rate (its start, a quarter of the way, its end) the twin of the
            parameters there (`theory.twin`) predicts the mean loss of four streams at two batch sizes. After how many
            updates is it off by more than 20 %?
Prediction  Never on least squares. On logistic regression it holds for at least a quarter of the run. On a multilayer
            perceptron it holds for less than a tenth of it from the start, and for more from later checkpoints, as the
            network behaves ever more like its linearisation.
Cost        1 minute on two CPU cores.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, descent, gradients, problems, report, theory
from gdjax.commands import experiment

NUM_STREAMS = 4
RUNS = {  # problem: (rate, {batch size: updates of the run})
    "least-squares": (0.3, {16: 200, 128: 200}),
    "logistic": (0.5, {16: 200, 128: 200}),
    "digits-mlp": (0.1, {16: 300, 128: 300}),
}
SHARES = 0.0, 0.25, 1.0  # of the run, where the twin is made


def followed(problem, rate, batch_size, num_updates, key):
    """Yield (checkpoint, measured mean losses [T], predicted [T], updates that it held) for each checkpoint."""
    init_key, stream_key, draw_key = jax.random.split(key, 3)
    method = descent.method(gradients.mean(problem.loss), optax.sgd(rate))
    build = jax.jit(lambda params, key: theory.twin(problem, params, key=key, num_steps=10))

    def loss(state, info):
        return problem.evaluate(state.params, names=("loss",))["loss"]

    def run(state, key):
        order = batching.reshuffled(key, problem.num_examples, length=num_updates * batch_size)
        return descent.run(method, state, problem.train, batching.batches(order, batch_size), loss)[1]

    measure = jax.jit(lambda state, keys: jax.lax.map(lambda key: run(state, key), keys).mean(0))
    start, begun = method.init(problem.init(init_key)), 0
    for share in SHARES:
        checkpoint = round(share * num_updates)
        if checkpoint > begun:
            order = batching.reshuffled(stream_key, problem.num_examples, length=checkpoint * batch_size)
            batches = batching.batches(order, batch_size)[begun:]
            start, _ = descent.run(method, start, problem.train, batches, every=len(batches))
            begun = checkpoint
        twin = build(start.params, draw_key)
        keys = jax.random.split(jax.random.fold_in(draw_key, checkpoint), NUM_STREAMS)
        measured = measure(start, keys)
        rates, sizes = jnp.full(num_updates, rate), jnp.full(num_updates, float(batch_size))
        predicted = twin.losses(rates, sizes)
        yield checkpoint, np.asarray(measured), np.asarray(predicted), twin.horizon(rates, sizes, measured)


def main(options: experiment.Options) -> experiment.Result:
    names = list(RUNS)[: 1 if options.smoke else None]
    rows, curves = [], {}
    for name in names:
        problem, (rate, runs) = problems.named(name), RUNS[name]
        for size, num_updates in runs.items():
            num_updates = 10 if options.smoke else num_updates
            key = jax.random.key(options.seed)
            for checkpoint, measured, predicted, held in followed(problem, rate, size, num_updates, key):
                row = {"problem": name, "batch_size": size, "checkpoint": checkpoint, "held": held, "of": num_updates}
                rows.append(row | {"measured": measured, "predicted": predicted})
                curves[name, size, checkpoint] = measured, predicted
    shares = {(row["problem"], row["batch_size"], row["checkpoint"]): row["held"] / row["of"] for row in rows}

    def of(name):
        return [share for (problem, *_), share in shares.items() if problem == name]

    nets = [name for name in names if name.endswith(("mlp", "cnn"))]
    starts = [share for (name, _, checkpoint), share in shares.items() if name in nets and checkpoint == 0]
    later = [share for (name, _, checkpoint), share in shares.items() if name in nets and checkpoint > 0]
    checks = {
        "never off on least squares": all(share == 1 for share in of("least-squares")),
        "a quarter of the run on logistic regression": all(share >= 0.25 for share in of("logistic")),
        "less than a tenth from the start of a network": all(share < 0.1 for share in starts),
        "longer from later checkpoints": not nets or np.mean(later) > np.mean(starts),
    }
    text = "; ".join(
        f"{row['problem']}, B = {row['batch_size']}, from {row['checkpoint']}: {row['held']} of {row['of']}"
        for row in rows
    )
    verdict = experiment.verdict(checks, f"Updates that it held: {text}.")
    return experiment.Result(rows, verdict, draw(curves, names))


def draw(curves, names):
    figure, axes = report.panels(
        len(names), title="The quadratic twin of a problem, and the runs that it predicts", width=5.5
    )
    for axis, name in zip(axes, names, strict=True):
        for i, ((_, size, checkpoint), (measured, predicted)) in enumerate(
            (key, curve) for key, curve in curves.items() if key[0] == name
        ):
            label = f"B = {size}, from {checkpoint}"
            updates = np.arange(1, len(measured) + 1)
            looks = np.unique(np.geomspace(1, len(measured), 25).round().astype(int))
            axis.plot(looks, measured[looks - 1], "o", markersize=3, color=report.COLOURS[i], label=label)
            axis.plot(updates, np.where(predicted > 0, predicted, np.nan), color=report.COLOURS[i], linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="updates from the checkpoint", ylabel="mean loss", title=name)
        axis.set_ylim(0.3 * min(measured.min() for (key, *_), (measured, _) in curves.items() if key == name))
        axis.legend(frameon=False, fontsize="x-small", title="points: runs, lines: twin", title_fontsize="x-small")
    return figure


if __name__ == "__main__":
    experiment.run(main)
