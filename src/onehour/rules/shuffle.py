"""One random permutation of all the data an epoch, divided among the workers (paper §3, Remark 4)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from onehour.rules.arguments import positive_int, whole_number
from onehour.rules.keys import random_bits, seed_for
from onehour.rules.minibatch import Minibatch
from onehour.rules.ramp import Phase, Ramp

__all__ = ["SampleStream"]


def permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of epoch `epoch`: a random permutation of range(samples), a pure function of its arguments.

    Sorts `samples` random 64-bit keys; a tie (probability below 1e-6 at ImageNet's size) keeps file order.
    """
    return np.argsort(random_bits(seed_for(seed, "permutation", epoch), samples), kind="stable")


class SampleStream:
    """Which samples iteration t of a run takes, and which of them worker j (§3, Remark 4).

    The stream is one permutation after another: position s is sample π_{s // N}[s % N]. Iteration t takes the
    positions [t·kn, (t+1)·kn), worker j every k-th of them from the j-th on. Nothing is dropped, padded or
    repeated, every minibatch is full, and a minibatch may straddle two epochs. There is no state: any
    iteration can be asked for at any time.

    Args:
        samples: N, the size of the data set.
        minibatch: a `Minibatch`; a plain int is a single worker's.
        seed: the run's seed.
        ramp: of a minibatch that grows; `minibatch` is then the largest.

    Raises:
        ValueError: if the minibatch is larger than the data set.

    >>> stream = SampleStream(samples=6, minibatch=Minibatch(per_worker=1, workers=2), seed=0)
    >>> epoch = [int(stream.indices(t, worker=j)[0]) for t in range(3) for j in range(2)]
    >>> sorted(epoch)
    [0, 1, 2, 3, 4, 5]
    """

    def __init__(self, *, samples: int, minibatch: Minibatch | int, seed: int, ramp: Ramp | None = None) -> None:
        self.samples = positive_int("samples", samples)
        self.minibatch = minibatch if isinstance(minibatch, Minibatch) else Minibatch(minibatch, 1)
        self.seed, self.ramp = whole_number("seed", seed), ramp or Ramp((Phase(self.minibatch),))
        if (largest := max(phase.minibatch.size for phase in self.ramp.phases)) > self.samples:
            raise ValueError(
                f"minibatch {largest} is larger than the data set of {self.samples} samples;"
                f" use a minibatch of at most {self.samples}"
            )
        # A minibatch straddles two epochs at most, so two permutations serve every call.
        self._permutation = lru_cache(maxsize=2)(self._permuted)

    def _permuted(self, epoch: int) -> np.ndarray:
        return permutation(self.samples, self.seed, epoch)

    def indices(self, iteration: int, worker: int | range | None = None) -> np.ndarray:
        """The data set's indices that iteration `iteration` takes.

        Args:
            iteration: t ≥ 0.
            worker: j, one worker's n samples; a range of g workers' g·n, interleaved (row i·g + j is the i-th
                sample of the range's j-th worker); None for the whole minibatch.

        Returns:
            int64 array of shape (n,), (g·n,) or (kn,).

        >>> stream = SampleStream(samples=8, minibatch=4, seed=0)
        >>> len(set(stream.indices(0)) | set(stream.indices(1)))
        8
        """
        return self.epochs_and_indices(iteration, worker)[1]

    def epochs_and_indices(self, iteration: int, worker: int | range | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `indices`, with the epoch of each sample in front, for augmentation that is keyed by both."""
        positions = self.positions(iteration, worker)
        epochs, offsets = np.divmod(positions, self.samples)
        first, last = int(epochs[0]), int(epochs[-1])
        if first == last:
            return epochs, self._permutation(first)[offsets]
        return epochs, np.where(epochs == first, self._permutation(first)[offsets], self._permutation(last)[offsets])

    def __getstate__(self) -> dict[str, Any]:
        return {"samples": self.samples, "minibatch": self.minibatch, "seed": self.seed, "ramp": self.ramp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def positions(self, iteration: int, worker: int | range | None = None) -> np.ndarray:
        """As `indices`, of places in the stream."""
        iteration = whole_number("iteration", iteration)
        if iteration < 0:
            raise ValueError(f"iteration must not be below zero, got {iteration}")
        minibatch = self.ramp.at(iteration).minibatch
        n, k = minibatch.per_worker, minibatch.workers
        workers = range(k) if worker is None else worker if isinstance(worker, range) else _one(worker)
        if not workers or workers.step != 1 or workers.start < 0 or workers.stop > k:
            raise ValueError(f"worker must lie in 0 … {k - 1} (k = {k} workers), got {worker}")
        first = self.ramp.position(iteration)
        return (first + np.arange(n * k).reshape(n, k)[:, workers.start : workers.stop]).reshape(-1)


def _one(worker: int) -> range:
    number = whole_number("worker", worker)
    return range(number, number + 1)
