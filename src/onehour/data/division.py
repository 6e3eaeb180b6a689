"""One data set as a training and a validation part: keyed by the run's seed, of each class the same share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from onehour.data.dataset import KeyedDataset, as_label, in_memory
from onehour.data.processes import in_child
from onehour.data.samples import Keyed, pair_of
from onehour.rules.keys import random_bits, seed_for


def divide(
    labels: np.ndarray, share: float, seed: int, classes: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Which samples are trained on, and which are validated on; a pure function of its arguments.

    Of a class of m samples ⌊share·m + 1/2⌋ are validated on: those whose random numbers are the smallest. Of N labels
    the indices of both are returned, each in ascending order.
    """
    found, counts = np.unique(labels, return_counts=True)
    _refuse_share(share, int(counts.min()), int(found[counts.argmin()]), classes)
    held: list[np.ndarray] = []
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    for label, own in zip(found.tolist(), members, strict=True):
        order = np.argsort(random_bits(seed_for(seed, "division", label), len(own)), kind="stable")
        held.append(own[order[: _held(share, len(own))]])
    validation = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def divided(dataset: Any, share: float, seed: int) -> tuple[Any, Any]:
    """A data set of (image, label) as two; all labels are read, by a process of its own unless they lie in memory."""
    if in_memory(dataset):
        labels = dataset.tensors[1].cpu().numpy()
    else:
        keyed, what = Keyed(dataset, seed), "the reading of all labels, by which validation divides the data"
        read = in_child(lambda: [_label(keyed, index) for index in range(len(dataset))], what, patience=None)
        labels = np.array(read)
    train, validation = (_part(dataset, indices) for indices in divide(labels, share, seed))
    return train, validation


def _label(keyed: Keyed, index: int) -> int:
    sample = keyed[(0, index)]
    try:
        return as_label(pair_of(sample)[1])
    except ValueError as error:
        raise ValueError(f"{keyed.called(index)}: {error}") from error


def _held(share: float, samples: int) -> int:
    return math.floor(Fraction(str(share)) * samples + Fraction(1, 2))


def _refuse_share(share: float, samples: int, label: int, classes: Sequence[str] | None) -> None:
    """Look at the smallest class: where it has a sample on each side, all have."""
    held = _held(share, samples)
    if 0 < held < samples:
        return
    name = repr(classes[label]) if classes is not None else f"{label}"
    if samples == 1:
        raise ValueError(f"class {name} has one image, and validation needs one beside it: add some, or leave it out")
    bound = math.ceil(10_000 / (2 * samples)) / 10_000
    side, use = ("training", f"less than {1 - bound:g}") if held else ("validation", f"at least {bound:g}")
    raise ValueError(f"validation {share:g} leaves class {name} of {samples} images without a {side} image; use {use}")


def _part(dataset: Any, indices: np.ndarray) -> Any:
    if in_memory(dataset):
        return TensorDataset(*(tensor[torch.from_numpy(indices)] for tensor in dataset.tensors))
    return KeyedPart(dataset, indices) if isinstance(dataset, KeyedDataset) else _Part(dataset, indices.tolist())


class _Part(Subset[Any]):
    """Some samples of anyone's data set."""

    @property
    def classes(self) -> Any:
        dataset: Any = self.dataset
        return dataset.classes


class KeyedPart(KeyedDataset):
    """Some samples of a data set that offers more."""

    def __init__(self, dataset: KeyedDataset, indices: np.ndarray) -> None:
        self.dataset, self.indices, self.skips = dataset, indices, dataset.skips

    @property
    def classes(self) -> Any:
        dataset: Any = self.dataset
        return dataset.classes

    @property
    def facts(self) -> dict[str, Any] | None:
        return self.dataset.facts

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def keyed(self, index: int, key: int) -> tuple[Tensor, Any]:
        return self.dataset.keyed(int(self.indices[index]), key)

    def prepare(self, images: Tensor) -> Tensor:
        return self.dataset.prepare(images)

    def from_file(self, data: bytes, name: str) -> Tensor:
        return self.dataset.from_file(data, name)

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.indices[index]))
