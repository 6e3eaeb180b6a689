"""Feeds a process the batches of its passes, from any iteration on; no batch depends on how many processes load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onehour.data.dataset import Classes, KeyedDataset, in_memory, refuse_labels
from onehour.data.loader_processes import PATIENCE, LoaderProcesses
from onehour.data.samples import ARRAYS, IMAGES_AND_LABELS, Form, Keyed, leaves, mapped
from onehour.data.sources import Look, look
from onehour.rules.shuffle import SampleStream

Batch = Any
"""(images, labels), or the tree that a task's own samples make."""
CHUNK = 256
"""Validation samples evaluated together, whatever the number of processes, so that no bit depends on it."""
SPARE = 1024
"""Bytes of a batch beside its images and labels, so that each tensor begins at a round address."""


class Feed:
    """A data set's batches on a device, and the processes that load them, which stay from one use to the next.

    Tensors in memory are gathered, without a process.

    Args:
        seed: keys whatever is random in a sample.
        loaders: processes that load; 0 loads in this one. Changes no sample.
        device: where batches are wanted. For CUDA they are copied beside the computation, from pinned memory.
        classes: that labels must be of: those of tensors in memory are checked now, others as they are read.
        look: at the data set; where there is none, it is looked at when the first batch is asked for.
        patience: seconds that a process may take for a sample before it counts as stuck; None waits for ever.
        warn: is told of every process that ended or was stuck, and was replaced; None writes to standard error.
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
        form: Form = IMAGES_AND_LABELS,
        patience: float | None = PATIENCE,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.dataset, self.loaders, self.device, self.stream = dataset, loaders, device, stream
        self.skipped = Skipped()
        """Images that could not be read, of the batches given so far."""
        side = "training" if stream is not None else "validation"
        substitutes = stream if isinstance(dataset, KeyedDataset) and dataset.skips else None
        self._keyed = Keyed(dataset, seed, substitutes, classes=classes, side=side, form=form)
        if classes is not None and in_memory(dataset):
            refuse_labels(self.dataset.tensors[1], classes, self.called)
        self._patience, self._warn = patience, warn
        self._gathers = in_memory(dataset) and form.collate is None
        self._look = look
        self._processes: LoaderProcesses | None = None
        self._largest = 0
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def own(self) -> bool:
        """Whether samples are a task's own, of any kind."""
        return self._keyed.form.own

    @property
    def samples(self) -> int:
        return self._looked().samples

    def passes(self, passes: list[range], *, start: int, stop: int) -> Iterator[Batch]:
        """The batch of every pass, of the workers of each, of the iterations [start, stop)."""
        assert self.stream is not None
        if self._gathers:
            return _gathered(self._tensors(), self.stream, passes, range(start, stop), self.device)
        largest = self.stream.minibatch.per_worker * max(map(len, passes), default=1)
        return self._loaded(_pass_keys(self.stream, passes, range(start, stop)), largest)

    def chunks(self, chunks: range) -> Iterator[Batch]:
        """The batches of the chunks of `CHUNK` consecutive samples with these numbers."""
        spans = [range(c * CHUNK, min((c + 1) * CHUNK, self.samples)) for c in chunks]
        if self._gathers:
            tensors = self._tensors()
            place = partial(torch.Tensor.to, device=self.device, copy=True)  # a model may write into what it is given
            return (tuple(place(tensor[span.start : span.stop]) for tensor in tensors) for span in spans)
        indices = (np.arange(span.start, span.stop) for span in spans)
        return self._loaded((np.stack((0 * i, i, i), 1) for i in indices), CHUNK) if spans else iter(())

    def called(self, index: int) -> str:
        """What a message calls a sample: its side, its index and, where it is known, its file."""
        return self._keyed.called(index)

    def close(self) -> None:
        if self._processes is not None:
            self._processes.close()

    @property
    def pids(self) -> list[int]:
        return self._processes.pids if self._processes is not None else []

    def _looked(self) -> Look:
        self._look = self._look or look(self._keyed.side, self.dataset, self._keyed.form)
        return self._look

    def _tensors(self) -> tuple[Tensor, ...]:
        """In memory; labels as cross-entropy takes them."""
        if self._keyed.form.own:
            return self.dataset.tensors
        images, labels = self.dataset.tensors
        return images, labels.long()

    def _loaded(self, batches: Iterable[np.ndarray], largest: int) -> Iterator[Batch]:
        seen = self._looked()
        self._keyed.kind = tuple(seen.image.shape), seen.image.dtype
        if self._processes is not None and largest > self._largest:  # a ramp's next minibatch
            self._processes.close()
            self._processes = None
        if self.loaders and self._processes is None:
            self._largest = largest
            arrays = [leaf for leaf in leaves(seen.sample) if isinstance(leaf, ARRAYS)] or [seen.image]
            batch_bytes = largest * (sum(array.nbytes for array in arrays) + 8) + SPARE
            self._processes = LoaderProcesses(
                self._keyed, loaders=self.loaders, batch_bytes=batch_bytes, patience=self._patience, warn=self._warn
            )
        if self._processes is not None:
            made = self._processes.batches(batches)
        else:
            made = (self._keyed.batch(keys.tolist()) for keys in batches)
        for tree, skipped in made:
            with torch.cuda.stream(self._copies) if self._copies is not None else nullcontext():
                batch = mapped(tree, partial(moved, device=self.device))
            if self._copies is not None:
                computing = torch.cuda.current_stream(self.device)
                computing.wait_stream(self._copies)
                for tensor in leaves(batch):
                    if isinstance(tensor, Tensor):
                        tensor.record_stream(computing)
            self.skipped.add(skipped)
            yield prepared_batch(self.dataset, batch)


