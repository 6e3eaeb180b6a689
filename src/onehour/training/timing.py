"""Where an iteration's time goes: waiting for data, computing, waiting for the reduction, updating."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

from onehour.training.kinds import PARTS

__all__ = ["PARTS", "StepTimer"]


class StepTimer:
    """Laps of iterations, without waiting for the device: by the clock on the CPU, by events of the stream on CUDA.

    >>> timer = StepTimer(torch.device("cpu"))
    >>> timer.begin(); timer.lap("compute"); timer.end()
    >>> [list(step) for step in timer.steps()]
    [['data', 'compute', 'reduction', 'update']]
    """

    def __init__(self, device: torch.device) -> None:
        self._now = _event if device.type == "cuda" else time.perf_counter
        self._laps: list[tuple[str, object]] = []
        self._closed: list[list[tuple[str, object]]] = []

    def begin(self) -> None:
        """Begin an iteration.

        >>> StepTimer(torch.device("cpu")).begin()
        """
        self._laps = [("", self._now())]

    def lap(self, part: str) -> None:
        """What happened since the last lap, or the beginning, was `part`; an iteration may have several of each.

        >>> timer = StepTimer(torch.device("cpu"))
        >>> timer.begin(); timer.lap("data")
        """
        self._laps.append((part, self._now()))

    def end(self) -> None:
        """End an iteration.

        >>> StepTimer(torch.device("cpu")).end()
        """
        self._closed.append(self._laps)

    def steps(self) -> list[dict[str, float]]:
        """Milliseconds of each part for every iteration since the last call.

        >>> StepTimer(torch.device("cpu")).steps()
        []
        """
        if self._now is _event:
            torch.cuda.synchronize()
        closed, self._closed = self._closed, []
        return [_by_part(laps) for laps in closed]


def _by_part(laps: list) -> dict[str, float]:
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for (_, before), (part, after) in pairwise(laps):
        parts[part] += (after - before) * 1e3 if isinstance(before, float) else before.elapsed_time(after)
    return parts


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
