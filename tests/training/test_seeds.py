"""Several models as one network: side by side they compute what each computes alone, or they are refused."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exactness import exact
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from onehour.models.resnet import resnet8
from onehour.rules.batchnorm import convert_batchnorm, ghost_layers
from onehour.rules.initialize import init_weights_
from onehour.training import build
from onehour.training.seeds import JoinedLinear, Seeds, join_models, try_joined
from onehour.training.state import Network

N = 4  # n
OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [
    lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    lambda p: SGD(p, lr=0.1),
    *build.OPTIMIZERS.values(),
]


class Pooled(nn.Module):
    """A convolution, `act`, a pool and a linear layer."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.bn(self.conv(x))).mean((2, 3)))


def plain() -> nn.Sequential:
    layers = (nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return nn.Sequential(nn.Flatten(), *layers)


def grouped() -> nn.Module:
    """Depthwise and strided convolutions, pools, BatchNorm without γ and β."""
    head = (nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, affine=False), nn.ReLU(inplace=True))
    body = (nn.Conv2d(6, 6, 3, stride=2, groups=6), nn.Conv2d(6, 8, 1, groups=2), nn.AvgPool2d(2), nn.SiLU())
    return nn.Sequential(*head, *body, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 3))


RIGHT = {"resnet8": resnet8, "plain": plain, "grouped": grouped, "pooled": Pooled, "linear": lambda: plain()[:2]}


def seeds(make: Callable[[], nn.Module], count: int = 3) -> list[nn.Module]:
    """Models of one shape that differ in weights and statistics."""
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = convert_batchnorm(make(), N).double()
        for tensor in model.state_dict().values():
            tensor.uniform_(0.2, 0.8) if tensor.is_floating_point() and tensor.ndim == 1 else None
        made.append(model)
    return made


def images(models: int = 3, workers: int = 2) -> Tensor:
    """(S, g·n, 1, 8, 8)."""
    shape = (models, workers * N, 1, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def states(models: list[nn.Module]) -> list[dict[str, Tensor]]:
    return [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]


def joined(parts: list[Network], make: Callable[..., torch.optim.Optimizer]) -> Seeds:
    """As one, with an optimizer of the same kind."""
    decisions: Any = SimpleNamespace(optimizer=lambda model: make(model.parameters()))
    return Seeds(decisions, parts)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", RIGHT)
def test_joined_models_give_each_ones_logits_gradients_and_statistics(name: str, training: bool):
    models, others, x = seeds(RIGHT[name]), seeds(RIGHT[name]), images()
    network = joined([Network(model, SGD(model.parameters())) for model in others], SGD)
    network.model.train(training)
    together = network.model(x.transpose(0, 1).flatten(1, 2)).chunk(3, 1)
    alone = [model.train(training)(own) for model, own in zip(models, x, strict=True)]
    exact(together, tuple(alone))
    upstream = torch.randn_like(alone[0])
    torch.stack([(logits * upstream).sum() for logits in together]).sum().backward()
    for logits in alone:
        (logits * upstream).sum().backward()
    for parameter, *own in zip(network.model.parameters(), *(model.parameters() for model in models), strict=True):
        exact(parameter.grad, torch.cat([p.grad for p in own if p.grad is not None]).view(parameter.shape))
    network.give_back()
    exact(states(others), states(models))  # the running statistics have moved alike


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("count", [1, 3])
def test_splitting_gives_back_what_was_joined(name: str, count: int):
    models = seeds(RIGHT[name], count)
    for layer in (layer for model in models for layer in ghost_layers(model)):
        layer.register_buffer("num_batches_tracked", torch.tensor(7))  # the same for all, as iterations are
    before = states(models)
    network = joined([Network(model, SGD(model.parameters())) for model in models], SGD)
    for model in models:
        for tensor in model.state_dict().values():
            tensor.zero_()
    network.give_back()
    exact(states(models), before)


def test_a_joined_network_owns_its_memory_and_keeps_torchs_names():
    models = seeds(resnet8, 2)
    before = states(models)
    joined = join_models(models)
    assert list(joined.state_dict()) == list(models[0].state_dict())
    assert [layer.per_worker for layer in ghost_layers(joined)] == [N] * 9
    with torch.no_grad():
        for tensor in joined.state_dict().values():
            tensor.zero_()
    exact(states(models), before)


def test_what_is_frozen_stays_frozen():
    models = seeds(plain)
    for model in models:
        model[1].weight.requires_grad_(False)  # type: ignore[index]
    asked = [parameter.requires_grad for parameter in join_models(models).parameters()]
    assert asked == [parameter.requires_grad for parameter in models[0].parameters()]
    assert not all(asked)


def test_linear_layers_side_by_side():
    layers = [nn.Linear(3, 2).double() for _ in range(4)]
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    expected = torch.cat([layer(x[:, number]) for number, layer in enumerate(layers)], 1)
    exact(JoinedLinear(layers)(x.flatten(1)), expected)


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("begun", [0, 2])
def test_optimizers_go_on_together_and_apart_again(make: Callable[..., torch.optim.Optimizer], begun: int):
    """Two steps apart, two together, two apart: as if they had always been apart."""
    models, twins = seeds(plain), seeds(plain)
    own, theirs = ([Network(model, make(model.parameters())) for model in group] for group in (models, twins))

    def loss(logits: Tensor) -> Tensor:
        return logits.square().sum() / 100

    def step(parts: list[Network]) -> None:
        for part, x in zip(parts, images(len(parts)), strict=True):
            part.optimizer.zero_grad()
            loss(part.model.train()(x)).backward()
            part.optimizer.step()

    for _ in range(begun):
        step(own)
    network = joined(own, make)
    for _ in range(2):
        network.optimizer.zero_grad()
        loss(network.model.train()(images().transpose(0, 1).flatten(1, 2))).backward()
        network.optimizer.step()
    network.give_back()
    for _ in range(2):
        step(own)
    for _ in range(begun + 4):
        step(theirs)
    torch.testing.assert_close(states(models), states(twins), rtol=0, atol=1e-10)
    for mine, other in zip(own, theirs, strict=True):
        state = zip(mine.optimizer.state.values(), other.optimizer.state.values(), strict=True)
        torch.testing.assert_close(
            *map(list, zip(*state, strict=True)), rtol=0, atol=1e-10
        ) if mine.optimizer.state else None


class Residual(nn.Module):
    """Mixes channels where γ = 0 hides it at first."""

    downsample = None

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x - x.mean(1, keepdim=True)).softmax(1))


