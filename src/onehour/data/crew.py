"""The processes that load: they fill slots of shared memory, and one that is killed or stuck is replaced in its place.

torch's DataLoader ends a run when one of its processes dies, wherever the run is, and waits for ever for one that is
stopped. Here every process has pipes of its own, through which only numbers travel; the samples lie in shared memory.
So whatever happens to a process harms no other, and the one in its place makes the same samples, since a sample is a
function of its key.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

import numpy as np

from onehour.data.desk import NONE, Desk, Made
from onehour.data.keyed import Keyed, Part
from onehour.data.slots import Layout
from onehour.leaving import signal_with_parent

__all__ = ["PATIENCE", "STRIKES", "Crew"]

PATIENCE = 30.0
"""Seconds that a process may take for one sample before it counts as stuck: three times this is less than a hang."""
STRIKES = 3
"""Processes that may end at the same samples; then these samples are the matter."""
LOOK = 0.5
"""Seconds between two looks at processes that are waited for."""


@dataclass
class _Loader:
    """One process."""

    number: int
    pid: int
    tasks: Connection
    results: Connection
    slots: deque[int] = field(default_factory=deque)
    """What it has to fill, the one that it is at first."""
    begun: int = 0
    """Samples, when it was last looked at."""
    waited: float = 0.0
    """Seconds since then in which nothing came from any process."""


class Crew:
    """Processes that make parts of batches, forked from this one.

    Args:
        keyed: makes the samples.
        layout: of the images.
        loaders: how many processes.
        samples: of a part at most.
        ahead: parts that are made before they are asked for.
        patience: seconds for a sample; None waits for ever.
        warn: is told of every process that was replaced.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> keyed = Keyed(TensorDataset(torch.arange(9.0), torch.arange(9)), seed=0)
    >>> crew = Crew(keyed, keyed.layout(), loaders=2, samples=2, ahead=4)
    >>> [part.labels.tolist() for part in crew.parts([np.array([[0, 5, 0], [0, 3, 1]]), np.array([[0, 4, 2]])])]
    [[5, 3], [4]]
    >>> crew.close()
    """

    def __init__(
        self,
        keyed: Keyed,
        layout: Layout,
        *,
        loaders: int,
        samples: int,
        ahead: int,
        patience: float | None = PATIENCE,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._desk = Desk(keyed, layout, loaders=loaders, samples=samples, slots=ahead)
        self._patience, self._warn = patience, warn or _say
        self._free = list(range(ahead))
        self._left: set[int] = set()
        """Slots that are being filled for an earlier use."""
        self._made: dict[int, Made] = {}
        self._ends: dict[int, list[str]] = {}
        """Of slots that processes ended at, how."""
        self._owner = os.getpid()
        self._loaders: list[_Loader] = []
        for number in range(loaders):
            self._loaders.append(self._start(number))

    @property
    def pids(self) -> list[int]:
        """The processes' ids."""
        return [loader.pid for loader in self._loaders]

    def parts(self, parts: Iterable[np.ndarray]) -> Iterator[Part]:
        """The parts with these keys, int64 (n, 3) each, in their order.

        A part lies in shared memory until the next one is asked for. What an earlier call has not given is forgotten.

        Raises:
            ValueError: if a sample cannot be read, or processes end at the same part again and again.
        """
        self._desk.begin_use()
        self._left = {slot for loader in self._loaders for slot in loader.slots}
        self._free = [slot for slot in range(len(self._desk.counts)) if slot not in self._left]
        self._made.clear()
        use, order, coming, all_given = self._desk.use, deque[int](), iter(parts), False
        while True:
            while self._free and not all_given:
                keys = next(coming, None)
                all_given = keys is None
                if keys is not None:
                    order.append(self._give(keys))
            if not order:
                if all_given:
                    return
                self._look()  # for a slot that an earlier use has left
                continue
            while order[0] not in self._made:
                self._look()
            slot = order.popleft()
            skipped = self._made.pop(slot)
            if isinstance(skipped, ValueError):
                raise skipped
            yield self._desk.part(slot, skipped)
            assert use == self._desk.use, "these parts were given up for others"
            self._free.append(slot)

    def close(self) -> None:
        """End the processes.

        >>> keyed = Keyed([(np.zeros(1), 0)], seed=0)
        >>> Crew(keyed, keyed.layout(), loaders=1, samples=1, ahead=1).close()
        """
        if os.getpid() == self._owner:  # and not in what someone forked from it
            for loader in self._loaders:
                self._end(loader)
                loader.results.close()
        self._loaders = []

    def __del__(self) -> None:
        with suppress(AttributeError):
            self.close()

    def _give(self, keys: np.ndarray) -> int:
        """A slot that will hold the samples of these keys, by the process that has least to do."""
        slot = self._free.pop()
        self._ends.pop(slot, None)
        self._desk.give(slot, keys)
        loader = min(self._loaders, key=lambda loader: len(loader.slots))
        loader.slots.append(slot)
        self._ask(loader, slot)
        return slot

    def _ask(self, loader: _Loader, slot: int) -> None:
        use = NONE if slot in self._left else self._desk.use
        with suppress(OSError):  # it has ended, which is noticed where its results are waited for
            loader.tasks.send((slot, self._desk.counts[slot], use))

    def _look(self) -> None:
        """Take what the processes have made, and replace those that ended or are stuck."""
        started = time.monotonic()
        ready = wait([loader.results for loader in self._loaders], LOOK)
        for loader in list(self._loaders):
            if loader.results in ready and not self._receive(loader):
                self._replace(loader, "ended")
        if ready or self._patience is None:
            return
        waited = min(time.monotonic() - started, 2 * LOOK)  # no more, where this process was stopped too
        for loader in list(self._loaders):
            begun = self._desk.begun(loader.number)
            idle = begun != loader.begun or not loader.slots
            loader.begun, loader.waited = begun, 0.0 if idle else loader.waited + waited
            if loader.waited > self._patience:
                self._replace(loader, f"was stuck for {loader.waited:.0f} s")

    def _receive(self, loader: _Loader) -> bool:
        """Take one result; False where there will be no more."""
        try:
            slot, skipped = loader.results.recv()
        except (EOFError, OSError):
            return False
        assert slot == loader.slots[0]
        loader.slots.popleft()
        loader.waited = 0.0
        if slot in self._left:
            self._left.remove(slot)
            self._free.append(slot)
        else:
            self._made[slot] = skipped
        return True

    def _replace(self, loader: _Loader, how: str) -> None:
        """Another process in the place of one, with what that one had still to do.

        Raises:
            ValueError: if too many ended at the same part.
        """
        index = self._desk.index(loader.number)
        code = self._end(loader)
        while loader.results.poll() and self._receive(loader):
            pass  # what it made before
        loader.results.close()
        if how == "ended":
            how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"left with code {code}"
        how += f" at {self._desk.keyed.name(index)}" if index != NONE else ""
        if loader.slots:
            ends = self._ends.setdefault(loader.slots[0], [])
            ends.append(how)
            if len(ends) == STRIKES:
                self.close()
                raise ValueError(
                    f"{STRIKES} processes that load data ended at the same samples, one after another: it"
                    f" {', '.join(dict.fromkeys(ends))}; look at these files, or use fewer --loaders if memory runs out"
                )
        self._warn(f"a process that loads data {how}; another takes its place, and no sample changes")
        new = self._start(loader.number)
        new.slots = loader.slots
        self._loaders[loader.number] = new
        for slot in new.slots:
            self._ask(new, slot)

    def _start(self, number: int) -> _Loader:
        self._desk.arrive(number)
        try:
            (its_tasks, tasks), (results, its_results) = Pipe(duplex=False), Pipe(duplex=False)
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forking with threads
                pid = os.fork()
        except OSError as error:
            raise ValueError(
                f"no process can be started to load data: {error.strerror}; use fewer --loaders"
            ) from error
        if pid == 0:
            try:
                signal_with_parent(signal.SIGKILL)
                for ours in (tasks, results, *(c for other in self._loaders for c in (other.tasks, other.results))):
                    with suppress(OSError):
                        ours.close()
                if os.getppid() == self._owner:
                    self._desk.serve(number, its_tasks, its_results)
            except (EOFError, OSError):
                pass  # the process that trains has ended
            finally:
                os._exit(1)
        its_tasks.close()
        its_results.close()
        return _Loader(number, pid, tasks, results)

    def _end(self, loader: _Loader) -> int:
        """Kill a process; its exit code, below zero for a signal."""
        loader.tasks.close()
        with suppress(ProcessLookupError):
            os.kill(loader.pid, signal.SIGKILL)
        until = time.monotonic() + 1
        while time.monotonic() < until:  # one that waits for a disk ends when that answers; nobody waits for it
            try:
                pid, status = os.waitpid(loader.pid, os.WNOHANG)
            except ChildProcessError:
                break
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        return -signal.SIGKILL


def _say(text: str) -> None:
    with suppress(OSError):  # an output that cannot be written ends no run
        print(f"onehour: {text}", file=sys.stderr, flush=True)
