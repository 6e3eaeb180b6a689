"""What a data set offers: samples, labels, and faults; whoever derives from `KeyedDataset` offers more, on purpose.

A label names a class by a whole number from 0 to C − 1, which is checked on the host as samples are read. torch's
cross-entropy leaves out the label −100 without a word, and a label outside the classes ends a GPU's context.
"""

from __future__ import annotations

import math
import numbers
import operator
import random
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from onehour.messages import shown

__all__ = ["KeyedDataset"]


class FaultError(ValueError):
    """One file, folder or image that cannot be used as it is. Its text is one line.

    Args:
        problem: continues the path to a sentence, e.g. "is an empty file".
        note: True where nothing is lost but a person should know.
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

    def from_file(self, data: bytes, name: str) -> Tensor:
        """The image of a file that is not of the data set, as its own are before `prepare`: for `onehour predict`.

        Args:
            data: the file's bytes.
            name: its path, for messages.

        Raises:
            FaultError: a ValueError, if it is no such image.
            ValueError: unless it is defined: a data set knows its samples, and need not know files.
        """
        raise ValueError(f"a {type(self).__name__} does not say how it reads {name}; define from_file(data, name)")

    def name(self, index: int) -> str:
        """Where sample `index` lies, for messages; opens nothing."""
        return ""


def seed_generators(key: int) -> None:
    """Seed every global generator: Python's, numpy's and torch's."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)


def in_memory(dataset: Any) -> bool:
    """Whether the samples are tensors in memory that are the same each time: batches are then plain gathers."""
    return type(dataset) is TensorDataset and len(dataset.tensors) > 0


def as_label(value: Any) -> int:
    """The whole number that a label is, whatever holds it; whether there is such a class is not looked at.

    Args:
        value: an int, a bool, a numpy number, a float without a fraction, or a tensor or an array of shape () or (1,)
            that holds one.
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
    """The same for a tensor of N labels: itself where it is one of whole numbers (N,), else int64 (N,)."""
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
            raise ValueError(f"label {first} is {flat[first].item():g}, not a whole number")
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
    """C, and where it comes from, for messages."""

    count: int
    source: str

    def checked(self, label: object) -> int:
        expected = f"expected a whole number from 0 to {self.count - 1}, since C = {self.count} ({self.source})"
        try:
            number = as_label(label)
        except ValueError as error:
            raise ValueError(f"{error}; {expected}") from error
        if not 0 <= number < self.count:
            raise ValueError(f"the label is {number}; {expected}")
        return number


def refuse_labels(labels: Tensor, classes: Classes, name: Callable[[int], str]) -> None:
    """Check the labels of samples in memory, once; messages call sample i by its name."""
    whole = not labels.is_floating_point() and not labels.is_complex()
    if whole and labels.ndim == 1 and int(labels.min()) >= 0 and int(labels.max()) < classes.count:
        return
    for index, label in enumerate(labels.cpu()):
        try:
            classes.checked(label)
        except ValueError as error:
            raise ValueError(f"{name(index)}: {error}") from error
