"""Where a process computes, for how many there are GPUs (NCCL lets no two have one), and what bits depend on there."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from onehour.config import Recipe
from onehour.machine import cores

ON_CPU = 2
"""Processes on one machine's CPU, where a person leaves it to us: torch's threads use the other cores."""


def pick_device(device: str) -> str:
    """ "cuda" where asked for or available, else "cpu"; it comes before anything that computes."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # cuBLAS reads it once, and a canonical run may come later in this process
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device


def pick_processes(device: str, workers: int) -> tuple[int, str]:
    """How many processes to start on this machine, and a line for a person where a GPU decides it; else ""."""
    if device == "cpu":
        return min(ON_CPU, cores(), workers), ""
    gpus = torch.cuda.device_count()
    processes = min(gpus, workers)
    why = f"torch sees {_gpus(gpus)} here, and each process needs one of its own; k does not change"
    return processes, f"{processes} process{'es' * (processes > 1)}: {why}"


def refuse_too_few_gpus(processes: int, device: str) -> None:
    gpus = torch.cuda.device_count() if device == "cuda" else processes
    if gpus < processes:
        raise ValueError(
            f"--processes {processes} needs {processes} GPUs, one each, and torch sees {_gpus(gpus)} here; use"
            f" --processes {gpus} (k does not change), or --device cpu"
        )


def own_gpu(local_rank: int, local_size: int, *, shared: bool) -> int:
    """The number of the GPU that a process takes, one of `local_size` on this host.

    All of them see the same GPUs if `shared`; a launcher such as srun may give each some of its own.
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


@contextmanager
def deterministic(recipe: Recipe) -> Generator[None]:
    """For a canonical recipe: its number of threads, deterministic algorithms, no TF32, no algorithm by trial.

    Convolution gradients differ in bits between 1 and 2 threads, so the number is part of the recipe.
    """
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    memory: Any = torch.utils.deterministic
    benchmark, threads, strict = cudnn.benchmark, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    coarse, filled = (cudnn.allow_tf32, matmul.allow_tf32), memory.fill_uninitialized_memory
    canonical = recipe.reduce == "canonical"
    cudnn.benchmark = not canonical
    if canonical:
        torch.set_num_threads(recipe.canonical_threads)
        torch.use_deterministic_algorithms(True)
        cudnn.allow_tf32 = matmul.allow_tf32 = False
        memory.fill_uninitialized_memory = False  # it would write all of each result twice
    try:
        yield
    finally:
        cudnn.benchmark = benchmark
        if canonical:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict)
            cudnn.allow_tf32, matmul.allow_tf32 = coarse
            memory.fill_uninitialized_memory = filled


def build_of(device: torch.device) -> dict[str, str]:
    """What the bits of a canonical run depend on beside its recipe: it is recorded, and named when it changes."""
    if device.type == "cuda":
        name, instructions = torch.cuda.get_device_name(device), str(torch.cuda.get_device_capability(device))
    else:
        name, instructions = "cpu", torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "device": name, "instructions": instructions}


def _gpus(number: int) -> str:
    return f"{number or 'no'} GPU{'s' * (number != 1)}"


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`.

    Not `torch.manual_seed`, which without CUDA notes a stack trace for every call and keeps them all.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
