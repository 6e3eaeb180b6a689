"""Memory that processes share, and how one image lies in it: no image travels through a pipe."""

from __future__ import annotations

import math
import mmap
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Layout", "shared"]


class Layout(NamedTuple):
    """How every image of a data set lies in memory.

    >>> Layout.of(torch.zeros(4, 6, 3).permute(2, 0, 1))
    Layout(shape=(4, 6, 3), dtype=torch.float32, channels_last=True)
    """

    shape: tuple[int, ...]
    """(H, W, C) where the channels lie together, else the image's own."""
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def of(cls, image: Any) -> Layout:
        """What an image says for all.

        >>> Layout.of(torch.zeros(3, 4, 6)).shape
        (3, 4, 6)
        """
        image = torch.as_tensor(image)
        if image.ndim == 3 and image.permute(1, 2, 0).is_contiguous():
            return cls(tuple(image.permute(1, 2, 0).shape), image.dtype, True)
        return cls(tuple(image.shape), image.dtype, False)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of an image as the data set gives it: (C, H, W).

        >>> Layout((4, 6, 3), torch.uint8, True).image_shape
        (3, 4, 6)
        """
        return (self.shape[2], *self.shape[:2]) if self.channels_last else self.shape

    @property
    def bytes(self) -> int:
        """Of an image.

        >>> Layout((4, 6, 3), torch.uint8, True).bytes
        72
        """
        return math.prod(self.shape) * self.dtype.itemsize

    def put(self, place: Tensor, image: Any) -> None:
        """Copy an image to its place, a tensor of `shape`.

        Raises:
            ValueError: if it has another shape or type.

        >>> Layout((2,), torch.float32, False).put(torch.zeros(2), torch.ones(3))
        Traceback (most recent call last):
        ValueError: images of the data differ in shape ((2,) and (3,)); bring them to one size first
        """
        image = torch.as_tensor(image)
        if tuple(image.shape) != self.image_shape:
            shapes = f"{self.image_shape} and {tuple(image.shape)}"
            raise ValueError(f"images of the data differ in shape ({shapes}); bring them to one size first")
        if image.dtype != self.dtype:
            raise ValueError(f"images of the data differ in type ({self.dtype} and {image.dtype}); give all of one")
        place.copy_(image.permute(1, 2, 0) if self.channels_last else image)


def shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in memory that this process and all forked from it from now on have in common.

    It belongs to no file, so that no limit of /dev/shm applies. What nobody writes to takes no room.

    >>> shared((2, 3), torch.int64).sum().item()
    0
    """
    count = math.prod(shape)
    try:
        memory = mmap.mmap(-1, count * dtype.itemsize)
    except OSError as error:
        size = count * dtype.itemsize
        raise ValueError(
            f"no room for {size:,} bytes of loaded batches ({error.strerror}); use fewer --loaders"
        ) from error
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
