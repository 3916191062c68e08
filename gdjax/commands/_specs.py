"""Everything that turns a word of the command line into an object: problems, optimisers, models and variants.

>>> problem("least-squares").name
'least-squares'
>>> problem("least-square")
Traceback (most recent call last):
ValueError: problem='least-square' is not one of digits-mlp, least-squares, logistic, noisy-quadratic, mnist-mlp, \
fashion-mnist-cnn, cifar10-cnn, a9a-logistic, power-plant, tiny-shakespeare; a problem of your own is \
package.module:attribute

What has a colon is imported: 'package.module:attribute', the current folder first, as `python -m` searches.
"""

import difflib
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from gdjax.bench import Variant
    from gdjax.problem import Problem
    from gdjax.tuning import Optimizer


def problem(spec: str) -> "Problem":
    """Return a built-in problem, or one that is imported, itself or by a function of no argument that returns it.

    Raises:
        ValueError: for a name that is not built in, as `imported`, and where something else was found there.
    """
    from gdjax import problems
    from gdjax.problem import Problem

    if ":" not in spec:
        return problems.named(spec)
    found = imported(spec, "problem")
    if callable(found) and not isinstance(found, Problem):
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise ValueError(f"problem={spec!r}: calling it without arguments raised {error!r}") from error
    if not isinstance(found, Problem):
        raise ValueError(f"problem={spec!r} is a {type(found).__name__}, not a gdjax.problem.Problem")
    return found


def optimizer(spec: str) -> "str | Optimizer":
    """Return the name of a built-in optimiser as it is, and import what has a colon.

    Raises:
        ValueError: as `imported`, and where it does not make an optax transformation of a learning rate, or of that and
            a number of updates.
    """
    import optax

    from gdjax import tuning

    if ":" not in spec:
        return spec
    factory = imported(spec, "optimizer")
    try:
        made = tuning.made(factory, 0.1, 100)
    except (Exception, SystemExit) as error:
        raise ValueError(f"optimizer={spec!r}: calling it with a learning rate raised {error!r}") from error
    if not isinstance(made, optax.GradientTransformation):
        raise ValueError(f"optimizer={spec!r} returned a {type(made).__name__}, not an optax.GradientTransformation")
    return factory


def model(spec: str) -> "Problem":
    """Return a model of `gdjax bench`, or a problem.

    Raises:
        ValueError: as `problem`, naming the models too.
    """
    from gdjax import bench

    if spec in bench.MODELS:
        return bench.MODELS[spec]()
    try:
        return problem(spec)
    except ValueError as error:
        raise ValueError(f"models: {error}; or of {', '.join(bench.MODELS)}") from error


def variant(spec: str) -> "Variant | None":
    """Return a built-in variant of `gdjax bench`, None for 'lanes', or import one of the user's own.

    Raises:
        ValueError: for a name that is not built in, and as `imported`.
    """
    from gdjax import bench

    if spec in bench.VARIANTS or spec == "lanes":
        return bench.VARIANTS.get(spec)
    if ":" not in spec or " " in spec:
        known = ", ".join([*bench.VARIANTS, "lanes"])
        raise ValueError(f"variant={spec!r} is not one of {known}; one of your own is module:function")
    found = imported(spec, "variant")
    if callable(found):
        return cast("Variant", found)
    raise ValueError(f"variant={spec!r} is a {type(found).__name__}, not (problem, learning_rate) -> run")


def imported(spec: str, argument: str) -> Any:
    """Return what 'package.module:attribute' names. The current folder is searched first, as `python -m` does.

    Raises:
        ValueError: says, for the argument of this name, which part of `spec` could not be imported.
    """
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"{argument}={spec!r} is not of the form package.module:attribute")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{argument}={spec!r}: no module named {error.name!r} here or in this environment (looked in {here})"
            + (f"; a file {module_name} is named without '.py'" if module_name.endswith(".py") else "")
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{argument}={spec!r}: importing {module_name!r} raised {error!r}") from error
    finally:
        sys.path.remove(here)
    if not hasattr(module, attribute):
        public = [name for name, value in vars(module).items() if name[0] != "_" and _is_candidate(value)]
        raise ValueError(
            f"{argument}={spec!r}: module {module_name!r} has no {attribute!r}; the nearest that it has: "
            + (", ".join(difflib.get_close_matches(attribute, public, n=5, cutoff=0)) or "nothing")
        )
    return getattr(module, attribute)


def _is_candidate(value: Any) -> bool:
    from gdjax.problem import Problem

    return callable(value) or isinstance(value, Problem)
