"""The p processes of a run on one machine: started together, watched, and ended together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from onehour.dist.network import family_of, loopback
from onehour.dist.signals import EARLY, EXIT_STOPPED, StopSignals, asks_to_stop, held_back

__all__ = ["TELL", "Failure", "Processes", "meeting_place"]

TELL = "ONEHOUR_TELL"
"""Names the descriptor by which a process tells its launcher why it fails."""
GRACE = 5.0
"""Seconds that the others have when one has failed: they notice it themselves, and may be writing a checkpoint."""
TICK = 0.02


@dataclass(frozen=True)
class Failure:
    """Why p processes have ended.

    Args:
        text: for a person.
        code: to leave with.
        on_purpose: a signal asked for it, or there is nothing to go on with: they must not be started anew.

    >>> Failure("gone", 1).on_purpose
    False
    """

    text: str
    code: int
    on_purpose: bool = False


@contextmanager
def meeting_place(port: int) -> Iterator[int]:
    """The store where the processes of one start find each other, on the loopback device alone; gives its port.

    Args:
        port: 0 picks a free one, which nobody can take between choice and use.

    >>> with meeting_place(0) as port:
    ...     1024 < port < 65536
    True
    """
    from torch._C._distributed_c10d import TCPStore

    here = loopback()
    with socket.create_server((here, port), family=family_of(here), backlog=4096) as listener:
        found = listener.getsockname()[1]
        store = TCPStore(here, found, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    yield found
    del store


class Processes:
    """p processes, of ranks 0 … p − 1.

    Args:
        command: of each of them.
        environs: what each finds in its environment besides ours.
        stop: signals that this process was sent; they are passed on.

    >>> Processes(["false"], [{}, {}]).wait().code
    1
    """

    def __init__(
        self, command: Sequence[str], environs: Sequence[Mapping[str, str]], stop: StopSignals | None = None
    ) -> None:
        self._stop = stop
        self._passed_on = False
        self._started: list[subprocess.Popen[bytes]] = []
        self._ears: list[int] = []
        try:
            for environ in environs:
                self._start(command, environ)
        except BaseException:
            self.kill()
            raise

    def _start(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        ear, mouth = os.pipe()
        with ExitStack() as cleanup:
            cleanup.callback(os.close, mouth)
            cleanup.enter_context(nullcontext() if self._stop is None else held_back())
            self._ears.append(ear)
            os.set_blocking(ear, False)
            every = os.environ | environ | {TELL: str(mouth)}
            self._started.append(subprocess.Popen(command, env=every, pass_fds=[mouth]))

    def wait(self) -> Failure | None:
        """Wait until all have ended; None if all is well.

        When one fails, the others have a few seconds to end by themselves.

        >>> Processes(["true"], [{}]).wait() is None
        True
        """
        try:
            while None in (codes := self._codes()) and not any(codes):
                if (left := self._asked()) is not None:
                    return left
                time.sleep(TICK)
            deadline = time.monotonic() + GRACE
            while None in self._codes() and time.monotonic() < deadline:
                time.sleep(TICK)
            return self._failure(self._codes()) if any(codes) else None
        finally:
            self.kill()

    def kill(self) -> None:
        """End those that are left, also stopped ones.

        >>> Processes(["sleep", "9"], [{}]).kill()
        """
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
        while self._ears:
            os.close(self._ears.pop())

    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self._started]

    def _asked(self) -> Failure | None:
        """Pass the first signal on; a second one ends all at once."""
        if self._stop is None:
            return None
        if self._stop.again is not None:
            name = signal.Signals(self._stop.again).name
            text = f"ended at once by a second signal ({name}); the same command goes on from the last checkpoint"
            return Failure(text, 128 + self._stop.again, True)
        if self._stop.asked is not None and not self._passed_on:
            self._passed_on = True
            for process in self._started:
                process.send_signal(self._stop.asked)
        return None

    def _failure(self, codes: list[int | None]) -> Failure:
        """The one that explains itself, before those of processes that lost their peer to it."""
        told = [_heard(ear) for ear in self._ears]
        for code, said in zip(codes, told, strict=True):
            if said is not None and code:
                return Failure(str(said["message"]), code, on_purpose=said.get("final") is True)
        ended = {code: rank for rank, code in reversed(list(enumerate(codes))) if code}
        asked = [code for code in ended if asks_to_stop(code)]
        code = asked[0] if asked else min(ended)  # a signal says more than a code
        text = EARLY if code == EXIT_STOPPED else f"process {ended[code]} {_said(code)}"
        return Failure(text, _left_with(code), on_purpose=bool(asked) or self._passed_on)


def _heard(ear: int) -> dict[str, Any] | None:
    """What a process told us before it ended."""
    try:
        content = os.read(ear, 2**16)
    except BlockingIOError:
        return None
    try:
        said = json.loads(content) if content else None
    except ValueError:
        return None
    return said if isinstance(said, dict) and "message" in said else None


def _said(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    if asks_to_stop(code):
        return f"exited at once on a second {signal.Signals(code - 128).name}; the same command goes on"
    return f"exited with code {code}"


def _left_with(code: int) -> int:
    """A process's end as an exit code of ours: as a shell has it where it was asked to end, else 1 for a signal."""
    if code > 0:
        return code
    return 128 - code if asks_to_stop(code) else 1
