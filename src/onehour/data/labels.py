"""A label as data sets give it, as the whole number that it is."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from typing import Any, cast

import numpy as np
import torch

__all__ = ["as_label", "as_labels"]


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
            return int(cast(float, found))
        raise ValueError(f"the label {found} is no whole number")
    raise ValueError(f"the label is {_kind(found)} ({reprlib.repr(found)}); expected one whole number")


def as_labels(labels: torch.Tensor) -> torch.Tensor:
    """The same for a tensor of N labels: itself where it is one of whole numbers (N,), else int64 (N,).

    Raises:
        ValueError: for another shape, or the first that is no whole number.

    >>> as_labels(torch.tensor([[2.0], [0.0]]))
    tensor([2, 0])
    >>> as_labels(torch.tensor([2.0, 0.5]))
    Traceback (most recent call last):
    ValueError: label 1 is 0.5, no whole number
    """
    if labels.ndim != 1 and tuple(labels.shape) != (len(labels), 1):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected one whole number a sample, such as argmax(1) of one-hot"
        )
    flat = labels.detach().reshape(-1)
    if flat.is_complex():
        raise ValueError(f"labels are {flat.dtype}; expected whole numbers")
    if flat.is_floating_point():
        broken = (~(flat == flat.floor()) | flat.isinf()).nonzero()
        if len(broken):
            first = int(broken[0])
            raise ValueError(f"label {first} is {flat[first].item():g}, no whole number")
    plain = labels.ndim == 1 and labels.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    return labels if plain else flat.long()


def _kind(value: Any) -> str:
    """What a message calls a value: its type, with "a" or "an"; None is itself."""
    if value is None:
        return "nothing"
    name = "tensor" if isinstance(value, torch.Tensor) else "array" if isinstance(value, np.ndarray) else None
    name = name or type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
