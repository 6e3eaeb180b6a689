"""An iteration as one CUDA graph: what it launches is recorded once, and replayed with one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from onehour.data.loader import Batch
from onehour.messages import blame
from onehour.training.measure import StepTimer

WARMUPS = 3
"""Iterations that are launched one kernel after another first: libraries choose their algorithms in them."""

Launch = Callable[[Iterable[Batch], Tensor, Tensor], Tensor]
"""An iteration's work on the device: from a batch a pass, the rate, and whether to stop, to what it found."""


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
