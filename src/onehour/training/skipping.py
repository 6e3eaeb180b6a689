"""Training images that could not be read: counted over all processes, named in the run's folder, not too many."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onehour.config import Recipe
from onehour.data.dataset import FaultError
from onehour.data.loader import Feed, Skipped
from onehour.data.processes import in_child
from onehour.dist.group import Group
from onehour.files import append_whole
from onehour.messages import shown

BAD_IMAGES = "bad_images.jsonl"
"""In a run's folder: every image that could not be read, once."""
SHARE = 0.001
"""Of an epoch's samples, how many may be others in the place of bad ones."""


class Skipping:
    """What of a run's images was skipped since it began."""

    def __init__(self, recipe: Recipe, feed: Feed, group: Group, folder: Path, inside: Path) -> None:
        assert recipe.samples is not None
        self.samples, self._position = recipe.samples, recipe.phases(recipe.samples).position
        self.feed, self.group, self.folder, self._inside = feed, group, folder, inside
        self.skipped = torch.zeros((), dtype=torch.float64, device=group.device)
        """How many were replaced, in all processes."""
        self._too_many = torch.zeros((), device=group.device)
        self._first: tuple[int, Tensor] | None = None
        self._named = 0

    def add(self, iteration: int, skipped: Tensor) -> Tensor:
        """Count an iteration's; above zero once they are more than may be since this process began."""
        first, before = self._first = self._first or (iteration, self.skipped.clone())
        self.skipped += skipped
        limit = too_many(self._position(first), self._position(iteration + 1), self.samples)
        self._too_many.logical_or_(self.skipped - before > limit)
        return self._too_many

    def count(self, *, together: bool = True) -> int:
        """How many so far; where all processes call it together, new ones are named in the folder."""
        skipped = int(self.skipped.item())
        if not together:
            return skipped
        folder = self._inside if self.group.rank == 0 else None
        if skipped != self._named:  # the same number in all processes
            self._named = skipped
            name_skipped(folder, self.feed.dataset, self.feed.skipped, self._sum)
        elif folder is not None and self.feed.skipped.indices:  # refused by the disk before
            name_skipped(folder, self.feed.dataset, self.feed.skipped, lambda flags: flags)
        return skipped

    def refuse_too_many(self, done: int, saved: str) -> None:
        """Say why a stop was asked for, if it was for this.

        Args:
            saved: whether the stop was, and where the same command goes on.
        """
        if self._too_many.item():
            raise ValueError(
                f"{int(self.skipped.item())} training images could not be read up to iteration {done}, more than"
                f" 0.1 % of an epoch; {self.folder / BAD_IMAGES} names them. Restore or remove"
                f" them; the run has stopped there and {saved}"
            )

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.group.sum(tensor.to(self.group.device)).cpu()


def too_many(first: int, position: int, samples: int) -> float:
    """How many replaced images end a run when they are more: 0.1 % of N for every epoch of which it has drawn samples.

    Args:
        first, position: it has drawn the stream's positions [first, position) since it began or resumed.
    """
    return SHARE * samples * (-(-position // samples) - first // samples)


def name_skipped(folder: Path | None, dataset: Any, skipped: Skipped, add: Callable[[Tensor], Tensor]) -> None:
    """Write the names of what any process has skipped since the last call; all processes call it together.

    What the disk refuses stays in `skipped` of the process that writes, for the next call.

    Args:
        folder: the run's, in the process that writes it; None in the others.
        add: sums a tensor over the processes.
    """
    flags = torch.zeros(len(dataset), dtype=torch.int32)
    flags[list(skipped.indices)] = 1
    skipped.indices.clear()
    found: list[int] = add(flags).nonzero().flatten().numpy().tolist()
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
    found = set[int]()
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
