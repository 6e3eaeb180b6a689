"""The data that a recipe names: training and validation sets, checked before anything runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import TensorDataset

from onehour.config import nearest
from onehour.data.digits import digits, digits_wide
from onehour.data.faults import FaultError
from onehour.entry import blame, is_entry, resolve

__all__ = ["DATA", "Data", "load_data"]

DATA: dict[str, Callable[[int], tuple[Any, Any]]] = {"digits": digits, "digits-wide": digits_wide}
"""Embedded data by name; NAME:SPLIT takes another division of the originals."""


@dataclass(frozen=True)
class Data:
    """Two map-style data sets of (image, label), and what models must know of them.

    Args:
        train, validation: have `__len__` and `__getitem__(index) -> (image, label)`; perhaps also `keyed` and
            `prepare` (see `onehour.data.loader`), and then images may be uint8.
        classes: number of labels where the data says so (an attribute `classes`, or labels in memory).
        channels: of the images.

    >>> data = load_data("digits")
    >>> len(data.train), data.classes, data.channels
    (8192, 10, 1)
    """

    train: Any
    validation: Any
    classes: int | None
    channels: int

    @classmethod
    def of(cls, train: Any, validation: Any) -> Data:
        """Look at two data sets.

        Raises:
            ValueError: if one is not map-style, is empty, or does not hold (image, label) pairs.

        >>> images, labels = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])
        >>> Data.of(TensorDataset(images, labels), TensorDataset(images, labels)).classes
        3
        """
        shapes = [_item_shape(side, dataset) for side, dataset in (("training", train), ("validation", validation))]
        if shapes[0] != shapes[1]:
            raise ValueError(f"training images have shape {shapes[0]}, validation images {shapes[1]}; expected one")
        return cls(train, validation, _classes(train, validation), shapes[0][0] if shapes[0] else 1)


def _images(path: str, options: dict[str, Any]) -> tuple[Any, Any]:
    # Imported here, like its neighbour, so that what reads images is loaded only for those who have some.
    from onehour.data.images import ImageOptions, image_folder

    return image_folder(path, ImageOptions(**options))


def _cifar10(path: str, options: dict[str, Any]) -> tuple[Any, Any]:
    from onehour.data.cifar import cifar10

    return cifar10(path)


OPENERS: list[tuple[Callable[[str], bool], Callable[[str, dict[str, Any]], tuple[Any, Any]]]] = [
    (lambda path: os.path.isdir(path) or path.endswith(".index"), _images),
    (lambda path: path.endswith((".tar.gz", ".tgz")), _cifar10),
]
"""What a path may be, and what opens it; the first that fits does."""


def load_data(spec: str, **options: Any) -> Data:
    """The data of a recipe: a name, NAME:SPLIT, a path, or package.module:function that returns (train, validation).

    A path is a folder of images, its index or a pack (`image_folder`), or CIFAR-10's archive, .tar.gz or .tgz
    (`cifar10`).

    Args:
        options: of `ImageOptions`, for images at a path; other data is read as its reader likes.

    Raises:
        ValueError: for an unknown name, or what the path's opener or `Data.of` refuses.

    >>> load_data("digit")
    Traceback (most recent call last):
    ValueError: no data is called 'digit'; expected digits, a folder that exists, or package.module:function
    """
    name, _, split = spec.partition(":")
    if name in DATA:
        if not (split.isdecimal() or spec == name):
            raise ValueError(f"data {spec!r} names no division of {name}; expected {name}, or {name}:1, {name}:2 …")
        return Data.of(*DATA[name](int(split or 0)))
    for fits, opened in OPENERS:
        if fits(spec):
            return Data.of(*opened(spec, options))
    if not is_entry(spec):
        if not spec:
            raise ValueError("this recipe needs data; give --data DIR, or package.module:function")
        expected = f"{nearest(spec, DATA)}, a folder that exists, or package.module:function"
        raise ValueError(f"no data is called {spec!r}; expected {expected}")
    function = resolve("data", spec)
    try:
        returned = function()
    except Exception as error:
        raise ValueError(f"data {spec} failed when called: {blame(error)}") from error
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise ValueError(f"data {spec} returned {type(returned).__name__}; expected (train, validation)")
    return Data.of(*returned)


def _item_shape(side: str, dataset: Any) -> tuple[int, ...]:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(f"the {side} data is a {type(dataset).__name__}; expected a map-style data set (len and [i])")
    if len(dataset) == 0:
        raise ValueError(f"the {side} data is empty")
    try:
        image, label = dataset[0]
    except Exception as error:
        if getattr(dataset, "skips", False) and isinstance(error, FaultError):
            return dataset.shape  # another sample will be taken in its place
        if hasattr(dataset, "keyed") and isinstance(error, ValueError):
            raise  # it names the place and the remedy
        raise ValueError(f"the {side} data's first item is no (image, label) pair: {blame(error)}") from error
    prepared = torch.is_tensor(image) and image.dtype == torch.uint8 and hasattr(dataset, "prepare")
    if not torch.is_tensor(image) or not (image.is_floating_point() or prepared):
        kind = image.dtype if torch.is_tensor(image) else type(image).__name__
        raise ValueError(f"the {side} data's images are {kind}; expected float tensors of shape (C, H, W)")
    if not (isinstance(label, int) or (torch.is_tensor(label) and label.ndim == 0 and not label.is_floating_point())):
        raise ValueError(f"the {side} data's labels are {type(label).__name__}; expected whole numbers")
    return tuple(image.shape)


def _classes(train: Any, validation: Any) -> int | None:
    if isinstance(train, TensorDataset) and isinstance(validation, TensorDataset):
        labels = torch.cat((train.tensors[1], validation.tensors[1]))
        return max(int(labels.max()), 0) + 1
    names = getattr(train, "classes", None)
    return len(names) if names is not None else None
