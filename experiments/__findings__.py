"""How the ledger finds our number for a claim, and whether the claim holds, in the rows of a committed result."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

Found = tuple[str, bool | None]
Rows = list[dict[str, Any]]


def interval(values: Any, *, confidence: float = 0.9) -> tuple[float, float, float]:
    """Return (low, mean, high) of a mean over seeds, by Student's t."""
    values = np.asarray(values, float)
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return values.mean() - half, values.mean(), values.mean() + half


def span(low: float, middle: float, high: float, *, shown: str = ".3g") -> str:
    """Write a number with its 90 % interval."""
    return f"{middle:{shown}} ({low:{shown}} to {high:{shown}})"


def power(rows: Rows, optimizer: str, largest: int) -> tuple[float, float]:
    """Return the power by which best rates grow with the batch size up to `largest`, and its standard error."""
    points = [(row["batch_size"], row["learning_rate"]) for row in rows if row.get("optimizer", "sgd") == optimizer]
    x, y = np.log([point for point in points if point[0] <= largest]).T
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), float(np.sqrt(covariance[0, 0]))


def grows_as(rows: Rows, optimizer: str, largest: int, claimed: float) -> Found:
    """Say by which power best rates grow, and whether that is within 0.1 of `claimed`."""
    slope, error = power([row for row in rows if "learning_rate" in row], optimizer, largest)
    return f"power {slope:.2f} +- {error:.2f}, B up to {largest}", abs(slope - claimed) <= 0.1


def noise_grows(rows: Rows) -> Found:
    seeds = {row["seed"] for row in rows if "b_simple" in row}
    runs = [[row["b_simple"] for row in rows if row.get("seed") == seed and "b_simple" in row] for seed in seeds]
    low, middle, high = np.exp(interval([math.log(run[-1] / run[0]) for run in runs]))
    return f"{span(low, middle, high, shown='.2g')} times in 10 epochs or so", bool(low > 1)


def two_noise_scales(rows: Rows) -> Found:
    ratios = [row["b_noise"] / row["b_simple"] for row in rows if row.get("b_noise_verdict") == "ok"]
    low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
    return f"ratio {span(low, middle, high, shown='.2g')}, nine in ten", bool(low >= 0.1 and high <= 10)


def definition(rows: Rows, name: str) -> tuple[float, float, float]:
    row = next(row for row in rows if row.get("definition") == name)
    return row["interval"][0], row["examples"], row["interval"][1]


def predicts(rows: Rows, name: str, factor: float, other: str = "hyperbola", share: float = 1.0) -> Found:
    """Say whether one definition is within a factor of `share` times another; where intervals straddle, cannot tell."""
    ours, theirs = definition(rows, name), [share * x for x in definition(rows, other)]
    text = f"{span(*ours)} against {span(*theirs)}"
    least, most = ours[0] / theirs[2], ours[2] / theirs[0]
    if 1 / factor <= least and most <= factor:
        return text, True
    return text, False if most < 1 / factor or least > factor else None


def law(rows: Rows) -> Found:
    off = np.abs([row["log_residual"] for row in rows if "log_residual" in row])
    share, worst = np.mean(off <= math.log(1.25)), math.exp(off.max())
    return f"{share:.0%} of {len(off)} points within 25 %, the worst off by {worst:.2f}", bool(share >= 0.9)


def regimes(rows: Rows) -> Found:
    mean = [np.mean(row["updates"]) for row in rows if row.get("optimizer") == "sgd" and "updates" in row]
    first, last = mean[0] / mean[1], mean[-2] / mean[-1]
    return f"the first doubling saves a factor {first:.2f}, the last {last:.2f}", bool(first > 1.8 and last < 1.2)


def critical(rows: Rows, optimizer: str) -> Found:
    """Say whether B_crit of an optimiser is beyond that of SGD."""
    known = {row["optimizer"]: row for row in rows if "critical_batch_size" in row}
    ours, plain = (
        (row["critical_batch_size_interval"][0], row["critical_batch_size"], row["critical_batch_size_interval"][1])
        for row in (known[optimizer], known["sgd"])
    )
    holds = True if ours[0] > plain[2] else False if ours[2] < plain[0] else None
    return f"{span(*ours)}, SGD {span(*plain)}", holds


