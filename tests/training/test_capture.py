"""An iteration as a graph, on a played device: what is recorded runs again on what the kept batches then hold."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from onehour.training.capture import WARMUPS, CapturedIteration

Batches = Sequence[tuple[Tensor, Tensor]]


class Played:
    """A CUDA device that launches nothing while it captures, and everything that was captured at each replay."""

    def __init__(self) -> None:
        self.weight, self.found = torch.zeros(()), torch.zeros(())
        self.recorded: list[Batches] | None = None
        self.launches, self.replays = 0, 0
        self.refuses = False

    def launch(self, batches: Batches) -> Tensor:
        """An iteration: adds what the batches hold to the weight."""
        if self.recorded is not None:
            if self.refuses:
                self.recorded = None
                raise RuntimeError("operation not permitted when stream is capturing")
            self.recorded.append(batches)
            return self.found
        self.launches += 1
        return self.run(batches)

    def run(self, batches: Batches) -> Tensor:
        self.weight += sum(images.sum() * labels.sum() for images, labels in batches)
        return self.found.copy_(self.weight)

    @contextmanager
    def capturing(self, graph: Any, stream: Any) -> Iterator[None]:
        self.recorded = kept = []
        yield
        self.recorded = None

        def replay() -> None:
            self.replays += 1
            self.run(*kept)

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


def silent(text: str) -> None:
    raise AssertionError(text)


def test_every_iteration_takes_its_own_batches_whether_launched_or_replayed(played: Played):
    captured = CapturedIteration(played.launch, warn=silent)
    found = [float(captured(batches(value))) for value in range(1, 9)]
    assert found == [8.0 * sum(range(value + 1)) for value in range(1, 9)]
    assert (played.launches, played.replays) == (WARMUPS, 8 - WARMUPS)


def test_a_batch_of_the_callers_may_be_overwritten_once_the_call_is_back(played: Played):
    captured = CapturedIteration(played.launch, warn=silent)
    given = batches(1)
    for _ in range(WARMUPS + 1):
        captured(given)
    before = float(played.weight)
    given[0][0].zero_()
    captured(batches(1))
    assert float(played.weight) == before + 8


def test_a_model_that_cannot_be_captured_is_launched_for_good_and_named_once(played: Played):
    played.refuses = True
    said: list[str] = []
    captured = CapturedIteration(played.launch, warn=said.append)
    found = [float(captured(batches(value))) for value in range(1, 9)]
    assert found == [8.0 * sum(range(value + 1)) for value in range(1, 9)]
    assert (played.launches, played.replays) == (8, 0)
    (text,) = said
    assert "cannot be captured" in text
    assert "not permitted when stream is capturing" in text


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t.repeat(2)], ids=["type", "size"])
def test_a_batch_of_another_kind_is_our_fault(change: Callable[[Tensor], Tensor], played: Played):
    captured = CapturedIteration(played.launch, warn=silent)
    for _ in range(WARMUPS + 1):
        captured(batches(1))
    other = [(change(images), labels) for images, labels in batches(1)]
    with pytest.raises(AssertionError):
        captured(other)
