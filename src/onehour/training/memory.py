"""Out of memory, in words: what to give instead."""

from __future__ import annotations

import torch

__all__ = ["less_memory", "out_of_memory"]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or on the host.

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("a bug"))
    (True, False)
    """
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def less_memory(per_pass: int) -> str:
    """What to do about it.

    Args:
        per_pass: workers that shared a pass when memory ran out.

    >>> less_memory(8)
    'out of memory with 8 workers in a pass; give --workers-per-pass 4, which changes nothing that the run learns'
    """
    if per_pass > 1:
        return (
            f"out of memory with {per_pass} workers in a pass; give --workers-per-pass {per_pass // 2},"
            " which changes nothing that the run learns"
        )
    return (
        "out of memory with one worker in a pass; use --precision bf16, or a smaller --per-worker (which changes what"
        " BatchNorm sees, and so the loss)"
    )
