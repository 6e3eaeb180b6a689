"""What must be known of a data set before it is loaded, and everything wrong with it that its first samples show.

Labels too: a label names a class by a whole number from 0 to C − 1, which is checked on the host as samples are read.
torch's cross-entropy leaves out the label −100 without a word, and a label outside the classes ends a GPU's context.
"""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from onehour.data.bad_images import IN_A_ROW
from onehour.data.dataset import FaultError, KeyedDataset
from onehour.data.processes import in_child
from onehour.messages import blame

__all__ = ["Classes", "Look", "as_label", "as_labels", "in_memory", "look", "refuse_labels", "simplest"]


def as_label(value: Any) -> int:
    """The whole number that a label is, whatever holds it; whether there is such a class is not looked at.

    Args:
        value: an int, a bool, a numpy number, a float without a fraction, or a tensor or an array of shape () or (1,)
            that holds one.

    Raises:
        ValueError: for anything else, with what it is.

    >>> as_label(3), as_label(np.uint8(3)), as_label(np.array([3])), as_label(torch.tensor(3.0))
    (3, 3, 3, 3)
    >>> as_label(2.7)
    Traceback (most recent call last):
    ValueError: the label 2.7 is not a whole number
    """
    if type(value) is int:
        return value
    found: Any = value
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        if tuple(value.shape) not in ((), (1,)):
            raise ValueError(
                f"the label is {_kind(value)} of shape {tuple(value.shape)}; expected one whole number"
                + (", such as its argmax where it is one-hot" if value.ndim == 1 else "")
            )
        found = value.item()
    try:
        return operator.index(found)
    except TypeError:
        pass
    if isinstance(found, numbers.Number):
        if isinstance(found, numbers.Real) and math.isfinite(found) and found == math.floor(found):
            return int(cast(float, found))
        raise ValueError(f"the label {found} is not a whole number")
    raise ValueError(f"the label is {_kind(found)} ({reprlib.repr(found)}); expected one whole number")


def as_labels(labels: torch.Tensor) -> torch.Tensor:
    """The same for a tensor of N labels: itself where it is one of whole numbers (N,), else int64 (N,).

    Raises:
        ValueError: for another shape, or the first that is not a whole number.

    >>> as_labels(torch.tensor([[2.0], [0.0]]))
    tensor([2, 0])
    >>> as_labels(torch.tensor([2.0, 0.5]))
    Traceback (most recent call last):
    ValueError: label 1 is 0.5, no whole number
    """
    if labels.ndim != 1 and tuple(labels.shape) != (len(labels), 1):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected one whole number a sample, such as argmax(1) of one-hot"
        )
    flat = labels.detach().reshape(-1)
    if flat.is_complex():
        raise ValueError(f"labels are {flat.dtype}; expected whole numbers")
    if flat.is_floating_point():
        broken = (~(flat == flat.floor()) | flat.isinf()).nonzero()
        if len(broken):
            first = int(broken[0])
            raise ValueError(f"label {first} is {flat[first].item():g}, no whole number")
    plain = labels.ndim == 1 and labels.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    return labels if plain else flat.long()


def _kind(value: Any) -> str:
    """What a message calls a value: its type, with "a" or "an"; None is itself."""
    if value is None:
        return "nothing"
    name = "tensor" if isinstance(value, torch.Tensor) else "array" if isinstance(value, np.ndarray) else None
    name = name or type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


@dataclass(frozen=True)
class Classes:
    """C, and where it comes from.

    >>> Classes(10, "the model's outputs").expected
    "a whole number from 0 to 9, since C = 10 (the model's outputs)"
    """

    count: int
    source: str

    @property
    def expected(self) -> str:
        """What a label must be, for messages."""
        return f"a whole number from 0 to {self.count - 1}, since C = {self.count} ({self.source})"

    def checked(self, label: object, index: int, name: Callable[[int], str]) -> int:
        """The label of sample `index` as the whole number that it is.

        Args:
            name: what a message calls a sample: its side, index and file.

        Raises:
            ValueError: if it is none, or no class has it.

        >>> Classes(3, "the model's outputs").checked(-100, 5, "training sample {}".format)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: training sample 5: the label is -100; expected a whole number from 0 to 2, since C = 3 (the ...)
        """
        try:
            number = as_label(label)
        except ValueError as error:
            raise ValueError(f"{name(index)}: {error}; expected {self.expected}") from error
        if not 0 <= number < self.count:
            raise ValueError(f"{name(index)}: the label is {number}; expected {self.expected}")
        return number


def refuse_labels(labels: Tensor, classes: Classes, name: Callable[[int], str]) -> None:
    """Check the labels of samples in memory, once.

    Args:
        labels: N of them.
        name: what a message calls sample i.

    Raises:
        ValueError: for the first that no class has, as `Classes.checked`.
    """
    whole = not labels.is_floating_point() and not labels.is_complex()
    if whole and labels.ndim == 1 and int(labels.min()) >= 0 and int(labels.max()) < classes.count:
        return
    for index, label in enumerate(labels.cpu()):
        classes.checked(label, index, name)


@dataclass(frozen=True)
class Look:
    """What a data set's first samples say of all.

    Args:
        samples: how many there are.
        image: the first one, as the data set gives it; all have its shape and type.
        classes: how many, where the data set says so.
    """

    samples: int
    image: Tensor
    classes: int | None


def look(side: str, dataset: Any) -> Look:
    """Look at a data set, in a process of its own: nothing of it is opened, cached or drawn in this one.

    Tensors in memory are looked at here.

    Args:
        side: what a message calls it, e.g. "training".

    Raises:
        ValueError: if it is not map-style, is empty, or does not hold (image, label) pairs.
    """
    if in_memory(dataset):
        return _look(side, dataset)
    return in_child(lambda: _look(side, dataset), f"the first look at the {side} data")


