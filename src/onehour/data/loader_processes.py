"""Processes that make batches, by torch's DataLoader; one that is killed or stuck is replaced while a run goes on.

DataLoader alone ends a run when one of its processes dies, and waits for ever for one that is stopped. But it is known
which samples a batch holds before it is made, and a sample is a function of its key: so a new DataLoader makes what the
last one has not delivered. Batches lie in memory that the processes share and that belongs to no file: no limit of
/dev/shm applies, and only some numbers travel, in one piece each, so that whoever is killed leaves nothing half read.
"""

from __future__ import annotations

import gc
import math
import mmap
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.context import ForkContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling

from onehour.data.dataset import FaultError
from onehour.data.samples import Empty, Keyed, empty, mapped
from onehour.leaving import signal_with_parent, signals_wait
from onehour.messages import blame, tell

PATIENCE = 30.0
"""Seconds that a process may take for one sample before it counts as stuck: three times this is less than a hang."""
STRIKES = 3
"""Processes that may end at the same samples; then these samples are the matter."""
LOOK = 0.2
"""Seconds between two looks at processes that are waited for."""
AHEAD = 2
"""Batches that each process makes before they are asked for; one where that would be more than `IN_FLIGHT` bytes."""
IN_FLIGHT = 2**29
NONE = -1
"""The index of a process that is between two batches."""
ALIGNED = 64
"""Bytes."""
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Are for the process that trains, which ends the others."""

Task = tuple[int, np.ndarray]
"""The number of a batch in its use, and the keys of its samples, int64 (n, 3)."""


class LoaderProcesses:
    """Processes that make batches, forked from this one; they stay from one use to the next.

    What is larger than `batch_bytes` takes torch's own way, through /dev/shm.
    """

    def __init__(
        self,
        keyed: Keyed,
        *,
        loaders: int,
        batch_bytes: int,
        patience: float | None = PATIENCE,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._keyed, self._loaders, self._patience = keyed, loaders, patience
        self._warn = warn or tell
        self._ahead = AHEAD if AHEAD * loaders * batch_bytes <= IN_FLIGHT else 1
        self._slots = [_Slot(batch_bytes) for _ in range(self._ahead * loaders + 1)]  # one is read as others are filled
        self._progress = _shared(3 * 8 * loaders).view(torch.int64).view(loaders, 3).numpy()
        self._tasks = _Tasks(iter(()))
        self._ends: dict[int, list[str]] = {}
        """Of batches that processes ended at, how."""
        self._use = 0
        self._owner = os.getpid()
        self._processes: list[BaseProcess] = []
        self._loader: DataLoader[Any] | None = None
        self._running: Any = None
        # When Python leaves, multiprocessing would wait for ever for processes that ignore SIGTERM.
        Finalize(self, _kill, (self._processes,), exitpriority=0)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid is not None]

    def batches(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[Any, list[int]]]:
        """The batches of these keys, int64 (n, 3) each, in their order, and the indices of samples that were replaced.

        A batch lies in shared memory until the next one is asked for. What an earlier call has not given is forgotten.
        """
        if self._tasks.given:
            self.close()
        self._tasks.given.clear()
        self._tasks.coming = enumerate(batches)
        self._ends.clear()
        self._running = None
        self._use += 1
        use = self._use
        while (received := self._received()) is not None:
            slot, made = received
            if isinstance(made, ValueError):
                raise made
            tree, skipped = made
            yield mapped(tree, self._slots[slot].received), skipped
            assert use == self._use, "these batches were given up for others"

    def close(self) -> None:
        if os.getpid() == self._owner:  # and not in what someone forked from it
            _kill(self._processes)
            self._loader = self._running = None  # DataLoader waits for them as it goes

    def _received(self) -> tuple[int, Any] | None:
        """A batch's slot and what became of it; None behind the last one."""
        while True:
            began = time.monotonic()
            try:
                if self._running is None:
                    self._running = self._started()
                received = next(self._running)
                self._tasks.given.popleft()
                return received
            except StopIteration:
                return None
            except (RuntimeError, EOFError, OSError):  # time is up, or a process has ended
                waited = time.monotonic() - began
                ended = self._ended()
                if not ended and waited < LOOK / 2:
                    raise
                if self._running is None:  # none has said yet that it begins anew
                    self.close()
            ended = ended or self._stuck(min(waited, 2 * LOOK))  # no more, where this process was stopped too
            if ended:
                self._replace(ended)

    def _started(self) -> Any:
        """Have the processes begin with the tasks: those that are there, or new ones."""
        try:
            with warnings.catch_warnings(action="ignore"), _unwatched(), signals_wait(*IGNORED):
                if self._loader is None:
                    self._progress[:] = 0, NONE, 0
                    self._begun, self._waited = np.zeros((2, self._loaders))
                    maker = _Maker(self._keyed, self._slots, self._progress, self._owner)
                    self._loader = DataLoader(
                        maker,  # type: ignore[arg-type]
                        batch_size=None,
                        sampler=self._tasks,
                        num_workers=self._loaders,
                        collate_fn=lambda made: made,
                        timeout=LOOK,
                        worker_init_fn=maker.begin,
                        multiprocessing_context=_Context(self._processes),
                        generator=torch.Generator(),  # else it would draw from everyone's
                        prefetch_factor=self._ahead,
                        persistent_workers=True,
                    )
                running: Any = iter(self._loader)
                running._worker_pids_set = False
                return running
        except OSError as error:
            self.close()
            raise ValueError(
                f"no process can be started to load data: {error.strerror}; use fewer --loaders"
            ) from error

    def _ended(self) -> dict[int, str]:
        codes = {number: process.exitcode for number, process in enumerate(self._processes)}
        return {
            number: f"was killed ({signal.Signals(-code).name})" if code < 0 else f"exited with code {code}"
            for number, code in codes.items()
            if code is not None
        }

    def _stuck(self, waited: float) -> dict[int, str]:
        """The same of processes that have begun no sample for too long, after another wait of so many seconds."""
        if self._patience is None:
            return {}
        begun, index = self._progress[:, 0].copy(), self._progress[:, 1].copy()
        self._waited = np.where(begun == self._begun, self._waited + waited, 0.0)
        self._begun = begun
        late = self._waited > self._patience
        stuck = np.flatnonzero(late & (index != NONE))
        if not len(stuck) and late.all():  # between two batches
            stuck = [0]
        return {int(number): f"was stuck for {self._waited[number]:.0f} s" for number in stuck}

    def _replace(self, ended: dict[int, str]) -> None:
        """Have new processes make all that is not delivered, where some have ended or are stuck."""
        batches: dict[int, str] = {}
        for number in ended:
            _, index, batch = self._progress[number].tolist()
            if index == NONE:
                batch = self._tasks.given[0][0] if self._tasks.given else 0
            else:
                ended[number] += f" at {self._keyed.name(index)}"
            batches[batch] = ended[number]
        self.close()
        for batch, how in batches.items():
            ends = self._ends.setdefault(batch, [])
            ends.append(how)
            if len(ends) == STRIKES:
                raise ValueError(
                    f"{STRIKES} processes that load data ended at the same samples, one after another: it"
                    f" {', '.join(dict.fromkeys(ends))}; look at these files, or use fewer --loaders if memory runs out"
                )
        for how in ended.values():
            self._warn(f"a process that loads data {how}; another takes its place, and no sample changes")
        self._tasks.coming = chain(list(self._tasks.given), self._tasks.coming)
        self._tasks.given.clear()


