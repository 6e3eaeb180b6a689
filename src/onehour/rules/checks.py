"""Refusals of bad arguments in one voice: what, the value received, what was expected."""

from __future__ import annotations

import math
import operator
from typing import Any

__all__ = ["fraction", "not_negative", "positive", "positive_int"]


def positive_int(name: str, value: Any) -> int:
    """`value` as an int if it is a whole number above zero.

    >>> positive_int("samples", 10)
    10
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if number <= 0 or isinstance(value, bool):
        raise ValueError(f"{name} must be above zero, got {value!r}")
    return number


def positive(name: str, value: Any) -> float:
    """`value` if it is a finite number above zero.

    >>> positive("base_lr", 0.1)
    0.1
    """
    if not_negative(name, value) == 0:
        raise ValueError(f"{name} must be above zero, got {value!r}")
    return value


def not_negative(name: str, value: Any) -> float:
    """`value` if it is a finite number of at least zero.

    >>> not_negative("weight_decay", 0)
    0
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and not below zero, got {value!r}")
    return value


def fraction(name: str, value: Any, upper: float) -> float:
    """`value` if it lies in [0, upper).

    >>> fraction("momentum", 0.9, upper=1)
    0.9
    """
    if not_negative(name, value) >= upper:
        raise ValueError(f"{name} must be below {upper}, got {value!r}")
    return value
