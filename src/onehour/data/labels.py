"""A label as data sets give it, as the whole number that it is."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from typing import Any

import numpy as np
import torch

__all__ = ["as_label"]


def as_label(value: Any) -> int:
    """The whole number that a label is, whatever holds it; whether there is such a class is not looked at.

    Args:
        value: an int, a bool, a numpy number, a float without a fraction, or a tensor or an array of shape () or (1,)
            that holds one.

    Raises:
        ValueError: for anything else, with what it is.

    >>> as_label(3), as_label(np.uint8(3)), as_label(np.array([3])), as_label(torch.tensor(3.0))
    (3, 3, 3, 3)
    >>> as_label(2.7)
    Traceback (most recent call last):
    ValueError: the label 2.7 is no whole number
    """
    if type(value) is int:
        return value
    found: Any = value
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        if tuple(value.shape) not in ((), (1,)):
            raise ValueError(
                f"the label is {_kind(value)} of shape {tuple(value.shape)}; expected one whole number"
                + (", such as its argmax where it is one-hot" if value.ndim == 1 else "")
            )
        found = value.item()
    try:
        return operator.index(found)
    except TypeError:
        pass
    if isinstance(found, numbers.Number):
        if isinstance(found, numbers.Real) and math.isfinite(found) and found == math.floor(found):
            return int(math.floor(found))
        raise ValueError(f"the label {found} is no whole number")
    raise ValueError(f"the label is {_kind(found)} ({reprlib.repr(found)}); expected one whole number")


def _kind(value: Any) -> str:
    """What a message calls a value: its type, with "a" or "an"; None is itself."""
    if value is None:
        return "nothing"
    name = "tensor" if isinstance(value, torch.Tensor) else "array" if isinstance(value, np.ndarray) else None
    name = name or type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
