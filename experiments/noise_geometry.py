"""Does the noise scale in an optimiser's own geometry order the critical batch sizes of optimisers?

Question    optimizers_and_batch found a critical batch size for each of five optimisers. Is the noise scale, measured
            half way along each one's own run in the norm that it measures gradients by, in the same order, and near?
Prediction  The rank correlation over the five is at least 0.7, and each noise scale is within a factor of 4 of the
            critical batch size. In the Euclidean norm at the same points it is below 0.7: the geometry matters.
Setting     Euclidean for SGD and momentum, the diagonal of Adam's second moments, the l1 norm for Lion and the nuclear
            norm for Muon (lower ends of a bracket); runs at B = 32 with the rate found there.
Cost        40 s on two CPU cores, after optimizers_and_batch.
"""

import json
from pathlib import Path

import jax
import numpy as np
from scipy import stats

from experiments.optimizers_and_batch import OPTIMIZERS
from gdjax import batching, descent, gradients, noise, problems, report, tuning
from gdjax.commands import experiment

FOUND = Path(__file__).parent / "results" / "optimizers_and_batch" / "result.json"
GEOMETRIES = {"sgd": "euclidean", "momentum": "euclidean", "adamw": "diagonal", "lion": "sign", "muon": "spectral"}
BATCH_SIZE, NUM_SEEDS, NUM_MEASURED = 32, 5, 1024


def scales(problem, name, rate, num_updates, keys):
    """Return the noise scale half way, in the optimiser's geometry and in the Euclidean, [S, 2]."""
    method = descent.method(gradients.mean(problem.loss), tuning.named(name)[0](rate))

    @jax.jit
    def measured(key):
        init_key, stream_key, key = jax.random.split(key, 3)
        stream = batching.reshuffled(stream_key, problem.num_examples, length=num_updates * BATCH_SIZE)
        batches = batching.batches(stream, BATCH_SIZE)
        state, _ = descent.run(method, method.init(problem.init(init_key)), problem.train, batches, every=num_updates)
        own = GEOMETRIES[name]

        def scale(geometry):
            options = {"num_examples": NUM_MEASURED, "geometry": geometry}
            return noise.measure(problem.loss, state.params, problem.train, key, **options).b_simple

        return scale(state.opt_state if own == "diagonal" else own), scale("euclidean")

    return np.asarray([measured(key) for key in keys])


def main(options: experiment.Options) -> experiment.Result:
    if not FOUND.exists():
        raise ValueError("there is no result of optimizers_and_batch yet: python -m experiments.optimizers_and_batch")
    known = json.loads(FOUND.read_text())["rows"]
    problem, names = problems.digits_mlp(), OPTIMIZERS[: 1 if options.smoke else None]
    rows = []
    for name, key in zip(names, jax.random.split(jax.random.key(options.seed), len(names)), strict=True):
        mine = [row for row in known if row["optimizer"] == name]
        at = next(row for row in mine if row.get("batch_size") == BATCH_SIZE)
        critical = next(row for row in mine if "critical_batch_size" in row)
        num_updates = max(1, round(float(np.mean(at["updates"])) / 2))
        found = scales(problem, name, at["learning_rate"], num_updates, jax.random.split(key, NUM_SEEDS))
        own, euclidean = np.median(found, axis=0)
        rows.append(
            {"optimizer": name, "geometry": GEOMETRIES[name], "noise_scale": own, "euclidean": euclidean, "all": found}
            | {"critical_batch_size": critical["critical_batch_size"]}
            | {"critical_batch_size_interval": critical["critical_batch_size_interval"], "num_updates": num_updates}
        )
    return experiment.Result(rows, judge(rows), draw(rows))


def judge(rows):
    critical, own, euclidean = (
        np.asarray([row[name] for row in rows]) for name in ("critical_batch_size", "noise_scale", "euclidean")
    )
    ranks = [
        float(stats.spearmanr(scale, critical)[0])  # pyright: ignore
        if len(rows) > 1
        else 0.0
        for scale in (own, euclidean)
    ]
    checks = {
        "rank correlation at least 0.7": ranks[0] >= 0.7,
        "within a factor of 4": bool(np.all(np.abs(np.log(own / critical)) < np.log(4))),
        "below 0.7 in the Euclidean norm": ranks[1] < 0.7,
    }
    each = "; ".join(
        f"{row['optimizer']} {row['noise_scale']:.0f} ({row['geometry']}), Euclidean {row['euclidean']:.0f}, B_crit "
        f"{row['critical_batch_size']:.0f}"
        for row in rows
    )
    return experiment.verdict(
        checks, f"Noise scales half way: {each}. Rank correlations: own {ranks[0]:.2f}, Euclidean {ranks[1]:.2f}."
    )


def draw(rows):
    title = "digits-mlp: critical batch size against the noise scale half way (median and range of seeds)"
    figure, (own, euclidean) = report.panels(2, title=title, width=5)
    for axis, column in ((own, 0), (euclidean, 1)):
        drawn = []
        for i, row in enumerate(rows):
            values, (low, high) = np.asarray(row["all"])[:, column], row["critical_batch_size_interval"]
            x, y = np.median(values), row["critical_batch_size"]
            axis.errorbar(
                x, y, xerr=[[x - values.min()], [values.max() - x]], yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],
                fmt="osD^v"[i % 5], color=report.COLOURS[i], capsize=2,
                label=row["optimizer"] + (f", {row['geometry']}" if column == 0 else ""),
            )  # fmt: skip
            drawn += [x, y]
        axis.plot([min(drawn), max(drawn)], [min(drawn), max(drawn)], color="gray", linewidth=1, label="equal")
        axis.set(xscale="log", yscale="log", xlabel="noise scale (examples)", ylabel="critical batch size (examples)")
        axis.legend(frameon=False, fontsize="small")
    own.set_title("in the optimiser's geometry", fontsize="small")
    euclidean.set_title("in the Euclidean norm", fontsize="small")
    return figure


if __name__ == "__main__":
    experiment.run(main)
