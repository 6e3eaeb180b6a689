"""Work on many files in several processes, with progress, that ends at once when a person stops it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from onehour.leaving import signal_with_parent

__all__ = ["Done", "spans", "spread"]

Task = TypeVar("Task")
Result = TypeVar("Result")
Done = Callable[[int], None]
"""Is told how many more items are done."""
SECONDS = 0.2
"""Between two looks at how far the processes are."""


def spans(count: int, size: int) -> list[range]:
    """range(count) in ranges of `size`, the last one shorter.

    >>> spans(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def spread(
    work: Callable[[Task, Done], Result], tasks: Sequence[Task], *, jobs: int, done: Done = lambda items: None
) -> list[Result]:
    """`work(task, done)` of each task, in up to `jobs` processes; the results in the order of the tasks.

    Args:
        work: sent to each process once; tells `done` of every item, whose sum over all processes is passed on.
        jobs: 1 works in this process.
        done: is told of progress in this process.

    Raises:
        ValueError: if a process is ended from outside; whatever `work` raises.

    >>> spread(lambda task, done: task * task, [1, 2, 3], jobs=1)
    [1, 4, 9]
    """
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        return [work(task, done) for task in tasks]
    counter, stopping = multiprocessing.Value("q", 0), multiprocessing.Event()
    executor = ProcessPoolExecutor(jobs, initializer=_begin, initargs=(work, counter, stopping))
    told = 0
    try:
        with _interrupts_wait():
            results = [executor.submit(_run, task) for task in tasks]
        waiting: set[Future[Any]] = set(results)
        while waiting:
            ended, waiting = wait(waiting, timeout=SECONDS, return_when=FIRST_COMPLETED)
            told, before = counter.value, told
            done(told - before)
            for future in ended:
                future.result()
        return [future.result() for future in results]
    except BrokenProcessPool as error:
        raise ValueError(
            f"one of {jobs} processes was ended from outside, perhaps for want of memory; use fewer with --jobs"
        ) from error
    finally:
        stopping.set()
        executor.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C comes when the processes are there and ignore it: one that it ended while it starts would break all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Stopped(Exception):  # noqa: N818 - no error: nobody reads it
    """This process is to end."""


_shared: tuple[Any, Any, Any] | None = None


def _begin(work: Any, counter: Any, stopping: Any) -> None:
    global _shared
    _shared = work, counter, stopping
    signal_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    torch.set_num_threads(1)


def _run(task: Any) -> Any:
    assert _shared is not None
    work, counter, stopping = _shared

    def done(items: int) -> None:
        with counter.get_lock():
            counter.value += items
        if stopping.is_set():
            raise _Stopped

    return work(task, done)
