"""A frozen dataclass as a command line, by tyro: a field is an option, and the string below it is its help.

Beside what tyro does, nothing is coloured (https://no-color.org), and there is --version. What tyro cannot understand
it explains on standard error, and ends with status 2.

>>> import dataclasses
>>> from typing import Literal
>>> @dataclasses.dataclass(frozen=True)
... class Train:
...     num_epochs: int = 3
...     batch_sizes: tuple[int | Literal["full"], ...] | None = None
>>> parse({"train": Train}, prog="gd", description="Descend.", arguments=["train", "--batch-sizes", "1", "full"])
Train(num_epochs=3, batch_sizes=(1, 'full'))
>>> parse(Train, prog="gd", description="Descend.", arguments=["--num-epochs", "x"])
Traceback (most recent call last):
SystemExit: 2
"""

import contextlib
import importlib.metadata
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gdjax.commands._output import say

STATUSES = "Exit status: 0 done, 1 failure, 2 bad input, 130 interrupted."


def called(name: str, *others: str) -> Any:
    """Return what gives an option another name than that of its field, which may not be a word of Python, or more."""
    try:
        from tyro.conf import arg
    except ModuleNotFoundError:  # `parse` says so
        return name
    return arg(name=name, aliases=others)


def parse(
    kinds: Mapping[str, type] | type, *, prog: str, description: str, arguments: Sequence[str] | None = None
) -> Any:
    """Return the dataclass that a command line describes. Fields of a nested dataclass are options like others.

    Args:
        kinds: {name of a command: its dataclass}, or one dataclass where there are no commands.
        prog: name of the program.
        description: what its --help begins with.
        arguments: default those of the process.

    Raises:
        SystemExit: with status 2 for arguments that cannot be understood, and 0 after --help and --version.
        ModuleNotFoundError: where tyro is not installed.
    """
    try:
        import tyro
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the command line needs more packages: pip install 'gdjax[experiments]'") from None
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given == ["--version"]:
        print(f"gdjax {importlib.metadata.version('gdjax')}")
        sys.exit(0)
    options: dict[str, Any] = {
        "prog": prog,
        "description": f"{description}\n\n{STATUSES} --version shows the version.",
        "args": given,
        "config": (
            tyro.conf.DisallowNone,
            tyro.conf.HelptextFromCommentsOff,
            tyro.conf.OmitArgPrefixes,
            tyro.conf.FlagCreatePairsOff,
        ),
    }
    said, complaint = io.StringIO(), io.StringIO()  # no terminals, hence no colours
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
            if isinstance(kinds, type):
                return tyro.cli(kinds, **options)
            return tyro.extras.subcommand_cli_from_dict(dict(kinds), **options)
    except SystemExit as end:
        print(said.getvalue(), end="")
        if end.code:
            say(complaint.getvalue().rstrip())
        raise SystemExit(end.code) from None
