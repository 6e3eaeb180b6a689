"""A loader whose sampler was enumerated in full: the same batches in the same order, or some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

__all__ = ["Driven", "alone", "driven", "length_of"]

INDICES = 20_000_000
"""Of a sampler without a length; one that has more may be endless."""


class Driven:
    """The batches of indices that a sampler gives, drawn all at once as the first is asked for.

    Nothing else draws random numbers in between, so that the order is the one that the loop would have had.

    Args:
        sampler: gives batches of indices, or indices.

    >>> sampler = Driven([[0, 1], [2, 3], [4]])
    >>> sampler.choose = lambda order, at: 2 if at == 1 else at
    >>> list(sampler), len(sampler)
    ([[0, 1], [4]], 3)
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.drawn: Callable[[list[Any] | None], Any] = lambda order: None
        """Told the whole order, or None if it has no end."""
        self.choose: Callable[[list[Any], int], int] = lambda order, at: at
        """Which batch comes after so many."""

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self.sampler)
        order, endless = _drawn(iterator, length_of(self.sampler))
        self.drawn(None if endless else order)
        at = 0
        while at < len(order):
            at = at if endless else self.choose(order, at)
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


def driven(loader: DataLoader) -> DataLoader:
    """The same loader with a `Driven` sampler of its own; one of an IterableDataset has none, and stays.

    >>> import torch
    >>> loader = DataLoader(torch.arange(4), batch_size=2)  # type: ignore[arg-type]
    >>> [batch.tolist() for batch in driven(loader)]
    [[0, 1], [2, 3]]
    """
    copied = object.__new__(type(loader))
    vars(copied).update(vars(loader))
    if not isinstance(loader.dataset, IterableDataset):
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        vars(copied)[name] = Driven(vars(loader)[name])
    return copied


def alone(loader: DataLoader) -> None:
    """Take a copied loader's own processes away: its batches stay the same, and none of them waits.

    >>> import torch
    >>> loader = driven(DataLoader(torch.arange(4), batch_size=2, num_workers=1))  # type: ignore[arg-type]
    >>> alone(loader)
    >>> loader.num_workers
    0
    """
    vars(loader).update(num_workers=0, timeout=0, prefetch_factor=None, persistent_workers=False, _iterator=None)
    vars(loader)["_DataLoader__multiprocessing_context"] = None


def length_of(thing: Any) -> int | None:
    """Its length, if it has one.

    >>> length_of([1, 2]), length_of(iter([]))
    (2, None)
    """
    try:
        return len(thing)
    except (TypeError, NotImplementedError):  # users' samplers and data sets say it in either way
        return None
