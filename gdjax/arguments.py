"""A frozen dataclass as a command line: a field is an option, and the string below it is its help.

>>> @dataclasses.dataclass(frozen=True)
... class Train:
...     num_epochs: int = 3
...     batch_sizes: tuple[int | Literal["full"], ...] | None = None
>>> parse({"train": Train}, prog="gd", description="Descend.", arguments=["train", "--batch-sizes", "1", "full"])
Train(num_epochs=3, batch_sizes=(1, 'full'))
>>> parse(Train, prog="gd", description="Descend.", arguments=["--num-epoch", "4"])
Traceback (most recent call last):
ValueError: unrecognized arguments: --num-epoch 4 (did you mean --num-epochs?); see gd --help
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import shutil
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

import gdjax

STATUSES = "exit status: 0 done, 1 failure, 2 bad input, 130 interrupted"


def parse(
    kinds: Mapping[str, type] | type, *, prog: str, description: str, arguments: Sequence[str] | None = None
) -> Any:
    """Return the dataclass that a command line describes.

    Fields are bool (false unless given), int, float, str or Path, one of these or words (`int | Literal["full"]`),
    tuples of such, each with None where it need not be given, and dataclasses, whose fields become options as well.

    Args:
        kinds: {name of a command: its dataclass}, or one dataclass where there are no commands.
        prog: name of the program.
        description: what its --help begins with.
        arguments: default those of the process.

    Raises:
        ValueError: for arguments that cannot be understood, with the command that lists those that can.
    """
    parser = _Parser(prog=prog, description=description, epilog=STATUSES)
    parser.add_argument(
        "--version", action="version", version=f"gdjax {gdjax.__version__}", help="show the version and exit"
    )
    if isinstance(kinds, type):
        _add(parser, kinds)
        return _build(kinds, vars(parser.parse_args(arguments)))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, kind in kinds.items():
        text = inspect.getdoc(kind) or ""
        filled = [textwrap.fill(part, shutil.get_terminal_size().columns - 2) for part in text.split("\n\n")]
        command = commands.add_parser(
            name, help=text.split("\n\n")[0], description="\n\n".join(filled), epilog=STATUSES
        )
        _add(command, kind)
    found = vars(parser.parse_args(arguments))
    return _build(kinds[found["command"]], found)


class _Parser(argparse.ArgumentParser):
    """One that raises, and in whose help paragraphs stay paragraphs."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Refuse what is unknown here, where the command is known that it was given to."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _add(parser: argparse.ArgumentParser, kind: type, group: Any = None) -> None:
    """Add an option for every field, and a group of them for a field that is itself a dataclass."""
    hints, texts = typing.get_type_hints(kind), _texts(kind)
    for field in dataclasses.fields(kind):
        hint, text = hints[field.name], texts.get(field.name, "")
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            _add(parser, hint, parser.add_argument_group(f"{field.name} options"))
            continue
        options: dict[str, Any] = {"dest": field.name, "default": field.default}
        if hint is bool:
            options |= {"action": "store_true"}
        else:
            options |= _reader(hint)
        if field.default is dataclasses.MISSING:
            options |= {"required": True}
        elif field.default is not None and field.default is not False:
            shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            text += f" Default: {shown}."
        (group or parser).add_argument(
            f"--{field.name.replace('_', '-')}", help=text.strip().replace("%", "%%"), **options
        )


def _reader(hint: Any) -> dict[str, Any]:
    """Return how argparse reads values of this type."""

    def members(hint: Any) -> list[Any]:
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        return [part for part in typing.get_args(hint) if part is not types.NoneType] if union else [hint]

    parts = members(hint)
    several = typing.get_origin(parts[0]) is tuple
    if several:
        parts = members(typing.get_args(parts[0])[0])
    words = [word for part in parts if typing.get_origin(part) is Literal for word in typing.get_args(part)]
    [kind] = [part for part in parts if typing.get_origin(part) is not Literal]
    metavar = "|".join([kind.__name__.upper(), *words])

    def read(text: str) -> Any:
        try:
            return text if text in words else kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {metavar}") from None

    return {"type": read, "metavar": metavar} | ({"nargs": "+"} if several else {})


def _build(kind: type, found: Mapping[str, Any]) -> Any:
    values = {}
    for name, hint in typing.get_type_hints(kind).items():
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        value = _build(hint, found) if nested else found[name]
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _texts(kind: type) -> dict[str, str]:
    """Return {field: the string below it}, which Python itself does not keep; empty where there is no source."""
    try:
        [parsed] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except OSError:
        return {}
    texts = {}
    for field, below in itertools.pairwise(getattr(parsed, "body", [])):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = " ".join(text.split())
    return texts
