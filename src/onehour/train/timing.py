"""Where an iteration's time goes: waiting for data, computing, waiting for the reduction, updating."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["PARTS", "StepTimer"]

PARTS = ("data", "compute", "reduction", "update")


class StepTimer:
    """Times parts of iterations without waiting for the device.

    On the CPU a part is what the clock says. On CUDA it is what lies between two events of the stream, read
    when asked for; only `data`, where the host waits, is the clock's there too.

    >>> timer = StepTimer(torch.device("cpu"))
    >>> with timer("compute"):
    ...     pass
    >>> timer.close_step()
    >>> [list(step) for step in timer.steps()]
    [['data', 'compute', 'reduction', 'update']]
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: dict[str, list] = {}
        self._closed: list[dict[str, list]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        on_device = self._cuda and part != "data"
        start = _event() if on_device else time.perf_counter()
        try:
            yield
        finally:
            self._open.setdefault(part, []).append((start, _event() if on_device else time.perf_counter()))

    def close_step(self) -> None:
        """End an iteration.

        >>> StepTimer(torch.device("cpu")).close_step()
        """
        self._closed.append(self._open)
        self._open = {}

    def steps(self) -> list[dict[str, float]]:
        """Milliseconds of each part for every iteration since the last call.

        >>> StepTimer(torch.device("cpu")).steps()
        []
        """
        if self._cuda:
            torch.cuda.synchronize()
        closed, self._closed = self._closed, []
        return [{part: sum(_ms(a, b) for a, b in spans.get(part, [])) for part in PARTS} for spans in closed]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ms(start, stop) -> float:
    return (stop - start) * 1e3 if isinstance(start, float) else start.elapsed_time(stop)
