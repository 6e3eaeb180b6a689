"""Anyone's model, data or logger by name: package.module:function."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

from onehour.config import nearest

__all__ = ["blame", "is_entry", "make_importable", "resolve"]


def is_entry(spec: str) -> bool:
    """Whether `spec` has the form package.module:name.

    >>> is_entry("my.models:net"), is_entry("digits")
    (True, False)
    """
    module, colon, name = spec.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def make_importable() -> None:
    """Let modules of the current folder be imported, as in a script.

    >>> make_importable()
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


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
    make_importable()
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"{what} {spec}: {module_name} cannot be imported: {blame(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{what} {spec}: {module_name} has no {part!r}; expected {nearest(part, dir(found))}")
        found = getattr(found, part)
    return found


def blame(error: BaseException) -> str:
    """An error of someone's code in one line: its type, its text and the line it comes from.

    >>> try: 1 / 0
    ... except ZeroDivisionError as error: blame(error).split(" (")[0]
    'ZeroDivisionError: division by zero'
    """
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if "importlib" not in frame.filename]
    where = f" ({outside[-1].filename}:{outside[-1].lineno})" if outside else ""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}{where}"