@dataclass
class _Tasks:
    """What is to be made, as DataLoader's sampler, and what of it was given to processes and has not come back."""

    coming: Iterator[Task]
    given: deque[Task] = field(default_factory=deque)

    def __iter__(self) -> Iterator[Task]:
        for task in self.coming:
            self.given.append(task)
            yield task


@dataclass
class _Maker:
    """Makes the batches in a process, as DataLoader's data set."""

    keyed: Keyed
    slots: list[_Slot]
    progress: np.ndarray
    """Of each process: samples begun, the index of the one that it is at or NONE, the number of its batch."""
    owner: int

    def begin(self, number: int) -> None:
        """Before the first batch of a process."""
        signal_with_parent(signal.SIGKILL)
        if os.getppid() != self.owner:
            os._exit(1)
        for ignored in IGNORED:
            signal.signal(ignored, signal.SIG_IGN)
        gc.freeze()  # collecting what was inherited would copy every page of it

    def __getitem__(self, task: Task) -> tuple[int, Any]:
        number, keys = task
        worker = get_worker_info()
        assert worker is not None
        progress, slot = self.progress[worker.id], self.slots[number % len(self.slots)]
        progress[2] = number

        def begun(index: int) -> None:
            progress[1] = index
            progress[0] += 1

        try:
            batch, skipped = self.keyed.batch(keys.tolist(), empty=slot.emptied(), begun=begun)
            made: Any = mapped(batch, slot.sent), skipped
        except ValueError as error:
            made = error if isinstance(error, FaultError) else ValueError(str(error))  # others may not travel
        except Exception as error:
            made = ValueError(f"{self.keyed.name(int(progress[1]))} cannot be made: {blame(error)}")
        progress[1] = NONE
        return number % len(self.slots), made


