"""What a loader process does: samples by key, another one in the place of a bad one, collated to a part of a batch."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from onehour.data.bad import IN_A_ROW, following
from onehour.data.faults import FaultError
from onehour.entry import blame
from onehour.rules.keys import seed_for
from onehour.rules.shuffle import SampleStream

__all__ = ["Key", "Keyed", "Part", "Samples", "collated"]

Key = tuple[int, int, int]
"""Epoch, index and position in the stream of a sample."""


class Samples(NamedTuple):
    """(image, label) pairs, and the indices of those that could not be read and were replaced."""

    pairs: list[Any]
    skipped: list[int]


class Part(NamedTuple):
    """Some samples of a batch, as they travel between processes."""

    images: Tensor
    """(n, C, H, W), or (n, H, W, C) where the channels of the images lie together."""
    channels_last: bool
    labels: bytes
    """n int64."""
    skipped: list[int]


class Keyed(Dataset[Any]):
    """A data set asked by (epoch, index): `keyed` is given their key, else it seeds every global generator before.

    So a random transform gives the same image in any loader process, and another one each epoch.

    Args:
        dataset: map-style, of (image, label).
        seed: of the run.
        stream: where another sample comes from when one is bad; None where a bad one is an error.

    >>> from torch.utils.data import TensorDataset
    >>> train = TensorDataset(torch.arange(3.0), torch.arange(3))
    >>> Keyed(train, seed=0)[(0, 2)]
    (tensor(2.), tensor(2))
    """

    def __init__(self, dataset: Any, seed: int, stream: SampleStream | None = None) -> None:
        self.dataset, self.seed, self.stream = dataset, seed, stream

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        return self._sample(index, seed_for(self.seed, "sample", epoch, index))

    def __getitems__(self, keys: list[Key]) -> Samples | ValueError:
        """The samples of a part; an error is returned, since a loader process would raise it wrapped in its trace."""
        pairs, skipped = [], []
        try:
            for epoch, index, position in keys:
                try:
                    pairs.append(self[(epoch, index)])
                except FaultError as fault:
                    if self.stream is None:
                        raise
                    pairs.append(self._substitute(self.stream, position, fault))
                    skipped.append(index)
        except ValueError as error:
            return error
        return Samples(pairs, skipped)

    def _sample(self, index: int, number: int) -> Any:
        keyed = getattr(self.dataset, "keyed", None)
        if keyed is None:
            random.seed(number)
            np.random.seed(number & 0xFFFFFFFF)
            torch.default_generator.manual_seed(number)
        try:
            return self.dataset[index] if keyed is None else keyed(index, number)
        except Exception as error:
            if keyed is not None and isinstance(error, ValueError):
                raise
            raise ValueError(f"sample {index} of the data cannot be read: {blame(error)}") from error

    def _substitute(self, stream: SampleStream, position: int, first: FaultError) -> Any:
        """The next sample of the position's worker that can be read, its crop keyed by the position that it fills."""
        number = seed_for(self.seed, "substitute", position)
        for _, (_, index) in zip(range(IN_A_ROW), following(stream, position), strict=False):
            try:
                return self._sample(index, number)
            except FaultError:
                continue
        raise ValueError(f"{first} ({IN_A_ROW} samples after it cannot be read either: is the disk there?)")


def collated(samples: Samples | ValueError) -> Part | ValueError:
    """A part of a batch; images whose channels lie together in memory are stacked as they lie.

    >>> collated(Samples([(torch.zeros(3, 4, 4), 1)], [])).images.shape
    torch.Size([1, 3, 4, 4])
    """
    if isinstance(samples, ValueError):
        return samples
    images = [image for image, _ in samples.pairs]
    first = images[0]
    other = next((image for image in images if getattr(image, "shape", None) != getattr(first, "shape", None)), None)
    if other is not None:
        shapes = f"{tuple(first.shape)} and {tuple(other.shape)}"
        return ValueError(f"images of the data differ in shape ({shapes}); bring them to one size first")
    channels_last = torch.is_tensor(first) and first.ndim == 3 and first.permute(1, 2, 0).is_contiguous()
    if channels_last:
        images = [image.permute(1, 2, 0) for image in images]
    labels = np.array([int(label) for _, label in samples.pairs], np.int64)
    return Part(default_collate(images), channels_last, labels.tobytes(), samples.skipped)
