"""Training images that cannot be read: what is taken in their place, how many there may be, and their names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onehour.data.dataset import FaultError
from onehour.data.processes import in_child
from onehour.files import append_whole
from onehour.messages import shown
from onehour.rules.shuffle import SampleStream

__all__ = ["BAD_IMAGES", "IN_A_ROW", "SHARE", "Skipped", "following", "name_skipped", "too_many"]

BAD_IMAGES = "bad_images.jsonl"
"""In a run's folder: every image that could not be read, once."""
SHARE = 0.001
"""Of an epoch's samples, how many may be others in the place of bad ones."""
IN_A_ROW = 100
"""Bad images behind each other after which nothing is looked for any more: the disk is gone, not a file."""


def following(stream: SampleStream, position: int) -> Iterator[tuple[int, int]]:
    """(epoch, index) of the samples that the worker of a stream's position takes after it.

    Position s belongs to worker s mod k, whose next ones are s + k, s + 2k …: what the stream says, whatever was read.
    """
    n, k = stream.minibatch.per_worker, stream.minibatch.workers
    while True:
        position += k
        iteration, within = divmod(position, n * k)
        row, worker = divmod(within, k)
        epochs, indices = stream.epochs_and_indices(iteration, worker)
        yield int(epochs[row]), int(indices[row])


class Skipped:
    """Which images this process could not read, and how many times another took their place.

    >>> skipped = Skipped()
    >>> skipped.add([5, 5]); skipped.take(), skipped.take(), skipped.indices
    (2, 0, {5})
    """

    def __init__(self) -> None:
        self.indices: set[int] = set()
        self._since = 0

    def add(self, indices: Iterable[int]) -> None:
        """Note the bad images of a batch."""
        for index in indices:
            self.indices.add(index)
            self._since += 1

    def take(self) -> int:
        """How many since the last call."""
        since, self._since = self._since, 0
        return since


def too_many(first: int, position: int, samples: int) -> float:
    """How many replaced images end a run when they are more: 0.1 % of N for every epoch of which it has drawn samples.

    Args:
        first, position: it has drawn the stream's positions [first, position) since it began or resumed.
        samples: N.

    >>> too_many(0, 512, 10_000), too_many(0, 10_001, 10_000), too_many(9_000, 11_000, 10_000)
    (10.0, 20.0, 20.0)
    """
    return SHARE * samples * (-(-position // samples) - first // samples)


def name_skipped(folder: Path | None, dataset: Any, skipped: Skipped, add: Callable[[Tensor], Tensor]) -> None:
    """Write the names of what any process has skipped since the last call; all processes call it together.

    What the disk refuses stays in `skipped` of the process that writes, for the next call.

    Args:
        folder: the run's, in the process that writes it; None in the others.
        dataset: whose images they are.
        skipped: this process's.
        add: sums a tensor over the processes.
    """
    flags = torch.zeros(len(dataset), dtype=torch.int32)
    flags[list(skipped.indices)] = 1
    skipped.indices.clear()
    found = add(flags).nonzero().flatten().tolist()
    if folder is None or not found:
        return
    path = folder / BAD_IMAGES
    try:
        old = path.read_bytes() if path.is_file() else b""
        whole = old[: old.rfind(b"\n") + 1]  # a line without its end is what a full disk or a kill has left
        new = sorted(set(found) - _indices(whole))
        described = in_child(lambda: [_described(dataset, index) for index in new], "a look at bad images")
        lines = [json.dumps({"index": i, **found}) + "\n" for i, found in zip(new, described, strict=True)]
        append_whole(folder, BAD_IMAGES, "".join(lines).encode(), behind=len(whole))
    except (OSError, ValueError):
        skipped.indices.update(found)


def _indices(lines: bytes) -> set[int]:
    found = set()
    for line in lines.splitlines():
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            found.add(json.loads(line)["index"])
    return found


def _described(dataset: Any, index: int) -> dict[str, str]:
    try:
        dataset.keyed(index, 0)
    except FaultError as fault:
        return {"image": shown(fault.path), "problem": shown(fault.problem), "remedy": shown(fault.remedy)}
    return {"image": shown(dataset.name(index)), "problem": "could not be read where it was needed", "remedy": ""}
