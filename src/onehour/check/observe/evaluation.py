"""Evaluations: how many predictions of each batch were right, and what number the loop makes of them (§5.1).

The loop's own numbers are read from the variables of its functions after the last batch, line by line, so that a mean
of rates shows as the value that it is.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from onehour.check.observe.recorder import TapeRecorder, quiet
from onehour.check.observe.source import is_users, quotients, user_frames
from onehour.check.tape import MetricsGathered, ValueSeen

LINES, CALLS = 80, 300_000  # lines of the user's code that are read, and calls of anyone's that are waited through


class VariableTracer:
    """Traces the user's functions; a debugger or a coverage tool that does the same is left alone.

    `tell` is called with the name and value of each number that is new, and its file:line.
    """

    def __init__(self, tell: Callable[[str, float, str], Any]) -> None:
        self.tell = tell
        self._known: dict[str, float] = {}
        self._before: dict[CodeType, int] = {}  # the line that each function was at; what is new was set there
        self._lines = self._calls = 0

    def start(self, frames: list[FrameType]) -> None:
        """Read on in these functions, whose present numbers are not told, and in those that are called from now on."""
        if sys.gettrace() is not None:
            return
        self._known = {}
        self._before = {frame.f_code: frame.f_lineno for frame in frames}
        for frame in frames:
            self._known |= _numbers(frame)
            frame.f_trace = self._line
        self._lines, self._calls = LINES, CALLS
        sys.settrace(self._call)

    def stop(self) -> None:
        if self._lines:
            self._lines = 0
            sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._calls -= 1
        self._before.pop(frame.f_code, None)
        if self._calls <= 0:
            self.stop()
        return self._line if self._lines and is_users(frame.f_code.co_filename) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event in ("line", "return") and self._lines:
            self._lines -= 1
            self._look(frame, argument if event == "return" else None)
            if not self._lines:
                sys.settrace(None)
        return self._line if self._lines else None

    def _look(self, frame: FrameType, returned: Any) -> None:
        line = frame.f_lineno
        before, self._before[frame.f_code] = self._before.get(frame.f_code, line), line
        try:
            variables = _numbers(frame)
            numbers = variables | {f"line {line} {i}": value for i, value in enumerate(quotients(frame))}
            for index, value in enumerate(returned if isinstance(returned, tuple) else (returned,)):
                number = _number(value)
                if number is not None:
                    numbers[f"{frame.f_code.co_name}() {index}"] = number
        except Exception:  # a variable that cannot be looked at
            return
        for name, value in numbers.items():
            if self._known.get(name) != value:
                self._known[name] = value
                self.tell(name, value, f"{frame.f_code.co_filename}:{before if name in variables else line}")


def _numbers(frame: FrameType) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in list(frame.f_locals.items())[:500]:
        inside = list(vars(value).items())[:50] if _is_users_object(value) else []
        for place, each in ((name, value), *((f"{name}.{key}", inner) for key, inner in inside)):
            if (number := _number(each)) is not None:
                found[f"{frame.f_code.co_name}:{place}"] = number
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, float):
        return value
    if torch.is_tensor(value) and value.ndim == 0 and value.is_floating_point() and value.device.type != "meta":
        return float(value.detach())
    return None


def _is_users_object(value: Any) -> bool:
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    path = getattr(sys.modules.get(type(value).__module__), "__file__", None)
    return bool(path) and is_users(str(path))


FRAMES = 3  # of the user's functions around an evaluation whose variables are read


class Evaluations:
    """Watches passes over data that train nothing, and the numbers that the loop makes of them.

    The user's functions are traced for a few lines after each; debuggers do the same, so a loop that is only watched is
    left alone.
    """

    def __init__(self, recorder: TapeRecorder) -> None:
        self.recorder = recorder
        self.right: list[list[bool]] = []  # of each batch, whether each sample's prediction was
        self.losses: list[list[float]] = []
        """The mean losses that were computed, and the counts that they are means of."""
        self.given, self.used = 0, False  # batches, and whether a model was asked about one
        self.labels: deque[Tensor | None] = deque(maxlen=2)
        """Of batches that the model was not yet asked about; some loops hold the next one too."""
        self.tracer = VariableTracer(self._tell)
        self._last = False
        self._gathering = self._asked = False
        self._pass = 0, 0  # the loader and the epoch of the pass that is evaluated

    def begins(self) -> None:
        """A pass over some data begins; the one before is over."""
        self.tracer.stop()
        kind = getattr(sys.modules.get("accelerate"), "Accelerator", None)
        if kind is not None and not self._gathering:  # it drops what its samplers have repeated, where it is asked to
            self._gathering = True
            self.recorder.patches.beside(kind, "gather_for_metrics", before=self._gathered)
        self.right, self.losses, self.given, self.used = [], [], 0, False
        self.labels.clear()
        self._last = False

    def _gathered(self, *arguments: Any, **options: Any) -> None:
        if not self._asked and not self.recorder.finished:
            self._asked = True
            self.recorder.tape.add(MetricsGathered())

    @quiet
    def batch(self, batch: Any) -> None:
        self.given += 1
        self.labels.append(_labels(batch))

    @quiet
    def said(self, output: Any) -> None:
        """What the model says of a batch, without training."""
        self.used = True
        if not torch.is_tensor(output):
            output = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
        labels = self.labels.popleft() if self.labels else None
        if labels is None or not torch.is_tensor(output) or output.ndim != 2 or output.shape[0] != labels.shape[0]:
            return
        self.right.append((output.detach().argmax(1).cpu() == labels.cpu()).tolist())
        self._perhaps_over()

    @quiet
    def lost(self, value: float, count: float) -> None:
        """A loss over a batch, without training."""
        self.losses.append([value, count])
        self._perhaps_over()

    @quiet
    def last(self, loader: int, epoch: int) -> None:
        """The last batch was given: once the model has said what it says of it, the loop makes its number."""
        if not self._last:
            self._last, self._pass = True, (loader, epoch)
            self._perhaps_over()

    def _perhaps_over(self) -> None:
        said = (self.right and not self.labels) or len(self.losses) >= self.given
        if self._last and said and self.recorder.cut:
            self._last = False
            self.tracer.start(user_frames()[:FRAMES])

    def outcome(self) -> tuple[list[list[int]], list[list[float]]]:
        """Of the pass that was evaluated and is over: how many of each batch were right, and its mean loss."""
        several = len(self.losses) % max(self.given, 1)  # of a batch, or of some only
        losses = [] if several else self.losses[:: max(len(self.losses) // max(self.given, 1), 1)]
        return [[sum(right), len(right)] for right in self.right], losses

    def _tell(self, name: str, value: float, place: str) -> None:
        if not self.recorder.finished:
            self.recorder.tape.add(ValueSeen(place, *self._pass, name, value))


def _labels(batch: Any) -> Tensor | None:
    """The one tensor of whole numbers with one for each sample."""
    values = list(batch.values()) if isinstance(batch, dict) else batch
    if not isinstance(values, list | tuple):
        return None
    found = [v for v in values if torch.is_tensor(v) and v.ndim == 1 and v.dtype in (torch.int64, torch.int32)]
    return found[0] if len(found) == 1 else None
