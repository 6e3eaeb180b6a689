"""Work in processes that are forked for it and end with it: on many files at once, and a look at what is someone's.

A data set opens its file when it is first asked, so that every process which loads has a handle of its own. So whoever
starts such processes must not have asked before: they would all have one handle, with one offset in the file.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

import torch

from onehour.leaving import signal_with_parent
from onehour.messages import blame

__all__ = ["PATIENCE", "Done", "end_with_parent", "in_child", "spans", "spread"]

Task = TypeVar("Task")
Result = TypeVar("Result")
Done = Callable[[int], None]
"""Is told how many more items are done."""
SECONDS = 0.2
"""Between two looks at how far the processes are."""


def spans(count: int, size: int) -> list[range]:
    """range(count) in ranges of `size`, the last one shorter."""
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
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    torch.set_num_threads(1)


def end_with_parent() -> None:
    """Have Linux end this process with the one that started it: killed, that one can no longer say so."""
    signal_with_parent(signal.SIGKILL)


def _run(task: Any) -> Any:
    assert _shared is not None
    work, counter, stopping = _shared

    def done(items: int) -> None:
        with counter.get_lock():
            counter.value += items
        if stopping.is_set():
            raise _Stopped

    return work(task, done)


PATIENCE = 300.0
"""Seconds that a look may take: ten times what a sample may, since files are opened for it, perhaps far away."""
LOOK = 0.1
"""Seconds between two looks at a process that says nothing."""


def in_child(work: Callable[[], Result], what: str, *, patience: float | None = PATIENCE) -> Result:
    """What `work()` returns in a process that is forked for it and ends with it.

    What it prints is printed. Nothing that it opens, starts, caches or draws stays.

    Args:
        work: returns what pickle takes: numbers, texts, bytes, and tuples, lists and dicts of them.
        what: it is, for messages, e.g. "the first look at the data".
        patience: seconds until it counts as stuck, and is killed; None waits for ever.

    Raises:
        ValueError: that `work` raised; or, with `what`, for another error, a process that ended or was killed on its
            way, one that is stuck, and one that could not be started.

    >>> in_child(lambda: os.getpid(), "a look") == os.getpid()
    False
    >>> in_child(lambda: 1 / 0, "a look")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: a look failed: ZeroDivisionError: division by zero (...)
    """
    _flush()  # what waits here would be printed there too
    parent = os.getpid()
    results, its_results = Pipe(duplex=False)
    with results, its_results:
        try:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forking with threads
                pid = os.fork()
        except OSError as error:
            raise ValueError(f"no process can be started for {what}: {error.strerror}") from error
        if pid == 0:
            results.close()
            _work(work, what, its_results, parent)
        its_results.close()
        status, waited = None, 0.0
        try:
            while not results.poll(LOOK):
                waited += LOOK  # and no more, where both were stopped
                if patience is not None and waited > patience:
                    raise ValueError(
                        f"{what} has not ended after {patience:g} s: is what it reads there, and does a thread that"
                        " ran before hold a lock?"
                    )
                status = _ended(pid)
                if status is not None:  # what it has started may hold the other end
                    break
            answer = _received(results)
            if answer is None and status is None:
                status = _awaited(pid)
        finally:
            if status is None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                _awaited(pid)
    if answer is None:
        raise ValueError(f"{what} failed: its process {_how(status)}")
    made, result = pickle.loads(answer)
    if not made:
        raise result
    return result


def _work(work: Callable[[], Any], what: str, results: Connection, parent: int) -> NoReturn:
    """In the process: work, answer, and leave at once."""
    try:
        end_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other one ends this
        if os.getppid() == parent:
            torch.set_num_threads(1)  # threads that computed before are not in this process
            try:
                answer = pickle.dumps((True, work()))
            except BaseException as error:
                answer = _refusal(error, what)
            _flush()
            results.send_bytes(answer)
    finally:
        os._exit(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # of whatever kind it is
            stream.flush()


def _refusal(error: BaseException, what: str) -> bytes:
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        with suppress(Exception):  # some cannot travel
            answer = pickle.dumps((False, error))
            pickle.loads(answer)
            return answer
        return pickle.dumps((False, ValueError(str(error))))
    return pickle.dumps((False, ValueError(f"{what} failed: {blame(error)}")))


def _received(results: Connection) -> bytes | None:
    try:
        return results.recv_bytes() if results.poll() else None
    except (EOFError, OSError):
        return None


def _ended(pid: int) -> int | None:
    """The status of a process that has ended; 0 where nobody knows it; None while it lives."""
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:  # someone else waits for all
        return 0
    return status if ended else None


def _awaited(pid: int) -> int | None:
    """The same, after a second at most: one that waits for a disk ends when that answers."""
    until = time.monotonic() + 1
    while (status := _ended(pid)) is None and time.monotonic() < until:
        time.sleep(0.001)
    return status


def _how(status: int | None) -> str:
    if status is None:
        return "says nothing"
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"was killed ({signal.Signals(-code).name})" + ("; is there enough memory?" if code == -9 else "")
    return f"exited with code {code}"
