"""A look at what is someone's, in a process of its own: this one opens nothing and holds nothing of it afterwards.

A data set opens its file when it is first asked, so that every process which loads has a handle of its own. So whoever
starts such processes must not have asked before: they would all have one handle, with one offset in the file.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

import torch

from onehour.leaving import signal_with_parent
from onehour.messages import blame

__all__ = ["PATIENCE", "in_child"]

Result = TypeVar("Result")
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
        signal_with_parent(signal.SIGKILL)
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
    return f"left with code {code}"
