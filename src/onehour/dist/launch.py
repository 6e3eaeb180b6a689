"""The p processes of a run on this machine: started, watched, and ended together; what they tell their launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onehour.dist.launched import JOB
from onehour.dist.meeting import listen_here, loopback, store_at
from onehour.dist.signals import EARLY, EXIT_STOPPED, OURS, STOPS, StopSignals, asks_to_stop
from onehour.leaving import signal_with_parent, signals_wait
from onehour.machine import CORES, share_of, stat_of
from onehour.messages import tell

ENDS = "ONEHOUR_ENDS_WITH_PARENT"
"""Set for a run that must not outlive the process that started it."""
TELL = "ONEHOUR_TELL"
"""Names the descriptor by which a process tells its launcher why it fails."""
GRACE = 5.0
"""Seconds that the others have when one has failed: they notice it themselves, and may be writing a checkpoint."""
TICK = 0.02


@dataclass(unsafe_hash=True)
class LaunchError(Exception):
    """Why p processes have ended."""

    message: str
    code: int
    on_purpose: bool = False
    """A signal asked for it, or there is nothing to go on with: they must not be restarted."""

    def __str__(self) -> str:
        return self.message


def is_launched_by_us() -> bool:
    """Whether `launch` started this process, and so says for all of them how it ended."""
    return OURS in os.environ


def is_torchruns() -> bool:
    return JOB in os.environ and OURS not in os.environ


def launch(
    arguments: Sequence[str],
    *,
    processes: int,
    port: int,
    threads: int | None,
    job: str,
    restarts: int = 0,
    stop: StopSignals | None = None,
) -> None:
    """Run `onehour ARGUMENTS` in p processes of this machine, and wait.

    They find torchrun's variables, and meet on the loopback device.

    Args:
        job: its name, unique; its processes find it in TORCHELASTIC_RUN_ID.
        restarts: how often all processes are restarted when one has failed.
        stop: signals that this process was sent; they are passed on, and nothing is restarted after one.

    Raises:
        LaunchError: when a process fails, with its exit code and message.
    """
    refuse_used_port(port)
    if stop is not None:
        stop.leave_to_caller()
    # Without -P, Python would take a torch.py of the current folder for torch.
    command = [sys.executable, "-P", "-m", "onehour", *arguments]
    share = share_of(processes)
    shared = {
        OURS: str(os.getpid()),
        JOB: job,
        CORES: str(share),
        "OMP_NUM_THREADS": str(threads or os.environ.get("OMP_NUM_THREADS") or share),
        "MASTER_ADDR": loopback(),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "TORCHELASTIC_USE_AGENT_STORE": str(True),  # the store is this process's; theirs are clients
    }
    for attempt in range(restarts + 1):
        with meeting_place(port) as met:
            shared |= {"MASTER_PORT": str(met), "TORCHELASTIC_RESTART_COUNT": str(attempt)}
            own = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
            failure = Processes(command, own, stop).wait()
        if failure is None:
            return
        if failure.on_purpose or attempt == restarts:
            raise failure
        again = f"all processes are restarted ({attempt + 1} of {restarts})"
        tell(f"{failure}; {again}")


def end_with_launcher() -> None:
    """Ask the kernel for a SIGTERM when the process that started this one dies, so that none is left behind."""
    if not sys.platform.startswith("linux"):
        return
    parent = int(os.environ.get(OURS, os.getppid()))
    signal_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def process_began(pid: int) -> float:
    """When a process of this machine was started, in seconds since 1970; now where the system does not tell."""
    if not (stat := stat_of(pid)):
        return time.time()
    up = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    return time.time() - (up - int(stat[19]) / os.sysconf("SC_CLK_TCK"))


def report_failure(message: str, environ: Mapping[str, str] = os.environ, *, final: bool = False) -> bool:
    """Tell our launcher why this process fails, so that it is said once; False without one. `final`: no new start."""
    if OURS not in environ or TELL not in environ:
        return False
    try:
        os.write(int(environ[TELL]), json.dumps({"message": message[:9999], "final": final}).encode())
    except OSError:  # nobody listens any more
        return False
    return True


def refuse_used_port(port: int) -> None:
    """Refuse a port that another program listens on; 0 stands for a free one."""
    if port == 0:
        return
    try:
        listen_here(port).close()
    except OSError as error:
        raise ValueError(
            f"port {port} cannot be used ({error.strerror}); give another --port, or 0 for a free one"
        ) from error


@contextmanager
def meeting_place(port: int) -> Iterator[int]:
    """The store where the processes of one start find each other, on the loopback device alone; gives its port.

    Port 0 picks a free one, which nobody can take between choice and use.
    """
    listener = listen_here(port)
    found = listener.getsockname()[1]
    store = store_at(listener)
    yield found
    del store  # its last reference: the port is free again


class Processes:
    """p processes, of ranks 0 … p − 1; each finds one of `environs` in its environment besides ours."""

    def __init__(
        self, command: Sequence[str], environs: Sequence[Mapping[str, str]], stop: StopSignals | None = None
    ) -> None:
        self._stop = stop
        self._passed_on = False
        self._started: list[subprocess.Popen[bytes]] = []
        self._reports: list[int] = []
        """For each process the end of a pipe at which it tells why it fails."""
        try:
            for environ in environs:
                reading, writing = os.pipe()
                self._reports.append(reading)
                os.set_blocking(reading, False)
                try:
                    with nullcontext() if self._stop is None else signals_wait(*STOPS):
                        every = os.environ | environ | {TELL: str(writing)}
                        self._started.append(subprocess.Popen(command, env=every, pass_fds=[writing]))
                finally:
                    os.close(writing)
        except BaseException:
            self.kill()
            raise

    def wait(self) -> LaunchError | None:
        """Wait until all have ended; None if all is well.

        When one fails, the others have a few seconds to end by themselves.
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
        """End those that are left, also stopped ones."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
        while self._reports:
            os.close(self._reports.pop())

    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self._started]

    def _asked(self) -> LaunchError | None:
        """Pass the first signal on; a second one ends all at once."""
        if self._stop is None:
            return None
        if self._stop.again is not None:
            name = signal.Signals(self._stop.again).name
            text = f"ended at once by a second signal ({name}); the same command goes on from the last checkpoint"
            return LaunchError(text, 128 + self._stop.again, True)
        if self._stop.asked is not None and not self._passed_on:
            self._passed_on = True
            for process in self._started:
                process.send_signal(self._stop.asked)
        return None

    def _failure(self, codes: list[int | None]) -> LaunchError:
        """The one that explains itself, before those of processes that lost their peer to it."""
        told = [_report_from(reading) for reading in self._reports]
        for code, said in zip(codes, told, strict=True):
            if said is not None and code:
                return LaunchError(str(said["message"]), code, on_purpose=said.get("final") is True)
        ended = {code: rank for rank, code in reversed(list(enumerate(codes))) if code}
        asked = [code for code in ended if asks_to_stop(code)]
        code = asked[0] if asked else min(ended)  # a signal says more than a code
        text = EARLY if code == EXIT_STOPPED else f"process {ended[code]} {_said(code)}"
        # As a shell has it where a signal asked it to end; else 1 for a signal.
        left_with = code if code > 0 else 128 - code if asked else 1
        return LaunchError(text, left_with, on_purpose=bool(asked) or self._passed_on)


def _report_from(reading: int) -> dict[str, Any] | None:
    try:
        said = json.loads(os.read(reading, 2**16))
    except (BlockingIOError, ValueError):  # nothing, or nothing that is ours
        return None
    return said if isinstance(said, dict) and "message" in said else None


def _said(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    if asks_to_stop(code):
        return f"exited at once on a second {signal.Signals(code - 128).name}; the same command goes on"
    return f"exited with code {code}"
