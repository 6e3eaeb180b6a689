"""An evaluation that ends early when a stop is asked of any process: on a slow device it may take hours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from onehour.data.loader import CHUNK, Batch, Feed
from onehour.dist.group import Group

__all__ = ["Breakable", "EvaluationStoppedError"]


class EvaluationStoppedError(Exception):
    """All processes have left the evaluation at the same chunk.

    >>> issubclass(EvaluationStoppedError, Exception)
    True
    """


class Breakable:
    """A feed's chunks, before each of which the processes agree to go on.

    Args:
        feed: of the validation data.
        group: the processes that evaluate together.
        stop_asked: whether this one was asked to stop.

    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.arange(300.0), torch.arange(300))
    >>> feed = Feed(data, seed=0, loaders=0, device=torch.device("cpu"))
    >>> [len(labels) for _, labels in Breakable(feed, Group(), lambda: False).chunks(range(2))]
    [256, 44]
    """

    def __init__(self, feed: Feed, group: Group, stop_asked: Callable[[], bool]) -> None:
        self.feed, self.group, self.stop_asked = feed, group, stop_asked

    @property
    def samples(self) -> int:
        """As `Feed.samples`.

        >>> Breakable(Feed([0], seed=0, loaders=0, device=torch.device("cpu")), Group(), lambda: True).samples
        1
        """
        return self.feed.samples

    def chunks(self, chunks: range) -> Iterator[Batch]:
        """As `Feed.chunks`.

        Raises:
            EvaluationStoppedError: in all processes together, once any was asked to stop.

        >>> feed = Feed([0], seed=0, loaders=0, device=torch.device("cpu"))
        >>> next(Breakable(feed, Group(), lambda: True).chunks(range(1)))
        Traceback (most recent call last):
        onehour.training.breaking.EvaluationStoppedError
        """
        batches = self.feed.chunks(chunks)
        every = -(-self.samples // CHUNK)
        for turn in range(-(-every // self.group.size)):  # as many for each process, whoever has a chunk less
            if self._agreed():
                raise EvaluationStoppedError
            if turn < len(chunks):
                yield next(batches)

    def _agreed(self) -> bool:
        if self.group.size == 1:  # a GPU need not be waited for
            return self.stop_asked()
        asked = torch.tensor(float(self.stop_asked()), device=self.group.device)
        return self.group.sum(asked).item() > 0
