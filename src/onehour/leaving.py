"""What happens before a signal ends this process: what is being written is finished, temporary folders go."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of Linux's prctl."""

PATIENCE = 5.0
"""Seconds that something may take to be finished; a disk that hangs is not waited for."""

_writing = threading.RLock()
_inside = threading.local()
_last: list[Callable[[], object]] = []


@contextmanager
def undisturbed() -> Generator[None]:
    """While entered, no signal ends this process: files that belong together are all written, or none is."""
    _inside.depth = getattr(_inside, "depth", 0) + 1
    try:
        with _writing:
            yield
    finally:
        _inside.depth -= 1
        if not _inside.depth and getattr(_inside, "wanted", False):
            park()


@contextmanager
def before_leaving(last: Callable[[], object]) -> Generator[None]:
    """While entered, `last` is called before a signal ends this process, from another thread."""
    _last.append(last)
    try:
        yield
    finally:
        _last.remove(last)


@contextmanager
def signals_wait(*numbers: signal.Signals) -> Generator[None]:
    """While entered, signals wait: a process that is started here gets them once it listens, or ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def scratch(prefix: str) -> Generator[Path]:
    """A temporary folder that goes at the end, and also when a signal ends this process."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix=prefix))

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    with before_leaving(remove):
        try:
            yield folder
        finally:
            remove()


def signal_with_parent(number: int) -> None:
    """Have Linux send this process a signal when the one that started it ends: killed, that one can no longer do it."""
    _prctl(PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Have Linux make this process the parent of those below it whose own parent has ended."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(option, value, 0, 0, 0)


def park() -> None:
    """Keep the main thread from going on while another one ends this process; called where the signal is handled."""
    if getattr(_inside, "depth", 0):
        _inside.wanted = True  # it goes on to the end of what is undisturbed
        return
    while True:
        time.sleep(1)


def leave(code: int, text: str) -> NoReturn:
    """End this process at once, after what is undisturbed, with a line on standard error.

    Only os.write is safe here: the main thread may hold the lock of a stream.
    """
    _writing.acquire(timeout=PATIENCE)
    for last in reversed(_last):
        with suppress(Exception):
            last()
    with suppress(OSError):
        number, stream = (1, sys.__stdout__) if os.isatty(1) else (2, sys.__stderr__)
        if stream is not None and os.isatty(number):
            os.write(number, b"\r\x1b[K\x1b[?25h")  # a bar may be on this line, and the cursor hidden
        if text:
            os.write(2, f"onehour: {text}\n".encode(errors="backslashreplace"))
    os._exit(code)
