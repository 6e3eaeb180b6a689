"""JSON and TOML files that others may have touched: what they should be, or a ValueError with one message.

It names the file, its line where it has many, and what was expected.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Self, cast

Holds = Callable[[Any], bool]
Kind = tuple[str, Holds]
"""What a value should be, in words, and whether it is."""


class Read(str):
    """A text that was read from a file, which it remembers: nobody has typed it."""

    def __new__(cls, text: str, file: Path | None = None) -> Self:
        made = super().__new__(cls, text)
        made.file = file
        return made

    file: Path | None

    @classmethod
    def every(cls, values: dict[str, Any], file: Path) -> dict[str, Any]:
        """Values of a file, with their texts marked."""
        return {name: cls(value, file) if isinstance(value, str) else value for name, value in values.items()}


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return type(value) is int and abs(value) < 2**63


def is_list(holds: Holds, length: int | None = None) -> Holds:
    """A check for a list of what `holds` is true of, of that length."""

    def check(value: Any) -> bool:
        items = cast("list[Any]", value)
        return isinstance(value, list) and (length is None or len(items) == length) and all(map(holds, items))

    return check


def is_object(holds: Holds = lambda value: True, names: Collection[str] | None = None) -> Holds:
    """A check for an object of what `holds` is true of, with those names and no others."""

    def check(value: Any) -> bool:
        content = cast("dict[str, Any]", value)
        named = isinstance(value, dict) and (names is None or content.keys() == set(names))
        return named and all(map(holds, content.values()))

    return check


NUMBER: Kind = ("a number", _is_number)
NUMBER_OR_NONE: Kind = ("a number or null", lambda value: value is None or _is_number(value))
PERCENT: Kind = ("a number from 0 to 100", lambda value: _is_number(value) and 0 <= value <= 100)
COUNT: Kind = ("a whole number", lambda value: type(value) is int and 0 <= value < 2**63)
FLAG: Kind = ("true or false", lambda value: isinstance(value, bool))
TEXT: Kind = ("text", lambda value: isinstance(value, str))
TEXT_OR_NONE: Kind = ("text or null", lambda value: value is None or isinstance(value, str))


def read_text(path: Path) -> str:
    """A file's text, with or without the mark that some editors put before UTF-8."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe, say, which would be waited for
        raise ValueError(f"{path} is not a plain file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}; save it as UTF-8"
        ) from error


def object_of(text: str | bytes, kinds: Mapping[str, Kind], needs: Collection[str] = ()) -> dict[str, Any]:
    """A JSON text's object.

    Args:
        kinds: of its values, where they are there; others are not looked at.
        needs: keys that must be there.
    """
    try:
        found = json.loads(text, object_pairs_hook=_once)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {_short(found)}; expected an object, {{…}}")
        content = cast("dict[str, Any]", found)
        for name, (expected, holds) in kinds.items():
            if name in content and not holds(content[name]):
                raise ValueError(f"{name} is {_short(content[name])}; expected {expected}")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    for name in needs:
        if name not in content:
            raise ValueError(f"it has no {name!r}")
    return content


def read_object(path: Path, kinds: Mapping[str, Kind], needs: Collection[str] = ()) -> dict[str, Any]:
    """The object in a JSON file; arguments as of `object_of`."""
    text = read_text(path)
    try:
        return object_of(text, kinds, needs)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_lines(
    path: Path, kinds: Mapping[str, Kind], needs: Collection[str] = (), *, head: Collection[str] = ()
) -> list[dict[str, Any]]:
    """The objects in a file that has one a line; a line without its end was being written, and is left out.

    Args:
        kinds, needs: as of `object_of`.
        head: what the first line must have instead.

    Returns:
        None of them where there is no file.
    """
    if not path.exists():
        return []
    text = read_text(path)
    found: list[dict[str, Any]] = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], 1):
        first = bool(head) and number == 1
        try:
            found.append(object_of(line, {} if first else kinds, head if first else needs))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: line {number}: {error}") from error
    return found


def read_toml(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError names line and column
        raise ValueError(f"{path}: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
