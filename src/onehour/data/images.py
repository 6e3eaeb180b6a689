"""Folders of images as ImageNet's are: DIR/train/CLASS/* and DIR/val/CLASS/*."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from onehour.data.augment import drawn_key, normalise, training_crop, validation_crop
from onehour.data.decode import decode

__all__ = ["Folder", "Images", "Names", "Source", "image_folder"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Per channel, of ImageNet's training images (§5.1)."""
SUFFIXES = {".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}


class Names:
    """Many short texts in two arrays: a million cost their bytes, and processes that are forked share the memory.

    >>> names = Names(["a.jpg", "b.jpg"])
    >>> len(names), names[1]
    (2, 'b.jpg')
    """

    def __init__(self, names: Iterable[str]) -> None:
        buffer, ends = bytearray(), array("q", [0])
        for name in names:
            buffer += os.fsencode(name)
            ends.append(len(buffer))
        self.buffer, self.ends = np.frombuffer(bytes(buffer), np.uint8), np.array(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.buffer[self.ends[index] : self.ends[index + 1]].tobytes())


class Source(Protocol):
    """Where the bytes of labelled images come from."""

    classes: list[str]
    labels: np.ndarray
    """Of each image, the index of its class."""

    def name(self, index: int) -> str:
        """Where image `index` lies, for messages."""
        ...

    def read(self, index: int) -> bytes:
        """The file of image `index`; ValueError if it cannot be read."""
        ...


class Folder:
    """The files of FOLDER/CLASS/*, classes and files in the order of their names.

    Names that begin with a dot are passed over.

    Args:
        root: the folder.

    Raises:
        ValueError: naming the folder or file, if there are no classes, a class has no images, or a class's folder holds
            something whose name is no image's.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.classes = sorted(entry.name for entry in _entries(root) if entry.is_dir())
        if not self.classes:
            raise ValueError(f"{root} has no folders; expected one for each class, holding its images: {root}/CLASS/*")
        counts: list[int] = []
        self.names = Names(name for label in self.classes for name in self._listed(label, counts))
        empty = [label for label, count in zip(self.classes, counts, strict=True) if not count]
        if empty:
            raise ValueError(
                f"{root} has no images of {_quoted(empty)}; add some, or remove the folder here and in its counterpart"
            )
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def _listed(self, label: str, counts: list[int]) -> list[str]:
        names = []
        for entry in _entries(self.root / label):
            if not entry.is_file() or os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
                raise ValueError(f"{entry.path} is no image file by its name; move it out of the class's folder")
            names.append(entry.name)
        counts.append(len(names))
        return sorted(names)

    def name(self, index: int) -> str:
        """The path of image `index`."""
        return os.path.join(self.root, self.classes[self.labels[index]], self.names[index])

    def read(self, index: int) -> bytes:
        """The bytes of image `index`.

        Raises:
            ValueError: naming the file, if it cannot be read.
        """
        path = self.name(index)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}; restore it, or start without it") from error


class Images(Dataset[tuple[Tensor, int]]):
    """Images of any size and format as the paper's crops (§5.1); a map-style data set of uint8 (3, 224, 224).

    Args:
        source: where the files come from.
        augmented: the training crop and flip, drawn from each sample's key; otherwise the test crop.
    """

    def __init__(self, source: Source, *, augmented: bool) -> None:
        self.source, self.augmented, self.classes = source, augmented, source.classes

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.keyed(index, key=drawn_key())

    def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
        """Image `index`, its crop and flip a pure function of `key`, and its label.

        Raises:
            ValueError: naming the file, if it cannot be read or decoded.
        """
        pixels = decode(self.source.read(index), self.source.name(index))
        image = training_crop(pixels, key) if self.augmented else validation_crop(pixels)
        return image, int(self.source.labels[index])

    def prepare(self, images: Tensor) -> Tensor:
        """A batch (N, 3, H, W) of uint8 as the normalised float32 that networks take."""
        return normalise(images, MEAN, STD)


def image_folder(root: str | Path) -> tuple[Images, Images]:
    """Training and validation images of DIR/train/CLASS/* and DIR/val/CLASS/*, labelled by class name.

    Args:
        root: DIR.

    Returns:
        (train, validation), the first with the training crop, the second with the test crop.

    Raises:
        ValueError: for a folder that is missing or empty, or validation classes that are not the training classes.
    """
    root = Path(root)
    for folder in (root, root / "train", root / "val"):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}; expected {root}/train/CLASS/* and {root}/val/CLASS/*")
    train, validation = Folder(root / "train"), Folder(root / "val")
    unknown = sorted(set(validation.classes) - set(train.classes))
    missing = sorted(set(train.classes) - set(validation.classes))
    if unknown or missing:
        found = [f"has {_quoted(unknown)}, which {root}/train has not"] if unknown else []
        found += [f"lacks {_quoted(missing)}"] if missing else []
        raise ValueError(f"{root}/val {' and '.join(found)}; expected the same class folders in both")
    return Images(train, augmented=True), Images(validation, augmented=False)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed: {error.strerror}; make it readable") from error


def _quoted(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)
