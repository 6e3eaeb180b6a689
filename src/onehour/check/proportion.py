"""How one list of numbers follows another."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["ratio"]


def ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """c and the relative rest of the best a ≈ c·b; (0, 1) where b is zero.

    >>> ratio([2.0, 4.0], [1.0, 2.0])
    (2.0, 0.0)
    """
    square = math.fsum(y * y for y in b)
    size = math.sqrt(math.fsum(x * x for x in a))
    if square == 0 or len(a) != len(b):
        return 0.0, 1.0
    c = math.fsum(x * y for x, y in zip(a, b, strict=True)) / square
    rest = math.sqrt(math.fsum((x - c * y) ** 2 for x, y in zip(a, b, strict=True)))
    return c, rest / size if size else 0.0
