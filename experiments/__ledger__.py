"""The ledger: what others published about the batch size, beside what our committed results say of it.

A claim is one row of `CLAIMS`. Its number is computed from the rows of a committed result, and so is whether it holds:
True, False, or None where this size cannot tell. `python -m experiments ledger` writes experiments/LEDGER.md.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import __findings__ as find
from experiments.__findings__ import Found, Rows

FOLDER = Path(__file__).parent / "results"


class Claim(NamedTuple):
    """A published claim.

    Attributes:
        topic: the heading it stands under; claims that contradict each other stand side by side.
        said: what is claimed, in our words, with its number.
        source: who says so.
        result: the folder of the committed result.
        find: rows of that result -> (our number with its interval or error, whether the claim holds).
    """

    topic: str
    said: str
    source: str
    result: str
    find: Callable[[Rows], Found]


MCCANDLISH = "McCandlish et al. 2018, 1812.06162"
SHALLUE = "Shallue et al. 2019, 1811.03600"
ZHANG = "Zhang et al. 2019, 1907.04164"
MAREK = "Marek et al. 2025, 2507.07101"
ABADI = "Abadi et al. 2016, 1607.00133"
VERDICTS = {True: "holds", False: "does not", None: "cannot tell"}


P = functools.partial
CLAIMS = (
    Claim("The noise scale", "It grows along a run, severalfold.", MCCANDLISH, "noise_scale", find.noise_grows),
    Claim("The noise scale", "B_simple and B_noise differ by a small factor only.", MCCANDLISH, "noise_scale",
          find.two_noise_scales),
    Claim("The noise scale", "B_noise is B_crit to within a factor of 2, on digits.", MCCANDLISH, "critical_batch",
          P(find.predicts, name="B_noise", factor=2)),
    Claim("The noise scale", "The same, on Fashion-MNIST.", MCCANDLISH, "critical_batch-full",
          P(find.predicts, name="B_noise", factor=2)),
    Claim("The noise scale", "A ratio of averages is right, from devices or microbatches.", MCCANDLISH,
          "noise_estimators", P(find.estimator, way="devices")),
    Claim("The noise scale", "So is an average of ratios (as often programmed; the source warns of it).", "practice",
          "noise_estimators", P(find.estimator, way="mean of the ratio")),
    Claim("The noise scale", "Normalisation layers alone tell the whole model's (said of transformers; here they were "
          "given another).", "Gray et al. 2024, 2411.00999", "noise_estimators",
          P(find.estimator, way="normalisation layers only")),
    Claim("The noise scale", "The update of B independent examples has 1/B of the covariance of one.",
          "sampling theory", "update_noise", P(find.variance, draw="with replacement")),
    Claim("The noise scale", "Of B distinct examples out of N, times (N - B)/(N - 1).", "sampling theory",
          "update_noise", P(find.variance, draw="distinct examples")),
    Claim("Updates to a target", "They follow S_min (1 + B_crit/B).", MCCANDLISH, "steps_to_target", find.law),
    Claim("Updates to a target", "A doubling of B first halves them, in the end saves nothing.", SHALLUE,
          "steps_to_target", find.regimes),
    Claim("Updates to a target", "20 % more examples than the fewest buy 0.2 B_crit, by the law.",
          "Zhang et al. 2024, 2410.21676", "critical_batch",
          P(find.predicts, name="20 % overhead", factor=2, share=0.2)),
    Claim("Updates to a target", "Branching a run finds the B_crit of this law, within a factor of 2 (our question).",
          "Merrill et al. 2025, 2505.23971", "critical_batch", P(find.predicts, name="branched", factor=2)),
    Claim("Which optimiser gains", "Momentum's B_crit is larger than SGD's, on digits.", ZHANG, "steps_to_target",
          P(find.critical, optimizer="momentum")),
    Claim("Which optimiser gains", "So is Adam's.", ZHANG, "steps_to_target", P(find.critical, optimizer="adam")),
    Claim("Which optimiser gains", "Momentum's is, in another run with eight batch sizes.", ZHANG,
          "optimizers_and_batch", P(find.critical, optimizer="momentum")),
    Claim("Which optimiser gains", "Muon keeps profiting at larger batches than AdamW (here held against SGD).",
          "Essential AI 2025, 2505.02222", "optimizers_and_batch", P(find.critical, optimizer="muon")),
    Claim("Which optimiser gains", "Momentum helps at large batches only, on the noisy quadratic.", ZHANG,
          "noisy_quadratic", P(find.saved, method="momentum", small=False)),
    Claim("Which optimiser gains", "Averaging the parameters helps at small batches only.", ZHANG, "noisy_quadratic",
          P(find.saved, method="averaging", small=True)),
    Claim("Which optimiser gains", "Preconditioning extends the range of perfect scaling.", ZHANG, "noisy_quadratic",
          P(find.perfect, method="preconditioned SGD")),
    Claim("Linear or square root?", "SGD: the best rate is proportional to B, on digits.",
          "Goyal et al. 2017, 1706.02677", "steps_to_target",
          P(find.grows_as, optimizer="sgd", largest=128, claimed=1.0)),
    Claim("Linear or square root?", "SGD: in theory it grows as the square root of B.", "Krizhevsky 2014, 1404.5997",
          "steps_to_target", P(find.grows_as, optimizer="sgd", largest=128, claimed=0.5)),
    Claim("Linear or square root?", "SGD: it is proportional to B, on least squares.", "Goyal et al. 2017, 1706.02677",
          "best_learning_rate", P(find.grows_as, optimizer="sgd", largest=64, claimed=1.0)),
    Claim("Linear or square root?", "Adam: it grows as the square root of B.", "Malladi et al. 2022, 2205.10287",
          "steps_to_target", P(find.grows_as, optimizer="adam", largest=128, claimed=0.5)),
    Claim("Do large batches generalise worse?", "At fixed epochs and one rate they do (digits).",
          "Keskar et al. 2017, 1609.04836", "generalisation",
          P(find.gap, rule="fixed epochs, one rate", claimed=find.worse)),
    Claim("Do large batches generalise worse?", "At a fixed number of updates and one rate they do not (digits).",
          "Hoffer et al. 2017, 1705.08741", "generalisation",
          P(find.gap, rule="fixed updates, one rate", claimed=find.no_worse)),
    Claim("Do large batches generalise worse?", "The same, with the rate tuned (digits).", SHALLUE, "generalisation",
          P(find.gap, rule="fixed updates, tuned", claimed=find.no_worse)),
    Claim("Do large batches generalise worse?", "The same, with the rate tuned (Fashion-MNIST).", SHALLUE,
          "generalisation-full", P(find.gap, rule="fixed updates, tuned", claimed=find.no_worse)),
    Claim("Do large batches generalise worse?", "At fixed epochs the right rate closes the gap (said of 8k out of 1.3M "
          "examples; here of all N).",
          "Goyal et al. 2017, 1706.02677", "generalisation-full",
          P(find.gap, rule="fixed epochs, tuned", claimed=find.no_worse)),
    Claim("Growing the batch", "It does what decaying the rate does, in fewer updates (noisy quadratic).",
          "Smith et al. 2018, 1711.00489", "grow_the_batch",
          P(find.schedule, problem="noisy-quadratic", name="grow", than="decay", factor=1.1)),
    Claim("Growing the batch", "The same, on logistic regression.", "Smith et al. 2018, 1711.00489", "grow_the_batch",
          P(find.schedule, problem="logistic", name="grow", than="decay", factor=1.1)),
    Claim("Growing the batch", "Following the noise scale takes fewer updates at 1.5 times the loss at most.",
          MCCANDLISH, "grow_the_batch",
          P(find.schedule, problem="noisy-quadratic", name="follow", than="grow", factor=1.5)),
    Claim("Growing the batch", "The same, on logistic regression.", MCCANDLISH, "grow_the_batch",
          P(find.schedule, problem="logistic", name="follow", than="grow", factor=1.5)),
    Claim("The order of examples", "With replacement, SGD's error at a small constant rate grows as the rate.",
          "Mishchenko et al. 2020, 2006.05988", "stream_order",
          P(find.order_power, order="with replacement", claimed=1)),
    Claim("The order of examples", "Reshuffled, far less: here as its third power (the mean of 64 numbers).",
          "Mishchenko et al. 2020, 2006.05988", "stream_order", P(find.order_power, order="reshuffled", claimed=3)),
    Claim("The edge of stability", "Full batch: the largest eigenvalue settles at 2 / rate.",
          "Cohen et al. 2021, 2103.00065", "edge_of_stability",
          P(find.sharpness, run="full batch", field="rate_times_eigenvalue", near=0.025)),
    Claim("The edge of stability", "Mini-batches: batch sharpness settles there (10 %).",
          "Andreyev & Beneventano 2024, 2412.20553", "edge_of_stability",
          P(find.sharpness, run="random labels", field="rate_times_batch_sharpness", near=0.1)),
    Claim("The edge of stability", "and the largest eigenvalue below it.", "Andreyev & Beneventano 2024, 2412.20553",
          "edge_of_stability", P(find.sharpness, run="random labels", field="rate_times_eigenvalue", near=None)),
    Claim("Small batches", "At B = 1 the choice of optimiser hardly matters, at large B it does.", MAREK,
          "small_batch_lm-full", find.optimisers),
    Claim("Small batches", "At B = 1 Adam gains from b2's half-life being fixed in tokens.", MAREK,
          "small_batch_lm-full", find.half_life),
    Claim("Small batches", "Accumulating gradients wastes tokens: B = 128 ends higher than B = 1.", MAREK,
          "small_batch_lm-full", find.accumulated),
    Claim("Privacy", "Clipping alone costs little (2 points), digits.", ABADI, "private", find.clipping),
    Claim("Privacy", "At equal privacy larger batches are more accurate, MNIST.", "De et al. 2022, 2204.13650",
          "private-full", find.large_private),
    Claim("Initialisation and paths", "The signal is multiplied by gain^2/2 a layer.", "He et al. 2015, 1502.01852",
          "initialisation", find.signal),
    Claim("Initialisation and paths", "Deep ReLU networks train at gain sqrt 2 alone (others end five times higher).",
          "He et al. 2015, 1502.01852", "initialisation", find.only_he),
    Claim("Initialisation and paths", "Two principal directions hold 76 % of a path, as of a random walk.",
          "Antognini & Sohl-Dickstein 2018, 1806.08805", "trajectories", find.two_directions),
)  # fmt: skip


def ledger() -> str:
    """Return the page."""
    parts = [
        "# Published claims, and what came out here",
        "Each row is a claim in our words with its source, the experiment that was run, our number computed from the "
        "committed result, with its 90 % interval or standard error where there is one, and a verdict. *Does not* "
        "means not here: small models on two CPU cores, and what a claim says of large ones may be true of them. Cost "
        "is the wall time of the whole experiment. `python -m experiments ledger` writes this page; a claim is one "
        "row of `experiments/__ledger__.py`.",
    ]
    found = []
    for claim in CLAIMS:
        number, holds = claim.find(_result(claim.result)["rows"])
        found.append((claim, number, None if holds is None else bool(holds)))
    counts = [f"{sum(holds is value for *_, holds in found)} {word}" for value, word in VERDICTS.items()]
    parts.append(f"**{len(found)} claims: {', '.join(counts)}.**")
    for topic in dict.fromkeys(claim.topic for claim in CLAIMS):
        lines = ["| claim | source | ran | our number | verdict | cost |", "|---|---|---|---|---|---|"]
        for claim, number, holds in found:
            if claim.topic == topic:
                name, _, full = claim.result.partition("-")
                seconds = _result(claim.result)["provenance"].get("wall_seconds")
                cost = "" if seconds is None else f"{seconds:.0f} s"
                ran = f"[{name}]({name}.py){' --full' if full else ''}"
                lines.append(
                    f"| {claim.said} | {_link(claim.source)} | {ran} | {number} | **{VERDICTS[holds]}** | {cost} |"
                )
        parts += [f"## {topic}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


@functools.cache
def _result(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name / "result.json").read_text())


def _link(source: str) -> str:
    who, _, number = source.partition(", ")
    return f"[{who}](https://arxiv.org/abs/{number})" if number else who
