"""The processes of a run: joining them, summing over them, sending bytes from process 0 to all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from onehour.dist.devices import name_of, own_gpu, refuse_other_devices
from onehour.dist.launched import JOB, Launched, launched
from onehour.dist.meeting import GLOO_DEVICE, choose_device, meet
from onehour.messages import tell

LOST = (
    "closed by peer",
    "reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
)
"""What Gloo, NCCL and the store say when another process is gone."""
PATIENCE, LONGEST = 600.0, 1e7
"""Seconds to wait for another process, at least; and at most, since torch counts nanoseconds in 64 bits."""


class PeerLostError(Exception):
    """Another process of this run is gone, so this one cannot go on."""


class PeerLateError(PeerLostError):
    """Another process of this run has not come for too long; it may live still."""


def peer_lost(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another process is gone."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST)


def _peer_late(error: RuntimeError) -> bool:
    """Whether torch.distributed has waited too long; a user's code may say the same of something else."""
    text = str(error).lower()
    return ("timed out" in text or "timeout" in text) and (isinstance(error, dist.DistError) or "gloo" in text)


@dataclass(frozen=True)
class Group:
    """This process's place among the p processes of a run; rank 0 of 1 needs no torch.distributed."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, tensor: Tensor) -> Tensor:
        """Add `tensor` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def any(self, said: bool) -> bool:
        """Whether any process says so; all call it together."""
        if self.size == 1:  # a GPU need not be waited for
            return said
        return self.sum(torch.tensor(float(said), device=self.device)).item() > 0

    def broadcast(self, payload: bytes | None) -> bytes | None:
        """Process 0's bytes, or None, on every process."""
        if self.size == 1:
            return payload
        length = torch.tensor([-1 if payload is None else len(payload)], device=self.device)
        dist.broadcast(length, src=0)
        if length.item() < 0:
            return None
        if self.rank == 0 and payload:
            data = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(self.device)
        else:
            data = torch.empty(int(length.item()), dtype=torch.uint8, device=self.device)
        dist.broadcast(data, src=0)
        return data.cpu().numpy().tobytes()

    def gather(self, payload: bytes) -> list[bytes]:
        """Every process's bytes, at least one each, by rank, on every process."""
        if self.size == 1:
            return [payload]
        lengths = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        lengths[self.rank] = len(payload)
        sizes = self.sum(lengths).tolist()
        mine = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(self.device)
        every = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(every, mine)
        return [row[:size].cpu().numpy().tobytes() for row, size in zip(every, sizes, strict=True)]


@contextmanager
def joined(device: str, *, patience: float = 0.0) -> Iterator[Group]:
    """Join the processes that the launcher's environment names (RANK, WORLD_SIZE, …), and leave them at the end.

    Args:
        device: "cpu" or "cuda"; a process on CUDA takes the GPU of its LOCAL_RANK.
        patience: seconds to wait for another process in each exchange; ten minutes if that is more.

    Raises:
        ValueError: if the processes cannot meet: a variable, a port or a network device is wrong, or a GPU is missing.
        PeerLostError: when another process is gone, before or while this one is in the block.
        PeerLateError: when it has not come for too long.
    """
    place = launched()
    where = torch.device("cpu")
    if device == "cuda":
        shared = JOB in os.environ or "SLURM_PROCID" not in os.environ
        where = torch.device("cuda", own_gpu(_local_rank(place), place.local_size or 1, shared=shared))
        torch.cuda.set_device(where)
    if place.size == 1:
        yield Group(device=where)
        return
    limit = min(max(PATIENCE, patience), LONGEST)
    came = False
    try:
        try:
            store, hosts = meet(place, computes=name_of(where))
        except TimeoutError as error:
            raise PeerLateError(str(error)) from error
        refuse_other_devices([(host.name, host.machine, host.computes) for host in hosts])
        if device == "cpu" and (chosen := choose_device(place, hosts)):
            os.environ[GLOO_DEVICE] = chosen
            if chosen != "lo" and not place.local_rank:  # no matter of course, and one process of the host says so
                name = hosts[place.rank].name
                tell(
                    f"other hosts cannot reach this one by its name {name}: its processes use the device"
                    f" {chosen} ({GLOO_DEVICE} names another)",
                )
        store.set_timeout(timedelta(seconds=limit))
        dist.init_process_group(
            backend="nccl" if device == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=limit),
            device_id=where if device == "cuda" else None,
        )
        came = True
        try:
            yield Group(rank=dist.get_rank(), size=place.size, device=where)
        except BaseException:
            if device == "cuda" and dist.group.WORLD is not None:
                dist.group.WORLD.abort()  # NCCL would first wait for what a failed process never sends
            raise
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:
        who, reason = f"process {place.rank}", str(error).strip().partition("\n")[0]
        if peer_lost(error):
            hint = "" if came or device == "cuda" else f"; {GLOO_DEVICE} names the network device between hosts"
            raise PeerLostError(f"{who} lost another process, and cannot go on: {reason}{hint}") from error
        if not _peer_late(error):
            raise
        raise PeerLateError(
            f"{who} waited {limit:g} s for another of {place.size} in the middle of the run, and cannot go on; look at"
            f" what the others say, and whether each still runs ({reason})"
        ) from error


def _local_rank(place: Launched) -> int:
    devices = torch.cuda.device_count()
    if place.local_rank is None and place.size > 1 and devices > 1:
        raise ValueError(
            f"LOCAL_RANK is not set, so which of this host's {devices} GPUs process {place.rank} takes is not known;"
            " set it to 0, 1, … on the processes of a host, as torchrun, srun and mpirun do"
        )
    return place.local_rank or 0
