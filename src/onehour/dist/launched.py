"""What a launcher says of this process in its environment: read and checked here, and nowhere else."""

from __future__ import annotations

import dataclasses
import os
import re
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from onehour.machine import stat_of

LOOPBACK = "127.0.0.1"
JOB = "TORCHELASTIC_RUN_ID"
"""What torchrun, and our own launcher, call a run: the same in all its processes and restarts."""
TORCHRUNS_PORT = 29500
"""Where the processes of plain torchrun meet."""
MPI = (  # rank, size, local rank, local size
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "FLUX_TASK_LOCAL_SIZE"),
)
"""What Open MPI, MVAPICH2, jsrun, Hydra (MPICH, Intel MPI) and Flux set."""
ONE_MPI_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
"""Names the job, the same on all its hosts."""
FIRST_PORT, PORTS = 20005, 12763
"""All below 32768, from where on Linux gives ports to whoever connects to somewhere; a prime number of them."""
STRIDE = 113
"""Of two jobs less than 112 apart no steps share a port; nor do the first steps of jobs 1000, 2000, … apart."""
SLURMS_OWN = 0xFFFFFFF0
"""Step ids from here on: a batch script, an interactive shell."""


@dataclass(frozen=True)
class Launched:
    """This process's place among those that a launcher has started; by default it is alone."""

    rank: int = 0
    size: int = 1  # p
    local_rank: int | None = None  # among those of its host; None where the launcher does not say
    local_size: int | None = None
    address: str = ""  # where process 0 waits for the others
    port: int = 0

    @property
    def meeting(self) -> str:
        return f"{self.address}:{self.port}"


def is_launched(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this process has torchrun's variables, from torchrun or from `adopt`."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def launched(environ: MutableMapping[str, str] = os.environ) -> Launched:
    """This process's place as torchrun's variables have it."""
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name in environ and other not in environ:
            raise ValueError(
                f"{name} is set ({environ[name]!r}), but {other} is not; torchrun, srun and mpirun set both, one"
                " process needs neither"
            )
    if not is_launched(environ):
        return Launched()
    place = _place(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if place.size == 1:
        return place
    address = environ.get("MASTER_ADDR", "").strip()
    if not address:
        raise ValueError(
            f"WORLD_SIZE is {place.size}, but MASTER_ADDR is {'empty' if 'MASTER_ADDR' in environ else 'not set'};"
            " expected the name or the address of process 0's host, the same on every process"
        )
    if "MASTER_PORT" not in environ:
        raise ValueError(
            f"WORLD_SIZE is {place.size}, but MASTER_PORT is not set; expected a port of {address} that is free, the"
            " same on every process"
        )
    return dataclasses.replace(place, address=address, port=_port(environ, 0))


def adopt(environ: MutableMapping[str, str] = os.environ) -> None:
    """Write torchrun's variables for a process that mpirun or srun started; check them where they are there.

    Process 0's host is this one if all processes are on it, else the first of Slurm's list. `MASTER_ADDR` and
    `MASTER_PORT` go before. What a batch script or a shell starts without srun is alone.

    >>> environ = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "17",
    ...            "SLURM_STEP_ID": "0", "SLURM_GTIDS": "2,3", "SLURM_STEP_NODELIST": "gpu[07-08]"}
    >>> adopt(environ)
    >>> [environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    ['3', '4', '2', 'gpu07', '21926']
    """
    if is_launched(environ):
        launched(environ)
        return
    step = slurm_step(environ)
    place = _of_mpirun(environ, step) or step
    if place is None:
        if "PMIX_RANK" in environ and not any(names[0] in environ for names in (*MPI, ("SLURM_JOB_ID",))):
            raise ValueError(
                f"PMIX_RANK is {environ['PMIX_RANK']!r}, so a launcher has started this process as one of several, but"
                " it does not say of how many; set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or start with"
                " torchrun"
            )
        launched(environ)  # refuses one without the other
        return
    for name, own in (("RANK", place.rank), ("WORLD_SIZE", place.size)):
        if name in environ and _number(environ, name) != own:
            raise ValueError(f"{name} is {environ[name]!r}, but the launcher says {own}; leave {name} out")
    environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.size))
    environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
    for name, value in (("LOCAL_RANK", place.local_rank), ("LOCAL_WORLD_SIZE", place.local_size)):
        if value is not None:
            environ[name] = str(value)
    launched(environ)


def refuse_several(command: str) -> None:
    """Refuse to be one of several processes for a command that starts its processes itself."""
    copied = dict(os.environ)
    adopt(copied)
    place = launched(copied)
    if place.size > 1:
        raise ValueError(
            f"this is process {place.rank} of {place.size}, but `onehour {command}` starts its processes itself; start"
            " it once, alone"
        )


