"""gdjax: gradient descent, and how many examples each update should see.

A problem supplies the loss of one example; everything else is derived.

    problem        the loss of one example, parameters and data
    batching       streams of examples, and where to cut them
    ghost          norms of every example's gradient, for any function
    gradients      estimators of the mean gradient of a batch
    descent        one update, the loop, the loop ended by a rule
    kernels        a loop of small operations as one kernel of a CPU

    theory         laws of batch sizes and learning rates, in closed form
    quadratics     SGD on a noisy quadratic, exactly
    least_squares  SGD on least squares, exactly
    stream_order   the noise floor of every order of the stream, exactly
    curvature      Hessian-vector products, top eigenpairs, batch sharpness, trace
    intervals      confidence intervals of ratios
    noise          gradient noise scales, with intervals, of a sample and along a run

    records        run folders with provenance
    formats        parsers of standard data formats
    sources        published data files, checked to the bit
    datasets       data, real and drawn
    models         small pure models
    problems       ready-made problems

    programs       a function of one lane, compiled for many
    store          finished chunks that survive a crash
    sweep          many runs in one program
    feeding        compiled chunks of updates and what they are fed
    checkpoint     checkpoints of a run
    training       one long run from the host
    hosts          processes of several hosts, joined

    timing         compilation and run time, apart
    histories      runs of every rate and seed, piece by piece
    compare        stochastic, mini-batch and batch descent side by side
    claims         what a comparison says about the textbook
    variants       ways to run the same updates
    bench          those ways timed against one another and the device
    targets        what a run is to reach, and what it is judged on
    lanes          runs of every rate and seed, advanced together
    optimizers     optimisers by name
    pilots         updates to a target or loss after a budget, over rates and seeds
    scaling        laws fitted to pilots, and what they predict
    choices        what is known of each batch size
    throughput     seconds per update at every batch size
    advise         which batch size reaches the target first
    plots          figures

    arguments      a dataclass as a command line
    command        what every command is asked, and how it ends
    bench_report   the command that times the ways to run the same updates
    experiment     run an experiment from the command line
    cli            the other commands, and the way to all of them

A module imports from those above it alone.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "advise",
    "arguments",
    "batching",
    "bench",
    "bench_report",
    "checkpoint",
    "choices",
    "claims",
    "command",
    "compare",
    "curvature",
    "datasets",
    "descent",
    "experiment",
    "feeding",
    "formats",
    "ghost",
    "gradients",
    "histories",
    "hosts",
    "intervals",
    "kernels",
    "lanes",
    "least_squares",
    "models",
    "noise",
    "optimizers",
    "pilots",
    "plots",
    "problem",
    "problems",
    "programs",
    "quadratics",
    "records",
    "scaling",
    "sources",
    "store",
    "stream_order",
    "sweep",
    "targets",
    "theory",
    "throughput",
    "timing",
    "training",
    "variants",
]

if TYPE_CHECKING:
    from gdjax import (
        advise,
        arguments,
        batching,
        bench,
        bench_report,
        checkpoint,
        choices,
        claims,
        command,
        compare,
        curvature,
        datasets,
        descent,
        experiment,
        feeding,
        formats,
        ghost,
        gradients,
        histories,
        hosts,
        intervals,
        kernels,
        lanes,
        least_squares,
        models,
        noise,
        optimizers,
        pilots,
        plots,
        problem,
        problems,
        programs,
        quadratics,
        records,
        scaling,
        sources,
        store,
        stream_order,
        sweep,
        targets,
        theory,
        throughput,
        timing,
        training,
        variants,
    )


def __getattr__(name: str):
    """Import a module when it is first used, so that `gdjax --help` need not wait for jax."""
    if name in __all__:
        return importlib.import_module(f"gdjax.{name}")
    raise AttributeError(f"module 'gdjax' has no attribute {name!r}")
