"""CIFAR-10 from its "python version" archive, read without pickle, since unpickling may run anything."""

from __future__ import annotations

import gzip
import pickletools
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from onehour.data.augment import TrainTransform, drawn_key, normalise, uniform
from onehour.data.dataset import KeyedDataset
from onehour.data.decode import decode, of_size

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Per channel, of the 50,000 training images."""
SIDE, PADDING = 32, 4
PIXELS = 3 * SIDE * SIDE
TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
TEST = ["test_batch"]
WHOLE_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG1")
LARGEST = 2**26
"""Bytes of a batch that are read at most; real ones have 31 million."""
EXPECTED = "expected cifar-10-python.tar.gz as https://www.cs.toronto.edu/~kriz/cifar.html has it"


class Cifar(KeyedDataset):
    """Small images in memory; a map-style data set of uint8 (3, 32, 32).

    Args:
        images: uint8 (N, 3, 32, 32).
        labels: N whole numbers.
        augmented: padded by 4 black pixels, cropped to 32 anywhere and flipped half of the time, by each sample's key.
        transform: package.module:function, see `TrainTransform`; what is done to augmented images instead.
    """

    def __init__(self, images: Tensor, labels: list[int], *, augmented: bool, transform: str = "") -> None:
        self.images, self.labels, self.augmented, self.classes = images, np.array(labels), augmented, CLASSES
        self.transform = transform
        self._transformed = TrainTransform(transform) if augmented and transform else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.keyed(index, key=drawn_key())

    def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
        """Image `index`, its crop and flip a pure function of `key`, and its label."""
        image, label = self.images[index], int(self.labels[index])
        if not self.augmented:
            return image, label
        if self._transformed is not None:
            return self._transformed(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), key), label
        vertical, horizontal, flip = uniform(key, 3).tolist()
        top, left = int(vertical * (2 * PADDING + 1)), int(horizontal * (2 * PADDING + 1))
        image = F.pad(image, (PADDING,) * 4)[:, top : top + SIDE, left : left + SIDE]
        return image.flip(-1) if flip < 0.5 else image, label

    def from_file(self, data: bytes, name: str) -> Tensor:
        """An image file of 32×32 pixels as uint8 (3, 32, 32); FaultError for another size."""
        return torch.from_numpy(of_size(decode(data, name), SIDE, name)).permute(2, 0, 1).contiguous()

    @property
    def facts(self) -> dict[str, Any]:
        return {"train_transform": self.transform}

    def prepare(self, images: Tensor) -> Tensor:
        return normalise(images, MEAN, STD)


def cifar10(path: str | Path, transform: str = "") -> tuple[Cifar, Cifar]:
    """Of cifar-10-python.tar.gz five batches of 10,000 images to train on, augmented, and the test batch as it is.

    Nothing in it is executed or written to disk.
    """
    batches = _batches(Path(path))
    sides = []
    for names in (TRAIN, TEST):
        missing = [name for name in names if name not in batches]
        if missing:
            raise ValueError(f"{path} is not CIFAR-10's archive: it has no {', '.join(missing)}; {EXPECTED}")
        images, labels = zip(*(batches[name] for name in names), strict=True)
        sides.append((torch.cat(images), [label for part in labels for label in part]))
    return Cifar(*sides[0], augmented=True, transform=transform), Cifar(*sides[1], augmented=False)


def _batches(path: Path) -> dict[str, tuple[Tensor, list[int]]]:
    batches = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in (*TRAIN, *TEST) and member.isfile() and member.size <= LARGEST:
                    file = archive.extractfile(member)
                    assert file is not None
                    batches[name] = _parse(file.read(), f"{path}: {name}")
            while stream.read(LARGEST):
                pass  # The checksum is behind the end of the last member.
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}; {EXPECTED}") from error
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an archive: {error}; {EXPECTED}") from error
    return batches


def _parse(pickled: bytes, where: str) -> tuple[Tensor, list[int]]:
    """Images (N, 3, 32, 32) and N labels of a pickled batch, taken from its disassembly.

    A batch is a dict of 'data', an array whose bytes are the one text of 3,072 or more, and 'labels', the whole numbers
    that follow that key. Python 2 writes both texts as str, Python 3 as bytes or, in protocol 2, as Latin-1 in UTF-8.
    """
    blocks: list[bytes] = []
    labels: list[int] = []
    in_labels = False
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if isinstance(argument, str | bytes | bytearray):
                # genops gives Python 2's str as Latin-1.
                text = argument.encode("latin-1") if isinstance(argument, str) else bytes(argument)
                in_labels = text == b"labels"
                if len(text) >= PIXELS:
                    blocks.append(text)
            elif in_labels and opcode.name in WHOLE_NUMBERS and isinstance(argument, int):
                labels.append(argument)
            elif opcode.name in ("SETITEM", "SETITEMS"):
                in_labels = False
    except ValueError as error:
        raise ValueError(f"{where} is not a pickled batch of CIFAR-10: {error}; {EXPECTED}") from error
    if len(blocks) != 1 or len(blocks[0]) != PIXELS * len(labels):
        found = f"{len(blocks)} blocks of {[len(block) for block in blocks]} bytes and {len(labels)} labels"
        raise ValueError(f"{where} has {found}, not one block of 3,072 bytes a label; {EXPECTED}")
    if min(labels) < 0 or max(labels) >= len(CLASSES):
        raise ValueError(f"{where} has labels from {min(labels)} to {max(labels)}, not 0 to 9; {EXPECTED}")
    pixels = np.frombuffer(bytearray(blocks[0]), np.uint8)
    return torch.from_numpy(pixels).view(-1, 3, SIDE, SIDE), labels
