"""Samples by their keys, another one in the place of a bad one, and side by side in batches."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onehour.data.dataset import Classes, FaultError, KeyedDataset, as_label, seed_generators
from onehour.messages import blame
from onehour.rules.keys import seed_for
from onehour.rules.shuffle import SampleStream

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Makes a tensor of a shape and a type, to be filled."""
NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}
ARRAYS = (Tensor, np.ndarray, np.generic)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An `Empty`: in memory of this process."""
    return torch.empty(shape, dtype=dtype)


def collate(samples: list[Any], empty: Empty = empty) -> Any:
    """N samples as a batch: tensors and numbers become tensors (N, …), texts a list of N.

    Of images (C, H, W) whose channels lie together in memory the batch's do so too.

    Args:
        samples: trees of one form: tensors, arrays, numbers and texts in tuples, lists and dicts.

    >>> collate([{"image": torch.zeros(2), "size": (3, "a")}, {"image": torch.ones(2), "size": (4, "b")}])
    {'image': tensor([[0., 0.],
            [1., 1.]]), 'size': (tensor([3, 4]), ['a', 'b'])}
    """
    first = samples[0]
    if isinstance(first, str | bytes):
        _refuse_others(samples, (str, bytes))
        return list(samples)
    kind = type(first)
    if kind in NUMBERS and all(type(sample) is kind for sample in samples):
        try:
            numbers = torch.tensor(samples, dtype=NUMBERS[kind])
        except (ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"a number of a sample does not fit into {NUMBERS[kind]}: {blame(error)}") from error
        return empty((len(samples),), numbers.dtype).copy_(numbers)
    if kind in NUMBERS or isinstance(first, ARRAYS):
        _refuse_others(samples, (*ARRAYS, *NUMBERS))
        return _stacked([_as_tensor(sample) for sample in samples], empty)
    if isinstance(first, Mapping):
        _refuse_others(samples, (Mapping,))
        for other in samples:
            if first.keys() != other.keys():
                odd = next(key for key in (*first, *other) if key not in first or key not in other)
                raise ValueError(f"samples of a batch differ (not all have {odd!r}); give all the same keys")
        return {key: collate([sample[key] for sample in samples], empty) for key in first}
    if isinstance(first, tuple | list):
        _refuse_others(samples, (tuple, list))
        for other in samples:
            if len(other) != len(first):
                raise ValueError(f"samples of a batch differ ({len(first)} and {len(other)} parts); give all as many")
        return _like(first, [collate(list(column), empty) for column in zip(*samples, strict=True)])
    raise ValueError(
        f"a sample holds a {kind.__name__}; expected tensors, numbers and texts in tuples, lists and dicts"
    )


def _refuse_others(samples: list[Any], kinds: tuple[type, ...]) -> None:
    for other in samples:
        if not isinstance(other, kinds):
            names = f"{type(samples[0]).__name__} and {type(other).__name__}"
            raise ValueError(f"samples of a batch differ ({names}); bring them to one type")


def _as_tensor(value: Any) -> Tensor:
    """A number's type is the one that `collate` gives to numbers alone, whatever it stands beside."""
    try:
        return torch.as_tensor(value, dtype=NUMBERS.get(type(value)))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"a sample holds what is no tensor: {blame(error)}") from error


def pair_of(item: Any, called: str = "the item") -> tuple[Any, Any]:
    """The image and the label that an item of a data set is; a ValueError calls it by its name."""
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    content = f" of {', '.join(map(repr, list(item)[:5]))}" if isinstance(item, dict) else ""
    content = f" of {len(item)}" if isinstance(item, tuple | list) else content
    raise ValueError(f"{called} is not an (image, label) pair: it is a {type(item).__name__}{content}")


def mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """The same tree with `function` of all that is no tuple, list or dict."""
    if isinstance(tree, dict):
        return {key: mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return _like(tree, [mapped(value, function) for value in tree])
    if isinstance(tree, UserDict):  # such as transformers' collators make
        made = copy(tree)
        made.data = mapped(dict(tree.data), function)
        return made
    return function(tree)


def leaves(tree: Any) -> list[Any]:
    """All that is no tuple, list or dict, in the tree's order."""
    found: list[Any] = []
    mapped(tree, found.append)
    return found


def _stacked(tensors: list[Tensor], empty: Empty) -> Tensor:
    first, count = tensors[0], len(tensors)
    for other in tensors:
        if other.shape != first.shape or other.dtype != first.dtype:
            kinds = " and ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in (first, other))
            raise ValueError(f"samples of a batch differ ({kinds}); bring them to one shape and type")
    if first.ndim == 3 and first.permute(1, 2, 0).is_contiguous():
        channels, height, width = first.shape
        batch = empty((count, height, width, channels), first.dtype).permute(0, 3, 1, 2)
    else:
        batch = empty((count, *first.shape), first.dtype)
    for row, tensor in zip(batch, tensors, strict=True):
        try:
            row.copy_(tensor.detach())
        except RuntimeError as error:  # sparse ones
            raise ValueError(f"a sample holds a tensor that cannot be copied: {blame(error)}") from error
    return batch


def _like(tree: Any, values: list[Any]) -> Any:
    """A list, a tuple, or a tuple with names."""
    if isinstance(tree, list):
        return values
    return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)


