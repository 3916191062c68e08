"""A frozen dataclass as a command line, by tyro: a field is an option, and the string below it is its help.

Beside what tyro does, a mistake is a ValueError with the text of one line, nothing is coloured (https://no-color.org),
and there is --version.

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
ValueError: Error parsing --num-epochs: invalid literal for int() with base 10: 'x'; see gd --help
"""

import contextlib
import importlib.metadata
import io
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

STATUSES = "Exit status: 0 done, 1 failure, 2 bad input, 130 interrupted."


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
        ValueError: for arguments that cannot be understood, with the command that lists those that can.
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
    if not given and not isinstance(kinds, type):
        raise ValueError(f"give a command, one of {', '.join(kinds)}; see {prog} --help")
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
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
        try:
            if isinstance(kinds, type):
                return tyro.cli(kinds, **options)
            return tyro.extras.subcommand_cli_from_dict(dict(kinds), **options)
        except SystemExit as end:
            status = end.code
    if status:
        command = f"{prog} {given[0]}" if not isinstance(kinds, type) and given[0] in kinds else prog
        raise ValueError(f"{_one_line(complaint.getvalue())}; see {command} --help")
    print(said.getvalue(), end="")
    sys.exit(0)


def _one_line(box: str) -> str:
    """Return what a box says below its title, up to its first rule or empty line."""
    lines = (re.sub("[│╭╮╰╯─]|-{4,}", "", line).strip() for line in box.splitlines()[1:])
    said = next(group for text, group in itertools.groupby(lines, bool) if text)
    return " ".join(" ".join(said).split()).rstrip(".")
