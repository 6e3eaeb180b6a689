"""One pass over a loader, and where it is cut if it is long."""

from __future__ import annotations

import inspect
import linecache
import math
import re
import time
import weakref
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from onehour.check.driven import length_of
from onehour.check.follow import Leaps
from onehour.check.where import is_users

__all__ = ["SECONDS", "UPDATES", "WHOLE", "Pass", "asks_next", "by_hand", "leap"]

WHOLE = 48
"""Batches of a pass that is never cut."""
SECONDS = 3.0
"""A longer pass is not cut either if it ends within this time."""
HEAD_UPDATES, HEAD_BATCHES, EVALUATION_BATCHES = 4, 32, 4
UPDATES, SPARE = 300, 32
"""Updates after which a run is stopped, and how many of them a pass leaves for the ends of the next one."""
_NEXT = re.compile(r"\bnext\b|__next__")


class Pass:
    """One pass over a loader.

    Args:
        loader, number: which loader's, and which of its passes.
        batches: of the loader, if it knows.
        clone: the copy that is iterated.

    >>> import torch
    >>> Pass(0, 0, 2, DataLoader(torch.arange(4), batch_size=2)).samples  # type: ignore[arg-type]
    4
    """

    def __init__(self, loader: int, number: int, batches: int | None, clone: DataLoader) -> None:
        self.loader, self.number, self.batches, self.clone = loader, number, batches, clone
        self.samples = None if isinstance(clone.dataset, IterableDataset) else length_of(clone.dataset)
        self.driven = clone.sampler if clone.batch_sampler is None else clone.batch_sampler
        self.taken = 0
        self.next_index = 0
        self.updates_before = 0
        self.backwards_before = 0
        self.started = time.monotonic()
        self.cut = False
        self.leapt = 0
        self.followed: bool | None = None
        self.by_hand = False
        self.planned: int | None = None
        self.iterator: weakref.ref[Any] | None = None
        self.ended = False

    @property
    def done(self) -> bool:
        """Whether all its batches were taken.

        >>> Pass(0, 0, 2, DataLoader([0, 1])).done  # type: ignore[arg-type]
        False
        """
        return self.ended or self.next_index == self.batches

    @property
    def told(self) -> bool:
        """Whether the loop knows that there is no more: it was told so, or has counted.

        >>> Pass(0, 0, 2, DataLoader([0, 1])).told  # type: ignore[arg-type]
        False
        """
        # Of two loaders asked in turns, the only batch of one may wait for the other's.
        return self.ended or (self.done and self.by_hand and self.batches != 1)

    @property
    def dropped(self) -> bool:
        """Whether the loop has dropped its iterator.

        >>> Pass(0, 0, 2, DataLoader([0, 1])).dropped  # type: ignore[arg-type]
        False
        """
        return self.iterator is not None and self.iterator() is None

    def look(self) -> None:
        """Whether an `enumerate` has followed its leap: known before another pass may leap.

        >>> Pass(0, 0, 2, DataLoader([0, 1])).look()  # type: ignore[arg-type]
        """
        if self.leapt and self.followed is None:
            self.followed = Leaps.followed >= self.leapt


def by_hand(frame: FrameType | None) -> bool:
    """Whether the user's own code asks for a batch with `next`: it may count on as many as `len()` says.

    Args:
        frame: that asks; generators and `__next__` ask for someone else.

    >>> by_hand(None)
    False
    """
    while frame is not None:
        code = frame.f_code
        asks_on = code.co_name == "__next__"
        if not asks_on and is_users(code.co_filename) and asks_next(frame):
            return True
        if not asks_on and not code.co_flags & inspect.CO_GENERATOR:
            return False
        frame = frame.f_back
    return False


def asks_next(frame: FrameType) -> bool:
    """Whether the line that a function comes to asks for a next value itself.

    >>> import sys
    >>> asks_next(sys._getframe())
    False
    """
    return bool(_NEXT.search(linecache.getline(frame.f_code.co_filename, frame.f_lineno)))


def leap(
    *, total: int | None, at: int, taken: int, updates: int | None, seconds: float, left: float = math.inf
) -> int | None:
    """The index of the batch to go on with, where a pass is long enough to be cut here; None goes on as it is.

    A training pass is cut between two updates and goes on a whole number of windows later, so that the last windows
    are those that the loop would have come to.

    Args:
        total: batches of the pass.
        at: the index that would come next.
        taken: batches so far.
        updates: so far; None for a pass that trains nothing.
        seconds: so far.
        left: updates until the run is stopped.

    >>> leap(total=1002, at=16, taken=16, updates=4, seconds=9.0)
    996
    >>> leap(total=40, at=16, taken=16, updates=4, seconds=9.0)
    """
    if total is None or total <= WHOLE:
        return None
    fits = updates is None or not taken or (total - at) * updates / taken <= left - SPARE
    if fits and taken >= 2 and seconds / taken * total < SECONDS:
        return None
    if updates is None:
        return total - 2 if taken >= EVALUATION_BATCHES and total - 2 > at else None
    window = max(round(taken / updates), 1) if updates else 0
    enough = updates >= HEAD_UPDATES or (updates >= 2 and taken >= HEAD_BATCHES)
    if not enough or taken % window:
        return None
    rest = total - at
    kept = rest % window + window if rest % window else 2 * window
    return total - kept if rest > kept else None
