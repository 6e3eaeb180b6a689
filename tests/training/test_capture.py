"""An iteration as a graph: what is recorded runs again on what the kept batches then hold."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from simulated_gpu import SimulatedGpu
from torch import Tensor

from onehour.training.capture import WARMUPS, CapturedIteration

Batches = Sequence[tuple[Tensor, Tensor]]


class Work:
    """What an iteration does: adds what its batches hold to a weight."""

    def __init__(self) -> None:
        self.weight, self.found = torch.zeros((), device="cuda"), torch.zeros((), device="cuda")
        self.launches = 0
        self.waits = False

    def __call__(self, batches: Batches) -> Tensor:
        self.launches += 1
        for images, labels in batches:
            if self.waits:
                images.sum().item()
            self.weight += images.sum() * labels.sum()
        return self.found.copy_(self.weight)


@pytest.fixture
def work() -> Iterator[Work]:
    with SimulatedGpu():
        yield Work()


def batches(value: int) -> Batches:
    """Two passes of an iteration."""
    return [(torch.full((2,), float(value), device="cuda"), torch.tensor([number], device="cuda")) for number in (1, 3)]


def silent(text: str) -> None:
    raise AssertionError(text)


def test_every_iteration_takes_its_own_batches_whether_launched_or_replayed(work: Work):
    captured = CapturedIteration(work, warn=silent)
    found = [float(captured(batches(value))) for value in range(1, 9)]
    assert found == [8.0 * sum(range(value + 1)) for value in range(1, 9)]
    assert work.launches == WARMUPS + 1  # the last of them is the capture


def test_a_batch_of_the_callers_may_be_overwritten_once_the_call_is_back(work: Work):
    captured = CapturedIteration(work, warn=silent)
    given = batches(1)
    for _ in range(WARMUPS + 1):
        captured(given)
    before = float(work.weight)
    given[0][0].zero_()
    captured(batches(1))
    assert float(work.weight) == before + 8


def test_a_model_that_cannot_be_captured_is_launched_for_good_and_named_once(work: Work):
    work.waits = True
    said: list[str] = []
    captured = CapturedIteration(work, warn=said.append)
    found = [float(captured(batches(value))) for value in range(1, 9)]
    assert found == [8.0 * sum(range(value + 1)) for value in range(1, 9)]
    assert work.launches == 8 + 1  # one was the capture that failed
    (text,) = said
    assert "cannot be captured" in text
    assert "not permitted when stream is capturing" in text
    assert "test_capture.py" in text


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t.repeat(2)], ids=["type", "size"])
def test_a_batch_of_another_kind_is_our_fault(change: Callable[[Tensor], Tensor], work: Work):
    captured = CapturedIteration(work, warn=silent)
    for _ in range(WARMUPS + 1):
        captured(batches(1))
    other = [(change(images), labels) for images, labels in batches(1)]
    with pytest.raises(AssertionError):
        captured(other)
