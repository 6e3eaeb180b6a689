"""torch.compile of a model with ghost BatchNorm: one graph for each size of a pass, and no more than that."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from steps import step_of
from torch import Tensor, nn

from onehour import Recipe
from onehour.dist.placement import passes
from onehour.execution import Execution
from onehour.models.small import resnet8
from onehour.rules.batchnorm import convert_batchnorm
from onehour.training.build import complete, pick_workers_per_pass
from onehour.training.step import Step

N = 4


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What torch counts while it traces; the graphs then run as they are, without a compiler."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def trained(k: int, together: int, *, compiled: bool, iterations: int = 3) -> tuple[Step, list[Tensor]]:
    torch.manual_seed(0)
    recipe = Recipe(samples=1000, minibatch=k * N, per_worker=N, base_minibatch=k * N, compile=compiled)
    model = convert_batchnorm(resnet8(channels=1, classes=3), N).train()
    step = step_of(recipe, model, passes(range(k), together))
    draw = torch.Generator().manual_seed(0)
    sizes = [N * len(workers) for _ in range(iterations) for workers in step.passes]
    given = [(torch.randn(size, 1, 8, 8, generator=draw), torch.arange(size) % 3) for size in sizes]
    batches = iter(given)
    for iteration in range(iterations):
        step(iteration, batches)
    return step, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
@pytest.mark.parametrize(("together", "graphs"), [(4, 1), (6, 2), (1, 1), (8, 1)])
def test_there_is_a_graph_for_each_size_without_a_break_or_another_trace(
    counters: dict[str, Any], together: int, graphs: int
):
    _, weights = trained(8, together, compiled=True)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    _, plain = trained(8, together, compiled=False)
    for compiled, other in zip(weights, plain, strict=True):
        torch.testing.assert_close(compiled, other, rtol=1e-4, atol=1e-6)


Pick = Callable[..., int]


@pytest.mark.parametrize(
    ("k", "limit", "expected"), [(8, 6, 4), (8, 5, 4), (8, 8, 8), (8, 3, 3), (12, 5, 4), (7, 3, 3), (5, 1, 1)]
)
@pytest.mark.parametrize("where", ["cuda", "compiled", "cpu"])
def test_passes_are_of_one_size_where_as_many_divide_the_workers(
    monkeypatch: pytest.MonkeyPatch, k: int, limit: int, expected: int, where: str
):
    """On the CPU, uncompiled, the bits of runs that exist depend on the sizes, and they cost nothing there."""
    recipe = Recipe(model="resnet8", data="digits", minibatch=16 * k, per_worker=16, compile=where == "compiled")
    completed, data = complete(recipe)
    device = "cuda" if where == "cuda" else "cpu"
    monkeypatch.setitem(pick_workers_per_pass.__globals__["PASS_BYTES"], device, limit * 16 * 64 * 4)
    picked = pick_workers_per_pass(Execution(), completed, data, nn.Linear(1, 1), device)
    assert picked == (limit if where == "cpu" else expected)
    assert pick_workers_per_pass(Execution(workers_per_pass=3), completed, data, nn.Linear(1, 1), device) == 3
