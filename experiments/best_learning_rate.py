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

from gdjax import batching, descent, gradients, problems
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


def train(problem, optimum, batch_size, num_epochs, key, learning_rate):
    """Return the excess training loss at the end, scalar. Draws are independent, as the theory has them."""
    method = descent.method(gradients.mean(problem.loss), optax.sgd(learning_rate))
    stream = batching.with_replacement(key, problem.num_examples, num_epochs=num_epochs)
    state = method.init(problem.init(key))
    batches = batching.batches(stream, batch_size)
    state, _ = descent.run(method, state, problem.train, batches, every=len(batches))
    errors = problem.train[0] @ (state.params - optimum)
    return 0.5 * jnp.mean(errors**2)


def sweep(problem, optimum, batch_size, num_epochs, keys):
    """Return the excess loss for every seed and rate, [S, R]."""
    over_rates = jax.vmap(partial(train, problem, optimum, batch_size, num_epochs), (None, 0))
    return jax.jit(jax.vmap(over_rates, (0, None)))(keys, jnp.asarray(LEARNING_RATES))


def theory(problem, optimum, batch_size, num_epochs):
    """Return the expected excess loss for every rate, [R], exactly."""
    x, y = problem.train
    residuals = y - x @ optimum
    hessian = x.T @ x / len(y)
    start = jnp.append(-optimum, 1.0)
    size = len(start)
    num_updates = num_epochs * len(y) // batch_size

    def excess(learning_rate):
        step = partial(
            least_squares.finite_step,
            data=(x, residuals),
            learning_rate=learning_rate,
            batch_size=batch_size,
            replace=True,
        )
        # One update is a linear map of the second moments: T of them are its T-th power. `finite_step` is written for
        # symmetric moments; on others it is another map, unstable where SGD is stable, which rounding would excite.
        unit = jnp.eye(size**2).reshape(-1, size, size)
        unit = (unit + unit.mT) / 2
        matrix = jax.vmap(step)(unit).reshape(size**2, size**2)
        moments = jnp.outer(start, start).reshape(-1) @ jnp.linalg.matrix_power(matrix, num_updates)
        return 0.5 * jnp.sum(hessian * moments.reshape(size, size)[:-1, :-1])

    return jax.jit(partial(jax.lax.map, excess))(jnp.asarray(LEARNING_RATES))


def interpolation_rates(problem, batch_sizes):
    """Return the rate of Ma, Bassily & Belkin (2018) for each batch size: best where the data can be fitted exactly."""
    x, y = problem.train
    eigenvalues = jnp.linalg.eigvalsh(x.T @ x / len(y))
    return least_squares.interpolation_learning_rate(
        jnp.asarray(batch_sizes, float),
        max_sq_norm=jnp.max(jnp.sum(x**2, axis=1)),
        largest=eigenvalues[-1],
        smallest=eigenvalues[0],
    )


def slope(batch_sizes, rates):
    """Return the power of B that the rates grow with, by least squares on logarithms."""
    return float(np.polyfit(np.log(batch_sizes), np.log(rates), 1)[0])


def judge(rows, limit):
    """Return the verdict in words: the line, the plateau below the limit 2 / lambda_max, the distance from theory."""
    sizes, measured, expected = (
        np.asarray([row[name] for row in rows]) for name in ("batch_size", "learning_rate", "theory_learning_rate")
    )
    meeting = float(limit / (measured[0] / sizes[0]))
    power = slope(*(values[sizes <= max(meeting / 4, sizes[1])] for values in (sizes, measured)))
    plateau = measured[sizes >= min(meeting, sizes[-1])] / limit
    factor = float(np.max(np.maximum(measured / expected, expected / measured)))
    at_edge = bool(np.isin(measured, (LEARNING_RATES[0], LEARNING_RATES[-1])).any())
    standard_errors = max(
        abs(row["excess_loss_at_theory_rate"] - row["theory_excess_loss"]) / row["standard_error"] for row in rows
    )
    claims = {
        f"the best rate grows as B^{power:.2f} up to a quarter of B = {meeting:.0f}, where the line from B = "
        f"{sizes[0]} would meet 2 / lambda_max = {limit:.2f}": abs(power - 1) < SLOPE_TOLERANCE,
        f"from there on it is {plateau.min():.0%} to {plateau.max():.0%} of that": FLAT[0] < plateau.min()
        and plateau.max() < FLAT[1],
        f"it is within a factor of {factor:.2f} of theory's, on a grid of step {STEP:.2f}, and the excess loss at "
        f"theory's rate within {standard_errors:.1f} standard errors": factor < 1.01 * STEP
        and standard_errors < STANDARD_ERRORS
        and not at_edge,
    }
    return "; ".join(f"{claim} ({'as' if held else 'NOT as'} predicted)" for claim, held in claims.items()) + (
        ". A best rate lies on the edge of the grid: widen it." if at_edge else "."
    )


def main(options: experiment.Options) -> experiment.Result:
    num_epochs, batch_sizes = (1, BATCH_SIZES[::5]) if options.smoke else (NUM_EPOCHS, BATCH_SIZES)
    rows, best_of_seeds, best_in_theory = [], [], []
    with jax.enable_x64(True):  # the power of a matrix whose eigenvalues are close to 1
        problem = problems.least_squares()
        x, y = problem.train
        optimum = jnp.linalg.lstsq(x, y)[0]
        keys = jax.random.split(jax.random.key(options.seed), NUM_SEEDS)
        for batch_size in batch_sizes:
            losses = np.asarray(sweep(problem, optimum, batch_size, num_epochs, keys))
            expected = np.asarray(theory(problem, optimum, batch_size, num_epochs))
            expected = np.where(np.isfinite(expected), expected, np.inf)  # far above the stable rate it overflows
            best, predicted = int(np.nanargmin(losses.mean(0))), int(np.nanargmin(expected))
            at_theory = losses[:, predicted]
            rows.append(
                {
                    "batch_size": batch_size,
                    "learning_rate": float(LEARNING_RATES[best]),
                    "theory_learning_rate": float(LEARNING_RATES[predicted]),
                    "excess_loss": float(losses[:, best].mean()),
                    "theory_excess_loss": float(expected[predicted]),
                    "excess_loss_at_theory_rate": float(at_theory.mean()),
                    "standard_error": float(at_theory.std(ddof=1) / np.sqrt(NUM_SEEDS)),
                }
            )
            best_of_seeds.append(LEARNING_RATES[np.nanargmin(losses, axis=1)])
            best_in_theory.append(LEARNING_RATES[predicted])
        limit = 2 / float(jnp.linalg.eigvalsh(x.T @ x / len(y))[-1])
        interpolation = np.asarray(interpolation_rates(problem, batch_sizes))
    verdict = judge(rows, limit)
    curves = {
        "measured, the best of each seed": np.stack(best_of_seeds, axis=1),
        "exact expectation": np.asarray(best_in_theory)[None],
        "Ma et al. 2018: labels without noise, many updates": interpolation[None],
    }
    return experiment.Result(rows, verdict, draw(batch_sizes, curves, limit, num_epochs))


def draw(batch_sizes, curves, limit, num_epochs):
    figure = plots.curves(
        np.asarray(batch_sizes),
        curves,
        xlabel="batch size (examples per update)",
        ylabel=f"best learning rate after {num_epochs} epochs",
        log="xy",
        title=f"Least squares, N = 1024: the best constant rate, median and range of {NUM_SEEDS} seeds",
    )
    [axis] = figure.axes
    axis.axhline(limit, color="gray", linewidth=1, label="limit of stability, 2 / largest eigenvalue")
    axis.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    experiment.run(main)