Key = tuple[int, int, int]
"""Epoch, index and position in the stream of a sample."""
IN_A_ROW = 100
"""Bad images behind each other after which nothing is looked for any more: the disk is gone, not a file."""


def following(stream: SampleStream, position: int) -> Iterator[tuple[int, int]]:
    """(epoch, index) of the samples that the worker of a stream's position takes after it.

    Position s belongs to worker s mod k, whose next ones are s + k, s + 2k …: what the stream says, whatever was read.
    """
    while True:
        position += stream.ramp.holding(position).minibatch.workers
        phase = stream.ramp.holding(position)
        iteration, within = divmod(position - phase.position, phase.minibatch.size)
        row, worker = divmod(within, phase.minibatch.workers)
        epochs, indices = stream.epochs_and_indices(phase.first + iteration, worker)
        yield int(epochs[row]), int(indices[row])


@dataclass(frozen=True)
class Form:
    """What samples are, and how they become a batch."""

    own: bool = False  # whether they are a task's, of any kind; else (image, label)
    collate: Callable[[list[Any]], Any] | None = None  # makes a batch of a list of them; None for `collate`

    def batch(self, samples: list[Any], empty: Empty = empty) -> Any:
        try:
            return collate(samples, empty) if self.collate is None else self.collate(samples)
        except Exception as error:
            if self.collate is None and isinstance(error, ValueError | MemoryError | RuntimeError):
                raise  # it says what is wrong, or that memory ran out
            raise ValueError(f"collate failed for {len(samples)} samples: {blame(error)}") from error


IMAGES_AND_LABELS = Form()


class Keyed:
    """A data set asked by (epoch, index): `keyed` is given their key, else it seeds every global generator before.

    So a random transform gives the same image in any loader process, and another one each epoch.

    Args:
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
        form: Form = IMAGES_AND_LABELS,
    ) -> None:
        self.dataset, self.seed, self.stream, self.classes, self.side = dataset, seed, stream, classes, side
        self.form = form
        self.kind: tuple[tuple[int, ...], torch.dtype] | None = None
        """Shape and type that every image must have; None where they are not known yet."""

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        return self._sample(index, seed_for(self.seed, "sample", epoch, index))

    def batch(
        self, keys: Iterable[Key], *, empty: Empty = empty, begun: Callable[[int], object] = lambda index: None
    ) -> tuple[Any, list[int]]:
        """The samples of some keys as a batch, and the indices of those that could not be read and were replaced."""
        samples: list[Any] = []
        indices: list[int] = []
        skipped: list[int] = []
        for epoch, index, position in keys:
            begun(index)
            try:
                sample = self[(epoch, index)]
            except FaultError as fault:
                if self.stream is None:
                    raise
                skipped.append(index)
                index, sample = self._substitute(self.stream, position, fault)
            try:
                samples.append(sample if self.form.own else self._checked(*pair_of(sample)))
                indices.append(index)
            except ValueError as error:
                raise ValueError(f"{self.called(index)}: {error}") from None
        try:
            return self.form.batch(samples, empty), skipped
        except ValueError as error:
            raise ValueError(f"{self._blamed(samples, indices)}{error}") from error

    def _blamed(self, samples: list[Any], indices: list[int]) -> str:
        """The first sample that cannot be put beside the batch's first one; nothing with a collate of one's own."""
        for sample, index in zip(samples if self.form.collate is None else [], indices, strict=False):
            try:
                collate([samples[0], sample])
            except ValueError:
                beside = f" beside {self.name(indices[0])}" if index != indices[0] else ""
                return f"{self.called(index)}{beside}: "
        return ""

    def name(self, index: int) -> str:
        name = self.dataset.name(index) if isinstance(self.dataset, KeyedDataset) else ""
        return f"sample {index}" + (f" ({name})" if name else "")

    def called(self, index: int) -> str:
        return f"{self.side} {self.name(index)}".strip()

    def _checked(self, image: Any, label: Any) -> tuple[Tensor, int]:
        image = _as_tensor(image)
        shape, dtype = self.kind or (tuple(image.shape), image.dtype)
        if tuple(image.shape) != shape:
            shapes = f"{shape} and {tuple(image.shape)}"
            raise ValueError(f"images of the data differ in shape ({shapes}); bring them to one size first")
        if image.dtype != dtype:
            raise ValueError(f"images of the data differ in type ({dtype} and {image.dtype}); give all of one")
        return image, as_label(label) if self.classes is None else self.classes.checked(label)

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
        """The next sample of the position's worker that can be read, its crop keyed by the position that it fills."""
        number = seed_for(self.seed, "substitute", position)
        for _, (_, index) in zip(range(IN_A_ROW), following(stream, position), strict=False):
            try:
                return index, self._sample(index, number)
            except FaultError:
                continue
        raise ValueError(f"{first} ({IN_A_ROW} samples after it cannot be read either: is the disk there?)")
