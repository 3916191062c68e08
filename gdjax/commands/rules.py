"""`gdjax rules`. Nothing heavy is imported before it runs, so that --help answers at once."""

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from gdjax.commands import _specs
from gdjax.commands._arguments import called
from gdjax.commands._optimizer import Descent
from gdjax.commands._session import Common, progress, saving

if TYPE_CHECKING:
    from gdjax.advise import Rules as Found


@dataclasses.dataclass(frozen=True)
class Rules:
    """Find the rule that carries learning rate, weight decay and memories from one batch size to another.

    Tunes the rate at the smaller batch size, or takes yours, predicts from the noise scale which rule is best, carries
    the hyperparameters by each, runs them with fresh seeds, and compares them with the rate tuned at the larger one.
    Every run sees as many examples. Saves result.json and figure.png.
    """

    problem: str = "digits-mlp"
    """A built-in name, or package.module:attribute, as `gdjax compare --help` says."""
    descent: Descent = Descent(optimizer="adamw")
    learning_rate: float | None = None
    """Yours at the smaller batch size. Default: tuned there."""
    momentum: float | None = None
    """Momentum of momentum, nesterov and muon. Default: 0.9, 0.9 and 0.95."""
    b1: float | None = None
    """Decay of the first moment of adam, adamw and lion, per update. Default: 0.9."""
    b2: float | None = None
    """Decay of the second moment, per update. Default: 0.999; 0.99 for lion, 0.9 for rmsprop."""
    from_: Annotated[int, called("from")] = 16
    """The smaller batch size, where the hyperparameters are known."""
    to: int = 128
    """The larger batch size, to which they are carried."""
    rules: tuple[str, ...] = ()
    """Names of rules. Default: those that were derived for the optimiser."""
    examples: int | None = None
    """Examples that every run sees. Default: what fits into the budget, at most 8 epochs."""
    num_seeds: int = 3
    """Fresh seeds that the rules are run with."""
    budget: float = 150.0
    """Seconds that all of it should take; --examples goes before it."""
    seed: int = 0
    """Seed of parameters and streams."""
    common: Common = Common()

    def run(self) -> None:
        """Compare the rules, print and save."""
        from gdjax import advise

        with saving("rules", self, seed=self.seed) as save:
            recipe = self.descent.factory()
            given = {name: getattr(self, name) for name in ("momentum", "b1", "b2") if getattr(self, name) is not None}
            recipe = _with(recipe, given)
            problem = _specs.problem(self.problem)
            with progress() as show:
                found = advise.rules(
                    problem,
                    recipe,
                    base=self.from_,
                    batch_size=self.to,
                    learning_rate=self.learning_rate,
                    names=self.rules or None,
                    num_examples=self.examples,
                    num_seeds=self.num_seeds,
                    seconds=self.budget,
                    seed=self.seed,
                    progress=show,
                    announce=lambda text: print(_folded(text), flush=True),
                )
            title = f"{problem.name}, {found.optimizer} from B = {found.base} to {found.batch_size}"
            save(found.summary() | {"problem": problem.name}, _report(found), lambda: advise.regrets(found, title))


def _with(recipe: Any, numbers: dict[str, float]) -> Any:
    """Return the recipe with other hyperparameters.

    Raises:
        ValueError: for those that the optimiser does not have, and for what is not in [0, 1).
    """
    had = getattr(recipe, "hyperparameters", None)
    for name, value in numbers.items():
        if getattr(had, name, None) is None:
            raise ValueError(f"{name}={value}: this optimiser has no {name}")
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} must be at least 0 and below 1")
    return dataclasses.replace(recipe, hyperparameters=had._replace(**numbers)) if had else recipe


def _report(found: "Found") -> str:
    """Return what each rule carries, what that came to, the rules that do not apply, and the verdict."""
    carried: list[tuple[str, ...]] = [("rule", "rate", "decay", "b1", "b2", "predicted")]
    came_to: list[tuple[str, ...]] = [("rule", "loss", "loss regret", "examples regret")]
    for outcome in (*found.run, found.tuned):
        h = outcome.hyperparameters
        assert h is not None
        numbers = (h.learning_rate, h.weight_decay, h.b1 if h.momentum is None else h.momentum, h.b2)
        cells = ["" if x is None else f"{float(x):.3g}" for x in numbers]
        name = outcome.rule + "*" * bool(outcome.flag)
        carried.append((name, *cells, f"{outcome.predicted:.2f}" if outcome.predicted == outcome.predicted else ""))
        loss = "diverged" if outcome.last == float("inf") else f"{outcome.last:.4g}"
        regrets = (
            ("{:+.2g} [{:+.2g}, {:+.2g}]", outcome.loss_regret),
            ("{:+.0%} [{:+.0%}, {:+.0%}]", outcome.examples_regret),
        )
        told = ["" if x is None or x.mean == float("inf") else form.format(*x) for form, x in regrets]
        came_to.append((name, loss, *told))
    lines = [*_aligned(carried), "", *_aligned(came_to)]
    lines += [f"{outcome.rule} = {', '.join(outcome.same)}" for outcome in found.run if outcome.same]
    flags: dict[str, list[str]] = {}
    for outcome in found.run:
        if outcome.flag:
            flags.setdefault(outcome.flag, []).append(outcome.rule)
    lines += [_folded(f"* {', '.join(names)}: {flag}.") for flag, names in flags.items()]
    lines += [_folded(f"Not run: {outcome.why_not}.") for outcome in found.outcomes if outcome.why_not]
    if found.num_examples // found.batch_size < 30:
        lines += [_folded(f"Few updates, {found.num_examples // found.batch_size}: a larger --budget says more.")]
    edges = [f"B = {size}" for size, tuned in found.tunings.items() if tuned.at_edge]
    lines += [f"The best rate at {' and '.join(edges)} is at the edge of those tried."] * bool(edges)
    return "\n".join([*lines, "", _folded(found.sentence())])


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gap = " " if sum(widths) + 2 * len(widths) - 2 > shutil.get_terminal_size().columns else "  "
    return [gap.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _folded(text: str) -> str:
    return textwrap.fill(text, max(60, shutil.get_terminal_size().columns))
