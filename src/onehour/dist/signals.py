"""Signals that ask a run to stop: noted at once, obeyed between two iterations; a second one ends the process."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from onehour.leaving import leave, park

OURS = "ONEHOUR_LAUNCHED"
"""Holds the id of our launcher in the processes that it started."""
EXIT_STOPPED = 75
EARLY = "stopped before the first iteration; the same command goes on"
STOPPED = "stopped"
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
APART = 1.0
"""Seconds: signals closer together are one. Ctrl-C reaches every process of a terminal, and launchers pass it on."""

_listening: StopSignals | None = None


class StopSignals:
    """While entered, takes the signals of `STOPS`; not SIGHUP where it is ignored, as by nohup.

    Until the first call there is nothing to save: a signal ends the process at once, with code 75. From then on it
    only sets what a call returns. A second one, more than a second later, ends the process with 128 + its number.

    A thread of its own reads what the C handler writes, so that both hold while the process waits for another one.

    >>> with StopSignals() as stop_asked:
    ...     before = stop_asked()
    ...     signal.raise_signal(signal.SIGUSR1)
    ...     before, stop_asked()
    (False, True)
    """

    def __init__(self, *, speaks: bool = True, text: str = EARLY) -> None:
        self.speaks, self.text = speaks, text
        self.asked: int | None = None
        """The first signal."""
        self.again: int | None = None
        """A second one, where `leave_to_caller` was called."""
        self._since: float | None = None
        """When the first was heard; the thread's alone, which may be late if something holds the interpreter."""
        self._training = self._left_to_caller = False
        self._before: dict[int, Any] = {}
        self._wakeup: tuple[socket.socket, socket.socket] | None = None
        self._outer: StopSignals | None = None
        self._hears = False
        self._missed: list[int] = []
        """What came before the thread was told of it."""

    def __call__(self) -> bool:
        """Whether to stop; from now on there is something to save."""
        self._training = True
        return self.asked is not None

    def leave_to_caller(self) -> None:
        """From now on signals are only noted, in `asked` and `again`: someone reads them and acts."""
        self._training = self._left_to_caller = True

    def end_at_once(self) -> None:
        """From now on a signal ends the process at once again, as before the first call: there is nothing to save."""
        self._training = self._left_to_caller = False

    def __enter__(self) -> StopSignals:
        global _listening
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread alone
            return self
        self._wakeup = reading, writing = socket.socketpair()
        writing.setblocking(False)
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self._outer, _listening = _listening, self
        self._before = {number: signal.signal(number, self._note) for number in STOPS if number not in ignored}
        threading.Thread(target=self._read, args=(reading,), name="signals", daemon=True).start()
        self._descriptor = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        self._hears = True
        writing.send(bytes(self._missed))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # what a launcher has held back comes now
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _listening
        if self._wakeup is None:
            return
        # In this order, one that comes in between is heard by the outer one's thread.
        signal.set_wakeup_fd(self._descriptor)
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        _listening = self._outer
        if self._outer is not None and self.asked is not None:  # what is asked twice within a second is asked once
            self._outer.asked, self._outer._since, self._outer._training = self.asked, self._since, True
        self._wakeup[1].shutdown(socket.SHUT_RDWR)  # the thread reads its end
        self._wakeup[1].close()
        self._wakeup = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        """At once for who calls next; the thread does the rest, perhaps a moment later."""
        if self._training:
            self.asked = self.asked or number
        elif self._hears:
            park()
        else:
            self._missed.append(number)

    def _read(self, reading: socket.socket) -> None:
        with reading:
            while content := reading.recv(64):
                for number in content:
                    if number in self._before:
                        self._obey(number)

    def _obey(self, number: int) -> None:
        if not self._training:
            leave(EXIT_STOPPED, self.text if self.speaks else "")
        if self._since is None:
            self._since = time.monotonic()
            self.asked = self.asked or number
        elif time.monotonic() - self._since > APART:
            if not self._left_to_caller:
                leave(128 + number, "")
            self.again = number


def ignore_stops() -> None:
    """From now on no signal of `STOPS` ends this process: what it had to do is done, and its exit code stands."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def asks_to_stop(code: int) -> bool:
    """Whether an exit code, negative for a signal as of Popen, says that a process ended because it was asked to."""
    return code == EXIT_STOPPED or any(code in (-number, 128 + number) for number in STOPS)


def _forked() -> None:
    """A process that was forked, such as one that loads data, is told to end by the one that forked it alone."""
    global _listening
    while _listening is not None and _listening._wakeup is not None:
        signal.set_wakeup_fd(-1)
        for end in _listening._wakeup:
            end.close()
        for number in _listening._before:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        _listening = _listening._outer


os.register_at_fork(after_in_child=_forked)
