"""What loader processes have in common with the one that trains, and what each of them does there."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import torch

from onehour.data.faults import FaultError
from onehour.data.keyed import Key, Keyed, Part
from onehour.data.slots import Layout, shared
from onehour.messages import blame

__all__ = ["IGNORED", "NONE", "Desk", "Made"]

NONE = -1
"""No sample, no use."""
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Are for the process that trains, which ends the others."""
Made = list[int] | ValueError
"""What became of a slot: the indices of samples that were replaced, or why it could not be filled."""


class Desk:
    """Slots in shared memory: keys are put there, processes fill them with the samples of these keys.

    Args:
        keyed: makes the samples.
        layout: of the images.
        loaders: how many processes.
        samples: of a slot at most.
        slots: how many.

    >>> keyed = Keyed([(torch.ones(2), 7)], seed=0)
    >>> desk = Desk(keyed, keyed.layout(), loaders=1, samples=4, slots=2)
    >>> desk.give(1, np.array([[0, 0, 0]]))
    >>> desk.fill(0, 1, count=1, use=0), desk.part(1, []).labels
    ([], tensor([7]))
    """

    def __init__(self, keyed: Keyed, layout: Layout, *, loaders: int, samples: int, slots: int) -> None:
        self.keyed, self.layout = keyed, layout
        self.counts = [0] * slots
        """Samples of each slot."""
        self._keys = shared((slots, samples, 3), torch.int64).numpy()
        self._labels = shared((slots, samples), torch.int64)
        self._images = shared((slots, samples, *layout.shape), layout.dtype)
        self._at = shared((loaders, 2), torch.int64).numpy()
        self._use = shared((1,), torch.int64).numpy()

    @property
    def use(self) -> int:
        """Counts what slots are filled for: a process leaves what is for an earlier use.

        >>> keyed = Keyed([(torch.ones(2), 7)], seed=0)
        >>> Desk(keyed, keyed.layout(), loaders=1, samples=1, slots=1).use
        0
        """
        return int(self._use[0])

    def begin_use(self) -> None:
        """Another use begins.

        >>> keyed = Keyed([(torch.ones(2), 7)], seed=0)
        >>> desk = Desk(keyed, keyed.layout(), loaders=1, samples=1, slots=1)
        >>> desk.begin_use(); desk.use
        1
        """
        self._use[0] += 1

    def give(self, slot: int, keys: np.ndarray) -> None:
        """Put keys, int64 (n, 3), into a slot."""
        self.counts[slot] = len(keys)
        self._keys[slot, : len(keys)] = keys

    def part(self, slot: int, skipped: list[int]) -> Part:
        """What a slot holds, until it is given other keys."""
        count = self.counts[slot]
        return Part(self._images[slot, :count], self._labels[slot, :count], skipped)

    def arrive(self, number: int) -> None:
        """A process takes the place of loader `number`."""
        self._at[number] = 0, NONE

    def begun(self, number: int) -> int:
        """How many samples the process has begun."""
        return int(self._at[number, 0])

    def index(self, number: int) -> int:
        """The index of the sample that it is at; `NONE` between two slots."""
        return int(self._at[number, 1])

    def serve(self, number: int, tasks: Connection, results: Connection) -> None:
        """What loader `number` does until it is killed: (slot, count, use) comes, (slot, `Made`) goes.

        Raises:
            EOFError, OSError: when the other end is gone.
        """
        for ignored in IGNORED:
            signal.signal(ignored, signal.SIG_IGN)
        torch.set_num_threads(1)
        gc.freeze()  # collecting what was inherited would copy every page of it
        while True:
            slot, count, use = tasks.recv()
            made = self.fill(number, slot, count=count, use=use)
            self._at[number, 1] = NONE
            results.send((slot, made))

    def fill(self, number: int, slot: int, *, count: int, use: int) -> Made:
        """Fill a slot, unless it is for an earlier use."""

        def noted() -> Iterator[Key]:
            for epoch, index, position in self._keys[slot, :count].tolist():
                if self.use != use:
                    return
                self._at[number, 1] = index
                self._at[number, 0] += 1
                yield epoch, index, position

        try:
            return self.keyed.fill(noted(), self.layout, self._images[slot], self._labels[slot])
        except ValueError as error:
            return error if isinstance(error, FaultError) else ValueError(str(error))  # others may not travel
        except Exception as error:
            return ValueError(f"{self.keyed.name(self.index(number))} cannot be made: {blame(error)}")
