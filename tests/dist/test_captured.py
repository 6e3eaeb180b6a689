"""An iteration as a graph: what is recorded runs again on what its inputs then hold."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
import torch
from simulated_gpu import SimulatedGpu
from torch import Tensor

from onehour.dist.devices import WARMUPS, CapturedIteration, StepTimer

Batches = Sequence[tuple[Tensor, Tensor]]
CUDA = torch.device("cuda")


class Work:
    """What an iteration does: adds what its batches hold, times the rate, to a weight."""

    def __init__(self) -> None:
        self.weight, self.found = torch.zeros((), device=CUDA), torch.zeros(2, device=CUDA)
        self.launches, self.waits = 0, False
        self.timer, self.said = StepTimer(("compute", "update"), CUDA), list[str]()
        self.captured = CapturedIteration(self.launch, timer=self.timer, device=CUDA, warn=self.said.append)

    def launch(self, batches: Iterable[tuple[Tensor, Tensor]], rate: Tensor, stopping: Tensor) -> Tensor:
        self.launches += 1
        for images, labels in batches:
            if self.waits:
                images.sum().item()
            self.weight += rate * images.sum() * labels.sum()
        self.timer.lap("update")
        return self.found.copy_(torch.stack([self.weight, stopping]))

    def iterations(self) -> list[list[float]]:
        """Eight, each at a rate of its own; a stop is asked for in the third and in the seventh."""
        found: list[list[float]] = []
        for number in range(1, 9):
            self.timer.begin()
            found.append(self.captured(iter(batches(number)), 0.5 * number, number in (3, 7)).tolist())
            self.timer.end()
        return found

    def parts(self) -> list[set[str]]:
        """What took time in each of them."""
        return [{part for part, took in step.items() if took} for step in self.timer.steps()]


@pytest.fixture
def work() -> Iterator[Work]:
    with SimulatedGpu():
        yield Work()


def batches(value: int) -> Batches:
    """Two passes of an iteration."""
    return [(torch.full((2,), float(value), device=CUDA), torch.tensor([number], device=CUDA)) for number in (1, 3)]


EXPECTED = [[sum(4.0 * number**2 for number in range(1, last + 1)), last in (3, 7)] for last in range(1, 9)]


def test_every_iteration_takes_its_own_inputs_whether_launched_or_replayed(work: Work):
    assert work.iterations() == EXPECTED
    assert work.launches == WARMUPS + 1  # the last of them is the capture
    assert not work.said
    assert work.parts() == [{"update"}] * WARMUPS + [{"compute"}] * (8 - WARMUPS)


def test_a_batch_of_the_callers_may_be_overwritten_once_the_call_is_back(work: Work):
    given = batches(1)
    for _ in range(WARMUPS + 1):
        work.captured(given, 1.0, False)
    before = float(work.weight)
    given[0][0].zero_()
    work.captured(batches(1), 1.0, False)
    assert float(work.weight) == before + 8


def test_a_model_that_cannot_be_captured_is_launched_for_good_and_named_once(work: Work):
    work.waits = True
    assert work.iterations() == EXPECTED
    assert work.launches == 8 + 1  # one was the capture that failed
    (text,) = work.said
    assert "cannot be captured" in text
    assert "not permitted when stream is capturing" in text
    assert "test_captured.py" in text
    assert work.parts() == [{"update"}] * 8


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t.repeat(2)], ids=["type", "size"])
def test_a_batch_of_another_kind_is_our_fault(change: Callable[[Tensor], Tensor], work: Work):
    for _ in range(WARMUPS + 1):
        work.captured(batches(1), 1.0, False)
    other = [(change(images), labels) for images, labels in batches(1)]
    with pytest.raises(AssertionError):
        work.captured(other, 1.0, False)
