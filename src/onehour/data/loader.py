"""Feeds a process the batches of its passes, from any iteration on, whatever the number of loader processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onehour.data.bad_images import Skipped
from onehour.data.dataset import KeyedDataset
from onehour.data.loader_processes import PATIENCE, LoaderProcesses
from onehour.data.look import Classes, Look, in_memory, refuse_labels
from onehour.data.processes import in_child
from onehour.data.samples import Key, Keyed, mapped, moved
from onehour.rules.keys import seed_for
from onehour.rules.shuffle import SampleStream

__all__ = ["CHUNK", "PATIENCE", "Batch", "Feed", "chunk_batches", "pass_batches", "prepared"]

Batch = tuple[Tensor, Tensor]
CHUNK = 256
"""Validation samples evaluated together, whatever the number of processes, so that no bit depends on it."""
SPARE = 1024
"""Bytes of a batch beside its images and labels, so that each tensor begins at a round address."""


class Feed:
    """A data set's batches on a device, and the processes that load them, which stay from one use to the next.

    Tensors in memory are gathered, without a process.

    Args:
        dataset: map-style, of (image, label).
        seed: keys whatever is random in a sample.
        loaders: processes that load; 0 loads in this one. Changes no sample.
        device: where batches are wanted. For CUDA they are copied beside the computation, from pinned memory.
        stream: the run's samples, for training.
        classes: that labels must be of: those of tensors in memory are checked now, others as they are read.
        look: at the data set; where there is none, one that loads looks first.
        patience: seconds that a process may take for a sample before it counts as stuck; None waits for ever.
        warn: is told of every process that ended or was stuck, and was replaced; None writes to standard error.

    Raises:
        ValueError: for a label of tensors in memory that is no class.

    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.arange(300.0), torch.arange(300))
    >>> feed = Feed(data, seed=0, loaders=0, device=torch.device("cpu"))
    >>> [len(labels) for _, labels in feed.chunks(range(2))]
    [256, 44]
    """

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int,
        loaders: int,
        device: torch.device,
        stream: SampleStream | None = None,
        classes: Classes | None = None,
        look: Look | None = None,
        patience: float | None = PATIENCE,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.dataset, self.loaders, self.device, self.stream = dataset, loaders, device, stream
        self.skipped = Skipped()
        """Images that could not be read, of the batches given so far."""
        side = "training" if stream is not None else "validation"
        substitutes = stream if isinstance(dataset, KeyedDataset) and dataset.skips else None
        self._keyed = Keyed(dataset, seed, substitutes, classes=classes, side=side)
        if classes is not None and in_memory(dataset):
            refuse_labels(self.dataset.tensors[1], classes, self.called)
        self._patience, self._warn = patience, warn
        self._look = look
        if look is not None:
            self._keyed.kind = tuple(look.image.shape), look.image.dtype
        self._processes: LoaderProcesses | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def samples(self) -> int:
        """How many the data set has."""
        return len(self.dataset) if self._look is None else self._look.samples

    def passes(self, passes: list[range], *, start: int, stop: int) -> Iterator[Batch]:
        """(images, labels) of every pass of the iterations [start, stop).

        Args:
            passes: the workers of each of this process's passes.
        """
        assert self.stream is not None
        if in_memory(self.dataset):
            return _gathered(self.dataset.tensors, self.stream, passes, range(start, stop), self.device)
        largest = self.stream.minibatch.per_worker * max(map(len, passes), default=1)
        return self._loaded(_pass_keys(self.stream, passes, range(start, stop)), largest)

    def chunks(self, chunks: range) -> Iterator[Batch]:
        """(images, labels) of the chunks of `CHUNK` consecutive samples with these numbers."""
        spans = [range(c * CHUNK, min((c + 1) * CHUNK, self.samples)) for c in chunks]
        if in_memory(self.dataset):
            return _sliced(self.dataset.tensors, spans, self.device)
        indices = (np.arange(span.start, span.stop) for span in spans)
        return self._loaded((np.stack((0 * i, i, i), 1) for i in indices), CHUNK) if spans else iter(())

    def called(self, index: int) -> str:
        """What a message calls a sample: its side, its index and, where it is known, its file."""
        return self._keyed.called(index)

    def close(self) -> None:
        """End the processes."""
        if self._processes is not None:
            self._processes.close()

    @property
    def pids(self) -> list[int]:
        """The processes that load, once a batch was asked for."""
        return self._processes.pids if self._processes is not None else []

    def _loaded(self, batches: Iterable[np.ndarray], largest: int) -> Iterator[Batch]:
        """The batches of these keys.

        Args:
            largest: samples of a batch at most.
        """
        if self._keyed.kind is None:
            first = self._keyed.first
            self._keyed.kind = in_child(first, "the first look at the data") if self.loaders else first()
        made = self._started(largest).batches(batches) if self.loaders else map(self._keyed.batch, _lists(batches))
        for tree, skipped in made:
            with torch.cuda.stream(self._copies) if self._copies is not None else nullcontext():
                images, labels = mapped(tree, partial(moved, device=self.device))
            if self._copies is not None:
                computing = torch.cuda.current_stream(self.device)
                computing.wait_stream(self._copies)
                for tensor in (images, labels):
                    tensor.record_stream(computing)
            self.skipped.add(skipped)
            yield prepared(self.dataset, images.contiguous()), labels

    def _started(self, largest: int) -> LoaderProcesses:
        """The processes, from the first time that a batch is asked for."""
        if self._processes is None:
            assert self._keyed.kind is not None
            shape, dtype = self._keyed.kind
            batch_bytes = largest * (math.prod(shape) * dtype.itemsize + 8) + SPARE
            self._processes = LoaderProcesses(
                self._keyed, loaders=self.loaders, batch_bytes=batch_bytes, patience=self._patience, warn=self._warn
            )
        return self._processes


def pass_batches(
    dataset: Any,
    stream: SampleStream,
    passes: list[range],
    *,
    start: int,
    stop: int,
    loaders: int,
    device: torch.device,
    classes: Classes | None = None,
    look: Look | None = None,
) -> Iterator[Batch]:
    """The batches of `Feed.passes`, from processes that end with them."""
    given: dict[str, Any] = {"loaders": loaders, "device": device, "classes": classes, "look": look}
    with closing(Feed(dataset, seed=stream.seed, stream=stream, **given)) as feed:
        yield from feed.passes(passes, start=start, stop=stop)


def chunk_batches(dataset: Any, chunks: range, *, seed: int, loaders: int, device: torch.device) -> Iterator[Batch]:
    """The batches of `Feed.chunks`, from processes that end with them."""
    with closing(Feed(dataset, seed=seed_for(seed, "validation"), loaders=loaders, device=device)) as feed:
        yield from feed.chunks(chunks)


def prepared(dataset: Any, images: Tensor) -> Tensor:
    """A batch as the model takes it: through `KeyedDataset.prepare`, where it is one."""
    return dataset.prepare(images) if isinstance(dataset, KeyedDataset) else images


def _pass_keys(stream: SampleStream, passes: list[range], iterations: range) -> Iterator[np.ndarray]:
    n, k = stream.minibatch.per_worker, stream.minibatch.workers
    rows = np.arange(n * k).reshape(n, k)
    for iteration in iterations:
        for workers in passes:
            epochs, indices = stream.epochs_and_indices(iteration, workers)
            positions = iteration * n * k + rows[:, workers.start : workers.stop].reshape(-1)
            yield np.stack((epochs, indices, positions), 1)


def _lists(batches: Iterable[np.ndarray]) -> Iterator[list[Key]]:
    return (keys.tolist() for keys in batches)


def _gathered(
    tensors: tuple[Tensor, ...], stream: SampleStream, passes: list[range], iterations: range, device: torch.device
) -> Iterator[Batch]:
    images, labels = (tensor.to(device) for tensor in tensors)
    for iteration in iterations:
        for workers in passes:
            chosen = moved(torch.from_numpy(stream.indices(iteration, workers)), device)
            yield images.index_select(0, chosen), labels.index_select(0, chosen).long()


def _sliced(tensors: tuple[Tensor, ...], spans: list[range], device: torch.device) -> Iterator[Batch]:
    images, labels = tensors
    for span in spans:
        yield images[span.start : span.stop].to(device), labels[span.start : span.stop].to(device).long()
