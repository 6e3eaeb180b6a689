"""The user's variables, read line by line for a little while: what number does the loop make of an evaluation?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch

from onehour.check.expressions import quotients
from onehour.check.where import is_users

__all__ = ["Reading"]

LINES, CALLS = 80, 300_000
"""Lines of the user's code that are read, and calls of anyone's that are waited through."""


class Reading:
    """Traces the user's functions; a debugger or a coverage tool that does the same is left alone.

    Args:
        tell: called with the name and value of each number that is new, and its file:line.

    >>> seen = []
    >>> reading = Reading(lambda name, value, place: seen.append(value))
    >>> reading.start([])
    >>> reading.stop()
    >>> seen
    []
    """

    def __init__(self, tell: Callable[[str, float, str], Any]) -> None:
        self.tell = tell
        self._known: dict[str, float] = {}
        self._before: dict[CodeType, int] = {}
        """The line that each function was at; what is new was set there."""
        self._lines = self._calls = 0

    def start(self, frames: list[FrameType]) -> None:
        """Read on in these functions, and in those that are called from now on.

        Args:
            frames: what is known in them already is not told.
        """
        if sys.gettrace() is not None:
            return
        self._known = {}
        self._before = {frame.f_code: frame.f_lineno for frame in frames}
        for frame in frames:
            self._known |= _numbers(frame)
            frame.f_trace = self._line
        self._lines, self._calls = LINES, CALLS
        sys.settrace(self._call)

    def stop(self) -> None:
        """Read no further."""
        if self._lines:
            self._lines = 0
            sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._calls -= 1
        self._before.pop(frame.f_code, None)
        if self._calls <= 0:
            self.stop()
        return self._line if self._lines and is_users(frame.f_code.co_filename) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event in ("line", "return") and self._lines:
            self._lines -= 1
            self._look(frame, argument if event == "return" else None)
            if not self._lines:
                sys.settrace(None)
        return self._line if self._lines else None

    def _look(self, frame: FrameType, returned: Any) -> None:
        line = frame.f_lineno
        before, self._before[frame.f_code] = self._before.get(frame.f_code, line), line
        try:
            variables = _numbers(frame)
            numbers = variables | {f"line {line} {i}": value for i, value in enumerate(quotients(frame))}
            for index, value in enumerate(returned if isinstance(returned, tuple) else (returned,)):
                number = _number(value)
                if number is not None:
                    numbers[f"{frame.f_code.co_name}() {index}"] = number
        except Exception:  # a variable that cannot be looked at
            return
        for name, value in numbers.items():
            if self._known.get(name) != value:
                self._known[name] = value
                self.tell(name, value, f"{frame.f_code.co_filename}:{before if name in variables else line}")


def _numbers(frame: FrameType) -> dict[str, float]:
    """The numbers among a function's variables, and in its objects of the user's own classes."""
    found: dict[str, float] = {}
    for name, value in list(frame.f_locals.items())[:500]:
        number = _number(value)
        if number is not None:
            found[f"{frame.f_code.co_name}:{name}"] = number
        elif _is_users_object(value):
            for key, inner in list(vars(value).items())[:50]:
                number = _number(inner)
                if number is not None:
                    found[f"{frame.f_code.co_name}:{name}.{key}"] = number
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, float):
        return value
    if torch.is_tensor(value) and value.ndim == 0 and value.is_floating_point() and value.device.type != "meta":
        return float(value.detach())
    return None


def _is_users_object(value: Any) -> bool:
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    path = getattr(sys.modules.get(type(value).__module__), "__file__", None)
    return bool(path) and is_users(str(path))
