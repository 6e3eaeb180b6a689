"""One pass over a loader, and where it is cut if it is long."""

from __future__ import annotations

import time

from torch.utils.data import DataLoader, IterableDataset

from onehour.check.driven import length_of

__all__ = ["SECONDS", "WHOLE", "Pass", "leap"]

WHOLE = 48
"""Batches of a pass that is never cut."""
SECONDS = 3.0
"""A longer pass is not cut either if it ends within this time."""
HEAD_UPDATES, HEAD_BATCHES, EVALUATION_BATCHES = 4, 32, 4


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
        self.ended = False


def leap(*, total: int | None, at: int, taken: int, updates: int | None, seconds: float) -> int | None:
    """The index of the batch to go on with, where a pass is long enough to be cut here; None goes on as it is.

    A training pass is cut between two updates and goes on a whole number of windows later, so that the last windows
    are those that the loop would have come to.

    Args:
        total: batches of the pass.
        at: the index that would come next.
        taken: batches so far.
        updates: so far; None for a pass that trains nothing.
        seconds: so far.

    >>> leap(total=1002, at=16, taken=16, updates=4, seconds=9.0)
    996
    >>> leap(total=40, at=16, taken=16, updates=4, seconds=9.0)
    """
    if total is None or total <= WHOLE or (taken >= 2 and seconds / taken * total < SECONDS):
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