def scaled(kind: type[Any], *sizes: int) -> nn.Module:
    """A layer with a parameter of its own, which is 1 at first."""

    class Scaled(kind):
        def __init__(self) -> None:
            super().__init__(*sizes)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, input: Tensor) -> Tensor:
            return self.scale * super().forward(input)

    return Scaled()


class Sometimes(nn.Module):
    """Does something to the logits in training alone, or in evaluation alone."""

    def __init__(self, training: bool, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.when, self.act = plain(), training, act

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return self.act(logits) if self.training == self.when else logits


def tied() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64))
    model[2].weight = model[1].weight
    return model


def locked() -> nn.Module:
    model = plain()
    model.lock = threading.Lock()  # type: ignore[assignment]
    return model


def shuffled(x: Tensor) -> Tensor:
    return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softmax over channels": (lambda: Pooled(lambda x: x.softmax(1)), "gives other logits"),
    "a mean over channels": (lambda: Pooled(lambda x: x - x.mean(1, keepdim=True)), "gives other logits"),
    "a norm over channels": (lambda: Pooled(lambda x: F.layer_norm(x, x.shape[1:])), "gives other logits"),
    "channels shuffled": (lambda: Pooled(shuffled), "gives other logits"),
    "the largest of all": (lambda: Pooled(lambda x: x / x.abs().max()), "gives other logits"),
    "a size written down": (lambda: Pooled(lambda x: x.view(-1, 4, 8, 8)), "the joined network fails: RuntimeError"),
    "channels in a loop": (lambda: Pooled(lambda x: torch.stack(x.unbind(1)[:4], 1)), "the joined network fails"),
    "noise in training": (lambda: Sometimes(True, F.dropout), "gives other logits"),
    "probabilities in evaluation": (lambda: Sometimes(False, lambda x: x.softmax(1)), "gives other logits"),
    "hidden by zero gamma": (lambda: nn.Sequential(Residual(), plain()), "gives other logits"),
    "GroupNorm": (lambda: nn.Sequential(nn.GroupNorm(1, 1), plain()), "0 is a GroupNorm, which cannot be joined"),
    "LayerNorm": (lambda: nn.Sequential(plain(), nn.LayerNorm(3)), "1 is a LayerNorm, which cannot be joined"),
    "PReLU": (lambda: nn.Sequential(nn.PReLU(), plain()), "0 is a PReLU, which cannot be joined"),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(1, 1, 1), plain()), "0 is a ConvTranspose2d"),
    "a linear layer of one's own": (
        lambda: nn.Sequential(nn.Flatten(), scaled(nn.Linear, 64, 3)),
        "gives other logits",
    ),
    "a convolution of one's own": (
        lambda: nn.Sequential(scaled(nn.Conv2d, 1, 3, 8), nn.Flatten()),
        "cannot be copied and joined",
    ),
    "a shared weight": (tied, "several layers share a parameter"),
    "what cannot be copied": (locked, "cannot be copied and joined: TypeError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_model_that_would_not_be_itself_is_refused_with_the_reason(name: str):
    make, reason = WRONG[name]
    torch.manual_seed(0)
    models = [convert_batchnorm(init_weights_(make()), N) for _ in range(2)]
    with pytest.raises(ValueError, match=reason) as refused:
        try_joined(models, images(2, 1))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_can_be_joined_is_not_refused_and_nothing_of_it_changes(name: str, dtype: torch.dtype):
    models = [model.to(dtype).eval() for model in seeds(RIGHT[name], 2)]
    before = states(models)
    state = torch.get_rng_state()
    try_joined(models, images(2).float())
    assert torch.equal(torch.get_rng_state(), state)
    exact(states(models), before)
    assert not any(module.training for model in models for module in model.modules())
