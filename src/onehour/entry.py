"""Anyone's model, data, optimizer or logger by name: package.module:function, where a person has asked for it.

A name that a person types is asked for. One that is read from a file, which may have come from anywhere, is not: the
person types it too, or says that the file is trusted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import PathFinder, all_suffixes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onehour.config import Recipe
from onehour.messages import blame, nearest
from onehour.sidefile import Read

LIBRARIES = ("timm", "torchvision")
"""Before the colon of a model's name: where the model comes from, which is no code of the name's own."""


def is_entry(spec: str) -> bool:
    """Whether `spec` has the form package.module:name.

    >>> is_entry("my.models:net"), is_entry("digits")
    (True, False)
    """
    module, colon, name = spec.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def asked_for(recipe: Recipe, *, trust: bool, uses: Collection[str] | None = None) -> Recipe:
    """A recipe, once a person has asked for all code that it names; nothing is imported here.

    Args:
        recipe: with what was typed in place of what its file holds.
        uses: fields that are needed; None for all.

    Returns:
        The recipe, and with `trust` one whose texts count as typed.
    """
    read = {name: value for name, value in recipe.as_dict().items() if isinstance(value, Read)}
    if trust:
        return recipe.replace(**{name: str(value) for name, value in read.items()})
    wanted = {name: value for name, value in read.items() if uses is None or name in uses}
    _refuse({name: value for name, value in wanted.items() if _is_code(name, value)})
    return recipe


def names_code(recipe: Recipe) -> bool:
    """Whether a recipe, read from a file, would be refused unless that is trusted.

    >>> names_code(Recipe(model="mine:net")), names_code(Recipe(model="timm:vit_tiny"))
    (True, False)
    """
    return any(isinstance(value, str) and _is_code(name, value) for name, value in recipe.as_dict().items())


def make_importable() -> None:
    """Let modules of the current folder be imported, as in a script."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def resolve(what: str, spec: str) -> Any:
    """The object that `spec` names; the current folder is importable, as for a script.

    Args:
        what: what it is for, to say so in a message, e.g. "model".
    """
    if isinstance(spec, Read):
        _refuse({what: spec})
    module_name, _, name = spec.partition(":")
    make_importable()
    try:
        with _usage_unsaid():
            found: Any = importlib.import_module(module_name)
    except SystemExit as error:
        raise ValueError(
            f"{what} {spec}: {module_name} parses arguments or exits Python while it is imported: {blame(error)}; put"
            ' what it does as a script under `if __name__ == "__main__":`'
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of any class that its author likes
        raise ValueError(f"{what} {spec}: {module_name} cannot be imported: {blame(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            offered = [name for name in dir(found) if not name.startswith("_")]
            raise ValueError(f"{what} {spec}: {module_name} has no {part!r}; expected {nearest(part, offered)}")
        found = getattr(found, part)
    return found


@contextmanager
def _usage_unsaid() -> Iterator[None]:
    """A module whose argparse finds our command's arguments would print its own usage before it leaves."""
    parser = argparse.ArgumentParser
    printed = {name: getattr(parser, name) for name in ("print_usage", "print_help", "exit")}
    parser.print_usage = parser.print_help = lambda self, file=None: None
    parser.exit = lambda self, status=0, message=None: sys.exit(status)
    try:
        yield
    finally:
        for name, method in printed.items():
            setattr(parser, name, method)


def _is_code(field: str, value: str) -> bool:
    return is_entry(value) and field != "init" and not (field == "model" and value.partition(":")[0] in LIBRARIES)


def _refuse(names: Mapping[str, Read]) -> None:
    if not names:
        return
    code = "; ".join(f"{what} {spec} ({_place(spec)})" for what, spec in names.items())
    flags = " ".join(f"--{what.replace('_', '-')} {spec}" for what, spec in names.items())
    file = next(iter(names.values())).file
    raise ValueError(
        f"{file} names code, which would run: {code}. You did not type these names, so nothing was imported; type them"
        f" ({flags}), or give --trust (trust=True from Python) if you trust that file"
    )


def _place(spec: str) -> str:
    """The file that an import would read. Python itself would import the packages above a module to find it."""
    top, *rest = spec.partition(":")[0].split(".")
    here = os.getcwd()
    try:
        found = PathFinder.find_spec(top, sys.path if here in sys.path else [here, *sys.path]) or find_spec(top)
    except (ImportError, ValueError):
        found = None
    if found is None:
        return f"no module {top} is found"
    above = list(found.submodule_search_locations or [])
    for place in above if rest else ():
        for end in ("/__init__.py", *all_suffixes()):
            if (file := Path(place, *rest[:-1], f"{rest[-1]}{end}")).is_file():
                return str(file)
    return found.origin or above[0]
