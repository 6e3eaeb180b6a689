"""Batches that are made in parts: a batch is divided among all loader processes, and put together on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from onehour.data.keyed import Part
from onehour.data.slots import Layout

__all__ = ["divided", "part_size", "whole_batch"]


SMALLEST = 8
"""Samples that a loader process makes at a time, at least: a batch is divided among all, so that it is there soon."""
PART_BYTES = 5 * 2**20
"""And at most: about 34 of ImageNet's crops."""


def part_size(samples: int, *, loaders: int, image_bytes: int) -> int:
    """How many samples a loader process makes at a time, of a batch of so many.

    >>> part_size(256, loaders=4, image_bytes=72), part_size(256, loaders=4, image_bytes=3 * 224 * 224)
    (64, 34)
    """
    if loaders == 0:
        return samples
    return max(min(-(-samples // loaders), PART_BYTES // image_bytes), SMALLEST)


def divided(batches: Iterable[np.ndarray], size: int, counts: deque[int]) -> Iterator[np.ndarray]:
    """Every batch's keys in parts of `size`, the last one smaller; `counts` learns how many each batch has.

    >>> counts = deque()
    >>> [part.tolist() for part in divided([np.array([[0, 5, 0], [0, 3, 1], [0, 4, 2]])], 2, counts)], counts
    ([[[0, 5, 0], [0, 3, 1]], [[0, 4, 2]]], deque([3]))
    """
    for batch in batches:
        counts.append(len(batch))
        for first in range(0, len(batch), size):
            yield batch[first : first + size]


def whole_batch(
    parts: Iterator[Part], counts: deque[int], layout: Layout, device: torch.device
) -> tuple[Tensor, Tensor, list[int]] | None:
    """The next batch, put together on the device; None behind the last one.

    Args:
        parts: in order; each is copied before the next is asked for.
        counts: how many samples belong together, as of `divided`.

    Returns:
        Images (N, C, H, W), labels int64 (N,), and the indices of samples that were replaced.

    >>> part, layout = Part(torch.zeros(1, 4, 6, 3), torch.tensor([7]), []), Layout((4, 6, 3), torch.float32, True)
    >>> images, labels, _ = whole_batch(iter([part]), deque([1]), layout, torch.device("cpu"))
    >>> images.shape, labels
    (torch.Size([1, 3, 4, 6]), tensor([7]))
    """
    part = next(parts, None)
    if part is None:
        return None
    count = counts.popleft()
    images = _room(count, layout, device)
    labels = torch.empty(count, dtype=torch.int64, pin_memory=device.type == "cuda")
    skipped, done = list[int](), 0
    while True:
        rows = slice(done, done + len(part.labels))
        _copy(part.images, images[rows], layout)
        labels[rows] = part.labels
        skipped += part.skipped
        done = rows.stop
        if done == count:
            return images, labels.to(device, non_blocking=True), skipped
        part = next(parts)


def _room(count: int, layout: Layout, device: torch.device) -> Tensor:
    """An empty (count, C, H, W) on the device: on the CPU as networks want it, on a GPU in the order of the parts."""
    if layout.channels_last and device.type != "cpu":
        return torch.empty((count, *layout.shape), dtype=layout.dtype, device=device).permute(0, 3, 1, 2)
    return torch.empty((count, *layout.image_shape), dtype=layout.dtype, device=device)


def _copy(images: Tensor, rows: Tensor, layout: Layout) -> None:
    """A part's images to their rows of the batch; to a GPU from pinned memory, beside whatever it computes."""
    if rows.device.type != "cpu":
        rows = rows.permute(0, 2, 3, 1) if layout.channels_last else rows
        rows.copy_(images.pin_memory(), non_blocking=True)
    elif layout.channels_last:  # plane by plane: a transpose takes twice as long
        for to, plane in zip(rows.unbind(1), images.unbind(3), strict=True):
            to.copy_(plane)
    else:
        rows.copy_(images)
