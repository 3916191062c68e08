"""What does the best ramp of batch sizes save, exactly and in the real loop?

Question    Quadratics with a power-law spectrum h = i^-2, noise c = h: how much of the least cost c_0 T + c_1 E of a
            constant rate and batch is left with the best batch sizes in two phases, with the best for every update,
            with a rate that falls in proportion to the updates left, and with both? And does the real loop, through
            the best three whole batch sizes in one stream, end where the recursion says?
Prediction  A ramp costs less than a decay on every task, and both together save no more than a fifth over the better
            one. In the real loop every mean loss is within four standard errors of the recursion, and the ramp's is
            below that of a constant batch by the predicted ratio, to 5 %.
Cost        3 minutes on two CPU cores; --full, the hard tasks too, of 2000 modes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from gdjax import batching, descent, gradients, report
from gdjax.commands import experiment
from gdjax.theory import plans, ramps, schedules

TASKS = {"easy": (1.0, 0.002, 300), "hard": (0.25, 0.2, 2000)}  # source exponent, target, modes
COSTS = 10.0, 100.0, 1000.0  # of an update, in examples
WAYS = {
    "two phases": (plans.constant, 2),
    "ramp": (plans.constant, None),
    "linear decay": (plans.linear, 1),
    "both": (plans.linear, None),
}
NUM_MODES, NUM_UPDATES, NUM_EXAMPLES, RATE, NUM_RUNS = 50, 100, 3000, 0.5, 1000  # of the real loop


def power_law(source: float, num_modes: int) -> schedules.Quadratic:
    i = jnp.arange(1.0, num_modes + 1)
    return schedules.noisy_quadratic(i**-2, i**-2, start=i ** -(2 * source + 1) / i**-2)


def saved(name: str, cost: float):
    """Yield a row for each way: its least cost over that of a constant rate and batch."""
    source, target, num_modes = TASKS[name]
    find = partial(plans.plan, power_law(source, num_modes), target=target, cost_per_update=cost, cost_per_example=1.0)
    base = find(num_phases=1)
    for way, (shape, phases) in WAYS.items():
        found = find(shape=shape, num_phases=phases)
        numbers = {"share": found.cost / base.cost, "updates": found.num_updates, "examples": found.num_examples}
        yield {"task": name, "cost": cost, "way": way, "constant_updates": base.num_updates} | numbers


def real_loop(key, num_runs):
    """Return {name: (schedule, mean loss, its standard error, predicted)} of a constant batch and the best ramp."""
    h = 1 / jnp.arange(1.0, NUM_MODES + 1)
    quadratic = schedules.noisy_quadratic(h, h, start=jnp.ones(NUM_MODES))
    rates = jnp.full(NUM_UPDATES, RATE)
    best = ramps.batch_ramp(quadratic, rates, num_examples=NUM_EXAMPLES, num_phases=3)
    found = {}
    ways = {"constant": [(NUM_UPDATES, NUM_EXAMPLES // NUM_UPDATES)], "ramp": ramps.phases(best.batch_sizes)}
    # The gradient of one example is h theta + sqrt(h) z with z of its own key: fresh at every position.
    noisy = descent.method(
        gradients.mean(lambda w, both: h @ w**2 / 2 + jnp.sqrt(h) * jax.random.normal(both[1], (NUM_MODES,)) @ w),
        optax.sgd(RATE),
    )
    for name, schedule in ways.items():
        phases = batching.Phases.of(schedule)
        batches = phases.batches(jnp.zeros(phases.examples(NUM_UPDATES), jnp.int32))

        def one(key, batches=batches):
            start_key, noise_key = jax.random.split(key)
            method = descent.with_keys(noisy, noise_key)
            state = method.init(jax.random.rademacher(start_key, (NUM_MODES,), float))
            state, _ = descent.run(method, state, jnp.zeros(1), batches, every=NUM_UPDATES)
            return h @ state.params**2 / 2

        losses = jax.jit(lambda keys, one=one: jax.lax.map(one, keys, batch_size=50))(jax.random.split(key, num_runs))
        sizes = jnp.asarray([size for count, size in schedule for _ in range(count)], float)
        predicted = float(schedules.run(quadratic, rates, sizes)[1][-1])
        found[name] = schedule, *experiment.mean_and_error(losses), predicted
    return found


def main(options: experiment.Options) -> experiment.Result:
    names = list(TASKS) if options.full else ["easy"]
    costs = COSTS[:1] if options.smoke else COSTS
    if options.smoke:
        TASKS["easy"] = (1.0, 0.02, 20)
    rows = [row for name in names for cost in costs for row in saved(name, cost)]
    loop = real_loop(jax.random.key(options.seed), 20 if options.smoke else NUM_RUNS)
    for name, (schedule, mean, error, predicted) in loop.items():
        rows.append({"loop": name, "schedule": schedule, "loss": mean, "standard_error": error, "predicted": predicted})
    share = {(row["task"], row["cost"], row["way"]): row["share"] for row in rows if "task" in row}
    tasks = [(name, cost) for name in names for cost in costs]
    better = [min(share[*task, "ramp"], share[*task, "linear decay"]) for task in tasks]
    gain = [1 - share[*task, "both"] / least for task, least in zip(tasks, better, strict=True)]
    ratio = loop["ramp"][1] / loop["constant"][1]
    exact = loop["ramp"][3] / loop["constant"][3]
    checks = {
        "a ramp costs less than a decay": all(share[*task, "ramp"] < share[*task, "linear decay"] for task in tasks),
        "both save at most a fifth over the better one": max(gain) <= 0.2,
        "the real loop is the recursion": all(abs(mean - p) < 4 * error for _, mean, error, p in loop.values()),
        "the ramp ends below by the predicted ratio": abs(ratio / exact - 1) < 0.05,
    }
    text = "; ".join(
        f"{name}, c_0 = {cost:g} c_1: " + ", ".join(f"{way} {share[name, cost, way]:.3f}" for way in WAYS)
        for name, cost in tasks
    )
    verdict = experiment.verdict(
        checks,
        f"Of the cost of a constant rate and batch there is left: {text}. In the real loop the ramp "
        f"{loop['ramp'][0]} ends at {ratio:.3f} of the loss of a constant batch, where the recursion has {exact:.3f}.",
    )
    return experiment.Result(rows, verdict, draw(share, tasks, loop))


def draw(share, tasks, loop):
    figure, (left, right) = report.panels(
        2, title="What ramps and decays leave of the cost, and the real loop", width=6
    )
    for i, way in enumerate(WAYS):
        values = [share[*task, way] for task in tasks]
        left.plot(range(len(tasks)), values, "os^D"[i] + "-", color=report.COLOURS[i], label=way)
    left.set_xticks(range(len(tasks)), [f"{name}, {cost:g}" for name, cost in tasks])
    left.set(xlabel="task, examples that an update costs", ylabel="least cost / that of a constant rate and batch")
    for i, (name, (_, mean, error, predicted)) in enumerate(loop.items()):
        right.errorbar(
            [i], [mean], [4 * error], fmt="o", color=report.COLOURS[i], capsize=4, label=f"{name}: real loop"
        )
        right.plot([i - 0.2, i + 0.2], [predicted] * 2, "--", color="0.4", label="the recursion" if i == 0 else None)
    right.set_xticks(range(len(loop)), list(loop))
    right.set(ylabel=f"loss after {NUM_EXAMPLES} examples (4 standard errors)", xlim=(-0.5, 1.5))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    experiment.run(main)
