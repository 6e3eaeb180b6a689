"""The data that a recipe names: training and validation sets, and all that a first look shows to be wrong with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from onehour.data.dataset import FaultError, KeyedDataset, as_label, as_labels, in_memory
from onehour.data.digits import digits, digits_wide
from onehour.data.idx import fashion_mnist, idx, idx_files
from onehour.data.processes import in_child
from onehour.data.samples import IN_A_ROW
from onehour.entry import is_entry, resolve
from onehour.messages import blame, nearest

__all__ = ["DATA", "Data", "Look", "load_data", "look"]

DATA: dict[str, Callable[[int], tuple[Any, Any]]] = {"digits": digits, "digits-wide": digits_wide}
"""Embedded data by name; NAME:SPLIT takes another division of the originals."""


@dataclass(frozen=True)
class Data:
    """Two map-style data sets of (image, label), and what models must know of them.

    Args:
        train, validation: have `__len__` and `__getitem__(index) -> (image, label)`; a `KeyedDataset` has more.
        classes: number of labels where the data says so (an attribute `classes`, or labels in memory).
        channels: of the images.
        looks: at the first samples of each.
    """

    train: Any
    validation: Any
    classes: int | None
    channels: int
    looks: tuple[Look, Look]

    @classmethod
    def of(cls, train: Any, validation: Any) -> Data:
        """Look at two data sets, in processes of their own unless they are tensors in memory.

        Raises:
            ValueError: if one is not map-style, is empty, or does not hold (image, label) pairs.
        """
        train, validation = _simplest("training", train), _simplest("validation", validation)
        ours, theirs = look("training", train), look("validation", validation)
        shape, other = tuple(ours.image.shape), tuple(theirs.image.shape)
        if shape != other:
            raise ValueError(f"training images have shape {shape}, validation images {other}; expected one")
        kinds = ours.image.dtype, theirs.image.dtype
        if kinds[0] != kinds[1] and torch.uint8 not in kinds:  # bytes become floats later
            raise ValueError(f"training images are {kinds[0]}, validation images {kinds[1]}; expected one type")
        classes = ours.classes
        if in_memory(train) and in_memory(validation):
            classes = 1 + max(0, *(int(side.tensors[1].max()) for side in (train, validation)))
        return cls(train, validation, classes, shape[0] if shape else 1, (ours, theirs))


def load_data(spec: str, **options: Any) -> Data:
    """The data of a recipe: a name, NAME:SPLIT, a path, or package.module:function that returns (train, validation).

    fashion-mnist:DIR is read from a folder of one's own. A path is a folder of images, its index or a pack
    (`image_folder`), MNIST's four files or others in their format (`idx`), or CIFAR-10's archive, .tar.gz or .tgz
    (`cifar10`).

    Args:
        options: of `ImageOptions`, for images at a path; other data is read as its reader likes.

    Raises:
        ValueError: for an unknown name, or what the path's reader or `Data.of` refuses.
    """
    name, colon, rest = spec.partition(":")
    if name in DATA:
        if not (rest.isdecimal() or spec == name):
            raise ValueError(f"data {spec!r} names no division of {name}; expected {name}, or {name}:1, {name}:2 …")
        return Data.of(*DATA[name](int(rest or 0)))
    if name == "fashion-mnist":
        return Data.of(*(fashion_mnist(rest) if colon else fashion_mnist()))
    if idx_files(spec):
        return Data.of(*idx(spec))
    # Imported here, so that what reads images is loaded only for those who have some.
    if os.path.isdir(spec) or spec.endswith(".index"):
        from onehour.data.images import ImageOptions, image_folder

        return Data.of(*image_folder(spec, ImageOptions(**options)))
    if spec.endswith((".tar.gz", ".tgz")):
        from onehour.data.cifar import cifar10

        return Data.of(*cifar10(spec))
    if not is_entry(spec):
        if not spec:
            raise ValueError("this recipe needs data; give --data DIR, or package.module:function")
        expected = f"{nearest(spec, [*DATA, 'fashion-mnist'])}, a folder that exists, or package.module:function"
        raise ValueError(f"no data is called {spec!r}; expected {expected}")
    function = resolve("data", spec)
    try:
        returned = function()
    except Exception as error:
        raise ValueError(f"data {spec} failed when called: {blame(error)}") from error
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise ValueError(f"data {spec} returned {type(returned).__name__}; expected (train, validation)")
    return Data.of(*returned)


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


def _simplest(side: str, dataset: Any) -> Any:
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
                kinds = [f"{tuple(image.shape)} of {image.dtype}" for image in (first, last)]
                raise ValueError(
                    f"the {side} data's first image is {kinds[0]}, its last one {kinds[1]}; bring them to one shape and"
                    " type"
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
        content = f" of {', '.join(map(repr, list(item)[:5]))}" if isinstance(item, dict) else ""
        content = f" of {len(item)}" if isinstance(item, tuple | list) else content
        found = f"it is a {type(item).__name__}{content}"
        raise ValueError(f"the {side} data's {which} item is not an (image, label) pair: {found}")
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