def prepared(dataset: Any, images: Any) -> Any:
    """Images, or a task's whole batch, as the model takes them: through `KeyedDataset.prepare`, where it is one."""
    return dataset.prepare(images) if isinstance(dataset, KeyedDataset) else images


def prepared_batch(dataset: Any, batch: Any) -> Any:
    """The images of a pair through `prepared`; any other tree as a whole."""
    parts: Any = batch
    if isinstance(batch, tuple) and len(parts) == 2:
        return prepared(dataset, parts[0]), parts[1]
    return prepared(dataset, parts)


def moved(leaf: Any, device: torch.device) -> Any:
    """A tensor of a batch on a device, a copy of its own; to a GPU from pinned memory, beside whatever it computes.

    Its memory is contiguous on a CPU, and ordered as it is on a GPU, which reorders it faster.
    """
    if not isinstance(leaf, Tensor):
        return leaf
    together = leaf.ndim == 4 and not leaf.is_contiguous() and leaf.permute(0, 2, 3, 1).is_contiguous()
    if device.type != "cpu":
        plain = leaf.permute(0, 2, 3, 1) if together else leaf
        there = plain.pin_memory().to(device, non_blocking=True)
        return there.permute(0, 3, 1, 2) if together else there
    copy = torch.empty(leaf.shape, dtype=leaf.dtype)
    if not together:
        return copy.copy_(leaf)
    for to, plane in zip(copy.unbind(1), leaf.unbind(1), strict=True):  # a transpose takes twice as long
        to.copy_(plane)
    return copy


def _pass_keys(stream: SampleStream, passes: list[range], iterations: range) -> Iterator[np.ndarray]:
    for iteration in iterations:
        for workers in passes:
            epochs, indices = stream.epochs_and_indices(iteration, workers)
            yield np.stack((epochs, indices, stream.positions(iteration, workers)), 1)


def _gathered(
    tensors: tuple[Tensor, ...], stream: SampleStream, passes: list[range], iterations: range, device: torch.device
) -> Iterator[Batch]:
    placed = [tensor.to(device) for tensor in tensors]
    for iteration in iterations:
        for workers in passes:
            chosen = torch.from_numpy(stream.indices(iteration, workers))
            chosen = chosen if device.type == "cpu" else moved(chosen, device)
            yield tuple(tensor.index_select(0, chosen) for tensor in placed)


class Skipped:
    """Which images this process could not read, and how many times another took their place."""

    def __init__(self) -> None:
        self.indices: set[int] = set()
        self._since = 0

    def add(self, indices: list[int]) -> None:
        self.indices.update(indices)
        self._since += len(indices)

    def take(self) -> int:
        """How many since the last call."""
        since, self._since = self._since, 0
        return since
