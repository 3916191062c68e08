"""`gdjax problems`. Nothing heavy is imported before it runs, so that --help answers at once."""

import dataclasses
import json
import math
from pathlib import Path

from gdjax.commands._session import Common

SOURCES = {
    "digits-mlp": "scikit-learn's digits, an MLP",
    "least-squares": "drawn: Gaussian inputs, a linear model",
    "logistic": "drawn: Gaussian inputs, a linear model",
    "noisy-quadratic": "drawn: Zhang et al. 2019, section 3",
    "mnist-mlp": "MNIST, an MLP",
    "fashion-mnist-cnn": "Fashion-MNIST, a convolutional network",
    "cifar10-cnn": "CIFAR-10, a convolutional network",
    "a9a-logistic": "LIBSVM's a9a (incomes), a linear model",
    "power-plant": "UCI's power plant, an MLP",
    "tiny-shakespeare": "tiny Shakespeare, a transformer",
}


@dataclasses.dataclass(frozen=True)
class Problems:
    """List the built-in problems: examples, parameters, and where the data come from.

    What is read from files is counted where --data, or GDJAX_DATA, has them, and every file is checked by its SHA-256.
    """

    common: Common = Common()

    def run(self) -> None:
        """Print the list, or with --json write it."""
        import jax

        from gdjax import _files, problems

        if self.common.json not in (None, "-"):
            _files.check_replaceable(Path(self.common.json), "json")
        rows, missing = [], ""
        for name, source in SOURCES.items():
            row = {"problem": name, "examples": None, "parameters": None, "source": source}
            try:
                problem = problems.named(name)
            except (ValueError, OSError, ModuleNotFoundError) as error:
                missing = missing or str(error)
            else:
                leaves = jax.tree.leaves(jax.eval_shape(problem.init, jax.random.key(0)))
                row |= {"examples": problem.num_examples, "parameters": sum(math.prod(leaf.shape) for leaf in leaves)}
            rows.append(row)
        if self.common.json not in (None, "-"):
            _files.write_json(Path(self.common.json), {"rows": rows})
        if self.common.json == "-":
            print(json.dumps({"rows": rows}, indent=2))
            return
        print(f"{'problem':<17}  {'examples':>8}  {'parameters':>10}  source")
        for row in rows:
            examples, parameters = ("-" if row[key] is None else row[key] for key in ("examples", "parameters"))
            print(f"{row['problem']:<17}  {examples:>8}  {parameters:>10}  {row['source']}")
        if missing:
            print(f"\n-: {missing}")
