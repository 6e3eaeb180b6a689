"""Feeds a process the batches of its passes, from any iteration on, whatever the number of loader processes.

A data set may have two methods of ours beside `__len__` and `__getitem__`:
- `keyed(index, key) -> (image, label)` takes its random numbers from the 63-bit key alone. It is called instead of
  `__getitem__`, and no global generator is seeded. Its ValueErrors name the place and the remedy: they pass unchanged.
- `prepare(images) -> images` makes of a batch on the device what the model takes, e.g. floats of bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from onehour.entry import blame
from onehour.rules.keys import seed_for
from onehour.rules.shuffle import SampleStream

__all__ = ["CHUNK", "Batch", "chunk_batches", "in_memory", "pass_batches", "prepared"]

Batch = tuple[Tensor, Tensor]
CHUNK = 256
"""Validation samples evaluated together, whatever the number of processes, so that no bit depends on it."""


class Keyed(Dataset[Any]):
    """A data set asked by (epoch, index): `keyed` is given their key, else it seeds every global generator before.

    So a random transform gives the same image in any loader process, and another one each epoch.

    >>> train = TensorDataset(torch.arange(3.0), torch.arange(3))
    >>> Keyed(train, seed=0)[(0, 2)]
    (tensor(2.), tensor(2))
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        number = seed_for(self.seed, "sample", epoch, index)
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

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any] | ValueError:
        """The samples of a batch; an error is returned, since a loader process would raise it wrapped in its trace."""
        try:
            return [self[key] for key in keys]
        except ValueError as error:
            return error


class PassKeys:
    """The (epoch, index) keys of each pass of each iteration: a batch sampler."""

    def __init__(self, stream: SampleStream, passes: list[range], start: int, stop: int) -> None:
        self.stream, self.passes, self.start, self.stop = stream, passes, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for iteration in range(self.start, self.stop):
            for workers in self.passes:
                epochs, indices = self.stream.epochs_and_indices(iteration, workers)
                yield list(zip(epochs.tolist(), indices.tolist(), strict=True))

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.passes)


def in_memory(dataset: Any) -> bool:
    """Whether the samples are tensors in memory that are the same each time: batches are then plain gathers.

    >>> in_memory(TensorDataset(torch.zeros(2), torch.zeros(2)))
    True
    """
    return type(dataset) is TensorDataset and len(dataset.tensors) == 2


def pass_batches(
    dataset: Any,
    stream: SampleStream,
    passes: list[range],
    *,
    start: int,
    stop: int,
    loaders: int,
    device: torch.device,
) -> Iterator[Batch]:
    """(images, labels) of every pass of the iterations [start, stop), on the device.

    Args:
        dataset: map-style, of (image, label).
        stream: the run's samples.
        passes: the workers of each of this process's passes.
        loaders: processes that load; 0 loads in this one. Changes no sample.

    >>> data = TensorDataset(torch.arange(8.0), torch.arange(8))
    >>> stream = SampleStream(samples=8, minibatch=4, seed=0)
    >>> batches = pass_batches(data, stream, [range(1)], start=0, stop=2, loaders=0, device=torch.device("cpu"))
    >>> sorted(int(label) for _, labels in batches for label in labels)
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if in_memory(dataset):
        images, labels = (tensor.to(device) for tensor in dataset.tensors)
        for iteration in range(start, stop):
            for workers in passes:
                chosen = torch.from_numpy(stream.indices(iteration, workers)).to(device, non_blocking=True)
                yield images.index_select(0, chosen), labels.index_select(0, chosen).long()
        return
    keys = PassKeys(stream, passes, start, stop)
    yield from _loaded(Keyed(dataset, stream.seed), keys, loaders, device)


def chunk_batches(dataset: Any, chunks: range, *, seed: int, loaders: int, device: torch.device) -> Iterator[Batch]:
    """(images, labels) of the chunks of `CHUNK` consecutive samples with the given numbers, on the device.

    >>> data = TensorDataset(torch.arange(300.0), torch.arange(300))
    >>> [len(labels) for _, labels in chunk_batches(data, range(2), seed=0, loaders=0, device=torch.device("cpu"))]
    [256, 44]
    """
    spans = [range(c * CHUNK, min((c + 1) * CHUNK, len(dataset))) for c in chunks]
    if in_memory(dataset):
        images, labels = dataset.tensors
        for span in spans:
            yield images[span.start : span.stop].to(device), labels[span.start : span.stop].to(device).long()
        return
    keys = [[(0, index) for index in span] for span in spans]
    yield from _loaded(Keyed(dataset, seed_for(seed, "validation")), keys, loaders, device)


def prepared(dataset: Any, images: Tensor) -> Tensor:
    """A batch as the model takes it: through the data set's `prepare`, where it has one.

    >>> prepared(TensorDataset(torch.zeros(2)), torch.ones(1, 3, 2, 2)).dtype
    torch.float32
    """
    return dataset.prepare(images) if hasattr(dataset, "prepare") else images


def _collated(samples: list[Any] | ValueError) -> Any:
    """The samples as a batch; images whose channels lie together in memory stay so."""
    if isinstance(samples, ValueError):
        return samples
    image = samples[0][0]
    other = next((item for item, _ in samples if getattr(item, "shape", None) != getattr(image, "shape", None)), None)
    if other is not None:
        shapes = f"{tuple(image.shape)} and {tuple(other.shape)}"
        return ValueError(f"images of the data differ in shape ({shapes}); bring them to one size first")
    if torch.is_tensor(image) and image.ndim == 3 and image.permute(1, 2, 0).is_contiguous():
        # Stacked as they lie, bytes are only copied; a GPU then transposes them in next to no time.
        images, labels = default_collate([(image.permute(1, 2, 0), label) for image, label in samples])
        return images.permute(0, 3, 1, 2), labels
    return default_collate(samples)


def _loaded(dataset: Keyed, keys: Any, loaders: int, device: torch.device) -> Iterator[Batch]:
    pinned = device.type == "cuda"
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=min(loaders, len(keys)),
        pin_memory=pinned,
        prefetch_factor=4 if loaders and len(keys) else None,
        collate_fn=_collated,
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        images, labels = batch
        images = prepared(dataset.dataset, images.to(device, non_blocking=pinned).contiguous())
        yield images, torch.as_tensor(labels).to(device, non_blocking=pinned).long()
