"""The data that a recipe names: training and validation sets, checked before anything runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from onehour.data.digits import digits, digits_wide
from onehour.data.look import Look, in_memory, look, simplest
from onehour.entry import is_entry, resolve
from onehour.messages import blame, nearest

__all__ = ["DATA", "Data", "load_data"]

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

    >>> data = load_data("digits")
    >>> data.looks[0].samples, data.classes, data.channels
    (8192, 10, 1)
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
        train, validation = simplest("training", train), simplest("validation", validation)
        ours, theirs = look("training", train), look("validation", validation)
        shape, other = tuple(ours.image.shape), tuple(theirs.image.shape)
        if shape != other:
            raise ValueError(f"training images have shape {shape}, validation images {other}; expected one")
        kinds = ours.image.dtype, theirs.image.dtype
        if kinds[0] != kinds[1] and torch.uint8 not in kinds:  # bytes become floats later
            raise ValueError(f"training images are {kinds[0]}, validation images {kinds[1]}; expected one type")
        classes = _in_memory_classes(train, validation) or ours.classes
        return cls(train, validation, classes, shape[0] if shape else 1, (ours, theirs))


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


def _in_memory_classes(train: Any, validation: Any) -> int | None:
    if not (in_memory(train) and in_memory(validation)):
        return None
    both = train.tensors[1], validation.tensors[1]
    return max(0, *(int(labels.max()) for labels in both)) + 1
