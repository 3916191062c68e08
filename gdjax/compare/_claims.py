"""What a comparison says about the textbook's claims: agrees, disagrees, or cannot tell, each with its numbers.

The claims are those of introductory texts on stochastic, mini-batch and batch gradient descent. A verdict is computed
from the rows of one comparison and can come out either way.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy.stats  # a dependency of jax itself

from gdjax.compare._rows import Row

Verdict = Literal["agrees", "disagrees", "cannot tell"]
EQUIVALENT_ACCURACY = 0.01  # a difference in accuracy that nobody would change the batch size for
EQUAL_WORK = 0.1  # relative difference in floating-point operations, or in time, that counts as none
ROUNDING = 1e-5  # relative difference between losses that is rounding, in float32
NO_NOISE = 1e-9  # variance over squared mean of a gradient that does not vary
CONFIDENCE = 0.95


class Claim(NamedTuple):
    """A claim, whether this comparison agrees with it, and the numbers behind the verdict."""

    claim: str
    verdict: Verdict
    evidence: str


def judge(rows: Sequence[Row]) -> list[Claim]:
    """Return every claim that these rows can speak to. A row that diverged speaks to none."""
    rows = [row for row in rows if not row.num_diverged]
    stochastic = next((row for row in rows if row.name == "stochastic"), None)
    batch = next((row for row in rows if row.name == "batch"), None)
    mini = next((row for row in rows if row.name == "mini-batch"), None)
    claims = []
    if stochastic and mini:
        claims += [_fewer_updates(stochastic, mini), _less_calculation(stochastic, mini)]
        claims += [_same_end_performance(stochastic, mini)] if "accuracy" in mini.metrics else []
    if stochastic and (other := mini or batch):
        claims += [_noisier(stochastic, other)]
    if stochastic and batch:
        claims += [_slower_clock(stochastic, batch), _slower_progress(stochastic, batch)]
        claims += [_limited_memory(stochastic, batch)] if batch.memory_per_gradient else []
    if batch:
        claims += [_falls(batch)]
    return claims


def _fewer_updates(stochastic: Row, mini: Row) -> Claim:
    few, many = _updates_per_epoch(mini), _updates_per_epoch(stochastic)
    return Claim(
        "Mini-batch: fewer updates per epoch",
        "agrees" if few < many else "disagrees",
        f"{few:g} at B = {mini.batch_size}, {many:g} at B = 1",
    )


def _less_calculation(stochastic: Row, mini: Row) -> Claim:
    claim = "Mini-batch: less calculation per epoch"
    clock = f"it takes {_ratio(_seconds_per_epoch(mini) / _seconds_per_epoch(stochastic))} the time"
    if not (stochastic.flops_per_gradient and mini.flops_per_gradient):
        return Claim(claim, "cannot tell", f"this device reports no operation counts; {clock}")
    mini_flops = mini.flops_per_gradient * _updates_per_epoch(mini)
    flops = stochastic.flops_per_gradient * _updates_per_epoch(stochastic)
    return Claim(
        claim,
        "agrees" if mini_flops < (1 - EQUAL_WORK) * flops else "disagrees",
        f"gradients of an epoch take {mini_flops / 1e6:.3g} Mflop at B = {mini.batch_size} and {flops / 1e6:.3g} at "
        f"B = 1; {clock}",
    )


def _same_end_performance(stochastic: Row, mini: Row) -> Claim:
    difference, low, high = _difference(mini.metrics["accuracy"][:, -1], stochastic.metrics["accuracy"][:, -1])
    if low > -EQUIVALENT_ACCURACY and high < EQUIVALENT_ACCURACY:
        verdict: Verdict = "agrees"
    elif high < -EQUIVALENT_ACCURACY or low > EQUIVALENT_ACCURACY:
        verdict = "disagrees"
    else:
        verdict = "cannot tell"
    return Claim(
        "Mini-batch: end performance is not affected",
        verdict,
        f"accuracy at B = {mini.batch_size} minus that at B = 1 is {difference:+.4f}, {CONFIDENCE:.0%} interval "
        f"[{low:+.4f}, {high:+.4f}] ({len(mini.losses)} seeds); within {EQUIVALENT_ACCURACY} would be no difference",
    )


def _noisier(stochastic: Row, other: Row) -> Claim:
    claim, size = "Stochastic: updates are noisier", other.batch_size
    noises = stochastic.gradient_noise, other.gradient_noise
    evidence = f"variance over squared mean is {noises[0]:.3g} at B = 1, {_noise(noises[1])} at B = {size}"
    if not np.all(np.isfinite(noises)) or max(noises) < NO_NOISE:
        return Claim(claim, "cannot tell", f"{evidence}, at the initial parameters")
    num_examples = round(stochastic.num_examples / stochastic.num_epochs)
    if size < num_examples and noises[1] >= NO_NOISE:
        predicted = size * (num_examples - 1) / (num_examples - size)
        evidence += f": {_ratio(noises[0] / noises[1])}, where sampling theory says {_ratio(predicted)}"
    return Claim(claim, "agrees" if noises[0] > noises[1] else "disagrees", evidence)


def _slower_clock(stochastic: Row, batch: Row) -> Claim:
    ratio = _seconds_per_epoch(stochastic) / _seconds_per_epoch(batch)
    verdict: Verdict = "agrees" if ratio > 1 + EQUAL_WORK else "disagrees" if ratio < 1 - EQUAL_WORK else "cannot tell"
    return Claim(
        "Stochastic: an epoch takes longer",
        verdict,
        f"{_ratio(ratio)} the batch's time: {1e3 * _seconds_per_epoch(stochastic):.3g} ms against "
        f"{1e3 * _seconds_per_epoch(batch):.3g} ms",
    )


def _slower_progress(stochastic: Row, batch: Row) -> Claim:
    targets = batch.losses[:, -1]
    needed, batch_needed = (_examples_to(row, targets) for row in (stochastic, batch))
    faster, slower = needed < batch_needed, needed > batch_needed
    verdict: Verdict = "disagrees" if faster.all() else "agrees" if slower.all() else "cannot tell"
    reached = "never" if np.isinf(np.median(needed)) else f"after {np.median(needed):.0f} examples"
    return Claim(
        "Stochastic: an epoch brings less progress",
        verdict,
        f"it reaches the batch's final loss, {targets.mean():.3g}, {reached}, the batch after "
        f"{np.median(batch_needed):.0f} (medians; first in {faster.sum()} of {len(faster)} seeds)",
    )


def _examples_to(row: Row, targets: np.ndarray) -> np.ndarray:
    """Return the examples seen when the loss was first at each seed's target [S], up to rounding; inf where never."""
    reached = row.losses <= (targets + ROUNDING * np.abs(targets))[:, None]
    return np.where(reached.any(1), row.examples_seen[reached.argmax(1)].astype(float), np.inf)


