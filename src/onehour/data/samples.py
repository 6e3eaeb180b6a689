"""Samples by their keys, another one in the place of a bad one, and side by side in batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onehour.data.bad_images import IN_A_ROW, following
from onehour.data.dataset import FaultError, KeyedDataset, seed_generators
from onehour.data.look import Classes, as_label
from onehour.messages import blame
from onehour.rules.keys import seed_for
from onehour.rules.shuffle import SampleStream

__all__ = ["Empty", "Key", "Keyed", "collate", "empty", "mapped", "moved"]

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Makes a tensor of a shape and a type, to be filled."""
NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An `Empty`: in memory of this process."""
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


Key = tuple[int, int, int]
"""Epoch, index and position in the stream of a sample."""


class Keyed:
    """A data set asked by (epoch, index): `keyed` is given their key, else it seeds every global generator before.

    So a random transform gives the same image in any loader process, and another one each epoch.

    Args:
        dataset: map-style, of (image, label).
        seed: of the run.
        stream: where another sample comes from when one is bad; None where a bad one is an error.
        classes: what labels are checked against; None where any whole number will do.
        side: of the data, "training" or "validation", for messages.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        stream: SampleStream | None = None,
        *,
        classes: Classes | None = None,
        side: str = "",
    ) -> None:
        self.dataset, self.seed, self.stream, self.classes, self.side = dataset, seed, stream, classes, side
        self.kind: tuple[tuple[int, ...], torch.dtype] | None = None
        """Shape and type that every image must have; None where they are not known yet."""

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        return self._sample(index, seed_for(self.seed, "sample", epoch, index))

    def first(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of an image: as `KeyedDataset.shape` says, else as the first one has them."""
        shape = self.dataset.shape if isinstance(self.dataset, KeyedDataset) else None
        if shape is not None:
            return shape, torch.uint8
        with _undisturbed():
            image = torch.as_tensor(self[(0, 0)][0])
        return tuple(image.shape), image.dtype

    def batch(
        self, keys: Iterable[Key], *, empty: Empty = empty, begun: Callable[[int], object] = lambda index: None
    ) -> tuple[Any, list[int]]:
        """The samples of some keys as a batch.

        Args:
            empty: makes room for each tensor of the batch.
            begun: is told of the index of each sample before it is made.

        Returns:
            (images, labels), and the indices of samples that could not be read and were replaced.

        Raises:
            ValueError: if a sample cannot be read, its label is no class, or its image is not like the others.

        >>> from torch.utils.data import TensorDataset
        >>> keyed = Keyed(TensorDataset(torch.arange(3.0), torch.arange(3)), seed=0)
        >>> keyed.batch([(0, 2, 0), (0, 1, 1)])
        ((tensor([2., 1.]), tensor([2, 1])), [])
        """
        samples: list[tuple[Tensor, int]] = []
        skipped: list[int] = []
        for epoch, index, position in keys:
            begun(index)
            try:
                image, label = self[(epoch, index)]
            except FaultError as fault:
                if self.stream is None:
                    raise
                skipped.append(index)
                index, (image, label) = self._substitute(self.stream, position, fault)
            try:
                image = self._like_all(image)
                number = as_label(label) if self.classes is None else None
            except ValueError as error:
                raise ValueError(f"{self.called(index)}: {error}") from None
            if self.classes is not None:
                number = self.classes.checked(label, index, self.called)
            assert number is not None
            samples.append((image, number))
        return collate(samples, empty), skipped

    def name(self, index: int) -> str:
        """What a message calls sample `index`."""
        name = self.dataset.name(index) if isinstance(self.dataset, KeyedDataset) else ""
        return f"sample {index}" + (f" ({name})" if name else "")

    def called(self, index: int) -> str:
        """`name` behind the side that it is of."""
        return f"{self.side} {self.name(index)}".strip()

    def _like_all(self, image: Any) -> Tensor:
        image = torch.as_tensor(image)
        shape, dtype = self.kind or (tuple(image.shape), image.dtype)
        if tuple(image.shape) != shape:
            shapes = f"{shape} and {tuple(image.shape)}"
            raise ValueError(f"images of the data differ in shape ({shapes}); bring them to one size first")
        if image.dtype != dtype:
            raise ValueError(f"images of the data differ in type ({dtype} and {image.dtype}); give all of one")
        return image

    def _sample(self, index: int, number: int) -> Any:
        offered = isinstance(self.dataset, KeyedDataset)
        try:
            if offered:
                return self.dataset.keyed(index, number)
            seed_generators(number)
            return self.dataset[index]
        except (Exception, SystemExit) as error:
            if offered and isinstance(error, ValueError):
                raise
            raise ValueError(f"sample {index} of the data cannot be read: {blame(error)}") from error

    def _substitute(self, stream: SampleStream, position: int, first: FaultError) -> tuple[int, Any]:
        """The next sample of the position's worker that can be read, its crop keyed by the position that it fills.

        Returns:
            Its index, and (image, label).
        """
        number = seed_for(self.seed, "substitute", position)
        for _, (_, index) in zip(range(IN_A_ROW), following(stream, position), strict=False):
            try:
                return index, self._sample(index, number)
            except FaultError:
                continue
        raise ValueError(f"{first} ({IN_A_ROW} samples after it cannot be read either: is the disk there?)")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the global generators as they were."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
