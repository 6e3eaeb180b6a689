"""Batches that travel in parts: a batch is divided among all loader processes, and put together on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onehour.data.keyed import Key, Part

__all__ = ["Parts", "whole_batch"]


class Parts:
    """A batch sampler that gives every batch in parts, and remembers how many samples each batch has.

    >>> parts = Parts()
    >>> parts.size = 2
    >>> parts.of([[(0, 5, 0), (0, 3, 1), (0, 4, 2)]])
    >>> [len(part) for part in parts], list(parts.counts)
    ([2, 1], [3])
    """

    def __init__(self) -> None:
        self.size = 1
        """Samples of a part at most."""
        self.of(())

    def of(self, batches: Iterable[list[Key]]) -> None:
        """Give these batches next.

        >>> Parts().of([])
        """
        self.batches, self.counts = batches, deque[int]()

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in self.batches:
            self.counts.append(len(batch))
            for first in range(0, len(batch), self.size):
                yield batch[first : first + self.size]


def whole_batch(parts: Iterator[Any], sizes: Parts, device: torch.device) -> tuple[Tensor, Tensor, list[int]] | None:
    """The next batch, put together on the device; None behind the last one.

    Args:
        parts: what the loader processes made, in order: a `Part`, or a ValueError.
        sizes: knows how many samples belong together.

    Returns:
        Images (N, C, H, W), labels int64 (N,), and the indices of samples that were replaced.

    Raises:
        ValueError: if a sample cannot be read, or a loader process was ended.

    >>> sizes = Parts()
    >>> sizes.counts.append(1)
    >>> part = Part(torch.zeros(1, 3, 4, 4), False, np.array([7]).tobytes(), [])
    >>> whole_batch(iter([part]), sizes, torch.device("cpu"))[1]
    tensor([7])
    """
    images: Tensor | None = None
    labels, skipped, done, count = b"", [], 0, 1
    while done < count:
        part = _next(parts)
        if part is None:
            return None
        if images is None:
            count = sizes.counts.popleft()
            images = _room(count, part, device)
        rows = images[done : done + len(part.images)]
        for to, source in zip(*_planes(rows, part), strict=True):
            to.copy_(source, non_blocking=True)
        labels, done = labels + part.labels, done + len(part.images)
        skipped += part.skipped
    assert images is not None
    numbers = torch.from_numpy(np.frombuffer(bytearray(labels), np.int64))
    return images, numbers.to(device, non_blocking=True), skipped


def _next(parts: Iterator[Any]) -> Part | None:
    """The next part.

    Raises:
        ValueError: if a sample cannot be read, or a loader process was ended.
    """
    try:
        part = next(parts, None)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            f"a process that loads data was ended from outside ({str(error).splitlines()[0].rstrip('.')}), perhaps for"
            " want of memory; use fewer --loaders, or give /dev/shm more room"
        ) from error
    if isinstance(part, ValueError):
        raise part
    return part


def _room(count: int, part: Part, device: torch.device) -> Tensor:
    """An empty (count, C, H, W) on the device: on the CPU as networks want it, on a GPU in the order of the part."""
    shape, kind = part.images.shape[1:], part.images.dtype
    if not part.channels_last:
        return torch.empty((count, *shape), dtype=kind, device=device)
    if device.type == "cpu":
        return torch.empty((count, shape[2], shape[0], shape[1]), dtype=kind)
    return torch.empty((count, *shape), dtype=kind, device=device).permute(0, 3, 1, 2)


def _planes(rows: Tensor, part: Part) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
    """What is copied from where: all at once, or on the CPU plane by plane, where a transpose takes twice as long."""
    if not part.channels_last:
        return [rows], [part.images]
    if rows.device.type == "cpu":
        return rows.unbind(1), part.images.unbind(3)
    return [rows.permute(0, 2, 3, 1)], [part.images]
