"""What the commands' flags share: a parser with one message for bad input, flags from dataclasses' fields, values."""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from onehour.config import SIZES, Recipe
from onehour.execution import Execution
from onehour.messages import nearest
from onehour.recipes import RECIPES
from onehour.rules.minibatch import parse_size

EXIT_PEER_LOST, EXIT_BAD_INPUT, EXIT_NOT_FINITE = 1, 2, 4
OF_THE_DATA = ("samples", "resized")  # what a run reads from its data; only a plan, which has none, is told
WORKERS = (
    "--workers is not a flag, because it means two things. The paper's k workers follow from the minibatch: k = kn / n,"
    " with --minibatch and --per-worker. Processes that load data are --loaders; processes that train are --processes"
)
NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # a number that argparse takes for a flag


class Parser(argparse.ArgumentParser):
    """argparse, with one message of ours in place of usage and message; a hidden command is offered to nobody."""

    def __init__(self, *, hidden: bool = False, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.hidden = hidden
        self.commands: Mapping[str, Parser] = {}

    def add_subparsers(self, **options: Any) -> Any:
        """As argparse's; the commands are known here too."""
        made = super().add_subparsers(**options)
        self.commands = made.choices  # pyright: ignore[reportAttributeAccessIssue]
        return made

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # pyright: ignore
        """As argparse's, but for a command that there is not: argparse would name those that are hidden, too."""
        typed = next((word for word in args or () if not word.startswith("-")), None)
        if self.commands and typed is not None and typed not in self.commands:
            listed = [name for name, parser in self.commands.items() if not parser.hidden]
            self.error(f"no command is called {typed!r}; expected {nearest(typed, listed)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """One message, for `onehour.cli.main` to print."""
        raise ValueError(f"{message}; see `{self.prog} --help`")


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; a ValueError for anything unknown, with the nearest flag or command."""
    arguments = list(arguments)
    if any(argument.split("=")[0] == "--workers" for argument in arguments):
        raise ValueError(WORKERS)
    theirs: list[str] = []
    if arguments[:1] == ["check"] and "--" in arguments:  # argparse would give the script none, and then not know them
        cut = arguments.index("--")
        arguments, theirs = arguments[:cut], arguments[cut + 1 :]
    options, unknown = parser.parse_known_args(_joined(arguments))
    if unknown:
        word = unknown[0].split("=")[0]
        if word.removeprefix("--") in OF_THE_DATA:
            raise ValueError(f"{word} is read from the data; only `onehour plan`, which reads no data, takes it")
        for argument in arguments:
            parser = parser.commands.get(argument, parser)
        flags = list(dict.fromkeys(re.findall(r"--[a-z][\w-]*", parser.format_usage())))
        hint = f"; expected {nearest(word, flags)}" if word.startswith("--") and flags else ""
        raise ValueError(f"unknown argument {unknown[0]!r}{hint}; see `onehour --help`")
    if theirs:
        options.arguments = [*options.arguments, *theirs]
    return options


def _joined(arguments: list[str]) -> list[str]:
    """With each negative number such as -1e-4 joined to its flag, which argparse would take for two flags."""
    joined: list[str] = []
    for argument in arguments:
        if NEGATIVE.fullmatch(argument) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def add_recipe_argument(parser: argparse.ArgumentParser, **options: Any) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help=f"{', '.join(RECIPES)}, or a .toml file", **options)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Whether code that only a file names may be imported."""
    parser.add_argument("--trust", action="store_true", help="import code that only a recipe's file names")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (auto)")


def add_margin(parser: argparse.ArgumentParser) -> None:
    """When a minibatch is as good as the reference, and how often that is looked at."""
    parser.add_argument(
        "--margin",
        type=float,
        metavar="POINTS",
        help="points above the reference that still count as equal (0.5); for a task, in its metric's unit",
    )
    parser.add_argument(
        "--looks",
        type=int,
        default=1,
        metavar="N",
        help="how often you judge while adding seeds: all N err as one would (1)",
    )


def add_recipe_fields(
    parser: argparse.ArgumentParser, several: Collection[str] = (), but: Collection[str] = ()
) -> None:
    """A flag for each field of a recipe, for several sizes of some, but for those that the command does not take."""
    own: dict[str, Any] = {"epochs": {"type": _epochs}}
    own |= {name: {"type": sizes, "metavar": "KN[,KN…]"} for name in several}
    _add_fields(parser, Recipe, own, ("name", "continues", *but))


def add_execution_fields(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """A flag for each field of an `Execution` that says what it is; returns the groups of flags by their titles."""
    kinds = {"processes": auto, "workers_per_pass": auto, "loaders": auto, "save_every": _interval}
    return _add_fields(parser, Execution, {name: {"type": kind} for name, kind in kinds.items()})


def _add_fields(
    parser: argparse.ArgumentParser, of: type[Any], own: dict[str, Any], but: Collection[str] = ()
) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    hints = get_type_hints(of)
    for field in fields(of):
        if field.metadata and field.name not in but:
            title = field.metadata.get("group", "the recipe (default: the recipe's own)")
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            flag, options = f"--{field.name.replace('_', '-')}", _options(field, hints[field.name])
            options |= own.get(field.name, {})
            groups[title].add_argument(flag, dest=field.name, default=argparse.SUPPRESS, **options)
    return groups


def _options(field: Field[Any], hint: Any) -> dict[str, Any]:
    """What argparse is told of a field: what it carries, and a type and a placeholder by its own type."""
    assert field.default is not MISSING
    about = {key: value for key, value in field.metadata.items() if key != "group"}
    about["help"] = about["help"].replace("%", "%%")
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if about.keys() & {"action", "choices"}:
        return about
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction, **about}
    if get_origin(hint) is Literal:
        return {"metavar": "|".join(get_args(hint)), **about}  # the Recipe checks it, and offers the nearest
    if field.name in SIZES:
        return {"type": size, "metavar": "SIZE", **about}
    if get_origin(hint) is tuple:
        return {"type": lambda text: tuple(text.split(",")), "metavar": "E,E,…", **about}
    return {"type": hint, "metavar": hint.__name__.upper(), **about}


def recipe_changes(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's fields that options give."""
    names = {f.name for f in fields(Recipe)} - {"name"}
    return {key: value for key, value in vars(options).items() if key in names}


def auto(text: str) -> int | None:
    """A whole number; None for auto."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected auto or a whole number, got {text!r}") from None


def size(text: str) -> int:
    """A count such as 8k."""
    try:
        return parse_size(text)
    except ValueError as error:  # argparse would replace the text of any other error
        raise argparse.ArgumentTypeError(str(error)) from None


def sizes(text: str) -> tuple[int, ...]:
    return tuple(size(part) for part in text.split(","))


def _epochs(text: str) -> float:
    """Any number such as 1.5, or a count such as 1k."""
    if text.endswith("k"):
        return size(text)
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}") from None


def _interval(text: str) -> int | float:
    """Iterations as a whole number; minutes, which end in m, as a float."""
    if not text.endswith("m"):
        return size(text)
    try:
        return float(text[:-1])
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected iterations, or minutes as 5m, got {text!r}") from None
