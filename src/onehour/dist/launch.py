"""Starting a run's processes: torch's elastic agent on one node, or what torchrun and srun have started."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

__all__ = [
    "ENDS",
    "LaunchError",
    "adopt_slurm",
    "end_with_launcher",
    "is_launched",
    "is_launched_by_us",
    "launch",
    "refuse_used_port",
    "report_failure",
]

OURS = "ONEHOUR_LAUNCHED"
PR_SET_PDEATHSIG = 1
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


def is_launched(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether a launcher has started this process as one of several (torchrun's variables are there).

    >>> is_launched({"RANK": "0", "WORLD_SIZE": "2"}), is_launched({})
    (True, False)
    """
    return "RANK" in environ and "WORLD_SIZE" in environ


def is_launched_by_us(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether `launch` started this process, and so says for all of them how it ended.

    >>> is_launched_by_us({"RANK": "0", "WORLD_SIZE": "2"})
    False
    """
    return OURS in environ


def adopt_slurm(environ: MutableMapping[str, str] = os.environ) -> None:
    """Write torchrun's variables from Slurm's, for processes that plain `srun` started.

    Process 0's host is the first of the node list, the port follows from the job's number, so that all agree.

    >>> environ = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "17",
    ...            "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "gpu[07-08]"}
    >>> adopt_slurm(environ)
    >>> environ["RANK"], environ["WORLD_SIZE"], environ["MASTER_ADDR"], environ["MASTER_PORT"]
    ('3', '4', 'gpu07', '20017')
    """
    if is_launched(environ) or "SLURM_PROCID" not in environ or int(environ.get("SLURM_NTASKS", "1")) == 1:
        return
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "localhost")
    step = int(environ.get("SLURM_JOB_ID", "0")) + 1000 * int(environ.get("SLURM_STEP_ID", "0"))
    environ.update(
        {
            "RANK": environ["SLURM_PROCID"],
            "WORLD_SIZE": environ["SLURM_NTASKS"],
            "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
            "MASTER_ADDR": environ.get("MASTER_ADDR", _first_host(nodes)),
            "MASTER_PORT": environ.get("MASTER_PORT", str(20000 + step % 20000)),
        }
    )
    per_node = re.match(r"\d+", environ.get("SLURM_NTASKS_PER_NODE", ""))
    if per_node:
        environ["LOCAL_WORLD_SIZE"] = per_node[0]


def launch(
    arguments: Sequence[str], *, processes: int, port: int, threads: int | None, job: str, restarts: int = 0
) -> None:
    """Run `onehour ARGUMENTS` in p processes of this machine under torch's elastic agent, and wait.

    Args:
        job: its name, unique; its processes find it in TORCHELASTIC_RUN_ID.
        restarts: how often all processes are started anew when one has failed.

    Raises:
        ValueError: if the port is in use.
        LaunchError: when a process fails, with its exit code and message.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    refuse_used_port(port)
    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # restarts hang without it; see docs/decisions.md
    os.environ["OMP_NUM_THREADS"] = str(threads or max(1, (os.cpu_count() or 1) // processes))
    os.environ[OURS] = "1"
    known = {field.name for field in dataclasses.fields(LaunchConfig)}  # the first releases had no such setting
    signals: dict[str, Any] = {"signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"}
    config = LaunchConfig(
        **{name: value for name, value in signals.items() if name in known},
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=job,
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}",
        local_addr="localhost",
        max_restarts=restarts,
        monitor_interval=0.1,
    )
    command = ["-m", "onehour", *arguments]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        raise _first_cause(error.failures.values(), error.get_first_failure()[1]) from error
    except SignalException as error:
        raise LaunchError(f"stopped by signal {error.sigval.name}", 75) from error
    finally:
        del os.environ[OURS]


def end_with_launcher() -> None:
    """Ask the kernel for a SIGTERM when the process that started this one dies, so that none is left behind.

    >>> end_with_launcher.__name__
    'end_with_launcher'
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def report_failure(message: str, environ: MutableMapping[str, str] = os.environ) -> bool:
    """Tell our launcher why this process fails, so that it is said once and not p times; False without one.

    >>> report_failure("no", environ={})
    False
    """
    path = environ.get("TORCHELASTIC_ERROR_FILE")
    if OURS not in environ or not path:
        return False
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
    return True


def _first_cause(failures: Iterable[Any], first: Any) -> LaunchError:
    """The failure that explains itself, before those of processes that lost their peer to it."""
    for failure in failures:
        message = failure.error_file_data.get("message")
        if isinstance(message, dict):
            return LaunchError(message["message"], failure.exitcode)
    if first.exitcode < 0:
        return LaunchError(f"process {first.local_rank} was ended by {first.signal_name()}", 1)
    return LaunchError(f"process {first.local_rank} left with exit code {first.exitcode}", first.exitcode)


def refuse_used_port(port: int) -> None:
    """Refuse a port that another program listens on; 0 stands for a free one.

    >>> refuse_used_port(0)
    """
    if port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("localhost", port))
        except OSError as error:
            raise ValueError(
                f"port {port} cannot be used ({error.strerror}); give another --port, or 0 for a free one"
            ) from error


def _first_host(nodes: str) -> str:
    """The first of a Slurm node list such as gpu[07-09,12],login1."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    return (match[1] + (match[2] or "")) if match else "localhost"