def _place(environ: MutableMapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> Launched:
    """Four variables, checked; without an address."""
    own = Launched(
        _number(environ, rank),
        _number(environ, size, low=1),
        _number(environ, local_rank) if local_rank in environ else None,
        _number(environ, local_size, low=1) if local_size in environ else None,
    )
    for name, value, among, count in (
        (rank, own.rank, size, own.size),
        (local_rank, own.local_rank, local_size, own.local_size),
    ):
        if value is not None and count is not None and value >= count:
            raise ValueError(f"{name} is {value}, but {among} is {count}: expected 0 … {count - 1}")
    if own.local_size is not None and own.local_size > own.size:
        raise ValueError(
            f"{local_size} is {own.local_size}, but {size} is {own.size}: a host cannot have more than all"
        )
    return own


def _of_mpirun(environ: MutableMapping[str, str], step: Launched | None) -> Launched | None:
    """This process's place among several that mpirun started; it goes before Slurm, which mpirun may have used."""
    for names in MPI:
        if names[0] in environ:
            break
    else:
        return None
    if names[1] not in environ:
        raise ValueError(
            f"{names[0]} is {environ[names[0]]!r}, so a launcher has started this process as one of several, but"
            f" {names[1]} is not set; set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or start with torchrun"
        )
    own = _place(environ, *names)
    if own.size == 1 or (step is not None and (step.rank, step.size) == (own.rank, own.size)):
        return None  # alone, or srun itself, with --mpi=pmi2
    address = environ.get("MASTER_ADDR") or (LOOPBACK if own.local_size == own.size else "")
    if not address:
        raise ValueError(
            f"{names[1]} is {own.size} and {names[3]} {own.local_size or 'not set'}: a launcher has started"
            f" {own.size} processes on several hosts, and does not say on which process 0 is; set MASTER_ADDR to that"
            " host's name and MASTER_PORT to a port that is free there (Open MPI: mpirun -x MASTER_ADDR=HOST -x"
            " MASTER_PORT=29500; MPICH, Intel MPI: mpirun -genv MASTER_ADDR HOST -genv MASTER_PORT 29500)"
        )
    job = next((environ[name] for name in ONE_MPI_JOB if name in environ), None)
    if job is None and own.local_size == own.size:
        job = _started_by(names[0])
    # All processes of one mpirun agree on it, and another mpirun on this host hardly does.
    usual = TORCHRUNS_PORT if job is None else FIRST_PORT + zlib.crc32(job.encode()) % PORTS
    return dataclasses.replace(own, address=address, port=_port(environ, usual))


def _started_by(rank: str) -> str | None:
    """The process that started all ranks of this host: the nearest ancestor that has no rank itself."""
    for pid in _ancestors():
        try:
            if not re.search(rb"(^|\0)" + rank.encode() + b"=", Path(f"/proc/{pid}/environ").read_bytes()):
                return str(pid)
        except OSError:
            return None
    return None


def slurm_step(environ: Mapping[str, str] = os.environ) -> Launched | None:
    """This process's place in a Slurm step of several tasks; None where srun has not started it, or it alone.

    A batch script is no step, though it finds SLURM_PROCID and SLURM_NTASKS, and the SLURM_STEP_… of the shell that
    submitted it. So the slurmstepd that this process is under, where it is seen, goes before what variables say.
    """
    if "SLURM_PROCID" not in environ or not any(name.startswith("SLURM_STEP") for name in environ):
        return None
    ours = _number(environ, "SLURM_STEP_ID") if "SLURM_STEP_ID" in environ else 0
    size = _tasks(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if size == 1 or ours >= SLURMS_OWN or not _under_srun() or _typed_in_shell(environ):
        return None
    rank = _number(environ, "SLURM_PROCID", 0, size - 1)
    job = _number(environ, "SLURM_JOB_ID") if "SLURM_JOB_ID" in environ else 0
    local_rank = _number(environ, "SLURM_LOCALID") if "SLURM_LOCALID" in environ else 0
    local_size = _local_size(environ, rank, size)
    address = environ.get("MASTER_ADDR") or (LOOPBACK if local_size == size else _first_host(environ))
    return Launched(
        rank, size, local_rank, local_size, address, _port(environ, FIRST_PORT + (STRIDE * job + ours) % PORTS)
    )


def without_srun(environ: Mapping[str, str]) -> int:
    """How many tasks a job has for a process that srun did not start as one of several; 1 outside Slurm."""
    return _tasks(environ, "SLURM_NTASKS", "SLURM_JOB_NUM_NODES") if "SLURM_JOB_ID" in environ else 1


def _first_host(environ: Mapping[str, str]) -> str:
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


def _ancestors() -> Iterator[int]:
    pid = os.getppid()
    while pid > 0:
        yield pid
        pid = int(stat[1]) if (stat := stat_of(pid)) else 0


def _port(environ: Mapping[str, str], usual: int) -> int:
    return _number(environ, "MASTER_PORT", low=1, high=65535) if "MASTER_PORT" in environ else usual


def _tasks(environ: Mapping[str, str], *names: str) -> int:
    return next((_number(environ, name, low=1) for name in names if name in environ), 1)


def _local_size(environ: Mapping[str, str], rank: int, size: int) -> int | None:
    """How many tasks this host has: SLURM_GTIDS lists them; SLURM_NTASKS_PER_NODE was asked for the whole job."""
    here = environ.get("SLURM_GTIDS", "").split(",")
    if str(rank) in here:
        return len(here)
    asked = re.match(r"[1-9]\d*", environ.get("SLURM_NTASKS_PER_NODE", ""), re.ASCII)
    return min(int(asked[0]), size) if asked else None


def _under_srun() -> bool:
    """Whether the slurmstepd above this process is that of srun's tasks; also where none is seen, as in a container."""
    for pid in _ancestors():
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


def _number(environ: Mapping[str, str], name: str, low: int = 0, high: int | None = None) -> int:
    text = environ[name].strip()
    value = int(text) if re.fullmatch("[0-9]{1,18}", text) else None
    if value is None or value < low or (high is not None and value > high):
        span = f"of at least {low}" if high is None else f"in {low} … {high}"
        raise ValueError(f"the environment variable {name} is {environ[name]!r}; expected a whole number {span}")
    return value
