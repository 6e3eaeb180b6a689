"""Muon against its equations written out in float64, what it leaves to SGD, and a run that is resumed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from onehour.api import train
from onehour.config import Recipe
from onehour.models.resnet import resnet8
from onehour.planner import plan
from onehour.rules.decay import parameter_groups
from onehour.rules.muon import Muon, hidden_weights, muon_groups, orthogonalised
from onehour.training.build import build_optimizer
from onehour.training.console import effects
from onehour.training.record import StoppedError
from onehour.translate import translate

RATE, MOMENTUM, DECAY = 0.1, 0.9, 0.05


def net() -> nn.Module:
    """With one hidden weight, a convolution that is taller than wide as a matrix, in the middle."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Conv2d(2, 9, 2), nn.Flatten(), nn.Linear(36, 3)
    return nn.Sequential(*layers)


def transcribed(weight: Tensor, gradients: list[Tensor], *, nesterov: bool) -> Tensor:
    """Jordan's algorithm, an update a gradient, by G's powers: X ← a·X + b·(X·Xᵀ)·X + c·(X·Xᵀ)²·X."""
    velocity = torch.zeros_like(weight)
    for gradient in gradients:
        velocity = MOMENTUM * velocity + gradient
        move = (gradient + MOMENTUM * velocity if nesterov else velocity).reshape(len(weight), -1)
        x = move / (move.square().sum().sqrt() + 1e-7)
        for _ in range(5):
            cube = x @ x.T @ x
            x = 3.4445 * x - 4.7750 * cube + 2.0315 * (x @ x.T @ cube)
        rows, columns = x.shape
        weight = weight - RATE * DECAY * weight - RATE * max(1, rows / columns) ** 0.5 * x.reshape(weight.shape)
    return weight


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(9, 2, 2, 2), (3, 2, 2, 2), (5, 5), (2, 3, 4)])
def test_updates_of_a_matrix_are_the_equations(shape: tuple[int, ...], nesterov: bool):
    torch.manual_seed(0)
    start, *gradients = (torch.randn(shape, dtype=torch.float64) for _ in range(5))
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=RATE, momentum=MOMENTUM, nesterov=nesterov, weight_decay=DECAY)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    expected = transcribed(start, gradients, nesterov=nesterov)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)
    other = transcribed(start, gradients, nesterov=not nesterov)
    assert (weight.detach() - other).abs().max() > 1e-3


def test_singular_values_come_near_1_whatever_the_size_of_the_gradient():
    torch.manual_seed(0)
    matrix = torch.randn(6, 20)
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.min() > 0.65
    assert values.max() < 1.25
    torch.testing.assert_close(orthogonalised(1000 * matrix), orthogonalised(matrix))
    assert torch.equal(orthogonalised(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_rest_is_torchs_sgd_to_the_bit(nesterov: bool):
    model, twin = net(), net()
    groups = muon_groups(parameter_groups(model, weight_decay=DECAY), model)
    ours = Muon(groups, lr=RATE, momentum=MOMENTUM, nesterov=nesterov)
    theirs = torch.optim.SGD(
        parameter_groups(twin, weight_decay=DECAY), lr=RATE, momentum=MOMENTUM, nesterov=nesterov, foreach=False
    )
    for _ in range(3):
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            mine.grad = other.grad = torch.randn_like(mine)
        ours.step()
        theirs.step()
    hidden = {id(weight) for weight in hidden_weights(model)}
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other) == (id(mine) not in hidden)


def test_first_and_last_weights_vectors_and_frozen_ones_are_not_orthogonalised():
    model = resnet8()
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = [names[id(weight)] for weight in hidden_weights(model)]
    assert hidden[0] == "layer1.0.conv1.weight"
    assert len(hidden) == 8
    assert not {"conv1.weight", "fc.weight"} & set(hidden)
    model.layer1.requires_grad_(False)
    assert len(hidden_weights(model)) == 6


def test_what_cannot_be_orthogonalised_is_refused():
    with pytest.raises(ValueError, match="give vectors in a group with orthogonal=False"):
        Muon([torch.zeros(3, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match="give vectors in a group with orthogonal=False"):
        Muon([torch.zeros(3, 3, requires_grad=True)], lr=0.1).add_param_group({"params": [torch.zeros(3)]})
    with pytest.raises(ValueError, match="between a network's first layer and its last, and Sequential has none"):
        build_optimizer(Recipe(optimizer="muon"), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_a_closure_computes_the_gradients_and_gives_the_loss():
    weight = nn.Parameter(torch.eye(2))
    optimizer = Muon([weight], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2
    assert float(weight.detach().square().sum()) < 2


def recipe(**changes: object) -> Recipe:
    common = {"minibatch": 8, "per_worker": 4, "base_minibatch": 8, "epochs": 2, "warmup_epochs": 1, "seed": 1}
    return Recipe(name="muon", data="tinytask:data", optimizer="muon", **(common | changes))  # type: ignore[arg-type]


def test_a_run_repeats_its_bits_and_goes_on_where_it_was_stopped(tmp_path: Path):
    whole, again = (train(recipe(), out=tmp_path / name, model=net) for name in ("whole", "again"))
    assert again.summary["state_sha256"] == whole.summary["state_sha256"]
    calls: list[int] = []
    with pytest.raises(StoppedError):
        train(recipe(), out=tmp_path / "run", model=net, stop_asked=lambda: calls.append(1) or len(calls) == 8)
    assert train(recipe(), out=tmp_path / "run", model=net).summary["state_sha256"] == whole.summary["state_sha256"]
    assert "1 of 8 tensors orthogonalised, the rest by SGD" in effects(recipe(), net())


def test_a_plan_says_what_stays_and_a_translation_is_refused():
    assert "whatever kn" in plan(recipe(minibatch=16, scaling="fixed"))["orthogonal"].rule
    with pytest.raises(ValueError, match="optimizer muon is not translated"):
        translate(plan(recipe(samples=64, classes=3)), "torch")
