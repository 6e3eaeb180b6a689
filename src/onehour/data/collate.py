"""Samples side by side: a batch is the tree that a sample is, of tensors with one more dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Empty", "collate", "empty", "mapped", "moved"]

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Makes a tensor of a shape and a type, to be filled."""
NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An `Empty`: in memory of this process.

    >>> empty((2, 3), torch.uint8).shape
    torch.Size([2, 3])
    """
    return torch.empty(shape, dtype=dtype)


def collate(samples: list[Any], empty: Empty = empty) -> Any:
    """N samples as a batch: tensors and numbers become tensors (N, …), texts a list of N.

    Of images (C, H, W) whose channels lie together in memory the batch's do so too.

    Args:
        samples: trees of one form: tensors, arrays, numbers and texts in tuples, lists and dicts.
        empty: makes room for each tensor of the batch.

    Raises:
        ValueError: for tensors that differ in shape or type, or anything else.

    >>> collate([{"image": torch.zeros(2), "size": (3, "a")}, {"image": torch.ones(2), "size": (4, "b")}])
    {'image': tensor([[0., 0.],
            [1., 1.]]), 'size': (tensor([3, 4]), ['a', 'b'])}
    """
    first = samples[0]
    if isinstance(first, Tensor | np.ndarray | np.generic):
        return _stacked([torch.as_tensor(sample) for sample in samples], empty)
    if isinstance(first, str | bytes):
        return list(samples)
    if type(first) in NUMBERS:
        numbers = empty((len(samples),), NUMBERS[type(first)])
        return numbers.copy_(torch.tensor(samples, dtype=numbers.dtype))
    if isinstance(first, Mapping):
        return {key: collate([sample[key] for sample in samples], empty) for key in first}
    if isinstance(first, tuple | list):
        columns = [collate(list(column), empty) for column in zip(*samples, strict=True)]
        return _like(first, columns)
    kind = type(first).__name__
    raise ValueError(f"a sample holds a {kind}; expected tensors, numbers and texts in tuples, lists and dicts")


def mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """The same tree with `function` of all that is no tuple, list or dict.

    >>> mapped({"a": (1, [2, 3])}, str)
    {'a': ('1', ['2', '3'])}
    """
    if isinstance(tree, dict):
        return {key: mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return _like(tree, [mapped(value, function) for value in tree])
    return function(tree)


def moved(leaf: Any, device: torch.device) -> Any:
    """A tensor of a batch on a device, a copy of its own; to a GPU from pinned memory, beside whatever it computes.

    Its memory is contiguous on a CPU, and ordered as it is on a GPU, which reorders it faster.

    >>> moved(torch.zeros(1, 2, 2, 3).permute(0, 3, 1, 2), torch.device("cpu")).is_contiguous()
    True
    """
    if not isinstance(leaf, Tensor):
        return leaf
    together = _channels_together(leaf)
    if device.type != "cpu":
        plain = leaf.permute(0, 2, 3, 1) if together else leaf
        there = plain.pin_memory().to(device, non_blocking=True)
        return there.permute(0, 3, 1, 2) if together else there
    copy = torch.empty(leaf.shape, dtype=leaf.dtype)
    if not together:
        return copy.copy_(leaf)
    for to, plane in zip(copy.unbind(1), leaf.unbind(1), strict=True):  # a transpose takes twice as long
        to.copy_(plane)
    return copy


def _channels_together(images: Tensor) -> bool:
    return images.ndim == 4 and not images.is_contiguous() and images.permute(0, 2, 3, 1).is_contiguous()


def _stacked(tensors: list[Tensor], empty: Empty) -> Tensor:
    first = tensors[0]
    for other in tensors:
        if other.shape != first.shape or other.dtype != first.dtype:
            kinds = " and ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in (first, other))
            raise ValueError(f"samples of a batch differ ({kinds}); bring them to one shape and type")
    count, together = len(tensors), first.ndim == 3 and first.permute(1, 2, 0).is_contiguous()
    if together:
        channels, height, width = first.shape
        batch = empty((count, height, width, channels), first.dtype).permute(0, 3, 1, 2)
    else:
        batch = empty((count, *first.shape), first.dtype)
    for row, tensor in zip(batch, tensors, strict=True):
        row.copy_(tensor.detach())
    return batch


def _like(tree: Any, values: list[Any]) -> Any:
    """A list, a tuple, or a tuple with names."""
    if isinstance(tree, list):
        return values
    return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
