"""What the host does beside a device that works on its own: iterations as one graph, their times, flags read late."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from onehour.data.loader import Batch
from onehour.messages import blame
from onehour.training.record import PARTS

WARMUPS = 3
"""Iterations that are launched one kernel after another first: libraries choose their algorithms in them."""

Launch = Callable[[Iterable[Batch], Tensor, Tensor], Tensor]
"""An iteration's work on the device: from a batch a pass, the rate, and whether to stop, to what it found."""


class StepTimer:
    """Laps of iterations, without waiting for the device: by the clock on the CPU, by events of the stream on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._laps: list[tuple[str, Any]] = []
        self._closed: list[list[tuple[str, Any]]] = []
        self._silent = False

    def begin(self) -> None:
        """Begin an iteration."""
        self._laps = [("", self._now())]

    def lap(self, part: str) -> None:
        """What happened since the last lap, or the beginning, was `part`; an iteration may have several of each."""
        if not self._silent:
            self._laps.append((part, self._now()))

    @contextmanager
    def silent(self) -> Generator[None]:
        """While entered, laps are left out: an event of a stream that is captured would become part of the graph."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def end(self) -> None:
        self._closed.append(self._laps)

    def steps(self) -> list[dict[str, float]]:
        """Milliseconds of each part for every iteration since the last call."""
        if self._on_device:
            torch.cuda.synchronize()
        closed, self._closed = self._closed, []
        return [self._by_part(laps) for laps in closed]

    def _by_part(self, laps: list[tuple[str, Any]]) -> dict[str, float]:
        parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in pairwise(laps):
            parts[part] += before.elapsed_time(after) if self._on_device else (after - before) * 1e3
        return parts

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class CapturedIteration:
    """Runs `launch` as it is for some iterations, then as a graph that does the same with what its inputs then hold.

    What `launch` reads and writes must lie where it lay before, and nothing in it may wait for the device. If a model
    does, its iterations go on being launched one kernel after another, and people are told which call it was.

    Args:
        before: called before each replay, as `launch` does it before it changes anything.
        timer: is told how long a replay took, which has no parts.
        device: where the numbers lie.
        warn: is told why a model cannot be captured.
    """

    def __init__(
        self,
        launch: Launch,
        *,
        before: Callable[[], None],
        timer: StepTimer,
        device: torch.device,
        warn: Callable[[str], None],
    ) -> None:
        self._launch, self._before, self._timer, self._warn = launch, before, timer, warn
        self._stream = torch.cuda.Stream()
        self._launched, self._usable = 0, True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batches: list[Batch] = []
        self._rate, self._stopping = torch.zeros((), device=device), torch.zeros((), device=device)
        self._found: Tensor | None = None

    def __call__(self, batches: Iterable[Batch], rate: float, stopping: float) -> Tensor:
        """What `launch` returns; it is overwritten by the next call."""
        given = list(batches)
        self._rate.fill_(rate)
        self._stopping.fill_(stopping)
        if self._graph is None and self._usable and self._launched >= WARMUPS:
            self._before()
            self._capture(given)
        if self._graph is None:
            return self._launch_beside(given)
        targets = [tensor for batch in self._batches for tensor in batch]
        sources = [tensor for batch in given for tensor in batch]
        for target, source in zip(targets, sources, strict=True):
            assert (target.shape, target.dtype) == (source.shape, source.dtype)
            target.copy_(source, non_blocking=True)
        self._before()
        self._graph.replay()
        self._timer.lap("compute")
        assert self._found is not None
        return self._found

    def _launch_beside(self, batches: Sequence[Batch]) -> Tensor:
        """On the stream that is captured later, whose autograd must not wait for another's."""
        self._launched += 1
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            found = self._launch(batches, self._rate, self._stopping)
        here.wait_stream(self._stream)
        return found

    def _capture(self, batches: Sequence[Batch]) -> None:
        kept = [tuple(tensor.clone() for tensor in batch) for batch in batches]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream), self._timer.silent():
                found = self._launch(kept, self._rate, self._stopping)
        except Exception as error:
            self._usable = False
            torch.cuda.synchronize()
            self._warn(
                "the model cannot be captured as a CUDA graph, so its kernels are launched one by one, which is slower"
                f" where they are short: {blame(error)}"
            )
            return
        self._graph, self._batches, self._found = graph, kept, found


class HostFlags:
    """Two booleans an iteration: a stop was asked for, no seed is alive any more.

    On the CPU they are read at once. On CUDA they are copied behind the iteration and read one iteration later, so that
    the device always has work; every process reads the same iteration's, so all act alike.
    """

    def __init__(self, device: torch.device) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None
        self._cuda = device.type == "cuda"
        self.late = 0
        """How many iterations before the one that it was read at a run had halted."""

    def read(self, stop: Tensor, alive: Tensor, *, now: bool = False) -> tuple[bool, bool]:
        """(stop asked, halted) of this iteration; on CUDA of the one before, and of this one where `now`."""
        if not self._cuda:
            return stop.item() > 0, not alive.any().item()
        earlier, self._pending = self._pending, self._copy(stop, alive)
        stopped = halted = False
        for late, copied in ((1, earlier), (0, self._pending if now else None)):
            if copied is not None:
                flags, event = copied
                event.synchronize()
                stopped |= bool(flags[0])
                if flags[1] and not halted:
                    halted, self.late = True, late
        return stopped, halted

    def _copy(self, stop: Tensor, alive: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        on_host = torch.empty(2, dtype=torch.bool, pin_memory=True)
        on_host.copy_(torch.stack((stop > 0, ~alive.any())), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return on_host, event
