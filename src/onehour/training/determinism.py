"""What a canonical run fixes besides the order of its sums, and what may still differ between machines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from onehour.config import Recipe

__all__ = ["build_of", "deterministic"]


@contextmanager
def deterministic(recipe: Recipe) -> Iterator[None]:
    """For a canonical recipe: its number of threads, deterministic algorithms, no TF32, no algorithm by trial.

    Convolution gradients differ in bits between 1 and 2 threads, so the number is part of the recipe.

    >>> with deterministic(Recipe(reduce="canonical")):
    ...     torch.get_num_threads()
    1
    """
    if recipe.reduce != "canonical":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        cudnn.benchmark,
        cudnn.allow_tf32,
        matmul.allow_tf32,
    )
    torch.set_num_threads(recipe.canonical_threads)
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark = cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before[2:]


def build_of(device: torch.device) -> dict[str, str]:
    """What the bits of a canonical run depend on beside its recipe: it is recorded, and named when it changes.

    >>> sorted(build_of(torch.device("cpu")))
    ['device', 'instructions', 'torch']
    """
    if device.type == "cuda":
        name, instructions = torch.cuda.get_device_name(device), str(torch.cuda.get_device_capability(device))
    else:
        name, instructions = "cpu", torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "device": name, "instructions": instructions}
