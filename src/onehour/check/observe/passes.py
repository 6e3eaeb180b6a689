"""One pass over a loader, and where it is cut if it is long.

Of a pass that is cut the first windows and the last ones are taken, what lies between is left out. `len()` of the
loader stays true, and an `enumerate` around it goes on with the true index.
"""

from __future__ import annotations

import builtins
import itertools
import math
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from onehour.check.observe.recorder import TapeRecorder, nothing

_COUNTED = builtins.enumerate


class LeftOut:
    """How many batches were left out so far, and whether an `enumerate` has noticed."""

    total = 0
    followed = 0


def following_enumerate(iterable: Any, start: int = 0) -> Any:
    """As `enumerate`, plus what the loader below left out; the real one for what is never cut."""
    if hasattr(iterable, "__getitem__"):
        return _COUNTED(iterable, start)
    left_out = 0

    def numbered(before: int, value: Any, number: int) -> tuple[int, Any]:
        nonlocal left_out
        if LeftOut.total != before:
            left_out += LeftOut.total - before
            LeftOut.followed = LeftOut.total
        return number + left_out, value

    befores = iter(lambda: LeftOut.total, None)  # each is read before its value is asked for
    return map(numbered, befores, iterable, itertools.count(start))


INDICES = 20_000_000  # of a sampler without a length; one that has more may be endless


class EnumeratedSampler:
    """The batches of indices, or the indices, that a sampler gives, drawn all at once as the first is asked for.

    Nothing else draws random numbers in between, so that the order is the one that the loop would have had.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.drawn: Callable[..., Any] = nothing  # told the whole order, or None if it has no end
        self.choose: Callable[[int], int] = lambda at: at  # which batch comes after so many

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self.sampler)
        order, endless = _drawn(iterator, length_of(self.sampler))
        self.drawn(None if endless else order)
        at = 0
        while at < len(order):
            at = at if endless else self.choose(at)
            yield order[at]
            at += 1
        yield from iterator

    def __len__(self) -> int:
        return len(self.sampler)


def _drawn(iterator: Iterator[Any], length: int | None) -> tuple[list[Any], bool]:
    """All batches, as far as the sampler's length goes, and whether there may be no end to them."""
    order, indices = [], 0
    for batch in iterator:
        order.append(batch)
        indices += len(batch) if isinstance(batch, list | tuple) else 1
        if length is not None and len(order) >= length:
            return order, False
        if indices > INDICES:
            return order, True
    return order, False


def enumerated(loader: DataLoader) -> DataLoader:
    """The same loader with a `EnumeratedSampler` sampler of its own; one of an IterableDataset has none, and stays."""
    copied = object.__new__(type(loader))
    vars(copied).update(vars(loader))
    if not isinstance(loader.dataset, IterableDataset):
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        vars(copied)[name] = EnumeratedSampler(vars(loader)[name])
    return copied


def length_of(thing: Any) -> int | None:
    try:
        return len(thing)
    except (TypeError, NotImplementedError):  # users' samplers and data sets say it in either way
        return None


WHOLE = 48  # batches of a pass that is never cut
UNCUT_SECONDS = 3.0  # a longer pass is not cut either if it ends within this time of the CPU
HEAD_UPDATES, HEAD_BATCHES, EVALUATION_BATCHES = 4, 32, 4
MOST_UPDATES, SPARE = 300, 32
"""Updates after which a run is stopped, and how many of them a pass leaves for the ends of the next one."""


class Pass:
    """A pass over a loader, by both numbers, of as many batches as the loader knows of; `clone` is iterated."""

    def __init__(
        self, recorder: TapeRecorder, loader: int, number: int, batches: int | None, clone: DataLoader
    ) -> None:
        self.recorder, self.loader, self.number, self.batches = recorder, loader, number, batches
        self.clone: Any = clone
        self.samples = None if isinstance(clone.dataset, IterableDataset) else length_of(clone.dataset)
        self.sampler: Any = clone.sampler if clone.batch_sampler is None else clone.batch_sampler
        self.taken = self.next_index = self.left_out = 0
        self.updates_before, self.backwards_before = recorder.updates, recorder.backwards
        self.started = time.process_time()
        self.cut = self.by_hand = self.ended = False
        self.followed: bool | None = None
        self.planned: int | None = None
        self.iterator: weakref.ref[Any] | None = None

    @property
    def done(self) -> bool:
        """Whether all its batches were taken."""
        return self.ended or self.next_index == self.batches

    @property
    def trains(self) -> bool:
        """Whether there was a backward pass since it began."""
        return self.recorder.backwards > self.backwards_before

    @property
    def told(self) -> bool:
        """Whether the loop knows that there is no more: it was told so, or has counted."""
        # Of two loaders asked in turns, the only batch of one may wait for the other's.
        return self.ended or (self.done and self.by_hand and self.batches != 1)

    @property
    def dropped(self) -> bool:
        """Whether the loop has dropped its iterator."""
        return self.iterator is not None and self.iterator() is None

    @property
    def may_be_cut(self) -> bool:
        return self.recorder.cut and not self.recorder.finished and not self.by_hand

    def look(self) -> None:
        """Whether an `enumerate` has followed its cut: known before another pass may be cut."""
        if self.left_out and self.followed is None:
            self.followed = LeftOut.followed >= self.left_out

    def choose(self, at: int) -> int:
        """The index of the batch that follows: the next, or where a cut pass goes on."""
        if not self.may_be_cut or self.cut:
            return at
        target = cut_to(
            total=self.batches,
            at=at,
            taken=self.taken,
            updates=self.recorder.updates - self.updates_before if self.trains else None,
            seconds=time.process_time() - self.started,
            left=MOST_UPDATES - self.recorder.updates,
        )
        if target is None:
            return at
        LeftOut.total += target - at
        self.cut, self.left_out, self.next_index = True, LeftOut.total, target
        return target

    def over(self) -> bool:
        """Whether a pass without a sampler, of an IterableDataset, ends here."""
        if not self.may_be_cut or isinstance(self.sampler, EnumeratedSampler):
            return False
        long = self.taken >= WHOLE and time.process_time() - self.started > UNCUT_SECONDS
        self.cut = self.cut or long
        return long


def cut_to(
    *, total: int | None, at: int, taken: int, updates: int | None, seconds: float, left: float = math.inf
) -> int | None:
    """The index of the batch to go on with, where a pass is long enough to be cut here; None goes on as it is.

    A training pass is cut between two updates and goes on a whole number of windows later, so that the last windows
    are those that the loop would have come to. Of `total` batches so many were `taken`, and `at` would come next;
    `updates` is None for a pass that trains nothing; the seconds are of the CPU; after `left` updates more the run is
    stopped.
    """
    if total is None or total <= WHOLE:
        return None
    fits = updates is None or not taken or (total - at) * updates / taken <= left - SPARE
    if fits and taken >= 2 and seconds / taken * total < UNCUT_SECONDS:
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
