"""How does the best learning rate move along the batch-size axis?

Question    Least squares, N = 1024, condition number 33: which constant rate has the least excess loss after 16 epochs?
Prediction  Proportional to B, with power 0.9 to 1.1, up to a quarter of the batch size at which that line meets the
            stable limit 2 / lambda_max; beyond that size flat, 70 to 100 % of the limit. The measured points lie on the
            curve of the exact recursion for the second moments of the parameters (`least_squares.finite_step`).
Cost        30 s on two CPU cores.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, descent, problems, sweep
from gdjax import report as plots
from gdjax.commands import experiment
from gdjax.theory import least_squares

NUM_SEEDS = 16
NUM_EPOCHS = 16
BATCH_SIZES = tuple(2**i for i in range(11))
LEARNING_RATES = 2.0 ** np.arange(-10, 1.6, 0.25)
STEP = 2**0.25  # between neighbouring rates
SLOPE_TOLERANCE = 0.1
FLAT = 0.7, 1.0  # of the limit
STANDARD_ERRORS = 4
COLUMNS = (
    "batch_size",
    "learning_rate",
    "theory_learning_rate",
    "excess_loss_at_theory_rate",
    "theory_excess_loss",
    "standard_error",
)


def excess_loss(problem, least, batch_size, num_epochs, point):
    """Return the excess training loss at the end, scalar. Draws are independent, as the theory has them."""
    _, history = descent.train(
        problem,
        optax.sgd(point["rate"]),
        key=point["key"],
        batch_size=batch_size,
        num_epochs=num_epochs,
        stream=batching.with_replacement,
    )
    return history["loss"][-1] - least


def theory(problem, optimum, batch_size, num_epochs):
    """Return the expected excess loss for every rate, [R], exactly; infinite where, far too high, it overflows."""
    x, y = problem.train
    hessian = x.T @ x / len(y)
    start = jnp.append(-optimum, 1.0)
    size = len(start)
    # One update is a linear map of the second moments: T of them are its T-th power. `finite_step` is written for
    # symmetric moments; on others it is another map, unstable where SGD is stable, which rounding would excite.
    unit = jnp.eye(size**2).reshape(-1, size, size)
    unit = (unit + unit.mT) / 2

    def excess(unit, rate):
        common = {"data": (x, y - x @ optimum), "learning_rate": rate, "batch_size": batch_size, "replace": True}
        matrix = jax.vmap(partial(least_squares.finite_step, **common))(unit).reshape(size**2, size**2)
        power = jnp.linalg.matrix_power(matrix, num_epochs * len(y) // batch_size)
        moments = jnp.outer(start, start).reshape(-1) @ power
        return 0.5 * jnp.sum(hessian * moments.reshape(size, size)[:-1, :-1])

    over_rates = jax.jit(lambda unit, rates: jax.lax.map(partial(excess, unit), rates))
    expected = over_rates(unit, jnp.asarray(LEARNING_RATES))
    return np.where(np.isfinite(expected), expected, np.inf)


def judge(rows, limit):
    """Return the verdict in words: the line, the plateau below the limit 2 / lambda_max, the distance from theory."""
    sizes, measured, expected, found, exact, error = (np.asarray([row[name] for row in rows]) for name in COLUMNS)
    meeting = float(limit / (measured[0] / sizes[0]))
    line = sizes <= max(meeting / 4, sizes[1])
    power = float(np.polyfit(np.log(sizes[line]), np.log(measured[line]), 1)[0])
    plateau = measured[sizes >= min(meeting, sizes[-1])] / limit
    factor = float(np.max(np.maximum(measured / expected, expected / measured)))
    standard_errors = float(np.max(np.abs(found - exact) / error))
    checks = {
        "the best rate grows in proportion to B": abs(power - 1) < SLOPE_TOLERANCE,
        "then it is flat, below the limit": FLAT[0] < plateau.min() and plateau.max() < FLAT[1],
        "it is theory's, to a step of the grid": factor < 1.01 * STEP,
        "the excess loss is theory's": standard_errors < STANDARD_ERRORS,
        "best rates are inside the grid": not np.isin(measured, (LEARNING_RATES[0], LEARNING_RATES[-1])).any(),
    }
    return experiment.verdict(
        checks,
        f"The best rate grows as B^{power:.2f} up to a quarter of B = {meeting:.0f}, where the line from B = "
        f"{sizes[0]} would meet 2 / lambda_max = {limit:.2f}; from there on it is {plateau.min():.0%} to "
        f"{plateau.max():.0%} of that. It is within a factor of {factor:.2f} of theory's, on a grid of step "
        f"{STEP:.2f}, and the excess loss at theory's rate within {standard_errors:.1f} standard errors.",
    )


def main(options: experiment.Options) -> experiment.Result:
    num_epochs, sizes = (1, BATCH_SIZES[::5]) if options.smoke else (NUM_EPOCHS, BATCH_SIZES)
    rows, best_of_seeds = [], []
    with jax.enable_x64(True):  # the power of a matrix whose eigenvalues are close to 1
        problem = problems.least_squares()
        x, y = problem.train
        optimum = jnp.linalg.lstsq(x, y)[0]
        least = problem.evaluate(optimum)["loss"]
        grid = sweep.grid(key=jax.random.split(jax.random.key(options.seed), NUM_SEEDS), rate=LEARNING_RATES)
        for size in sizes:
            losses = sweep.map(partial(excess_loss, problem, least, size, num_epochs), grid)
            expected = theory(problem, optimum, size, num_epochs)
            predicted = int(np.argmin(expected))
            found = size, experiment.best_rate(LEARNING_RATES, losses).rate, float(LEARNING_RATES[predicted])
            mean, error = experiment.mean_and_error(losses[:, predicted])
            rows.append(dict(zip(COLUMNS, (*found, mean, float(expected[predicted]), error), strict=True)))
            best_of_seeds.append(LEARNING_RATES[np.nanargmin(losses, axis=1)])
        eigenvalues = jnp.linalg.eigvalsh(x.T @ x / len(y))
        limit = 2 / float(eigenvalues[-1])
        # Of Ma, Bassily & Belkin (2018): best where the data can be fitted exactly.
        interpolation = least_squares.interpolation_learning_rate(
            jnp.asarray(sizes, float),
            max_sq_norm=jnp.max(jnp.sum(x**2, axis=1)),
            largest=eigenvalues[-1],
            smallest=eigenvalues[0],
        )
    figure = plots.curves(
        np.asarray(sizes),
        {
            "measured, the best of each seed": np.stack(best_of_seeds, axis=1),
            "exact expectation": np.asarray([[row["theory_learning_rate"] for row in rows]]),
            "Ma et al. 2018: labels without noise, many updates": np.asarray(interpolation)[None],
        },
        xlabel="batch size (examples per update)",
        ylabel=f"best learning rate after {num_epochs} epochs",
        log="xy",
        title=f"Least squares, N = 1024: the best constant rate, median and range of {NUM_SEEDS} seeds",
    )
    figure.axes[0].axhline(limit, color="gray", linewidth=1, label="limit of stability, 2 / largest eigenvalue")
    figure.axes[0].legend(frameon=False, fontsize="small")
    return experiment.Result(rows, judge(rows, limit), figure)


if __name__ == "__main__":
    experiment.run(main)
