"""The stream of samples as a batch sampler for torch's DataLoader (paper §3, Remark 4)."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from onehour.rules.shuffle import SampleStream

__all__ = ["StreamSampler"]


class StreamSampler(Sampler[list[int]]):
    """One worker's batches of indices, from any iteration to any other; give it as `batch_sampler`.

    Args:
        stream: the run's samples.
        worker: j, which worker's share; a range of workers' for a process that hosts several.
        start: the first iteration: a run resumes in the middle of an epoch by naming it.
        stop: the iteration to end before.

    >>> import torch
    >>> from onehour import Minibatch
    >>> stream = SampleStream(samples=8, minibatch=Minibatch(per_worker=2, workers=2), seed=0)
    >>> loader = torch.utils.data.DataLoader(
    ...     torch.arange(8), batch_sampler=StreamSampler(stream, worker=0, stop=2)  # type: ignore[arg-type]
    ... )
    >>> [batch.shape for batch in loader]
    [torch.Size([2]), torch.Size([2])]
    """

    def __init__(self, stream: SampleStream, *, worker: int | range, start: int = 0, stop: int) -> None:
        if not 0 <= start <= stop:
            raise ValueError(f"start and stop must satisfy 0 <= start <= stop, got {start} and {stop}")
        self.stream, self.worker, self.start, self.stop = stream, worker, start, stop

    def __iter__(self) -> Iterator[list[int]]:
        for iteration in range(self.start, self.stop):
            yield self.stream.indices(iteration, self.worker).tolist()

    def __len__(self) -> int:
        return self.stop - self.start
