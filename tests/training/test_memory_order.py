"""Fused optimizers pair a weight with its gradient by their places in memory: the layouts must be one everywhere."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from steps import step_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from wires import on_threads

from onehour import Recipe
from onehour.dist import reducer
from onehour.dist.group import Group
from onehour.dist.placement import passes
from onehour.rules.batchnorm import convert_batchnorm
from onehour.rules.momentum import InsideSGD
from onehour.training.feeds import pick_share
from onehour.training.state import digest_of, load_optimizer, model_state, optimizer_state
from onehour.training.step import Step

K, N, STEPS, RATE, DECAY = 5, 4, 3, 0.1, 0.01


def fused_adamw(params: Iterable[Any], lr: float) -> Optimizer:
    return torch.optim.AdamW(params, lr=lr, fused=True)


def each_adamw(params: Iterable[Any], lr: float) -> Optimizer:
    return torch.optim.AdamW(params, lr=lr, foreach=True)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True),
    "torch.optim:SGD": lambda groups: torch.optim.SGD(groups, lr=RATE, momentum=0.9),
    "torch.optim:AdamW": lambda groups: torch.optim.AdamW(groups, lr=RATE),
    "onehour.rules.momentum:InsideSGD": lambda groups: InsideSGD(groups, lr=RATE, momentum=0.9),
    f"{__name__}:fused_adamw": lambda groups: torch.optim.AdamW(groups, lr=RATE),
    f"{__name__}:each_adamw": lambda groups: torch.optim.AdamW(groups, lr=RATE),
}
"""What a recipe may name, and what it is: one tensor after another, on contiguous weights."""


class Turned(nn.Module):
    """Logits by a weight that is stored transposed, as a model that was brought may have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 24).t())

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight


class Cut(Turned):
    """By a weight that is a part of a wider one: between its rows lies memory that is not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = torch.zeros(24, 5, dtype=torch.float64)
        self.weight = nn.Parameter(self.whole[:, :3])


def layer(channels: int, width: int) -> tuple[nn.Module, nn.Module]:
    """Without a bias: its gradient is nothing but rounding, which Adam's kind makes as large as any other."""
    return nn.Conv2d(channels, width, 3, bias=False), nn.BatchNorm2d(width)


def network(last: type[nn.Module]) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(*layer(3, 8), nn.ReLU(), *layer(8, 6), last()).double()
    for parameter in model.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def minibatch(iteration: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(iteration)
    return torch.randn(K * N, 3, 6, 6, generator=draw).double(), torch.randint(3, (K * N,), generator=draw)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """λ on weights of layers, none on BatchNorm's (Remark 1)."""
    own = {p for module in model.modules() if isinstance(module, nn.BatchNorm2d) for p in module.parameters()}
    others = [p for p in model.parameters() if p not in own]
    return [{"params": others, "weight_decay": DECAY}, {"params": list(own), "weight_decay": 0.0}]


def plainly(name: str, last: type[nn.Module]) -> dict[str, Tensor]:
    """A float64 loop of torch's own: worker after worker, each with a mean over n, the k gradients' mean."""
    model = network(last)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    optimizer = OPTIMIZERS[name](groups_of(model))
    for iteration in range(STEPS):
        images, labels = minibatch(iteration)
        optimizer.zero_grad()
        for worker in range(K):
            (F.cross_entropy(model(images[worker::K]), labels[worker::K]) / K).backward()
        optimizer.step()
    return {key: parameter.detach() for key, parameter in model.named_parameters()}


def made(name: str, last: type[nn.Module], group: Group, *, nhwc: bool, **options: Any) -> tuple[Step, list[range]]:
    options |= {"samples": 1000, "minibatch": K * N, "per_worker": N, "base_minibatch": K * N, "precision": "float64"}
    options |= {"base_lr": RATE, "warmup": "none", "weight_decay": DECAY, "scale_adaptive": True}
    recipe = Recipe(channels_last=nhwc, optimizer=name, **options)
    model = convert_batchnorm(network(last), N).train()
    model = model.to(memory_format=torch.channels_last) if nhwc else model  # type: ignore[call-overload]
    share = pick_share(recipe, group)
    own = passes(share, 1 if recipe.reduce == "canonical" else 2)
    return step_of(recipe, model, own, group=group), own


def taken(step: Step, own: list[range], iterations: range) -> dict[str, Tensor]:
    for iteration in iterations:
        images, labels = minibatch(iteration)
        rows = [[row * K + worker for row in range(N) for worker in workers] for workers in own]
        step(iteration, ((images[r], labels[r]) for r in rows))
    return {key: parameter.detach() for key, parameter in step.model.named_parameters()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("processes", "reduce"), [(1, "canonical"), (2, "canonical"), (3, "fast")])
def test_every_layout_learns_what_a_plain_loop_does(
    monkeypatch: pytest.MonkeyPatch, name: str, nhwc: bool, processes: int, reduce: str
):
    expected = plainly(name, Turned)
    found = on_threads(
        monkeypatch, processes, lambda group: taken(*made(name, Turned, group, nhwc=nhwc, reduce=reduce), range(STEPS))
    )
    for weights in found:
        for key, weight in weights.items():
            torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-7, msg=f"{key} differs")


def test_gradients_in_another_order_are_seen(monkeypatch: pytest.MonkeyPatch):
    """What the test before is for: contiguous gradients of channels_last weights."""
    monkeypatch.setattr(reducer, "part_for", lambda parameter, flat: flat.view(parameter.shape))
    weights, _ = on_threads(monkeypatch, 2, lambda group: taken(*made("sgd", Turned, group, nhwc=True), range(STEPS)))
    expected = plainly("sgd", Turned)
    assert max(float((weights[key] - expected[key]).abs().max()) for key in expected) > 0.05


@pytest.mark.parametrize("reduce", ["fast", "canonical"])
def test_a_weight_with_gaps_is_learned_and_nothing_between_it_changes(reduce: str):
    step, own = made("sgd", Cut, Group(), nhwc=False, reduce=reduce)
    weights = taken(step, own, range(STEPS))
    expected = plainly("sgd", Cut)
    for key, weight in weights.items():
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-7, msg=f"{key} differs")
    whole = step.model.get_submodule("5").whole
    assert isinstance(whole, Tensor)
    assert not whole[:, 3:].any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_keeps_comes_back_from_a_checkpoint_in_the_weights_order(name: str):
    undisturbed, own = made(name, Turned, Group(), nhwc=True)
    taken(undisturbed, own, range(STEPS))
    first, _ = made(name, Turned, Group(), nhwc=True)
    taken(first, own, range(1))
    second, _ = made(name, Turned, Group(), nhwc=True)
    second.model.load_state_dict(model_state(first.model))
    load_optimizer(second.optimizer, second.model, optimizer_state(first.optimizer, first.model))
    taken(second, own, range(1, STEPS))
    digests = [
        digest_of(model_state(step.model), optimizer_state(step.optimizer, step.model))
        for step in (undisturbed, second)
    ]
    assert digests[0] == digests[1]


def test_digests_and_snapshots_know_values_and_not_their_places():
    layouts = []
    for nhwc in (False, True):
        step, own = made("sgd", Turned, Group(), nhwc=nhwc)
        step.model.load_state_dict({key: torch.ones_like(v) for key, v in step.model.state_dict().items()})
        step.model.get_parameter("0.weight").data.copy_(torch.arange(216.0).view(8, 3, 3, 3))
        layouts.append(digest_of(model_state(step.model)))
        assert len(own) == 3
    assert layouts[0] == layouts[1]