def quadratic(rows: Rows) -> dict[str, dict[int, float]]:
    methods = {row["method"] for row in rows}
    return {name: {row["batch_size"]: row["num_updates"] for row in rows if row["method"] == name} for name in methods}


def saved(rows: Rows, method: str, small: bool) -> Found:
    """Say which factor of updates a method saves at the ends, and whether at the small end alone, or the large."""
    known = quadratic(rows)
    sizes = sorted(known["SGD"])
    ends = [known["SGD"][size] / known[method][size] for size in (sizes[0], sizes[-1])]
    helps, idle = ends if small else ends[::-1]
    return f"{ends[0]:.2f} at B = {sizes[0]}, {ends[1]:.2f} at B = {sizes[-1]}", bool(helps > 2 and idle < 1.1)


def perfect(rows: Rows, method: str) -> Found:
    """Say up to which batch size 20 % more examples suffice, and whether that is beyond SGD's."""

    def last(updates):
        examples = {size: size * count for size, count in updates.items()}
        return max(size for size, count in examples.items() if count <= 1.2 * min(examples.values()))

    ours, plain = last(quadratic(rows)[method]), last(quadratic(rows)["SGD"])
    return f"B = {ours}, SGD {plain} (sizes are fourfold apart)", ours > plain


def gap(rows: Rows, rule: str, claimed: Callable[[float, float], bool | None]) -> Found:
    """Say by how many points the test error changes from the smallest batch to all of the data."""
    of_rule = sorted((row for row in rows if row["rule"] == rule), key=lambda row: row["batch_size"])
    change = 100 * (np.asarray(of_rule[-1]["test_errors"]) - np.asarray(of_rule[0]["test_errors"]))
    low, middle, high = interval(change)
    sizes = f"B = {of_rule[0]['batch_size']} to {of_rule[-1]['batch_size']}"
    return f"{middle:+.1f} points ({low:+.1f} to {high:+.1f}), {sizes}", claimed(low, high)


def worse(low: float, high: float) -> bool | None:
    return True if low > 0 else False if high < 0 else None


def no_worse(low: float, high: float) -> bool | None:
    return True if high < 1 else False if low > 1 else None


def schedule(rows: Rows, problem: str, name: str, than: str, factor: float) -> Found:
    """Say whether one schedule ends within `factor` of another, in at most half of the updates."""
    known = {row["schedule"]: row for row in rows if row["problem"] == problem}
    ours, theirs = known[name], known[than]
    text = "; ".join(
        f"{row['schedule']} {row['end']:.2e} +- {row['standard_error']:.0e} in {row['updates'][-1]:.0f} updates"
        for row in (ours, theirs)
    )
    near = ours["end"] <= factor * theirs["end"]
    return text, bool(near and ours["updates"][-1] <= 0.5 * theirs["updates"][-1])


def order_power(rows: Rows, order: str, claimed: float) -> Found:
    """Say by which power of the rate the error grows at the two least rates."""
    (low, first), (high, second) = [(row["learning_rate"], row) for row in rows if row["order"] == order][:2]
    slope = math.log(second["measured"] / first["measured"]) / math.log(high / low)
    error = math.hypot(*(row["error"] / row["measured"] for row in (first, second))) / math.log(high / low)
    return f"power {slope:.2f} +- {error:.2f} at rate {low:.2g}", abs(slope - claimed) <= max(0.1, 2 * error)


def sharpness(rows: Rows, run: str, field: str, near: float | None) -> Found:
    """Say what settles at each batch size, times the rate, and whether within a share `near` of 2, or below it."""
    values = {row["batch_size"]: row[field] for row in rows if row["run"] == run}
    text = ", ".join(f"{value:.3g} at B = {size}" for size, value in values.items())
    if near is None:
        return text, max(values.values()) < 2
    return text, all(abs(value / 2 - 1) <= near for value in values.values())


def optimisers(rows: Rows) -> Found:
    """Say how far the best and the worst optimiser are apart at the smallest and the largest batch."""
    sizes = sorted({row["batch_size"] for row in rows})
    losses = [[row["loss"] for row in rows if row["batch_size"] == size] for size in (sizes[0], sizes[-1])]
    small, large = (max(values) - min(values) for values in losses)
    return f"{small:.2f} nats at B = {sizes[0]}, {large:.2f} at B = {sizes[-1]}", bool(small < 0.5 * large)


