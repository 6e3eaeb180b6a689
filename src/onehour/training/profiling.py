"""A trace of a few iterations, for `--profile`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from onehour.files import replace_whole
from onehour.lock import OpenFolder

__all__ = ["profiled"]


@contextmanager
def profiled(
    iterations: int, folder: Path, rank: int, *, warn: Callable[[str], None] = print
) -> Iterator[Callable[[], None]]:
    """Trace the third iteration and those after it into trace-RANK.json, for chrome://tracing and Perfetto.

    Gives a function to call after each iteration; 0 iterations trace nothing.

    Args:
        folder: the run's.
        warn: is told if the trace cannot be written.

    >>> with profiled(0, Path("."), rank=0) as step:
    ...     step()
    """
    if not iterations:
        yield lambda: None
        return
    name = f"trace-{rank}.json"

    def write(profiler: torch.profiler.profile) -> None:
        try:
            # torch writes wherever a path leads, a link in the folder for one.
            with tempfile.TemporaryDirectory() as temporary:
                profiler.export_chrome_trace(str(Path(temporary) / name))
                replace_whole(held.descriptor, name, (Path(temporary) / name).read_bytes())
        except (OSError, ValueError) as error:
            warn(f"{name} could not be written: {error}")

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=iterations, repeat=1)
    with OpenFolder(folder) as held, torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step
