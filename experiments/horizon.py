"""How does the useful batch size grow with the number of examples?

Question    Quadratics with power-law spectra, h_i = i^-2 and source r: as which power of the examples E do the best
            batch size at a fixed rate and the critical one at a tuned rate grow, exactly, and do runs of SGD agree?
            --full: and the critical batch size of a character model on Shakespeare?
Prediction  Both as E^(r / (1 + r)): 1/2 for r = 1 and 1/3 for r = 1/2, to 0.03 between 2^12 and 2^16. With a rate that
            decays as (1 - u)^2, E^(1/3) for r = 1 and not at all for r = 1/4. Losses of runs lie within four standard
            errors of the exact ones, and the best batch size among powers of two is the exact one or its neighbour.
            --full: the exponent of the character model lies between 0.2 and 0.7, around 0.47, which is reported of
            large models (Zhang et al. 2024, arXiv 2410.21676).
Cost        1 minute on two CPU cores. --full, 10 minutes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import descent, gradients, problems, report, sweep, tuning
from gdjax.commands import experiment
from gdjax.problems import datasets, models
from gdjax.theory import horizon

CAPACITY, NUM_MODES = 2.0, 4000
FEWER_MODES, NUM_BLOCKS = 1000, 64  # where the rate decays, which takes the most time
SOURCES = (1.0, 0.5)
EXAMPLES = 2 ** np.arange(10, 17, 2)
RUN_EXAMPLES, RUN_SIZES, RUN_SEEDS, RUN_MODES = (1024, 4096), 2 ** np.arange(3, 10), 64, 200
CHARACTER_EXAMPLES, CHARACTER_SIZES, OVERHEAD = (2048, 4096, 8192), (8, 16, 32, 64, 128, 256), 0.02


def slope(sizes, examples=EXAMPLES):
    """Return the power of E between the last three numbers of examples."""
    return float(np.polyfit(np.log(examples[-3:]), np.log(sizes[-3:]), 1)[0])


def exact(source, share=1):
    """Return the best size at a fixed rate, and the critical ones at a constant and at a decayed tuned rate, [E]."""
    quadratic = horizon.power_law(NUM_MODES // share, capacity=CAPACITY, source=source)
    shorter = horizon.power_law(FEWER_MODES // share, capacity=CAPACITY, source=source)
    along = {"shape": horizon.squared_decay, "num_blocks": NUM_BLOCKS // share}

    @jax.jit
    def at(num_examples):
        best = horizon.best_batch_size(quadratic, learning_rate=1.0, num_examples=num_examples)
        critical = horizon.critical_batch_size(quadratic, num_examples=num_examples)
        decayed = horizon.critical_batch_size(shorter, num_examples=num_examples, **along)
        return best, critical, decayed

    return np.asarray([at(float(examples)) for examples in EXAMPLES]).T


def runs(source, num_examples, key, num_seeds=RUN_SEEDS):
    """Return the mean loss of SGD at a rate of 1, its standard error, and the exact loss, [B] each.

    The noise is Gaussian, of variance h / B, and fresh in every update.
    """
    quadratic = horizon.power_law(RUN_MODES, capacity=CAPACITY, source=source)
    h = quadratic.eigenvalues
    losses = []
    for size in RUN_SIZES:
        # An example is its noise: the stream has no end, so batches are drawn as keys.
        method = descent.method(
            gradients.mean(lambda w, z: 0.5 * (h * w**2).sum() + (jnp.sqrt(h) * z) @ w), optax.sgd(1.0)
        )

        def end(point, method=method, size=int(size)):
            start_key, *keys = jax.random.split(point["key"], 1 + num_examples // size)
            start = jnp.sqrt(quadratic.start) * jax.random.normal(start_key, h.shape)

            def fetch(data, key):
                del data
                return jax.random.normal(key, (size, RUN_MODES))

            state, _ = descent.run(
                method, method.init(start), jnp.zeros(1), jnp.stack(keys), every=num_examples // size, fetch=fetch
            )
            return 0.5 * (h * state.params**2).sum()

        losses.append(sweep.map(end, sweep.grid(key=jax.random.split(key, num_seeds))))
    sizes = jnp.asarray(RUN_SIZES, float)
    expected = [
        horizon.loss_after(quadratic, learning_rate=1.0, batch_size=b, num_examples=num_examples) for b in sizes
    ]
    found = np.stack(losses, axis=1)
    return found.mean(0), found.std(0, ddof=1) / num_seeds**0.5, np.asarray(expected)


def character_model(key):
    """Return the critical batch size of a small transformer after each number of examples, [E], and the losses."""
    tokens = datasets.NUM_SHAKESPEARE_CHARACTERS
    model = models.transformer(num_tokens=tokens, width=32, num_layers=1)
    problem = problems.language_model(model, datasets.tiny_shakespeare(), num_tokens=tokens)
    found = {}
    for num_examples in CHARACTER_EXAMPLES:
        rate, losses = 0.004, []
        for size in CHARACTER_SIZES:
            search = tuning.searching(problem, tuning.named("adamw")[0], tuning.Budget(num_examples), num_runs=8)
            rates = rate * 2.0 ** np.arange(-1, 2)
            tuned = tuning.search_grid(partial(search, batch_size=size, num_seeds=2, key=key), rates)
            rate = tuned.rate * 2**0.5
            losses.append(float(tuned.optimum()[1].mean()))
        limit = (1 + OVERHEAD) * min(losses)
        above = next((i for i, loss in enumerate(losses) if loss > limit and i > int(np.argmin(losses))), None)
        if above is None:
            found[num_examples] = float(CHARACTER_SIZES[-1]), losses
            continue
        (a, b), (x, y) = losses[above - 1 : above + 1], np.log(CHARACTER_SIZES[above - 1 : above + 1])
        found[num_examples] = float(np.exp(x + (y - x) * (limit - a) / (b - a))), losses
    return found


def main(options: experiment.Options) -> experiment.Result:
    with jax.enable_x64(True):
        laws = {1.0: exact(1.0, share=16)} if options.smoke else {source: exact(source) for source in (*SOURCES, 0.25)}
        sources = SOURCES[: 1 if options.smoke else None]
        keys = jax.random.split(jax.random.key(options.seed), len(SOURCES) * len(RUN_EXAMPLES))
        pairs = [(source, examples) for source in sources for examples in RUN_EXAMPLES[: 1 if options.smoke else None]]
        num_seeds = 4 if options.smoke else RUN_SEEDS
        seen = {pair: runs(*pair, key, num_seeds) for pair, key in zip(pairs, keys, strict=False)}
    characters = character_model(jax.random.key(options.seed)) if options.full and not options.smoke else {}
    rows = []
    for source, (best, critical, decayed) in laws.items():
        named = {"best_at_fixed_rate": best, "critical": critical, "critical_decayed": decayed}
        for name, sizes in named.items():
            rows.append({"source": source, "what": name, "examples": EXAMPLES, "sizes": sizes, "slope": slope(sizes)})
    for (source, examples), (mean, error, expected) in seen.items():
        rows.append({"source": source, "examples": examples, "losses": mean, "errors": error, "exact": expected})
    rows += [{"examples": e, "critical": size, "losses": losses} for e, (size, losses) in characters.items()]
    return experiment.Result(rows, judge(laws, seen, characters), draw(laws, seen, characters))


def judge(laws, seen, characters):
    slopes = {source: [slope(sizes) for sizes in found] for source, found in laws.items()}
    checks = {
        f"E^{r / (1 + r):.2f} for r = {r}": max(abs(p - r / (1 + r)) for p in slopes[r][:2]) < 0.03
        for r in SOURCES
        if r in slopes
    }
    checks["E^(1/3) for r = 1 with a decayed rate"] = abs(slopes[1.0][2] - 1 / 3) < 0.03
    if 0.25 in slopes:
        checks["no growth for r = 1/4 with a decayed rate"] = slopes[0.25][2] < 0.03
    worst, near = 0.0, True
    for mean, error, expected in seen.values():
        worst = max(worst, float(np.max(np.abs(mean - expected) / error)))
        near &= abs(int(np.argmin(mean)) - int(np.argmin(expected))) <= 1
    checks["losses of runs within four standard errors"] = worst < 4
    checks["the best size of runs is the exact one or its neighbour"] = near
    said = ", ".join(f"r = {r}: {p[0]:.3f}, {p[1]:.3f}, {p[2]:.3f}" for r, p in slopes.items())
    text = "Powers of E, of the best size at a fixed rate, of the critical one at a tuned rate, and at a decayed one: "
    text += said
    text += f"; losses of runs are at most {worst:.1f} standard errors from the exact ones."
    if characters:
        power = slope([size for size, _ in characters.values()], np.asarray(list(characters)))
        checks["the character model's power lies between 0.2 and 0.7"] = 0.2 < power < 0.7
        sizes = ", ".join(f"{size:.0f} at {examples}" for examples, (size, _) in characters.items())
        text += f" Character model: {sizes}, a power of {power:.2f}."
    return experiment.verdict(checks, text)


def draw(laws, seen, characters):
    title = "Batch sizes against the examples of a run (h = i^-2, source r), and the losses of runs at a fixed rate"
    figure, (left, right) = report.panels(2, title=title, width=6)
    for i, (source, found) in enumerate(laws.items()):
        labels = ("best, fixed rate", "critical, tuned rate", "critical, decayed rate")
        for line, marker, sizes, label in zip(report.LINES, "os^", found, labels, strict=False):
            style: dict[str, Any] = {"color": report.COLOURS[i], "label": f"r = {source}: {label}"}
            left.plot(EXAMPLES, sizes, marker + line, markersize=4, **style)
    if characters:
        sizes = [size for size, _ in characters.values()]
        left.plot(list(characters), sizes, "D-", color=report.COLOURS[6], label="character model")
    for i, ((source, examples), (mean, error, expected)) in enumerate(seen.items()):
        style: dict[str, Any] = {"color": report.COLOURS[i], "label": f"r = {source}, E = {examples}"}
        right.errorbar(RUN_SIZES, mean, yerr=2 * error, fmt="os^D"[i], capsize=2, **style)
        right.plot(RUN_SIZES, expected, color=report.COLOURS[i], linewidth=1)
    left.set(xscale="log", yscale="log", xlabel="examples of a run", ylabel="batch size (examples)")
    right.set(xscale="log", yscale="log", xlabel="batch size (examples)", ylabel="loss at the end (lines: exact)")
    right.legend(frameon=False, fontsize="x-small")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    experiment.run(main)
