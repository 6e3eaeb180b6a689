"""Which GPU a process takes, and for how many processes there are enough: NCCL lets no two have one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from onehour.machine import cores

ON_CPU = 2
"""Processes on one machine's CPU, where a person leaves it to us: torch's threads use the other cores."""


def pick_processes(device: str, workers: int) -> tuple[int, str]:
    """How many processes to start on this machine, and a line for a person where a GPU decides it; else "".

    Args:
        device: "cpu" or "cuda".
        workers: k, which never changes.
    """
    if device == "cpu":
        return min(ON_CPU, cores(), workers), ""
    gpus = torch.cuda.device_count()
    processes = min(gpus, workers)
    why = f"torch sees {_gpus(gpus)} here, and each process needs one of its own; k does not change"
    return processes, f"{processes} process{'es' * (processes > 1)}: {why}"


def refuse_too_few_gpus(processes: int, device: str) -> None:
    """Refuse more processes on this machine than it has GPUs.

    Raises:
        ValueError: naming both numbers.
    """
    gpus = torch.cuda.device_count() if device == "cuda" else processes
    if gpus < processes:
        raise ValueError(
            f"--processes {processes} needs {processes} GPUs, one each, and torch sees {_gpus(gpus)} here; use"
            f" --processes {gpus} (k does not change), or --device cpu"
        )


def own_gpu(local_rank: int, local_size: int, *, shared: bool) -> int:
    """The number of the GPU that a process takes.

    Args:
        local_rank, local_size: its number among the processes of this host, and how many they are.
        shared: all of them see the same GPUs; a launcher such as srun may give each some of its own.

    Raises:
        ValueError: in each of them, if they are too many.
    """
    gpus = torch.cuda.device_count()
    started = max(local_size, local_rank + 1)
    if shared and started > gpus:
        raise ValueError(
            f"{started} processes were started on this host, and torch sees {_gpus(gpus)} here: each needs one of its"
            f" own; start {gpus} (k does not change), or use --device cpu"
        )
    return local_rank % gpus


def name_of(device: torch.device) -> str:
    """A device's name, which no other device of its machine has."""
    return f"GPU {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else "cpu"


def refuse_other_devices(places: Sequence[tuple[str, str, str]]) -> None:
    """Refuse processes of which some compute on GPUs and some do not, or two that have one GPU between them.

    Args:
        places: by rank: the host's name, its machine, and `name_of` the device.

    Raises:
        ValueError: naming two of them.

    >>> refuse_other_devices([("a", "1", "cpu"), ("b", "2", "GPU 17")])
    Traceback (most recent call last):
    ValueError: process 0 (a) computes on the CPU and process 1 (b) on a GPU; give all the same --device
    """
    first: dict[tuple[str, str], int] = {}
    for rank, (host, machine, name) in enumerate(places):
        if (name == "cpu") != (places[0][2] == "cpu"):
            one, two = ("the CPU" if each == "cpu" else "a GPU" for each in (places[0][2], name))
            raise ValueError(
                f"process 0 ({places[0][0]}) computes on {one} and process {rank} ({host}) on {two}; give all the same"
                " --device"
            )
        other = first.setdefault((machine, name), rank)
        if name != "cpu" and other != rank:
            raise ValueError(
                f"processes {other} and {rank} ({host}) would both compute on {name}, and each needs one of its own;"
                " start as many processes on a host as it has GPUs (k does not change), or use --device cpu"
            )


def _gpus(number: int) -> str:
    return f"{number or 'no'} GPU{'s' * (number != 1)}"