def _limited_memory(stochastic: Row, batch: Row) -> Claim:
    small, large = stochastic.memory_per_gradient or 0, batch.memory_per_gradient or 0
    return Claim(
        "Stochastic: suits limited computing power",
        "agrees" if small < large else "disagrees",
        f"a gradient needs {small / 1e3:.3g} kB of temporary memory at B = 1, {large / 1e3:.3g} kB at B = "
        f"{batch.batch_size}",
    )


def _falls(batch: Row) -> Claim:
    rises, falls = 0, 0
    for losses in batch.losses:
        until_minimum = losses[: losses.argmin() + 1]
        steps = np.diff(until_minimum)
        rises += int(np.sum(steps > ROUNDING * np.abs(until_minimum[:-1])))
        falls += len(steps)
    return Claim(
        "Batch: the loss falls at every update until its minimum",
        "disagrees" if rises else "agrees" if falls else "cannot tell",
        f"it rose between {rises} of {falls} evaluations on the way to the minimum ({len(batch.losses)} seeds, "
        f"learning rate {batch.learning_rate:.3g}), from {batch.losses[:, 0].mean():.3g} over at most "
        f"{batch.losses.max():.3g} to {batch.losses.min():.3g}",
    )


def _difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of a - b over paired seeds [S] and its Student-t interval, unbounded for one seed."""
    differences = a - b
    mean = float(differences.mean())
    if len(differences) < 2:
        return mean, -np.inf, np.inf
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    half_width = float(error * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    return mean, mean - half_width, mean + half_width


def _updates_per_epoch(row: Row) -> float:
    return row.num_updates / row.num_epochs


def _seconds_per_epoch(row: Row) -> float:
    return row.seconds / row.num_epochs


def _ratio(value: float) -> str:
    return f"{value:.3g}x"


def _noise(value: float) -> str:
    return "0" if value < NO_NOISE else f"{value:.3g}"
