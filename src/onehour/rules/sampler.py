"""The stream of samples as a batch sampler for torch's DataLoader (paper §3, Remark 4)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from torch import distributed
from torch.utils.data import Sampler

from onehour.rules.arguments import positive_int, whole_number
from onehour.rules.askers import Asker, asker, fixes_its_length
from onehour.rules.minibatch import Minibatch
from onehour.rules.shuffle import SampleStream

__all__ = ["StreamBatchSampler", "StreamSampler"]


class StreamBatchSampler(Sampler[list[int]]):
    """Minibatches of indices, one epoch of them at each `iter`; give it as `batch_sampler`.

    Nothing is padded or dropped, so a minibatch may straddle two epochs: the last iteration of an epoch is the first
    that ends at or past its end, and the lengths of epochs differ by one. An epoch begins with the first batch that is
    taken from an iterator, since loaders call `iter` more often than they use it. Its length is that of the current
    epoch, and after its end that of the next: to divide by the number of batches afterwards, count them.

    Args:
        samples: N, the size of the data set.
        minibatch: a `Minibatch`; a plain int is a single worker's.
        seed: the run's seed.
        epochs: E; a run has ⌈E·N / kn⌉ iterations.
        process: p of `processes`: its batches hold the samples of the workers p·g … (p + 1)·g - 1, g = k / P. Row
            i·g + j is the i-th sample of the j-th of them, as `convert_batchnorm` takes them.
        processes: P, which divides k. By default both are torch.distributed's where it runs, else 0 and 1. With 0 and 1
            all batches are whole minibatches. Accelerate needs whole ones, with split_batches=True, and gets them.
        trained: the iterations that are trained already. It goes on with the rest of their last epoch. A number, or a
            function that knows it at any time, such as `lambda: trainer.global_step`. A count of what the sampler has
            given would not do: loaders read ahead.

    Raises:
        ValueError: for a minibatch above N, P that does not divide k, or `trained` beyond the end. While iterated: past
            the last epoch, or where something else divides the batches once more.

    >>> sampler = StreamBatchSampler(10, 4, seed=0, epochs=3)
    >>> [len(list(sampler)) for epoch in range(3)]
    [3, 2, 3]
    >>> resumed = StreamBatchSampler(10, 4, seed=0, epochs=3, trained=4)
    >>> resumed.epoch, len(list(resumed)), len(list(resumed))
    (1, 1, 3)
    """

    def __init__(
        self,
        samples: int,
        minibatch: Minibatch | int,
        *,
        seed: int,
        epochs: int,
        process: int | None = None,
        processes: int | None = None,
        trained: int | Callable[[], int] = 0,
    ) -> None:
        self.stream = SampleStream(samples=samples, minibatch=minibatch, seed=seed)
        self.epochs = positive_int("epochs", epochs)
        self._place = _place(process, processes)
        if self._place:
            self._workers(*self._place)
        self._trained = trained if callable(trained) else None
        self._start = 0 if callable(trained) else self._counted(trained)
        self._resumed = self._start > 0
        self._given = (0, 0, 0)  # of the last epoch that began: its first iteration, the next one, its end
        self._over = True

    @property
    def epoch(self) -> int:
        """The epoch that the next `iter` gives. A resumed loop is `for epoch in range(sampler.epoch, epochs)`.

        >>> StreamBatchSampler(10, 4, seed=0, epochs=3, trained=4).epoch
        1
        """
        return self._epoch_of(self._next())

    def set_epoch(self, epoch: int) -> None:
        """The next `iter` gives this epoch; the one that a resumed run is in, from where it was left.

        >>> sampler = StreamBatchSampler(10, 4, seed=0, epochs=3)
        >>> sampler.set_epoch(1)
        >>> len(sampler)
        2
        """
        if not 0 <= (wanted := whole_number("epoch", epoch)) < self.epochs:
            raise ValueError(f"epoch must lie in 0 … {self.epochs - 1}, got {epoch}")
        if wanted == self.epoch:
            return
        if self._trained or (self._resumed and wanted < self.epoch):
            raise ValueError(
                f"set_epoch({epoch}), but {self._next()} iterations are trained, and the next is of epoch {self.epoch};"
                f" go on there, `for epoch in range(sampler.epoch, {self.epochs})` and Accelerate's"
                " loader.set_epoch(epoch) (the Hugging Face Trainer: ignore_data_skip=True), or leave out `trained`"
            )
        self._start, self._given = self._end(wanted), (0, 0, 0)
        self._over = True

    @property
    def batch_size(self) -> int:
        """Samples in each of its batches: kn, or a process's share. Accelerate's `split_batches` reads it."""
        by = asker()
        return self.stream.minibatch.size // (1 if by.accelerate else self._among(by)[1])

    def __iter__(self) -> Iterator[list[int]]:
        by = asker()
        if by.skips and (self._resumed or self._trained):
            raise ValueError(
                "skip_first_batches would skip again what `trained` skips; use only one of them"
                " (the Hugging Face Trainer: ignore_data_skip=True)"
            )
        if by.epoch not in (None, self.epoch):
            self.set_epoch(by.epoch)
        process, processes = self._among(by)
        shares = [self._workers(p, processes) for p in (range(processes) if by.processes > 1 else [process])]
        start, stop = self._begin()
        for iteration in range(start, stop):
            self._given = start, iteration + 1, stop
            yield np.concatenate([self.stream.indices(iteration, share) for share in shares]).tolist()
        self._over = True

    def __len__(self) -> int:
        if fixes_its_length():
            raise TypeError("epochs differ in length, and the length of the first would be taken for all")
        start, (first, _, end) = self._next(), self._given
        if not self._over or (self._trained and first <= start < end):
            return end - first
        if start == self._end(self.epochs) and not self._trained and not self._resumed:
            return start - self._end(self.epochs - 1)  # of the last one, as loops ask once more when it is over
        return self._end(self._epoch_of(start) + 1) - start

    def _next(self) -> int:
        """The iteration that the next `iter` begins with."""
        return self._counted(self._trained()) if self._trained else self._start

    def _begin(self) -> tuple[int, int]:
        """Its iterations, and what they are checked against: what was given before."""
        start, (first, reached, end) = self._next(), self._given
        if self._trained and first < reached == end and start > first and start != end:
            raise ValueError(
                f"iterations {first} … {end - 1} were given, and then `trained` says that {start} are trained, not"
                f" {end}; it must count one for each of the sampler's batches"
            )
        if not self._trained and reached < end:
            warnings.warn(
                f"StreamBatchSampler begins its next epoch, but of the iterations {first} … {end - 1} only"
                f" {reached - first} were taken; set_epoch({self._epoch_of(first)}) begins them again",
                stacklevel=3,
            )
        if not self._trained and not self._resumed and start == self._end(self.epochs):
            raise ValueError(
                f"all {self.epochs} epochs ({start} iterations) of StreamBatchSampler are given;"
                " set_epoch(e) gives one again, and epochs=… is how many there are"
            )
        stop = self._end(self._epoch_of(start) + 1)
        self._start, self._resumed, self._given, self._over = stop, False, (start, start, stop), False
        return start, stop

    def _end(self, epochs: int) -> int:
        """The iterations of so many epochs; of no more than there are."""
        epochs = min(epochs, self.epochs)
        return self.stream.minibatch.iterations(self.stream.samples, epochs) if epochs else 0

    def _epoch_of(self, iteration: int) -> int:
        """Iteration t is of epoch e where ⌈e·N / kn⌉ ≤ t < ⌈(e + 1)·N / kn⌉, which is e ≤ t·kn / N < e + 1."""
        return min(iteration * self.stream.minibatch.size // self.stream.samples, self.epochs)

    def _counted(self, trained: int) -> int:
        total = self._end(self.epochs)
        if not 0 <= (count := whole_number("trained", trained)) <= total:
            raise ValueError(
                f"trained must lie in 0 … {total}, the iterations of {self.epochs} epochs of {self.stream.samples}"
                f" samples at minibatch {self.stream.minibatch.size}, got {trained}"
            )
        return count

    def _among(self, by: Asker) -> tuple[int, int]:
        """Which process of how many; all of them where it is the asker who divides."""
        if by.processes > 1:
            if not by.splits or self._place not in (None, (0, 1)):
                raise ValueError(
                    f"accelerator.prepare divides these batches among {by.processes} processes once more; use"
                    " Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True)), and leave out process"
                    " and processes"
                )
            return 0, by.processes
        if self._place:
            return self._place
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        if (started := os.environ.get("WORLD_SIZE", "")).isdecimal() and int(started) > 1:
            raise ValueError(
                f"{started} processes were started (WORLD_SIZE), but torch.distributed does not run yet, so that each"
                " would get whole minibatches; call init_process_group first, or give process and processes"
            )
        return 0, 1

    def _workers(self, process: int, processes: int) -> range:
        """The workers that a process hosts."""
        hosted, rest = divmod(self.stream.minibatch.workers, processes)
        if rest or not hosted:
            n, k = self.stream.minibatch.per_worker, self.stream.minibatch.workers
            raise ValueError(
                f"{processes} processes cannot host the same number of {k} workers each; the minibatch is"
                f" {k} × {n}: give Minibatch(per_worker, workers) with a multiple of {processes} workers"
            )
        return range(process * hosted, (process + 1) * hosted)


class StreamSampler(Sampler[list[int]]):
    """Use `StreamBatchSampler`: this one gives a whole run at each `iter`. It is here for one version more.

    Args:
        worker: j, which worker's share; a range of workers' for a process that hosts several.

    >>> stream = SampleStream(samples=8, minibatch=4, seed=0)
    >>> with warnings.catch_warnings(action="ignore"):
    ...     len(list(StreamSampler(stream, worker=0, stop=2)))
    2
    """

    def __init__(self, stream: SampleStream, *, worker: int | range, start: int = 0, stop: int) -> None:
        warnings.warn(
            "StreamSampler gives all iterations to `stop` at each epoch of a loop, and will go; write"
            " StreamBatchSampler(samples, minibatch, seed=…, epochs=…, trained=…), which gives an epoch at each,"
            " and takes its workers from torch.distributed (or process=…, processes=…)",
            DeprecationWarning,
            stacklevel=2,
        )
        if not 0 <= start <= stop:
            raise ValueError(f"start and stop must satisfy 0 <= start <= stop, got {start} and {stop}")
        self.stream, self.worker, self.start, self.stop = stream, worker, start, stop

    def __iter__(self) -> Iterator[list[int]]:
        for iteration in range(self.start, self.stop):
            yield self.stream.indices(iteration, self.worker).tolist()

    def __len__(self) -> int:
        return self.stop - self.start


def _place(process: int | None, processes: int | None) -> tuple[int, int] | None:
    if process is None and processes is None:
        return None
    if process is None or processes is None:
        raise ValueError(f"process and processes belong together, got process={process!r} and processes={processes!r}")
    among = positive_int("processes", processes)
    if not 0 <= (number := whole_number("process", process)) < among:
        raise ValueError(f"process must lie in 0 … {among - 1} (processes={among}), got {process}")
    return number, among
