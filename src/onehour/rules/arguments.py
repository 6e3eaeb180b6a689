"""Refusals of bad arguments in one voice: what, the value received, what was expected."""

from __future__ import annotations

import math
import numbers
from typing import Any


def number(name: str, value: Any) -> int | float:
    """`value` as a plain int or float: of numpy's number, a fraction, or a tensor or an array of shape ()."""
    if type(value) in (int, float):
        return value
    found = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
    if isinstance(found, numbers.Real) and not isinstance(found, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        return int(found) if isinstance(found, numbers.Integral) else float(found)
    raise ValueError(f"{name} must be a number, got {_shown(value)}")


def whole_number(name: str, value: Any) -> int:
    """`value` as an int if it is a whole number; 3.0 is none."""
    if type(value) is int:
        return value
    try:
        found = number(name, value)
    except ValueError:
        found = None
    if not isinstance(found, int):
        raise ValueError(f"{name} must be a whole number, got {_shown(value)}")
    return found


def positive_int(name: str, value: Any) -> int:
    """`value` as an int if it is a whole number above zero."""
    found = whole_number(name, value)
    if found <= 0:
        raise ValueError(f"{name} must be above zero, got {_shown(value)}")
    return found


def positive(name: str, value: Any) -> int | float:
    """`value` as a plain number if it is a finite one above zero."""
    found = not_negative(name, value)
    if found == 0:
        raise ValueError(f"{name} must be above zero, got {_shown(value)}")
    return found


def not_negative(name: str, value: Any) -> int | float:
    """`value` as a plain number if it is a finite one of at least zero."""
    found = number(name, value)
    try:
        finite = math.isfinite(found)
    except OverflowError:  # a whole number that no float holds
        finite = False
    if not finite or found < 0:
        raise ValueError(f"{name} must be finite and not below zero, got {_shown(value)}")
    return found


def fraction(name: str, value: Any, upper: float) -> int | float:
    """`value` as a plain number if it lies in [0, upper)."""
    found = not_negative(name, value)
    if found >= upper:
        raise ValueError(f"{name} must be below {upper}, got {_shown(value)}")
    return found


def _shown(value: Any) -> str:
    """As a message shows it: in one line."""
    return " ".join(repr(value).split())
