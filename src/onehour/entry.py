"""Anyone's model, data or logger by name: package.module:function."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from onehour.config import nearest

__all__ = ["blame", "is_entry", "resolve"]


NOBODYS = ("argparse.py", "<frozen runpy>")
"""Files that say nothing of whose code an error comes from."""


def is_entry(spec: str) -> bool:
    """Whether `spec` has the form package.module:name.

    >>> is_entry("my.models:net"), is_entry("digits")
    (True, False)
    """
    module, colon, name = spec.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def resolve(what: str, spec: str) -> Any:
    """The object that `spec` names; the current folder is importable, as for a script.

    Args:
        what: what it is for, to say so in a message, e.g. "model".
        spec: package.module:name.

    Raises:
        ValueError: if the module or the name cannot be found, or importing fails.

    >>> resolve("model", "math:sqrt")(4)
    2.0
    """
    module_name, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with _usage_unsaid():
            found: Any = importlib.import_module(module_name)
    except SystemExit as error:
        raise ValueError(
            f"{what} {spec}: {module_name} parses arguments or leaves Python while it is imported: {blame(error)}; put"
            ' what it does as a script under `if __name__ == "__main__":`'
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of any class that its author likes
        raise ValueError(f"{what} {spec}: {module_name} cannot be imported: {blame(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{what} {spec}: {module_name} has no {part!r}; expected {nearest(part, dir(found))}")
        found = getattr(found, part)
    return found


@contextmanager
def _usage_unsaid() -> Iterator[None]:
    """A module whose argparse finds our command's arguments would print its own usage before it leaves."""
    printed = argparse.ArgumentParser._print_message
    argparse.ArgumentParser._print_message = lambda self, message, file=None: None
    try:
        yield
    finally:
        argparse.ArgumentParser._print_message = printed


def blame(error: BaseException) -> str:
    """An error of someone's code in one line: its type, its text and the line it comes from.

    >>> try: 1 / 0
    ... except ZeroDivisionError as error: blame(error).split(" (")[0]
    'ZeroDivisionError: division by zero'
    """
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.endswith(NOBODYS) and "importlib" not in frame.filename]
    where = f" ({outside[-1].filename}:{outside[-1].lineno})" if outside else ""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}{where}"
