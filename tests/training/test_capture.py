"""An iteration as a graph, on a played device: what is recorded runs again on what its inputs then hold."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from onehour.training.capture import WARMUPS, CapturedIteration
from onehour.training.measure import StepTimer

Batches = Sequence[tuple[Tensor, Tensor]]


CPU = torch.device("cpu")


class Played:
    """A CUDA device that launches nothing while it captures, and everything that was captured at each replay."""

    def __init__(self) -> None:
        self.weight, self.found = torch.zeros(()), torch.zeros(2)
        self.recorded: list[tuple[Batches, Tensor, Tensor]] | None = None
        self.launches, self.replays, self.waits = 0, 0, 0
        self.refuses = False
        self.timer, self.said = StepTimer(CPU), list[str]()

    def captured(self) -> CapturedIteration:
        return CapturedIteration(self.launch, before=self.wait, timer=self.timer, device=CPU, warn=self.said.append)

    def wait(self) -> None:
        self.waits += 1

    def launch(self, batches: Iterable[tuple[Tensor, Tensor]], rate: Tensor, stopping: Tensor) -> Tensor:
        """An iteration: adds what the batches hold, times the rate, to the weight."""
        given = (list(batches), rate, stopping)
        self.timer.lap("update")
        if self.recorded is not None:
            if self.refuses:
                self.recorded = None
                raise RuntimeError("operation not permitted when stream is capturing")
            self.recorded.append(given)
            return self.found
        self.launches += 1
        self.wait()
        return self.run(*given)

    def run(self, batches: Batches, rate: Tensor, stopping: Tensor) -> Tensor:
        self.weight += rate * sum(images.sum() * labels.sum() for images, labels in batches)
        return self.found.copy_(torch.stack([self.weight, stopping]))

    @contextmanager
    def capturing(self, graph: Any, stream: Any) -> Iterator[None]:
        self.recorded = kept = []
        yield
        self.recorded = None

        def replay() -> None:
            self.replays += 1
            self.run(*kept[0])

        graph.replay = replay


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    device = Played()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, replacement in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda chosen: nullcontext(),
        "CUDAGraph": SimpleNamespace,
        "graph": device.capturing,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    return device


def batches(value: int) -> Batches:
    """Two passes of an iteration."""
    return [(torch.full((2,), float(value)), torch.tensor([number])) for number in (1, 3)]


def iterations(captured: CapturedIteration, played: Played) -> list[list[float]]:
    """Eight, each at a rate of its own; a stop is asked for in the third and in the seventh."""
    found: list[list[float]] = []
    for number in range(1, 9):
        played.timer.begin()
        found.append(captured(iter(batches(number)), 0.5 * number, number in (3, 7)).tolist())
        played.timer.end()
    return found


EXPECTED = [[sum(4.0 * number**2 for number in range(1, last + 1)), last in (3, 7)] for last in range(1, 9)]


def test_every_iteration_takes_its_own_inputs_whether_launched_or_replayed(played: Played):
    assert iterations(played.captured(), played) == EXPECTED
    assert (played.launches, played.replays) == (WARMUPS, 8 - WARMUPS)
    assert played.waits >= 8  # before each of them
    assert not played.said
    parts = [{part for part, took in step.items() if took} for step in played.timer.steps()]
    assert parts == [{"update"}] * WARMUPS + [{"compute"}] * (8 - WARMUPS)


def test_a_batch_of_the_callers_may_be_overwritten_once_the_call_is_back(played: Played):
    captured, given = played.captured(), batches(1)
    for _ in range(WARMUPS + 1):
        captured(given, 1.0, False)
    before = float(played.weight)
    given[0][0].zero_()
    captured(batches(1), 1.0, False)
    assert float(played.weight) == before + 8


def test_a_model_that_cannot_be_captured_is_launched_for_good_and_named_once(played: Played):
    played.refuses = True
    assert iterations(played.captured(), played) == EXPECTED
    assert (played.launches, played.replays) == (8, 0)
    (text,) = played.said
    assert "cannot be captured" in text
    assert "not permitted when stream is capturing" in text
    assert {part for step in played.timer.steps() for part, took in step.items() if took} == {"update"}


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t.repeat(2)], ids=["type", "size"])
def test_a_batch_of_another_kind_is_our_fault(change: Callable[[Tensor], Tensor], played: Played):
    captured = played.captured()
    for _ in range(WARMUPS + 1):
        captured(batches(1), 1.0, False)
    other = [(change(images), labels) for images, labels in batches(1)]
    with pytest.raises(AssertionError):
        captured(other, 1.0, False)