@dataclass
class _Sent:
    """Where a tensor lies in its slot."""

    first: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Slot:
    """Memory for a batch."""

    def __init__(self, size: int) -> None:
        self._memory = _shared(size)
        self._used = 0

    def emptied(self) -> Empty:
        """Makes empty tensors in it, from its beginning; others where there is no more room."""
        self._used = 0

        def inside(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            first = -(-self._used // ALIGNED) * ALIGNED
            last = first + math.prod(shape) * dtype.itemsize
            if last > len(self._memory):
                return empty(shape, dtype)
            self._used = last
            return self._memory[first:last].view(dtype).view(shape)

        return inside

    def sent(self, leaf: Any) -> Any:
        """What travels of a batch's part."""
        first = leaf.data_ptr() - self._memory.data_ptr() if isinstance(leaf, Tensor) else NONE
        return _Sent(first, leaf.shape, leaf.stride(), leaf.dtype) if 0 <= first < len(self._memory) else leaf

    def received(self, sent: Any) -> Any:
        """What `sent` was called with, on the other side."""
        if not isinstance(sent, _Sent):
            return sent
        first = sent.first // sent.dtype.itemsize
        return torch.empty(0, dtype=sent.dtype).set_(self._memory.untyped_storage(), first, sent.shape, sent.strides)


def _shared(size: int) -> Tensor:
    """Zeros, uint8 (size,), in memory that this process and all forked from it from now on have in common.

    It belongs to no file, so that no limit of /dev/shm applies. What nobody writes to takes no room.
    """
    try:
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8, count=size)
    except OSError as error:
        raise ValueError(
            f"no room for {size:,} bytes of loaded batches ({error.strerror}); use fewer --loaders"
        ) from error


class _Context(ForkContext):
    """For DataLoader: adds the processes to a list, and its flag has no lock that a killed one may hold."""

    def __init__(self, started: list[BaseProcess]) -> None:
        super().__init__()
        self._started = started

    def Process(self, *args: Any, **named: Any) -> BaseProcess:  # noqa: N802 # pyright: ignore
        self._started.append(super().Process(*args, **named))
        return self._started[-1]

    def Event(self) -> Any:  # noqa: N802
        return _Flag()


class _Flag:
    def __init__(self) -> None:
        self._flag = _shared(1).numpy()

    def set(self) -> None:
        self._flag[0] = 1

    def is_set(self) -> bool:
        return bool(self._flag[0])


@contextmanager
def _unwatched() -> Iterator[None]:
    """Keep what is started from DataLoader's handler of SIGCHLD: wherever this process is, it raises when one ends."""
    names = ("_set_worker_pids", "_set_SIGCHLD_handler")
    before = [getattr(signal_handling, name) for name in names]
    try:
        for name in names:
            setattr(signal_handling, name, lambda *given: None)
        yield
    finally:
        for name, function in zip(names, before, strict=True):
            setattr(signal_handling, name, function)


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    processes.clear()
