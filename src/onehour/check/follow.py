"""`enumerate` that follows a cut: when an observed loader leaps over batches, the user's index leaps with it."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

__all__ = ["Leaps", "following"]

_COUNTED = builtins.enumerate


class Leaps:
    """How many batches were left out so far, and whether an `enumerate` has noticed.

    >>> Leaps.followed <= Leaps.total
    True
    """

    total = 0
    followed = 0


class _Following:
    """As `enumerate`, plus what the loader below left out."""

    def __init__(self, iterable: Any, start: int = 0) -> None:
        self._iterator, self._index = iter(iterable), start

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self

    def __next__(self) -> tuple[int, Any]:
        before = Leaps.total
        value = next(self._iterator)
        if Leaps.total != before:
            self._index += Leaps.total - before
            Leaps.followed = Leaps.total
        index = self._index
        self._index += 1
        return index, value


def following(iterable: Any, start: int = 0) -> Any:
    """In place of `enumerate`: the real one for what can leap nowhere.

    >>> list(following("ab", 1)), type(following([1])).__name__
    ([(1, 'a'), (2, 'b')], 'enumerate')
    """
    if hasattr(iterable, "__getitem__"):
        return _COUNTED(iterable, start)
    return _Following(iterable, start)