def of_losses(rows: Rows, optimizer: str, size: int) -> np.ndarray:
    row = next(row for row in rows if row["optimizer"] == optimizer and row["batch_size"] == size)
    return np.asarray(row["losses"])


def half_life(rows: Rows) -> Found:
    low, middle, high = interval(of_losses(rows, "Adam, b2 fixed", 1) - of_losses(rows, "Adam, half-life fixed", 1))
    return f"{middle:+.3f} nats off ({low:+.3f} to {high:+.3f})", True if low > 0 else False if high < 0 else None


def accumulated(rows: Rows) -> Found:
    names = dict.fromkeys(row["optimizer"] for row in rows)
    costs = {name: interval(of_losses(rows, name, 128) - of_losses(rows, name, 1)) for name in names}
    text = ", ".join(f"{middle:+.2f} ({low:+.2f} to {high:+.2f}) {name}" for name, (low, middle, high) in costs.items())
    return text, all(low > 0 for low, _, _ in costs.values())


def variance(rows: Rows, draw: str) -> Found:
    scores = []
    for row in rows:
        if row["draw"] == draw and row["exact"] > 0:
            scores.append(abs(row["ratios"][0] - row["exact"]) / row["errors"][0])
    return f"{len(scores)} traces within {max(scores):.1f} standard errors", max(scores) < 3


def estimator(rows: Rows, way: str, right: float = 0.05) -> Found:
    row = [row for row in rows if row["way"] == way][-1]
    runs = span(row["low"], row["median"], row["high"], shown=".4g")
    return f"{runs} where {row['b_simple']:g} is true, nine runs in ten", abs(
        row["median"] / row["b_simple"] - 1
    ) <= right


def large_private(rows: Rows) -> Found:
    """Say how many points ahead the largest batch is of the smallest, at noise that promises the same."""
    sizes = sorted({row["batch_size"] for row in rows if row.get("mu")})
    curves = {}
    for size in (sizes[0], sizes[-1]):
        curves[size] = sorted((math.log(row["mu"]), row["accuracy"]) for row in rows if row.get("batch_size") == size
                              and row["mu"])  # fmt: skip
    (small_x, small_y), (large_x, large_y) = (np.transpose(curve) for curve in curves.values())
    shared = large_x[(large_x >= small_x[0]) & (large_x <= small_x[-1])]
    ahead = 100 * (np.interp(shared, large_x, large_y) - np.interp(shared, small_x, small_y))
    text = ", ".join(f"{gain:+.1f} at mu {math.exp(x):.2g}" for x, gain in zip(shared, ahead, strict=True))
    return f"points of B = {sizes[-1]} over {sizes[0]}: {text}", bool(ahead.min() > 0)


def clipping(rows: Rows) -> Found:
    plain = next(row for row in rows if row.get("unclipped"))["accuracy"]
    clipped = max(row["accuracy"] for row in rows if row.get("noise_multiplier") == 0)
    return f"{100 * (plain - clipped):.1f} points", plain - clipped < 0.02


def signal(rows: Rows) -> Found:
    gaussian = [row for row in rows if row.get("shape") == "Gaussian"]
    worst = max(abs(row["signal"] - row["signal_expected"]) / row["standard_error"] for row in gaussian)
    return f"{len(gaussian)} networks within {worst:.1f} standard errors", worst < 3


def only_he(rows: Rows) -> Found:
    deep = {row["gain"]: row["loss"] for row in rows if row.get("layers") == 16 and row["shape"] == "Gaussian"}
    within = [gain for gain, loss in deep.items() if loss <= 5 * min(deep.values())]
    text = ", ".join(f"{loss:.3g} at {gain:.2g}" for gain, loss in deep.items())
    return f"loss of 16 layers {text}", within == [math.sqrt(2)]


def two_directions(rows: Rows) -> Found:
    parts = {row["network_batch_size"]: row["principal_parts"] for row in rows if "network_batch_size" in row}
    text = ", ".join(f"{np.mean(values):.0%} at B = {size}" for size, values in parts.items())
    return text, max(np.max(values) for values in parts.values()) < 0.8
