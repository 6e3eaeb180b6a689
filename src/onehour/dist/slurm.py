"""What Slurm says of a process: whether srun started it as one task of several, and where the others find task 0."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FIRST_PORT", "PORTS", "Step", "ancestors", "first_host", "number", "step", "without_srun"]

FIRST_PORT, PORTS = 20005, 12763
"""All below 32768, from where on Linux gives ports to whoever connects to somewhere; a prime number of them."""
STRIDE = 113
"""Of two jobs less than 112 apart no steps share a port; nor do the first steps of jobs 1000, 2000, … apart."""
SLURMS_OWN = 0xFFFFFFF0
"""Step ids from here on: a batch script, an interactive shell."""


@dataclass(frozen=True)
class Step:
    """A task's place in a step of several tasks.

    >>> Step(rank=0, size=2, local_rank=0, local_size=None, port=20017).size
    2
    """

    rank: int
    size: int
    local_rank: int
    local_size: int | None
    port: int


def number(environ: Mapping[str, str], name: str, low: int = 0, high: int | None = None) -> int:
    """A variable that must be a whole number.

    Raises:
        ValueError: naming it and what it is.

    >>> number({"RANK": "x"}, "RANK")
    Traceback (most recent call last):
    ValueError: the environment variable RANK is 'x'; expected a whole number of at least 0
    """
    text = environ[name].strip()
    value = int(text) if re.fullmatch("[0-9]{1,18}", text) else None
    if value is None or value < low or (high is not None and value > high):
        span = f"of at least {low}" if high is None else f"in {low} … {high}"
        raise ValueError(f"the environment variable {name} is {environ[name]!r}; expected a whole number {span}")
    return value


def step(environ: Mapping[str, str]) -> Step | None:
    """This process's place in a step of several tasks; None where srun has not started it, or it alone.

    A batch script is no step, though it finds SLURM_PROCID and SLURM_NTASKS, and the SLURM_STEP_… of the shell that
    submitted it. So the slurmstepd that this process is under, where it is seen, goes before what variables say.

    Raises:
        ValueError: if one of Slurm's variables is no number.

    >>> step({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "17"}) is None
    True
    >>> step({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "2", "SLURM_JOB_ID": "17"}).port
    21928
    """
    if "SLURM_PROCID" not in environ or not any(name.startswith("SLURM_STEP") for name in environ):
        return None
    ours = number(environ, "SLURM_STEP_ID") if "SLURM_STEP_ID" in environ else 0
    size = _tasks(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if size == 1 or ours >= SLURMS_OWN or not _under_srun() or _typed_in_shell(environ):
        return None
    rank = number(environ, "SLURM_PROCID", 0, size - 1)
    job = number(environ, "SLURM_JOB_ID") if "SLURM_JOB_ID" in environ else 0
    return Step(
        rank,
        size,
        local_rank=number(environ, "SLURM_LOCALID") if "SLURM_LOCALID" in environ else 0,
        local_size=_local_size(environ, rank, size),
        port=FIRST_PORT + (STRIDE * job + ours) % PORTS,
    )


def without_srun(environ: Mapping[str, str]) -> int:
    """How many tasks a job has for a process that srun did not start as one of several; 1 outside Slurm.

    >>> without_srun({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4"}), without_srun({})
    (4, 1)
    """
    return _tasks(environ, "SLURM_NTASKS", "SLURM_JOB_NUM_NODES") if "SLURM_JOB_ID" in environ else 1


def first_host(environ: Mapping[str, str]) -> str:
    """The first host of a step, where Slurm puts task 0.

    Raises:
        ValueError: if a hostfile has given the tasks an order of their own.

    >>> first_host({"SLURM_STEP_NODELIST": "gpu[07-09,12],login1"})
    'gpu07'
    """
    if environ.get("SLURM_DISTRIBUTION", "").startswith("arbitrary"):
        raise ValueError(
            "SLURM_DISTRIBUTION is arbitrary, so the first host of Slurm's list need not have process 0; set"
            " MASTER_ADDR to the host of the first task in SLURM_HOSTFILE"
        )
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if not match:
        raise ValueError("SLURM_STEP_NODELIST names no host; set MASTER_ADDR to the host of process 0")
    return match[1] + (match[2] or "")


def ancestors() -> Iterator[int]:
    """The processes that this one is below, from its parent on.

    >>> next(ancestors()) == os.getppid()
    True
    """
    pid = os.getppid()
    while pid > 0:
        yield pid
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except OSError:
            return


def _tasks(environ: Mapping[str, str], *names: str) -> int:
    """The first of the variables that is there."""
    return next((number(environ, name, low=1) for name in names if name in environ), 1)


def _local_size(environ: Mapping[str, str], rank: int, size: int) -> int | None:
    """How many tasks this host has: SLURM_GTIDS lists them; SLURM_NTASKS_PER_NODE was asked for the whole job."""
    here = environ.get("SLURM_GTIDS", "").split(",")
    if str(rank) in here:
        return len(here)
    asked = re.match(r"[1-9]\d*", environ.get("SLURM_NTASKS_PER_NODE", ""), re.ASCII)
    return min(int(asked[0]), size) if asked else None


def _under_srun() -> bool:
    """Whether the slurmstepd above this process is that of srun's tasks; also where none is seen, as in a container."""
    for pid in ancestors():
        with suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
            if found := re.match(rb"slurmstepd: \[[^\]]*\.(\w+)\]", title):
                return found[1].isdigit()
    return True


def _typed_in_shell(environ: Mapping[str, str]) -> bool:
    """Whether someone typed this command in a shell that is itself a task, as of `srun -n 4 --pty bash`.

    Such a shell has put it in front of its terminal, in a process group of its own.
    """
    with suppress(OSError, ValueError):
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
        try:
            in_front = os.tcgetpgrp(terminal)
        finally:
            os.close(terminal)
        return in_front == os.getpgrp() != os.getpgid(int(environ.get("SLURM_TASK_PID", "")))
    return False
