"""Notices a process that makes no progress, says which and where, and ends this one, so that a launcher can restart."""

from __future__ import annotations

import faulthandler
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["EXIT_STUCK", "Watchdog"]

EXIT_STUCK = 76
GRACE = 10.0
"""Times the timeout: what starting, compiling and evaluating may take."""

BEATS = ".beats"
BEAT = struct.Struct("<qqd")
"""A process's line in the file of beats: its id, its iteration, and when it was last seen."""


class Watchdog:
    """A thread that ends its process when `beat` was not called for too long.

    Every process of a host writes what it last did into one file in the run's folder. So the one that notices can name
    the one that is stuck: all others wait for it in the reduction.

    Args:
        folder: the run's.
        rank: of this process.
        size: p.
        timeout: seconds for an iteration; None for no watch.

    >>> dog = Watchdog(Path("nowhere"), rank=0, size=1, timeout=None)
    >>> dog.beat(3)
    >>> dog.close()
    """

    def __init__(self, folder: Path, *, rank: int, size: int, timeout: float | None) -> None:
        self.folder, self.rank, self.size, self.timeout = folder, rank, size, timeout
        self._iteration = 0
        self._seen = time.monotonic()
        self._patience = GRACE
        self._ended = threading.Event()
        self._file: int | None = None
        if timeout is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, iteration: int) -> None:
        """An iteration is done; the next one has the timeout."""
        self._iteration, self._seen, self._patience = iteration, time.monotonic(), 1.0

    @contextmanager
    def slow(self) -> Iterator[None]:
        """For what may take longer than an iteration: starting, compiling, evaluating.

        >>> with Watchdog(Path("nowhere"), rank=0, size=1, timeout=None).slow():
        ...     pass
        """
        self._seen, self._patience = time.monotonic(), GRACE
        yield
        self._seen, self._patience = time.monotonic(), 1.0

    def close(self) -> None:
        """Watch no longer."""
        self._ended.set()
        if self.timeout is not None:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        assert self.timeout is not None
        pace = min(1.0, self.timeout / 5)
        turn = time.monotonic()
        while not self._ended.wait(pace):
            if time.monotonic() - turn > 5 * pace:  # this whole process was stopped, and goes on now
                self._seen = time.monotonic()
            turn = time.monotonic()
            # Should this thread itself get no turn, because something holds the interpreter, this one in C fires.
            if sys.__stderr__ is not None:
                faulthandler.dump_traceback_later(2 * self.timeout * GRACE, exit=True, file=sys.__stderr__)
            self._note()
            late = time.monotonic() - self._seen
            if late > self.timeout * self._patience and not self._ended.is_set():
                self._give_up(late)

    def _give_up(self, late: float) -> None:
        lines = [f"onehour: process {self.rank} made no progress for {late:.0f} s after iteration {self._iteration}"]
        lines += [f"onehour: {text}" for text in self._culprits()]
        print("\n".join(lines), file=sys.stderr, flush=True)
        if sys.__stderr__ is not None:  # the process's own: a notebook's has no file
            faulthandler.dump_traceback(all_threads=True, file=sys.__stderr__)
        os._exit(EXIT_STUCK)

    def _note(self) -> None:
        """Write this process's line; a disk that refuses must not end a run."""
        with suppress(OSError):
            if self._file is None:
                self._file = os.open(self.folder / BEATS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.pwrite(self._file, BEAT.pack(os.getpid(), self._iteration, time.time()), self.rank * BEAT.size)

    def _culprits(self) -> list[str]:
        """Who is behind this process, or was not seen, as far as this host's file of beats knows."""
        if self._file is None:
            return []
        content = os.pread(self._file, BEAT.size * self.size, 0)
        found = []
        for rank in range(min(self.size, len(content) // BEAT.size)):
            pid, iteration, seen = BEAT.unpack_from(content, rank * BEAT.size)
            silent = time.time() - seen
            state = _state_of(pid)
            if rank != self.rank and pid and (silent > 5 or iteration < self._iteration or state != "runs"):
                found.append(
                    f"process {rank} (id {pid}, {state}) did iteration {iteration}, last seen {silent:.0f} s ago"
                )
        return found


def _state_of(pid: int) -> str:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "is gone"
    return {"T": "is stopped", "t": "is stopped", "Z": "has ended", "D": "waits for a disk"}.get(state, "runs")
