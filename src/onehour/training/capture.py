"""An iteration as one CUDA graph: what it launches is recorded once, and replayed with one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onehour.data.loader import Batch
from onehour.messages import blame

__all__ = ["CapturedIteration"]

WARMUPS = 3
"""Iterations that are launched one kernel after another first: libraries choose their algorithms in them."""


class CapturedIteration:
    """Runs `launch` as it is for some iterations, then as a graph that does the same to what the batches hold.

    What `launch` reads and writes must lie where it lay before, and nothing in it may wait for the device. If a model
    does, its iterations go on being launched one kernel after another, and people are told which call it was.

    Args:
        launch: an iteration's work on the device, from one batch a pass to what it found.
        warn: is told why a model cannot be captured.
    """

    def __init__(self, launch: Callable[[Sequence[Batch]], Tensor], *, warn: Callable[[str], None]) -> None:
        self._launch, self._warn = launch, warn
        self._stream = torch.cuda.Stream()
        self._launched, self._usable = 0, True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batches: list[Batch] = []
        self._found: Tensor | None = None

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        """What `launch` returns; it is overwritten by the next call."""
        if self._graph is None and self._usable and self._launched >= WARMUPS:
            self._capture(batches)
        if self._graph is None:
            return self._launch_beside(batches)
        targets = [tensor for batch in self._batches for tensor in batch]
        sources = [tensor for batch in batches for tensor in batch]
        for target, source in zip(targets, sources, strict=True):
            assert (target.shape, target.dtype) == (source.shape, source.dtype)
            target.copy_(source, non_blocking=True)
        return self._replay()

    def _replay(self) -> Tensor:
        assert self._graph is not None
        assert self._found is not None
        self._graph.replay()
        return self._found

    def _launch_beside(self, batches: Sequence[Batch]) -> Tensor:
        """On the stream that is captured later, whose autograd must not wait for another's."""
        self._launched += 1
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            found = self._launch(batches)
        here.wait_stream(self._stream)
        return found

    def _capture(self, batches: Sequence[Batch]) -> None:
        kept = [tuple(torch.empty_like(tensor).copy_(tensor) for tensor in batch) for batch in batches]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                found = self._launch(kept)  # type: ignore[arg-type]
        except Exception as error:
            self._usable = False
            torch.cuda.synchronize()
            self._warn(
                "the model cannot be captured as a CUDA graph, so its kernels are launched one by one, which is slower"
                f" where they are short: {blame(error)}"
            )
            return
        self._graph, self._batches, self._found = graph, kept, found  # type: ignore[assignment]