def in_memory(dataset: Any) -> bool:
    """Whether the samples are tensors in memory that are the same each time: batches are then plain gathers."""
    return type(dataset) is TensorDataset and len(dataset.tensors) == 2


def simplest(side: str, dataset: Any) -> Any:
    """A data set in memory with its labels as whole numbers (N,); any other as it is.

    Raises:
        ValueError: for labels that are no whole numbers.
    """
    if not in_memory(dataset):
        return dataset
    images, labels = dataset.tensors
    try:
        whole = as_labels(labels)
    except ValueError as error:
        raise ValueError(f"the {side} data: {error}") from None
    if whole is labels and not images.requires_grad:
        return dataset
    return TensorDataset(images.detach(), whole)


def _look(side: str, dataset: Any) -> Look:
    samples = _samples(side, dataset)
    if in_memory(dataset):
        image, classes = _checked(side, dataset, dataset.tensors[0][:1])[0], None
    else:
        image, classes = _first(side, dataset, samples), _classes(dataset)
    return Look(samples, image.detach().cpu().clone(), classes)


def _samples(side: str, dataset: Any) -> int:
    kind = type(dataset)
    if isinstance(dataset, IterableDataset) or not (hasattr(kind, "__len__") and hasattr(kind, "__getitem__")):
        raise ValueError(f"the {side} data is a {kind.__name__}; expected a map-style data set (len and [i])")
    if isinstance(dataset, tuple | list) and len(dataset) == 2 and all(hasattr(part, "shape") for part in dataset):
        raise ValueError(
            f"the {side} data is two arrays; expected a data set of (image, label), such as"
            " torch.utils.data.TensorDataset(images, labels)"
        )
    try:
        samples = len(dataset)
    except Exception as error:
        raise ValueError(f"the {side} data does not say how many samples it has: {blame(error)}") from error
    if samples == 0:
        raise ValueError(f"the {side} data is empty")
    return samples


def _first(side: str, dataset: Any, samples: int) -> Tensor:
    """The first image that can be read; the last sample of someone's data set too, if there is such a one."""
    keyed, faults = isinstance(dataset, KeyedDataset), list[FaultError]()
    for index in range(min(samples, IN_A_ROW)):
        try:
            first = _image(side, "first", dataset, index)
        except FaultError as fault:
            if not (keyed and dataset.skips):
                raise
            faults.append(fault)  # another sample will be taken in its place
            continue
        if not keyed:
            last = _image(side, "last", dataset, samples - 1)
            if last.shape != first.shape or last.dtype != first.dtype:
                raise ValueError(
                    f"the {side} data's first image is {_described(first)}, its last one {_described(last)}; bring them"
                    " to one shape and type"
                )
        return first
    raise ValueError(f"{faults[0]} ({len(faults) - 1} samples after it cannot be read either: is the disk there?)")


def _image(side: str, which: str, dataset: Any, index: int) -> Tensor:
    keyed = isinstance(dataset, KeyedDataset)
    try:
        item = dataset.keyed(index, 0) if keyed else dataset[index]
    except Exception as error:
        if keyed and isinstance(error, ValueError):
            raise  # it names the place and the remedy
        read = f"item, {index} of {index + 1}, cannot be read" if which == "last" else "item cannot be read"
        raise ValueError(f"the {side} data's {which} {read}: {blame(error)}") from error
    if not (isinstance(item, tuple | list) and len(item) == 2):
        raise ValueError(f"the {side} data's {which} item is not an (image, label) pair: it is {_content(item)}")
    image, label = item
    image = _checked(side, dataset, image)
    try:
        as_label(label)
    except ValueError as error:
        raise ValueError(f"the {side} data's {which} label: {error}") from None
    return image


def _checked(side: str, dataset: Any, image: Any) -> Tensor:
    """An image that is a tensor of floats, or of bytes where the data set makes floats of them."""
    expected = "expected float tensors of shape (C, H, W)"
    if not torch.is_tensor(image):
        raise ValueError(f"the {side} data's images are {type(image).__name__}; {expected}")
    if image.layout is not torch.strided:
        raise ValueError(f"the {side} data's images are {image.layout}; {expected}")
    prepared = image.dtype == torch.uint8 and isinstance(dataset, KeyedDataset)
    if not (image.is_floating_point() or prepared):
        bytes_ = "; a data set derived from onehour.KeyedDataset may give bytes" if image.dtype == torch.uint8 else ""
        raise ValueError(f"the {side} data's images are {image.dtype}; {expected}{bytes_}")
    return image


def _described(image: Tensor) -> str:
    return f"{tuple(image.shape)} of {image.dtype}"


def _content(item: Any) -> str:
    kind = type(item).__name__
    if isinstance(item, dict):
        return f"a {kind} of {', '.join(map(repr, list(item)[:5]))}"
    return f"a {kind} of {len(item)}" if isinstance(item, tuple | list) else f"a {kind}"


def _classes(dataset: Any) -> int | None:
    """How many classes a data set says that it has: its `classes` is a list of names, or a number."""
    try:
        classes = dataset.classes
    except Exception:  # it has none, or a property of that name that is for something else
        return None
    if isinstance(classes, np.ndarray):
        classes = classes.tolist()
    if isinstance(classes, Sequence) and not isinstance(classes, str | bytes):
        return len(classes) or None
    try:
        return max(as_label(classes), 0) or None if not isinstance(classes, bool) else None
    except ValueError:
        return None
