"""What a data set may offer besides its samples: whoever derives from `KeyedDataset` says so on purpose."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from onehour.messages import shown

__all__ = ["FaultError", "KeyedDataset", "seed_generators"]


class FaultError(ValueError):
    """One file, folder or image that cannot be used as it is. Its text is one line.

    Args:
        path: of what is wrong.
        problem: continues the path to a sentence, e.g. "is an empty file".
        remedy: what to do.
        note: True where nothing is lost but a person should know.

    >>> print(FaultError("a.jpg", "is an empty file", "replace or remove it"))
    a.jpg is an empty file; replace or remove it
    """

    def __init__(self, path: str, problem: str, remedy: str, *, note: bool = False) -> None:
        super().__init__(shown(f"{path} {problem}; {remedy}"))
        self.path, self.problem, self.remedy, self.note = path, problem, remedy, note

    def __reduce__(self) -> tuple[type[FaultError], tuple[str, str, str], dict[str, bool]]:
        return type(self), (self.path, self.problem, self.remedy), {"note": self.note}


class KeyedDataset(Dataset[Any]):
    """A map-style data set of (image, label) that draws from a key, gives bytes, or names its samples.

    Define `__len__`, and `keyed` or `__getitem__`; all else is as you like. Of a data set that does not derive from
    this class nothing but its samples and `classes` is looked at, whatever its attributes are called.

    `classes`, here as in any data set: a list of names, or their number.

    >>> class Bytes(KeyedDataset):
    ...     def __len__(self):
    ...         return 8
    ...     def keyed(self, index, key):
    ...         draws = torch.Generator().manual_seed(key)
    ...         return torch.randint(256, (3, 4, 4), dtype=torch.uint8, generator=draws), index % 2
    ...     def prepare(self, images):
    ...         return images.float() / 255
    >>> torch.equal(Bytes().keyed(3, key=7)[0], Bytes().keyed(3, key=7)[0])
    True
    """

    shape: tuple[int, int, int] | None = None
    """(C, H, W) of its images, if they are bytes whose channels lie together; the first image says it otherwise."""
    skips: bool = False
    """Whether an image whose `keyed` raises a `FaultError` is replaced by the stream's next one of its worker."""

    @property
    def facts(self) -> dict[str, Any] | None:
        """Fields of a recipe that only such data decides; None where it decides nothing."""
        return None

    def keyed(self, index: int, key: int) -> tuple[Tensor, Any]:
        """The image and the label of sample `index`; what is random in it is a function of `key` alone.

        Called in place of `[index]`. Where it is defined, no global generator is seeded, and its ValueErrors, which
        name the place and the remedy, pass unchanged. Where it is not, every global generator is seeded with the key.

        Args:
            key: 63 bits.
        """
        seed_generators(key)
        return self[index]

    def prepare(self, images: Tensor) -> Tensor:
        """What the model takes of a batch on the device, e.g. floats of bytes."""
        return images

    def name(self, index: int) -> str:
        """Where sample `index` lies, for messages; opens nothing."""
        return ""


def seed_generators(key: int) -> None:
    """Seed every global generator: Python's, numpy's and torch's."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)
