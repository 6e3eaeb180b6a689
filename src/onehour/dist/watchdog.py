"""What ends a run before its end: a stop that was asked for, or a process that makes no progress.

The watchdog says which and where, and ends its process, so that a launcher can restart.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from onehour.dist.group import Group
from onehour.dist.launch import is_torchruns
from onehour.dist.signals import StopSignals
from onehour.machine import stat_of
from onehour.messages import tell

EXIT_STUCK = 76
GRACE = 10.0
"""Times the timeout: what starting, compiling and evaluating may take."""
LONGEST = 1e7
"""Seconds; the C library refuses more."""

BEATS = ".beats"
BEAT = struct.Struct("<qqddq")
"""A process's line in the file of beats: its id, its iteration, when it was last seen, its patience, its host."""
HOST = zlib.crc32(socket.gethostname().encode())
FRESH = 5.0
"""Seconds since a process was last seen, within which it is alive."""
DUMP = getattr(signal, "SIGRTMIN", signal.SIGURG)  # macOS has no signals to spare
"""Asks a process of ours, or one that loads data for it, for its stacks."""


def never() -> bool:
    return False


class Watchdog:
    """A thread that ends its process when `beat` was not called for too long.

    Every process writes what it last did into one file in the run's folder. So the one that notices can name the one
    that is stuck, for which all others wait in the reduction; and it bears with a process 0 that waits for a disk.

    Args:
        folder: the run's; None until it is known to be.
        timeout: seconds for an iteration, and a tenth of those for the start; None for no watch.
    """

    def __init__(self, folder: Path | None, *, rank: int, size: int, timeout: float | None) -> None:
        self.folder, self.rank, self.size, self.timeout = folder, rank, size, timeout
        self._iteration: int | None = None
        self._seen = time.monotonic()
        self._patience = GRACE
        self._ended = threading.Event()
        self._file: int | None = None
        if timeout is not None:
            if sys.__stderr__ is not None:  # the process's own: a notebook's has no file
                faulthandler.register(DUMP, file=sys.__stderr__, all_threads=True)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, iteration: int, *, slow: bool = False) -> None:
        """An iteration is done; the next one has the timeout, or as long as a start where it will be slow."""
        self._iteration, self._seen, self._patience = iteration, time.monotonic(), GRACE if slow else 1.0

    @contextmanager
    def slow(self) -> Generator[None]:
        """For what may take longer than an iteration: starting, compiling, evaluating, waiting for a disk."""
        before, self._seen, self._patience = self._patience, time.monotonic(), GRACE
        yield
        self._seen, self._patience = time.monotonic(), before

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._ended.set()
        if self.timeout is not None:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(DUMP)

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
                longest = min(2 * self.timeout * GRACE, LONGEST)
                faulthandler.dump_traceback_later(longest, exit=True, file=sys.__stderr__)
                if self._ended.is_set():  # `close` came between, and has cancelled an earlier one
                    faulthandler.cancel_dump_traceback_later()
            self._note()
            late = time.monotonic() - self._seen
            if late > self.timeout * self._patience and not self._ended.is_set() and not self._excused(late):
                self._give_up(late)
        if self._file is not None:
            os.close(self._file)

    def _excused(self, late: float) -> bool:
        """Whether this process waits for process 0, which is alive and does something slow."""
        assert self.timeout is not None
        return any(
            time.time() - beat.seen < FRESH and late <= self.timeout * beat.patience for beat in self._beats()[:1]
        )

    def _give_up(self, late: float) -> None:
        at = "while it started" if self._iteration is None else f"after iteration {self._iteration}"
        lines = [f"process {self.rank} made no progress for {late:.0f} s {at}"]
        done, ask = self._iteration or 0, list[int]()
        for rank, beat in enumerate(self._beats()):
            silent = time.time() - beat.seen
            state = _state_of(beat.pid) if beat.host == HOST else "of another host"
            if rank != self.rank and beat.pid and (silent > FRESH or beat.iteration < done or state != RUNS):
                who = f"process {rank} (id {beat.pid}, {state})"
                lines.append(f"{who} did iteration {beat.iteration}, last seen {silent:.0f} s ago")
                ask += [beat.pid] if state == RUNS else []
        for pid in _loaders():
            if (state := _state_of(pid)) != RUNS:
                lines.append(f"a process that loads data for process {self.rank} (id {pid}, {state}) gives none")
            else:
                ask.append(pid)
        tell("\nonehour: ".join(lines))
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(all_threads=True, file=sys.__stderr__)
        for pid in ask:
            if _catches(pid, DUMP):
                tell(f"process id {pid} is at")
                with suppress(OSError):
                    os.kill(pid, DUMP)
                time.sleep(0.2)  # until it has written
        os._exit(EXIT_STUCK)

    def _note(self) -> None:
        """Write this process's line; a disk that refuses must not end a run."""
        if self.folder is None:
            return
        line = BEAT.pack(os.getpid(), self._iteration or 0, time.time(), self._patience, HOST)
        with suppress(OSError):
            if self._file is None:
                self._file = os.open(self.folder / BEATS, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            os.pwrite(self._file, line, self.rank * BEAT.size)

    def _beats(self) -> list[_Beat]:
        if self._file is None:
            return []
        try:
            content = os.pread(self._file, BEAT.size * self.size, 0)
        except OSError:
            return []
        return [_Beat(*fields) for fields in BEAT.iter_unpack(content[: len(content) // BEAT.size * BEAT.size])]


class Stopping:
    """Whether all processes are to stop: asked for at every iteration, and by a signal during evaluations too."""

    def __init__(self, group: Group, asked: Callable[[], bool] = never, signals: StopSignals | None = None) -> None:
        self.group, self._asked, self._signals = group, asked, signals

    def is_asked(self) -> bool:
        return self._asked() or self.is_signalled()

    def is_signalled(self) -> bool:
        return self._signals is not None and self._signals()

    def lasts(self) -> bool:
        """Whether a restart must not undo this stop. All processes call it together.

        torchrun sends SIGTERM when a host comes or goes, and then starts all processes anew, to go on.
        """
        if self._signals is None:
            return True
        asked = self._signals.asked
        mine = asked is not None and not (asked == signal.SIGTERM and is_torchruns())
        return self.group.any(mine)


class _Beat(NamedTuple):
    pid: int
    iteration: int
    seen: float
    patience: float
    host: int


RUNS = "runs"


def _state_of(pid: int) -> str:
    states = {"T": "is stopped", "t": "is stopped", "Z": "has ended", "D": "waits for a disk"}
    stat = stat_of(pid)
    return states.get(stat[0], RUNS) if stat else "is gone"


def _loaders() -> list[int]:
    """Processes that this one has forked: they have its command line."""
    ours = Path("/proc/self/cmdline").read_bytes()
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if stat_of(folder.name)[1:2] == [str(os.getpid())] and (folder / "cmdline").read_bytes() == ours:
                found.append(int(folder.name))
    return found


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; else it would end by it."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False
