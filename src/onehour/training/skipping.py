"""Training images that could not be read: counted over all processes, named in the run's folder, and not too many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onehour.config import Recipe
from onehour.data.bad_images import BAD_IMAGES, name_skipped
from onehour.data.loader import Feed
from onehour.dist.group import Group
from onehour.training.step import Step

__all__ = ["Skipping"]


class Skipping:
    """What a run with bad_images "skip" says of the images that it replaced; nothing for other runs.

    Args:
        recipe: of the run.
        feed: gives this process its batches.
        step: counts over all processes.
        folder: the run's.
        inside: a path to the very folder that process 0 holds; None for its name.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> feed = Feed(TensorDataset(torch.zeros(1)), seed=0, loaders=0, device=torch.device("cpu"))
    >>> Skipping(Recipe(), feed, None, Path("run"), Group()).count()  # type: ignore[arg-type]
    {}
    """

    def __init__(
        self, recipe: Recipe, feed: Feed, step: Step, folder: Path, group: Group, *, inside: Path | None = None
    ) -> None:
        self.feed, self.step, self.folder, self.group = feed, step, folder, group
        self._inside = inside or folder
        self._skips = recipe.bad_images == "skip"
        self._named = 0
        if self._skips:
            step.count_skipped = feed.skipped.take

    def count(self) -> dict[str, int]:
        """How many images were replaced so far; new ones are named in the folder. All processes call it together."""
        if not self._skips:
            return {}
        skipped = int(self.step.skipped.item())
        folder = self._inside if self.group.rank == 0 else None
        if skipped != self._named:  # the same number in all processes
            self._named = skipped
            name_skipped(folder, self.feed.dataset, self.feed.skipped, self._sum)
        elif folder is not None and self.feed.skipped.indices:  # refused by the disk before
            name_skipped(folder, self.feed.dataset, self.feed.skipped, lambda flags: flags)
        return {"skipped": skipped}

    def refuse_too_many(self, done: int, saved: str) -> None:
        """Say why the step asked for a stop, if it was for this.

        Args:
            saved: whether the stop was, and where the same command goes on.

        Raises:
            ValueError: if more images were replaced than may be.
        """
        if self._skips and self.step.too_many.item():
            raise ValueError(
                f"{int(self.step.skipped.item())} training images could not be read up to iteration {done}, more than"
                f" 0.1 % of an epoch; {self.folder / BAD_IMAGES} names them. Restore or remove"
                f" them; the run has stopped there and {saved}"
            )

    def _sum(self, tensor: Any) -> Any:
        return self.group.sum(tensor.to(self.group.device)).cpu()
