"""Where a run computes, and what its bits depend on there."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from onehour.config import Recipe


def pick_device(device: str) -> str:
    """ "cuda" where asked for or available, else "cpu"; it comes before anything that computes.

    Raises:
        ValueError: if a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # cuBLAS reads it once, and a canonical run may come later in this process
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device


@contextmanager
def deterministic(recipe: Recipe) -> Generator[None]:
    """For a canonical recipe: its number of threads, deterministic algorithms, no TF32, no algorithm by trial.

    Convolution gradients differ in bits between 1 and 2 threads, so the number is part of the recipe.
    """
    cudnn: Any = torch.backends.cudnn
    before, canonical = cudnn.benchmark, recipe.reduce == "canonical"
    cudnn.benchmark = not canonical
    try:
        with _repeatable(recipe.canonical_threads) if canonical else nullcontext():
            yield
    finally:
        cudnn.benchmark = before


@contextmanager
def _repeatable(threads: int) -> Generator[None]:
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    memory: Any = torch.utils.deterministic
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    coarse, filled = (cudnn.allow_tf32, matmul.allow_tf32), memory.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    memory.fill_uninitialized_memory = False  # it would write all of each result twice
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        cudnn.allow_tf32, matmul.allow_tf32 = coarse
        memory.fill_uninitialized_memory = filled


def build_of(device: torch.device) -> dict[str, str]:
    """What the bits of a canonical run depend on beside its recipe: it is recorded, and named when it changes."""
    if device.type == "cuda":
        name, instructions = torch.cuda.get_device_name(device), str(torch.cuda.get_device_capability(device))
    else:
        name, instructions = "cpu", torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "device": name, "instructions": instructions}
