"""Starting a run's processes on this machine, and what they and their launcher tell each other."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path

from onehour.dist.network import family_of, loopback
from onehour.dist.processes import TELL, Processes, meeting_place
from onehour.dist.signals import OURS, StopSignals
from onehour.leaving import signal_with_parent
from onehour.machine import CORES, share_of

__all__ = [
    "ENDS",
    "LaunchError",
    "end_with_launcher",
    "is_launched_by_us",
    "is_torchruns",
    "launch",
    "process_began",
    "refuse_used_port",
    "report_failure",
]

JOB = "TORCHELASTIC_RUN_ID"
ENDS = "ONEHOUR_ENDS_WITH_PARENT"
"""Set for a run that must not outlive the process that started it."""


class LaunchError(Exception):
    """A process failed; `code` is what it left with, the text what it said.

    >>> LaunchError("gone", code=4).code
    4
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def is_launched_by_us(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether `launch` started this process, and so says for all of them how it ended.

    >>> is_launched_by_us({"RANK": "0", "WORLD_SIZE": "2"})
    False
    """
    return OURS in environ


def is_torchruns(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process.

    >>> is_torchruns({"RANK": "0", "WORLD_SIZE": "2"}), is_torchruns({"TORCHELASTIC_RUN_ID": "17"})
    (False, True)
    """
    return JOB in environ and OURS not in environ


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
        restarts: how often all processes are started anew when one has failed.
        stop: signals that this process was sent; they are passed on, and nothing is started anew after one.

    Raises:
        ValueError: if the port is in use.
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
            raise LaunchError(failure.text, failure.code)
        again = f"all processes are started anew ({attempt + 1} of {restarts})"
        with suppress(OSError):  # a full disk, perhaps
            print(f"onehour: {failure.text}; {again}", file=sys.stderr, flush=True)


def end_with_launcher(environ: MutableMapping[str, str] = os.environ) -> None:
    """Ask the kernel for a SIGTERM when the process that started this one dies, so that none is left behind."""
    if not sys.platform.startswith("linux"):
        return
    parent = int(environ.get(OURS, os.getppid()))
    signal_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def process_began(pid: int) -> float:
    """When a process of this machine was started, in seconds since 1970; now where the system does not tell.

    >>> process_began(os.getppid()) < process_began(os.getpid()) < time.time()
    True
    """
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except OSError:
        return time.time()
    return time.time() - (up - ticks / os.sysconf("SC_CLK_TCK"))


def report_failure(message: str, environ: MutableMapping[str, str] = os.environ, *, final: bool = False) -> bool:
    """Tell our launcher why this process fails, so that it is said once and not p times; False without one.

    Args:
        final: nothing is to be started anew.

    >>> report_failure("no", environ={})
    False
    """
    if OURS not in environ or TELL not in environ:
        return False
    try:
        os.write(int(environ[TELL]), json.dumps({"message": message[:9999], "final": final}).encode())
    except OSError:  # nobody listens any more
        return False
    return True


def refuse_used_port(port: int) -> None:
    """Refuse a port that another program listens on; 0 stands for a free one.

    >>> refuse_used_port(0)
    """
    if port == 0:
        return
    here = loopback()
    try:
        socket.create_server((here, port), family=family_of(here)).close()
    except OSError as error:
        raise ValueError(
            f"port {port} cannot be used ({error.strerror}); give another --port, or 0 for a free one"
        ) from error
