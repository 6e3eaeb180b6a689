"""torch.compile of a model with ghost BatchNorm: a run's passes are of one size, and one graph."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from steps import step_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from onehour import Recipe
from onehour.data.sources import Data, complete
from onehour.dist.placement import passes
from onehour.execution import Execution
from onehour.models.resnet import BasicBlock, Bottleneck, ResNet, resnet8
from onehour.rules.batchnorm import convert_batchnorm
from onehour.training.feeds import pick_workers_per_pass

Make = Callable[[], nn.Module]


class NormAct(nn.BatchNorm2d):
    """A class of someone's own."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.silu(super().forward(input))


def own() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), NormAct(4), nn.Conv2d(4, 4, 3), NormAct(4), nn.Flatten(), nn.Linear(64, 3))


NETS: dict[str, Make] = {
    "own": own,
    "resnet8": partial(resnet8, channels=1, classes=3),
    "basic": partial(ResNet, BasicBlock, (1, 1, 1, 1), channels=1, classes=3, small_images=True),
    "bottleneck": partial(ResNet, Bottleneck, (1, 1, 1, 1), channels=1, classes=3),
}


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What torch counts while it traces; the graphs then run as they are, without a compiler."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def trained(make: Make, n: int, k: int, asked: int, *, compiled: bool, iterations: int = 3) -> list[Tensor]:
    """The weights after some iterations of passes of at most so many workers, as a run takes them."""
    torch.manual_seed(0)
    recipe = Recipe(samples=1000, minibatch=k * n, per_worker=n, base_minibatch=k * n, compile=True)
    model = convert_batchnorm(make(), n).train()
    side = TensorDataset(torch.zeros(9, 1, 8, 8), torch.arange(9) % 3)
    together = pick_workers_per_pass(Execution(workers_per_pass=asked), recipe, Data.of(side, side), model, "cpu")
    step = step_of(recipe.replace(compile=compiled), model, passes(range(k), together))
    draw = torch.Generator().manual_seed(0)
    sizes = [n * len(workers) for _ in range(iterations) for workers in step.passes]
    batches = iter([(torch.randn(size, 1, 8, 8, generator=draw), torch.arange(size) % 3) for size in sizes])
    for iteration in range(iterations):
        step(iteration, batches)
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
@pytest.mark.parametrize(
    ("net", "n", "k", "asked"),
    [
        ("own", 2, 6, 4),
        ("resnet8", 4, 8, 3),
        *[pytest.param("resnet8", 4, 8, asked, marks=pytest.mark.slow) for asked in (1, 6, 8)],
        pytest.param("resnet8", 3, 7, 3, marks=pytest.mark.slow),
        pytest.param("basic", 2, 6, 4, marks=pytest.mark.slow),
        pytest.param("bottleneck", 5, 4, 3, marks=pytest.mark.slow),
    ],
)
def test_passes_of_any_size_are_one_graph_without_a_break_or_another_trace(
    counters: dict[str, Any], net: str, n: int, k: int, asked: int
):
    weights = trained(NETS[net], n, k, asked, compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    for compiled, other in zip(weights, trained(NETS[net], n, k, asked, compiled=False), strict=True):
        torch.testing.assert_close(compiled, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("k", "limit", "on_cuda", "compiled"),
    [(8, 6, 4, 4), (8, 5, 4, 4), (8, 8, 8, 8), (8, 3, 3, 2), (12, 5, 4, 4), (7, 3, 3, 1), (5, 1, 1, 1)],
)
def test_passes_are_of_one_size_always_where_they_are_compiled_and_on_a_gpu_where_as_many_are(
    monkeypatch: pytest.MonkeyPatch, k: int, limit: int, on_cuda: int, compiled: int
):
    """On the CPU, uncompiled, the bits of runs that exist depend on the sizes, and they cost nothing there."""
    recipe = Recipe(model="resnet8", data="digits", minibatch=16 * k, per_worker=16)
    completed, data = complete(recipe)
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(pick_workers_per_pass.__globals__["PASS_BYTES"], device, limit * 16 * 64 * 4)

    def picked(device: str, *, compile: bool = False, **asked: Any) -> int:
        recipe = completed.replace(compile=compile)
        return pick_workers_per_pass(Execution(**asked), recipe, data, nn.Linear(1, 1), device)

    assert picked("cpu") == picked("cpu", workers_per_pass=limit) == picked("cuda", workers_per_pass=limit) == limit
    assert picked("cuda") == on_cuda
    assert picked("cpu", compile=True) == picked("cuda", compile=True, workers_per_pass=limit) == compiled


@pytest.mark.parametrize(("processes", "asked", "picked"), [(2, 4, 4), (2, 3, 1), (3, 3, 3), (3, 2, 1), (7, 5, 1)])
def test_compiled_passes_are_of_one_size_in_each_process(processes: int, asked: int, picked: int):
    """7 workers: 3 and 4 in two processes, 2, 2 and 3 in three."""
    recipe = Recipe(samples=1000, minibatch=28, per_worker=4, compile=True)
    side = TensorDataset(torch.zeros(9, 1, 8, 8), torch.arange(9) % 3)
    execution = Execution(workers_per_pass=asked, processes=processes)
    assert pick_workers_per_pass(execution, recipe, Data.of(side, side), nn.Linear(1, 1), "cpu") == picked
