"""A trace of a few iterations, for `--profile`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["profiled"]


@contextmanager
def profiled(iterations: int, folder: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Trace the third iteration and those after it into trace-RANK.json, for chrome://tracing and Perfetto.

    Gives a function to call after each iteration; 0 iterations trace nothing.

    >>> with profiled(0, Path("."), rank=0) as step:
    ...     step()
    """
    if not iterations:
        yield lambda: None
        return
    path = folder / f"trace-{rank}.json"
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=iterations, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step
