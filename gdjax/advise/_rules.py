"""Which rule carries hyperparameters from one batch size to another: predicted, then run and compared with tuning.

The rate is tuned at the smaller batch size, or given. Each rule of `theory.rules` carries the hyperparameters to the
larger one; there the rate is tuned too, and all are run with fresh seeds, the same for all. What a rule costs is its
loss over that of the tuned rate, and how many times the examples it takes.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdjax import batching, noise, tuning
from gdjax._trees import kept
from gdjax.advise._carried import carried, law_factor, prediction
from gdjax.advise._outcomes import Outcome, Rules, judged
from gdjax.problem import Problem
from gdjax.theory import rules as laws
from gdjax.theory.rules import RULES, Hyperparameters
from gdjax.tuning import Budget, Tuning

Progress = Callable[[str, float], None]

TUNED = "tuned"
NUM_RATES, FACTOR, NUM_SEEDS = 5, 2.0, 3
NUM_FINE, FINE = 3, 2**0.5  # at the larger batch size, in the end
NUM_EVALUATED, NUM_MEASURED = 256, 512  # training examples: that losses are of, and the noise scale
TUNING_LOOKS, LOOKS = 2, 6  # at a run, in equal parts of it
FEWEST, FEW = 8, 30  # updates of a run at the larger batch size: refused below, and flagged
MAX_EPOCHS = 8
EVALUATION = 1 / 3  # of the time of training on an example
COMPILING, SPENT, WIDENED = 8.0, 0.85, 1.4  # seconds a batch size; share of the seconds planned; rates beyond the grid


def rules(
    problem: Problem,
    optimizer: Any = "adamw",
    *,
    base: int,
    batch_size: int,
    learning_rate: float | None = None,
    names: Sequence[str] | None = None,
    num_examples: int | None = None,
    num_seeds: int = NUM_SEEDS,
    seconds: float = 150.0,
    seed: int = 0,
    progress: Progress = lambda stage, fraction: None,
    announce: Callable[[str], None] = lambda text: None,
) -> Rules:
    """Carry hyperparameters from one batch size to another by every rule, and compare each with tuning there.

    Args:
        problem: what to train.
        optimizer: a name, or what `tuning.named` makes of one, with its schedule and hyperparameters.
        base, batch_size: from where to where, in examples per update.
        learning_rate: at `base`; default tuned there.
        names: of `theory.rules.RULES`; default those that were derived for the optimiser. Others are run if they can
            be. The rule of the measured noise scale is always run.
        num_examples: E, of every run; default what fits into the seconds, at most 8 epochs.
        num_seeds: S, fresh ones, that rules are run with.
        seconds: that all of it should take.
        seed: of parameters and streams.
        progress: called now and then with what is being done and the share that is done.
        announce: called with what will be done, and with the prediction before any rule is run.

    Raises:
        ValueError: for a factory of one's own, whose hyperparameters no rule can change, batch sizes that are not
            1 <= base < batch_size <= N, unknown rules, fewer than 8 updates at `batch_size`, a learning rate that
            diverges at `base`, with the nearest that does not, and where all do.
    """
    began = time.perf_counter()
    recipe, names = _checked(problem, optimizer, base, batch_size, learning_rate, names, num_seeds, seconds)
    keys = dict(zip(("tuning", "fresh", "noise"), jax.random.split(jax.random.key(seed), 3), strict=True))
    given = recipe.hyperparameters
    candidates = carried(recipe, given, names, base, batch_size, None)
    if all(outcome.hyperparameters is None for outcome in candidates):
        reasons = "; ".join(f"{outcome.why_not}" for outcome in candidates)
        raise ValueError(f"rules={list(names or ())}: none of them can be applied: {reasons}")
    num_runs = num_seeds * (2 + sum(outcome.why_not is None for outcome in candidates))
    microbatches = tuning.microbatch_sizes(problem, [base, batch_size])
    gradient = tuning.estimator(problem, microbatches)
    if num_examples is None:
        progress("timing", 0.0)
        num_examples, expected = _affordable(problem, recipe, base, batch_size, gradient, num_runs, seconds)
        announce(f"{num_examples} examples, {num_examples // batch_size} updates at B = {batch_size}: {expected:.0f} s")
    elif num_examples // batch_size < FEWEST:
        raise ValueError(f"num_examples={num_examples} are fewer than {FEWEST} updates of {batch_size}: allow more")

    search = _searching(problem, recipe, gradient, num_examples, num_runs)

    def tuned(size: int, middle: float, *, num_rates: int, factor: float) -> Tuning:
        rates = middle * factor ** (np.arange(num_rates) - (num_rates - 1) / 2)
        progress(f"tuning at B = {size}", 0.05 if size == base else 0.3)
        every = max(1, num_examples // size // TUNING_LOOKS)
        limits = {"batch_size": size, "num_seeds": 1, "key": keys["tuning"], "every": every}
        return tuning.search_grid(partial(search, given), rates, **limits)

    tunings: dict[int, Tuning] = {}
    if learning_rate is None:
        tunings[base] = tuned(base, float(given.learning_rate), num_rates=NUM_RATES, factor=FACTOR)
        if not tunings[base].found:
            raise ValueError(f"the loss diverges at B = {base} at all rates tried: scale the data or the loss")
        learning_rate = tunings[base].optimum()[0]
    else:
        every = max(1, num_examples // base // TUNING_LOOKS)
        _check_stable(
            partial(search, given, batch_size=base, num_seeds=1, key=keys["tuning"], every=every), learning_rate
        )
    numbers = given._replace(learning_rate=learning_rate)

    progress("noise scale", 0.25)
    scale, geometry = _noise_scale(problem, recipe, numbers, gradient, base, num_examples, keys["noise"])
    outcomes = carried(recipe, numbers, names, base, batch_size, float(scale.b_simple))
    announce(prediction(outcomes, scale, geometry))
    known = math.isfinite(float(scale.b_simple)) and float(scale.b_simple) > 0
    expected_factor = law_factor(recipe, base, batch_size, float(scale.b_simple)) if known else 1.0
    tunings[batch_size] = tuned(batch_size, learning_rate * expected_factor, num_rates=NUM_FINE, factor=FACTOR)
    if not tunings[batch_size].found:
        raise ValueError(f"the loss diverges at B = {batch_size} at all rates tried: scale the data or the loss")
    # What rules are held against is to be better known than what they carry.
    tunings[batch_size] = tuned(batch_size, tunings[batch_size].rate, num_rates=NUM_FINE, factor=FINE)

    progress("rules with fresh seeds", 0.5)
    best = numbers._replace(learning_rate=tunings[batch_size].optimum()[0])
    applied = [outcome for outcome in outcomes if outcome.hyperparameters is not None]
    rows = [outcome.hyperparameters for outcome in applied if outcome.hyperparameters is not None] + [best]
    found = search(
        rows, None, batch_size=batch_size, num_seeds=num_seeds, key=keys["fresh"],
        every=max(1, num_examples // batch_size // LOOKS), stop_diverged=False,
    )  # fmt: skip
    assert found.history is not None
    losses = found.history.values
    examples = found.history.updates * batch_size
    reference = Outcome(TUNED, hyperparameters=best, losses=losses[-1])
    found_out = [judged(outcome, losses[i], losses[-1], examples) for i, outcome in enumerate(applied)]
    left = [outcome for outcome in outcomes if outcome.hyperparameters is None]
    return Rules(
        optimizer=recipe.name,
        base=base,
        batch_size=batch_size,
        num_examples=num_examples,
        hyperparameters=numbers,
        tunings=tunings,
        scale=scale._replace(per_leaf=None),
        geometry=geometry,
        outcomes=(*sorted(found_out, key=lambda outcome: outcome.last), *left),
        tuned=reference,
        examples=examples,
        seconds=time.perf_counter() - began,
    )


def _checked(
    problem: Problem, optimizer, base, batch_size, learning_rate, names, num_seeds, seconds
) -> tuple[Any, Any]:
    recipe: Any = tuning.named(optimizer)[0]
    if not hasattr(recipe, "hyperparameters"):
        raise ValueError("optimizer: rules change the hyperparameters of one by name, as 'adamw'; yours keeps its own")
    if not 1 <= base < batch_size <= problem.num_examples:
        raise ValueError(f"from {base} to {batch_size}: must be 1 <= from < to <= N={problem.num_examples}")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate={learning_rate} must be positive and finite")
    if unknown := [name for name in names or () if name not in RULES]:
        raise ValueError(f"rules={unknown[0]!r} is not one of {', '.join(RULES)}")
    if num_seeds < 2:
        raise ValueError(f"num_seeds={num_seeds} must be at least 2, for an interval")
    if not 0 < seconds < math.inf:
        raise ValueError(f"budget={seconds} seconds must be positive and finite")
    return recipe, names


def _affordable(problem, recipe, base: int, batch_size: int, gradient, num_runs: int, seconds: float):
    """Return (E, the seconds that all of it is expected to take): whole updates of the larger batch size."""
    rate = float(recipe.hyperparameters.learning_rate)
    speeds = tuning.speeds(problem, recipe, [base, batch_size], learning_rate=rate, gradient=gradient)
    small, large = (speed.seconds_per_update / speed.batch_size for speed in speeds)
    tunings, evaluated = WIDENED * NUM_RATES, min(NUM_EVALUATED, problem.num_examples)
    looks = 2 * tunings * (TUNING_LOOKS + 1) + num_runs * (LOOKS + 1)
    fixed = 2 * COMPILING + looks * evaluated * EVALUATION * large
    each = tunings * small + (tunings + num_runs) * large
    updates = int((SPENT * seconds - fixed) / each / batch_size)
    if updates < FEWEST:
        need = (fixed + FEWEST * batch_size * each) / SPENT
        raise ValueError(
            f"budget={seconds:g} seconds leave fewer than {FEWEST} updates of {batch_size}: allow {need:.0f}, or "
            "carry to a smaller batch size"
        )
    updates = min(updates, max(FEWEST, MAX_EPOCHS * problem.num_examples // batch_size))
    return updates * batch_size, fixed + updates * batch_size * each


def _searching(problem: Problem, recipe, gradient, num_examples: int, num_runs: int) -> Callable[..., Tuning]:
    """Return `(hyperparameters, rates or None, **limits) -> Tuning`: one program for all numbers of a batch size."""
    fields = [name for name, value in recipe.hyperparameters._asdict().items() if value is not None]

    def optimizer(row, num_updates):
        return recipe.at(Hyperparameters(**dict(zip(fields, row, strict=True))), num_updates)

    def make():
        examples = tuning.evaluation_examples(problem, "train")
        count = min(NUM_EVALUATED, len(jax.tree.leaves(examples)[0]))
        return tuning.trainer(
            problem,
            optimizer,
            evaluate=lambda params, examples: problem.evaluate(params, examples, names=("loss",))["loss"],
            examples=batching.take(examples, jnp.arange(count)),
            num_evaluated=count,
            num_runs=num_runs,
            gradient=gradient,
        )

    trainer = kept(problem, ("rules", recipe, num_runs), make)
    run = tuning.search(trainer, Budget(num_examples), lambda values: values)

    def search(numbers, rates, **limits: Any) -> Tuning:
        each = numbers if rates is None else [numbers._replace(learning_rate=float(rate)) for rate in rates]
        rows = np.asarray([[getattr(one, field) for field in fields] for one in each], float)
        found = run(rows, **limits)
        return dataclasses.replace(found, learning_rates=rows[:, 0] if rates is None else np.asarray(rates, float))

    return search


def _check_stable(search: Callable[..., Tuning], learning_rate: float) -> None:
    """Raise ValueError where the given rate diverges, with the nearest, by halves, that does not."""
    rates = learning_rate / 2.0 ** np.arange(NUM_RATES)
    found = search(rates)
    history = found.history
    assert history is not None
    stable = np.isfinite(found.losses) & (history.values[:, 0, -1] < history.values[:, 0, 0])
    if stable[0]:
        return
    nearest = f"{rates[stable.argmax()]:.3g} does not" if stable.any() else f"so does every one down to {rates[-1]:.3g}"
    raise ValueError(f"learning_rate={learning_rate:g} diverges at the batch size to carry from; {nearest}")


def _noise_scale(
    problem: Problem, recipe: Any, numbers: Hyperparameters, gradient, base: int, num_examples: int, key
) -> tuple[Any, str]:
    """Return (the noise scale half way through the run at the base batch size, the name of its geometry)."""
    run_key, measure_key = jax.random.split(key)
    goal = Budget(num_examples)
    trainer = tuning.training(problem, recipe, goal, num_runs=1, gradient=gradient)
    horizon = max(2, num_examples // base)
    run = trainer.start(np.asarray([float(numbers.learning_rate)]), num_seeds=1, key=run_key, horizon=horizon)
    run = trainer.advance(run, horizon // 2, np.ones(1, bool), batch_size=base)
    state = jax.tree.map(lambda leaf: leaf[0], run.states)
    geometry = "euclidean" if recipe.name in laws.PROPORTIONAL else str(recipe.name)
    geometry = {"lion": "sign", "adafactor": "sign", "muon": "spectral"}.get(geometry, geometry)
    # The root of a covariance takes more examples than the smaller side of the largest matrix.
    sides = [min(x.size // x.shape[-1], x.shape[-1]) for x in jax.tree.leaves(state.params) if x.ndim > 1]
    wanted = max(NUM_MEASURED, 2 * max(sides, default=1)) if geometry == "spectral" else NUM_MEASURED
    sample = min(problem.num_examples, wanted)
    few = geometry == "spectral" and sample <= max(sides, default=1)
    if few or (problem.weight is not None and geometry in ("sign", "spectral")):  # there are no weights in these
        geometry = "euclidean"

    def measure(params, opt_state, data, key):
        norm = geometry if geometry in ("euclidean", "sign", "spectral") else opt_state
        options: dict[str, Any] = {"num_examples": sample, "weight": problem.weight, "geometry": norm}
        return noise.measure(problem.loss, params, data, key, **options)

    program = kept(problem, ("noise scale in a geometry", geometry, recipe, sample), lambda: jax.jit(measure))
    return program(state.params, state.opt_state, problem.train, measure_key), geometry
