"""gdjax: gradient descent, and how many examples each update should see.

A problem supplies the loss of one example; everything else is derived. A stream of examples is cut into batches
(`batching.batches`), a rate is tuned (`tuning.tune`), a run is stored (`training.run`).

    idea
    problem        the loss of one example, its data, and what is evaluated
    batching       streams of examples, and where a batch is cut
    gradients      estimators of the mean gradient of a batch
    descent        one update, the loop, and the loop ended by a rule

    measure
    ghost          norms of every example's gradient, for any function
    noise          gradient noise scales, with intervals
    curvature      Hessian-vector products, top eigenpairs, batch sharpness, trace
    theory         laws of batch sizes and learning rates, and exact recursions

    run
    problems       ready-made problems, models and data
    sweep          many runs in one program, in chunks that survive a crash
    training       one long run, stored: checkpoints, resume, many devices
    tuning         where a learning rate is tuned, at one batch size

    answer
    compare        stochastic, mini-batch and batch descent side by side
    advise         which batch size reaches the target first
    bench          ways to run the same updates, timed against one another

    host
    privacy        what clipping and noise promise
    kernels        programs in the form that a device runs fastest
    timing         compilation and run time, apart
    report         run folders with provenance, and figures
    commands       the command line

A module imports from those below the line of its own kind alone: see the test of the house.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

__all__ = [
    "advise",
    "batching",
    "bench",
    "commands",
    "compare",
    "curvature",
    "descent",
    "ghost",
    "gradients",
    "kernels",
    "noise",
    "privacy",
    "problem",
    "problems",
    "report",
    "sweep",
    "theory",
    "timing",
    "training",
    "tuning",
]

if TYPE_CHECKING:
    from gdjax import (
        advise,
        batching,
        bench,
        commands,
        compare,
        curvature,
        descent,
        ghost,
        gradients,
        kernels,
        noise,
        privacy,
        problem,
        problems,
        report,
        sweep,
        theory,
        timing,
        training,
        tuning,
    )

    __version__: str


def __getattr__(name: str) -> Any:
    """Import a module when it is first used, so that `gdjax --help` need not wait for jax."""
    if name in __all__:
        return importlib.import_module(f"gdjax.{name}")
    if name == "__version__":
        return importlib.metadata.version("gdjax")
    raise AttributeError(f"module 'gdjax' has no attribute {name!r}")
