"""What a comparison says about the textbook's claims: agrees, disagrees, or cannot tell, each with its numbers.

The claims are those of introductory texts on stochastic, mini-batch and batch gradient descent. A verdict is computed
from the rows of one comparison and can come out either way.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy.stats  # a dependency of jax itself

from gdjax.compare import Row

Verdict = Literal["agrees", "disagrees", "cannot tell"]
EQUIVALENT_ACCURACY = 0.01  # a difference in accuracy that nobody would change the batch size for
EQUAL_WORK = 0.1  # relative difference in floating-point operations that counts as none
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
    clock = f"by the clock {_ratio(_seconds_per_epoch(stochastic) / _seconds_per_epoch(mini))} faster"
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
    size = other.batch_size
    num_examples = round(stochastic.num_examples / stochastic.num_epochs)
    predicted = size * (num_examples - 1) / (num_examples - size) if size < num_examples else np.inf
    return Claim(
        "Stochastic: updates are noisier",
        "agrees" if stochastic.gradient_noise > other.gradient_noise else "disagrees",
        f"variance over squared mean is {stochastic.gradient_noise:.3g} at B = 1, {_noise(other.gradient_noise)} at "
        f"B = {size}"
        + (
            f": {_ratio(stochastic.gradient_noise / other.gradient_noise)}, where sampling theory says "
            f"{_ratio(predicted)}"
            if np.isfinite(predicted)
            else ""
        ),
    )


def _slower_clock(stochastic: Row, batch: Row) -> Claim:
    ratio = _seconds_per_epoch(stochastic) / _seconds_per_epoch(batch)
    return Claim(
        "Stochastic: an epoch takes longer",
        "agrees" if ratio > 1 else "disagrees",
        f"{_ratio(ratio)} the batch's time: {1e3 * _seconds_per_epoch(stochastic):.3g} ms against "
        f"{1e3 * _seconds_per_epoch(batch):.3g} ms",
    )


def _slower_progress(stochastic: Row, batch: Row) -> Claim:
    target = batch.losses[:, -1].mean()
    reached = np.flatnonzero(stochastic.losses.mean(0) < target)
    if not reached.size:
        return Claim(
            "Stochastic: an epoch brings less progress",
            "agrees",
            f"it never reaches the batch's final loss, {target:.3g}",
        )
    needed = int(stochastic.examples_seen[reached[0]])
    return Claim(
        "Stochastic: an epoch brings less progress",
        "disagrees" if needed < batch.num_examples else "agrees",
        f"it reaches the batch's final loss, {target:.3g}, after {needed} examples against {batch.num_examples}",
    )


def _limited_memory(stochastic: Row, batch: Row) -> Claim:
    small, large = stochastic.memory_per_gradient or 0, batch.memory_per_gradient or 0
    return Claim(
        "Stochastic: suits limited computing power",
        "agrees" if small < large else "disagrees",
        f"a gradient needs {small / 1e3:.3g} kB of temporary memory at B = 1, {large / 1e3:.3g} kB at B = "
        f"{batch.batch_size}",
    )


def _falls(batch: Row) -> Claim:
    losses = batch.losses.mean(0)
    rises = int(np.sum(np.diff(losses) > 0))
    return Claim(
        "Batch: the loss falls at every update until its minimum",
        "disagrees" if rises else "agrees",
        f"it rose between {rises} of {len(losses) - 1} evaluations at learning rate {batch.learning_rate:.3g}, from "
        f"{losses[0]:.3g} over at most {losses.max():.3g} to {losses[-1]:.3g}",
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
    return f"{value:.3g} x"


def _noise(value: float) -> str:
    return "0" if value < 1e-9 else f"{value:.3g}"
