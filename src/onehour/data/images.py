"""Labelled images as the paper's crops, from a folder as ImageNet's is, from its index, or from a pack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from onehour.data.augment import SHORTER, SIZE, TrainTransform, drawn_key, normalise, training_crop, validation_crop
from onehour.data.dataset import FaultError, KeyedDataset
from onehour.data.decode import LARGEST_PIXELS, PIXELS, decode
from onehour.data.division import divide
from onehour.data.index import index_of, read_index
from onehour.data.listing import SIDES, Files, Names, Table, expected, list_classes, list_side, list_sides, refuse
from onehour.data.pack import Shards, shards_of
from onehour.rules.arguments import positive_int

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Per channel, of ImageNet's training images (§5.1)."""


@dataclass(frozen=True)
class ImageOptions:
    """What decides the pixels of images besides their files: fields of a recipe, which says what each does.

    With `bad_images` "skip" the stream's next sample of the same worker is trained on in place of an image that cannot
    be read.
    """

    bad_images: str = "error"
    exif_orientation: bool = False
    pixel_cap: int = PIXELS
    image_size: int = SIZE
    test_resize: int | None = None
    train_transform: str = ""

    def __post_init__(self) -> None:
        if positive_int("pixel_cap", self.pixel_cap) > LARGEST_PIXELS:
            raise ValueError(f"pixel_cap is {self.pixel_cap}; expected at most {LARGEST_PIXELS}, Pillow's own limit")
        size = positive_int("image_size", self.image_size)
        if positive_int("test_resize", self.shorter) < size:
            raise ValueError(f"test_resize is {self.test_resize}; expected at least image_size, {size}")

    @property
    def shorter(self) -> int:
        """The shorter side of test images, before their centre is taken."""
        return round(self.image_size * SHORTER / SIZE) if self.test_resize is None else self.test_resize


class Images(KeyedDataset):
    """Images of any size and format as the paper's crops (§5.1); a map-style data set of uint8 (3, size, size).

    Args:
        augmented: the training crop and flip, drawn from each sample's key; otherwise the test crop.
    """

    def __init__(self, source: Files | Shards, *, augmented: bool, options: ImageOptions | None = None) -> None:
        self.source, self.augmented, self.options = source, augmented, options or ImageOptions()
        self.skips = augmented and self.options.bad_images == "skip"
        transform = self.options.train_transform
        self._transformed = TrainTransform(transform) if augmented and transform else None

    @property
    def classes(self) -> list[str]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.keyed(index, key=drawn_key())

    def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
        """Image `index`, its crop and flip a pure function of `key`, and its label."""
        options = self.options
        pixels = self._decoded(self.source.read(index), self.source.name(index))
        if self._transformed is not None:
            image = self._transformed(pixels, key)
        elif self.augmented:
            image = training_crop(pixels, key, options.image_size)
        else:
            image = validation_crop(pixels, options.image_size, options.shorter)
        return image, int(self.source.labels[index])

    def from_file(self, data: bytes, name: str) -> Tensor:
        """The test crop of an image file's bytes; FaultError, naming the file, if it cannot be decoded."""
        return validation_crop(self._decoded(data, name), self.options.image_size, self.options.shorter)

    def _decoded(self, data: bytes, name: str) -> np.ndarray:
        return decode(data, name, exif=self.options.exif_orientation, pixels=self.options.pixel_cap)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def prepare(self, images: Tensor) -> Tensor:
        return normalise(images, MEAN, STD)

    @property
    def facts(self) -> dict[str, Any]:
        """What a recipe says of such data: how it is read, and the shorter side that a pack made of larger images."""
        return {**vars(self.options), "resized": getattr(self.source, "resized", None)}


def image_folder(root: str | Path, options: ImageOptions | None = None) -> tuple[Images, Images]:
    """Training and validation images of a folder DIR/train/CLASS/* and DIR/val/CLASS/*, of its index, or of a pack.

    DIR is listed unless it holds an index. The first have the training crop, the second the test crop.
    """
    sides = open_sides(Path(root))
    train, validation = (Images(sides[side], augmented=side == "train", options=options) for side in SIDES)
    return train, validation


def image_files(options: ImageOptions | None = None) -> Images:
    """No samples of its own: reads files by the test crop."""
    none = Table([], np.zeros(0, np.int32), Names.of(()), None, None)
    return Images(Files(Path(), none), augmented=False, options=options)


def divided_folder(
    root: str | Path, share: float, seed: int, options: ImageOptions | None = None
) -> tuple[Images, Images]:
    """Training and validation images of one folder DIR/CLASS/*, or DIR/train/CLASS/* where there is no DIR/val."""
    root = Path(root)
    part = root / "train"
    if index_of(root) is not None or (part.is_dir() and (root / "val").is_dir()):
        raise ValueError(f"{root} has a validation part; leave validation {share:g} out")
    if not (part.is_dir() and list_classes(part, [])):  # else it is a class of that name
        part = root
    faults: list[FaultError] = []
    table = list_side(part, list_classes(part, faults), faults)
    refuse(faults, None)
    parts = [Files(part, table.take(indices)) for indices in divide(table.labels, share, seed, table.classes)]
    return Images(parts[0], augmented=True, options=options), Images(parts[1], augmented=False, options=options)


def open_sides(root: Path, *, sizes: bool = False) -> dict[str, Files | Shards]:
    """The sources of a folder, an index or a pack, by "train" and "val"; `sizes` of files, which an index knows."""
    if (place := index_of(root)) is not None:
        index = read_index(place)
        if index.about["kind"] == "pack":
            packs = {side: shards_of(index, side) for side in SIDES}
            for fault in (fault for source in packs.values() for fault in source.faults().values()):
                raise fault
            return dict(packs)
        files = {side: index.files(side) for side in SIDES}
        if changed := index.changes():
            more = f" and {len(changed) - 1} more changes" if len(changed) > 1 else ""
            raise ValueError(f"{place} is out of date: {changed[0]}{more}")
        return dict(files)
    if not root.is_dir():
        kind = "index" if root.suffix == ".index" else "folder"
        raise ValueError(f"there is no {kind} {root}; {expected(root)}")
    faults: list[FaultError] = []
    tables = list_sides(root, faults, sizes=sizes)
    refuse(faults, root)
    return {side: Files(root / side, table) for side, table in tables.items()}
