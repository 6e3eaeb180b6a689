"""Evaluations: how many predictions of each batch were right, and what number the loop makes of them (§5.1).

The loop's own numbers are read from the variables of its functions after the last batch, line by line, so that a mean
of rates shows as the value that it is.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

import torch
from torch import Tensor

from onehour.check.install import Patches
from onehour.check.reading import Reading
from onehour.check.recorder import Recorder, quiet
from onehour.check.where import user_frames

__all__ = ["Evaluations"]

FRAMES = 3
"""Of the user's functions around an evaluation whose variables are read."""


class Evaluations:
    """Watches passes over data that train nothing.

    Args:
        recorder: takes the events "evaluation" and "value".
        read_variables: whether to trace the user's functions for a few lines after each; debuggers do the same, so a
            loop that is only watched is left alone.

    >>> Evaluations(Recorder(deep_updates=4, epochs=2, cut=False), read_variables=False).right
    []
    """

    def __init__(self, recorder: Recorder, *, read_variables: bool) -> None:
        self.recorder, self.read_variables = recorder, read_variables
        self.right: list[list[bool]] = []
        """Of each batch, whether each sample's prediction was."""
        self.labels: deque[Tensor | None] = deque(maxlen=2)
        """Of batches that the model was not yet asked about; some loops hold the next one too."""
        self.reading = Reading(self._tell)
        self._last = False
        self.patches = Patches()
        self._gathering = self._asked = False
        self._facts: dict[str, Any] = {}

    def install(self, patches: Patches) -> None:
        """Know where to undo what is put in place later."""
        self.patches = patches

    def begins(self) -> None:
        """A pass over some data begins; the one before is over."""
        self.reading.stop()
        self._watch_gathering()
        self.right = []
        self.labels.clear()
        self._facts, self._last = {}, False

    def _watch_gathering(self) -> None:
        """Accelerate drops what its samplers have repeated, where the loop asks it to."""
        kind = getattr(sys.modules.get("accelerate"), "Accelerator", None)
        if kind is not None and not self._gathering:
            self._gathering = True
            self.patches.around(kind, "gather_for_metrics", self._gathered)

    def _gathered(self, original: Any, *arguments: Any, **options: Any) -> Any:
        if not self._asked and not self.recorder.finished:
            self._asked = True
            self.recorder.tape.add("gathered for metrics")
        return original(*arguments, **options)

    @quiet
    def batch(self, batch: Any) -> None:
        """The next batch is given."""
        self.labels.append(_labels(batch))

    @quiet
    def said(self, output: Any) -> None:
        """What the model says of a batch, without training."""
        if not torch.is_tensor(output):
            output = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
        labels = self.labels.popleft() if self.labels else None
        if labels is None or not torch.is_tensor(output) or output.ndim != 2 or output.shape[0] != labels.shape[0]:
            return
        self.right.append((output.detach().argmax(1).cpu() == labels.cpu()).tolist())
        self._perhaps_over()

    @quiet
    def last(self, loader: int, epoch: int) -> None:
        """The last batch was given: once the model has said what it says of it, the loop makes its number."""
        if not self._last:
            self._last, self._facts = True, {"loader": loader, "epoch": epoch}
            self._perhaps_over()

    def _perhaps_over(self) -> None:
        if self._last and self.right and not self.labels and self.read_variables:
            self._last = False
            self.reading.start(user_frames(2)[:FRAMES])

    def write(self, loader: int, epoch: int, batches: int | None, samples: int | None) -> None:
        """The pass was an evaluation, and is over."""
        facts = {"loader": loader, "epoch": epoch, "batches": batches, "samples": samples}
        counts = [[sum(right), len(right)] for right in self.right]
        self.recorder.tape.add("evaluation", None, **facts, counts=counts)

    def _tell(self, name: str, value: float, place: str) -> None:
        if not self.recorder.finished:
            self.recorder.tape.add("value", place, **self._facts, name=name, value=value)


def _labels(batch: Any) -> Tensor | None:
    """The one tensor of whole numbers with one for each sample."""
    values = list(batch.values()) if isinstance(batch, dict) else batch
    if not isinstance(values, list | tuple):
        return None
    found = [v for v in values if torch.is_tensor(v) and v.ndim == 1 and v.dtype in (torch.int64, torch.int32)]
    return found[0] if len(found) == 1 else None
