"""What a launcher says of this process in its environment: read and checked here, and nowhere else."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from onehour.dist import slurm
from onehour.dist.slurm import FIRST_PORT, PORTS, ancestors

__all__ = ["LOOPBACK", "Launched", "adopt", "is_launched", "launched", "refuse_several"]

LOOPBACK = "127.0.0.1"
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


@dataclass(frozen=True)
class Launched:
    """This process's place among those that a launcher has started; by default it is alone.

    Args:
        rank, size: RANK of WORLD_SIZE, p.
        local_rank, local_size: the same among those of its host; None where the launcher does not say.
        address, port: where process 0 waits for the others: MASTER_ADDR and MASTER_PORT.

    >>> Launched().size
    1
    """

    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    local_size: int | None = None
    address: str = ""
    port: int = 0

    @property
    def meeting(self) -> str:
        """The address and port as one text.

        >>> Launched(rank=0, size=2, address="gpu07", port=20017).meeting
        'gpu07:20017'
        """
        return f"{self.address}:{self.port}"


def is_launched(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this process has torchrun's variables, from torchrun or from `adopt`.

    >>> is_launched({"RANK": "0", "WORLD_SIZE": "2"}), is_launched({})
    (True, False)
    """
    return "RANK" in environ and "WORLD_SIZE" in environ


def launched(environ: MutableMapping[str, str] = os.environ) -> Launched:
    """This process's place as torchrun's variables have it.

    Raises:
        ValueError: naming the variable that is missing or cannot be.

    >>> launched({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "gpu07", "MASTER_PORT": "20017"}).rank
    1
    >>> launched({"RANK": "1"})
    Traceback (most recent call last):
    ValueError: RANK is set ('1'), but WORLD_SIZE is not; torchrun, srun and mpirun set both, one process needs neither
    """
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
    port = slurm.number(environ, "MASTER_PORT", low=1, high=65535)
    return Launched(place.rank, place.size, place.local_rank, place.local_size, address, port)


def adopt(environ: MutableMapping[str, str] = os.environ) -> None:
    """Write torchrun's variables for a process that mpirun or srun started; check them where they are there.

    Process 0's host is this one if all processes are on it, else the first of Slurm's list. `MASTER_ADDR` and
    `MASTER_PORT` go before. What a batch script or a shell starts without srun is alone.

    Raises:
        ValueError: if a variable cannot be; if nobody knows where process 0 is: it says what to set.

    >>> environ = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "17",
    ...            "SLURM_STEP_ID": "0", "SLURM_GTIDS": "2,3", "SLURM_STEP_NODELIST": "gpu[07-08]"}
    >>> adopt(environ)
    >>> [environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    ['3', '4', '2', 'gpu07', '21926']
    """
    if is_launched(environ):
        launched(environ)
        return
    step = _step(environ)
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
        if name in environ and slurm.number(environ, name) != own:
            raise ValueError(f"{name} is {environ[name]!r}, but the launcher says {own}; leave {name} out")
    environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.size))
    environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
    for name, value in (("LOCAL_RANK", place.local_rank), ("LOCAL_WORLD_SIZE", place.local_size)):
        if value is not None:
            environ[name] = str(value)
    launched(environ)


def refuse_several(command: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse to be one of several processes for a command that starts its processes itself.

    >>> refuse_several("sweep", {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "gpu07", "MASTER_PORT": "20017"})
    Traceback (most recent call last):
    ValueError: this is process 1 of 2, but `onehour sweep` starts its processes itself; start it once, alone
    """
    copied = dict(environ)
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
        slurm.number(environ, rank),
        slurm.number(environ, size, low=1),
        slurm.number(environ, local_rank) if local_rank in environ else None,
        slurm.number(environ, local_size, low=1) if local_size in environ else None,
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


def _step(environ: MutableMapping[str, str]) -> Launched | None:
    """This task's place in a Slurm step of several."""
    step = slurm.step(environ)
    if step is None:
        return None
    here = step.local_size == step.size
    address = environ.get("MASTER_ADDR") or (LOOPBACK if here else slurm.first_host(environ))
    port = slurm.number(environ, "MASTER_PORT", low=1, high=65535) if "MASTER_PORT" in environ else step.port
    return Launched(step.rank, step.size, step.local_rank, step.local_size, address, port)


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
    if "MASTER_PORT" in environ:
        port = slurm.number(environ, "MASTER_PORT", low=1, high=65535)
    else:
        port = _port_of_mpirun(environ, names[0], here=own.local_size == own.size)
    return Launched(own.rank, own.size, own.local_rank, own.local_size, address, port)


def _port_of_mpirun(environ: MutableMapping[str, str], rank: str, *, here: bool) -> int:
    """A port on which all processes of one mpirun agree, and another mpirun on this host hardly does."""
    job = next((environ[name] for name in ONE_MPI_JOB if name in environ), None)
    if job is None and here:
        job = _started_by(rank)
    return TORCHRUNS_PORT if job is None else FIRST_PORT + zlib.crc32(job.encode()) % PORTS


def _started_by(rank: str) -> str | None:
    """The process that started all ranks of this host: the nearest ancestor that has no rank itself."""
    for pid in ancestors():
        try:
            if not re.search(rb"(^|\0)" + rank.encode() + b"=", Path(f"/proc/{pid}/environ").read_bytes()):
                return str(pid)
        except OSError:
            return None
    return None
