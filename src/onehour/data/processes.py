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
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO, Any, NoReturn, TypeVar

import torch

from onehour.leaving import signal_with_parent, signals_wait
from onehour.messages import blame

Task = TypeVar("Task")
Result = TypeVar("Result")
Done = Callable[[int], None]
"""Is told how many more items are done."""
FORK = multiprocessing.get_context("fork")
"""Processes get what they work with as it is, be it as large as it may, and nothing of it travels."""
SECONDS = 0.2
"""Between two looks at how far the processes are."""


def ignore(items: int) -> None:
    """A `Done` for who does not ask."""


def spans(count: int, size: int) -> list[range]:
    """range(count) in ranges of `size`, the last one shorter."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def spread(
    work: Callable[[Task, Done], Result], tasks: Sequence[Task], *, jobs: int, done: Done = ignore
) -> list[Result]:
    """`work(task, done)` of each task, in up to `jobs` processes; the results in the order of the tasks.

    Args:
        work: sent to each process once; tells `done` of every item, whose sum over all processes is passed on.
        jobs: 1 works in this process.
    """
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        return [work(task, done) for task in tasks]
    counter, stopping = FORK.Value("q", 0), FORK.Event()
    executor = ProcessPoolExecutor(jobs, FORK, initializer=_begin, initargs=(work, counter, stopping))
    told = 0
    try:
        with signals_wait(signal.SIGINT):
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
            f"one of {jobs} processes was ended from outside, perhaps for lack of memory; use fewer with --jobs"
        ) from error
    finally:
        stopping.set()
        executor.shutdown(cancel_futures=True)


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


PATIENCE = 300.0
"""Seconds that a look may take: ten times what a sample may, since files are opened for it, perhaps far away."""
PAUSE = 0.02
"""Seconds between two looks at a process that is waited for."""


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
    """
    _flush()  # what waits here would be printed there too
    parent = os.getpid()
    with open(os.memfd_create("result"), "rb+") if hasattr(os, "memfd_create") else TemporaryFile() as file:
        try:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forking with threads
                pid = os.fork()
        except OSError as error:
            raise ValueError(f"no process can be started for {what}: {error.strerror}") from error
        if pid == 0:
            _work(work, what, file, parent)
        status = None
        try:
            status = _awaited(pid, patience)
            if status is None:
                raise ValueError(
                    f"{what} has not ended after {patience:g} s: check that what it reads can be"
                    " reached, and that no thread that ran before holds a lock"
                )
        finally:
            if status is None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                _awaited(pid, 1.0)  # one that waits for a disk ends when that answers
        file.seek(0)
        answer = file.read()
    assert status is not None
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and answer:
        made, result = pickle.loads(answer)
        if not made:
            raise result
        return result
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"exited with code {code}"
    raise ValueError(f"{what} failed: its process {how}" + ("; is there enough memory?" if code == -9 else ""))


def _work(work: Callable[[], Any], what: str, file: IO[bytes], parent: int) -> NoReturn:
    """In the process: work, answer, and leave at once."""
    code = 1
    try:
        signal_with_parent(signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other one ends this
        if os.getppid() == parent:
            torch.set_num_threads(1)  # threads that computed before are not in this process
            try:
                answer = pickle.dumps((True, work()))
            except BaseException as error:
                answer = _refusal(error, what)
            _flush()
            file.write(answer)
            file.flush()
            code = 0
    finally:
        os._exit(code)


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


def _awaited(pid: int, patience: float | None) -> int | None:
    """The status of a process once it has ended; 0 where nobody knows it; None if it lives after so many seconds."""
    waited, pause = 0.0, PAUSE / 16
    while patience is None or waited <= patience:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # someone else waits for all
            return 0
        if ended:
            return status
        time.sleep(pause)
        waited, pause = waited + pause, min(2 * pause, PAUSE)  # and no more, where both were stopped
    return None
