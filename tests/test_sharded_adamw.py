"""The example with `fully_shard` on two processes against a plain loop over the concatenated minibatch, in float64."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from onehour import SampleStream

EXAMPLES = Path(__file__).parents[1] / "examples"
UPDATES = 47
"""Of 8 samples each: the last one ends past 3 epochs of 125."""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("sharded_adamw")


@pytest.fixture
def acted(world: Callable[[int], Path]) -> list[dict[str, Any]]:
    """What each process has written down."""
    return [torch.load(world(2) / f"sharded-{rank}.pt", weights_only=True) for rank in (0, 1)]


def rate(epoch: float) -> float:
    """For 4 times the minibatch twice the base's 0.001, after one epoch of warmup; a tenth from epoch 2 on."""
    return 1e-3 * (1 + epoch) if epoch < 1 else 2e-3 if epoch < 2 else 2e-4


def trained(mine: ModuleType, *, of_means: bool = False) -> dict[str, Tensor]:
    """The weights of a plain loop; `of_means` averages the means of two processes, which is wrong."""
    torch.manual_seed(0)
    net, (features, labels) = mine.network().double(), mine.random_data().tensors
    normalising = {p for name, p in net.named_parameters() if ".norm." in name or name.startswith("3.")}
    others = [p for p in net.parameters() if p not in normalising]
    groups = [{"params": others, "weight_decay": 0.2}, {"params": [*normalising], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.6, 0.996), eps=5e-9)
    stream = SampleStream(samples=125, minibatch=mine.MINIBATCH, seed=0)
    for t in range(UPDATES):
        indices = torch.tensor([int(i) for worker in range(4) for i in stream.indices(t, worker)])
        losses = F.cross_entropy(net(features[indices].double()), labels[indices], reduction="none")
        counts = (labels[indices] != mine.UNLABELLED).double()
        halves = [part.sum() / count.sum() for part, count in zip(losses.chunk(2), counts.chunk(2), strict=True)]
        optimizer.zero_grad()
        ((halves[0] + halves[1]) / 2 if of_means else losses.sum() / counts.sum()).backward()
        for group in optimizer.param_groups:
            group["lr"] = rate(t * 8 / 125)
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).detach().abs().max()) for name in other)


def test_the_whole_weights_are_those_of_one_process(example: ModuleType, acted: list[dict[str, Any]]):
    expected = trained(example)
    for process in acted:
        assert largest_difference(process["weights"], expected) <= 1e-12
    assert largest_difference(trained(example, of_means=True), expected) > 1e-5


def test_processes_take_their_workers_samples_at_the_schedules_rates(example: ModuleType, acted: list[dict[str, Any]]):
    stream = SampleStream(samples=125, minibatch=example.MINIBATCH, seed=0)
    for rank, process in enumerate(acted):
        hosted = range(2 * rank, 2 * rank + 2)
        assert process["samples"] == [i for t in range(UPDATES) for i in stream.indices(t, hosted).tolist()]
        assert [rates for rates, _ in process["rates"]] == [other for _, other in process["rates"]]
        assert [rates[0] for rates in process["rates"]] == pytest.approx([rate(t * 8 / 125) for t in range(UPDATES)])
