"""Remark 1 (§3, eq 8) and §5.1: weight decay belongs to the optimizer, and not to normalisation's γ and β."""

from typing import Any

import pytest
import torch
from exactness import exact
from torch import Tensor, nn

from onehour.rules.batchnorm import GhostBatchNorm2d
from onehour.rules.decay import parameter_groups

LR, DECAY, K = 0.1, 0.01, 8


def split(model: nn.Module, **options: Any) -> tuple[set[str], set[str]]:
    """Names of the decayed and of the kept parameters."""
    groups = parameter_groups(model, weight_decay=DECAY, **options)
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=True)}
    decayed, kept = (
        [names[id(p)] for group in groups if group["weight_decay"] == decay for p in group["params"]]
        for decay in (DECAY, 0.0)
    )
    assert len(set(decayed)) + len(set(kept)) == sum(len(group["params"]) for group in groups)
    return set(decayed), set(kept)


@pytest.mark.parametrize(
    "layer",
    [
        *[kind(4) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm)],
        *[kind(4, affine=True) for kind in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)],
        *[GhostBatchNorm2d(4, per_worker=2), nn.GroupNorm(2, 4), nn.RMSNorm(4)],
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_gamma_and_beta_of_every_normalisation_are_not_decayed(layer):
    names = {"weight"} if isinstance(layer, nn.RMSNorm) else {"weight", "bias"}
    assert split(layer) == (set(), names)


@pytest.mark.parametrize(
    "layer",
    [*[kind(2, 4, 3) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)], nn.Linear(2, 4)],
    ids=lambda layer: type(layer).__name__,
)
def test_weights_and_biases_of_convolutions_and_linear_layers_are_decayed(layer):
    assert split(layer) == ({"weight", "bias"}, set())


class Misnamed(nn.Module):
    """Names that a search for "bn" or "norm" gets wrong both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.bn_projection = nn.Linear(4, 4)
        self.normalised_scale = nn.Parameter(torch.ones(4))


def test_the_type_of_a_module_decides_and_not_its_name():
    decayed, kept = split(Misnamed())
    assert kept == {"downsample.1.weight", "downsample.1.bias"}
    assert decayed == {"downsample.0.weight", "bn_projection.weight", "bn_projection.bias", "normalised_scale"}
    by_substring = {name for name, _ in Misnamed().named_parameters() if "bn" in name}
    assert by_substring.isdisjoint(kept)


def test_other_types_may_be_kept_from_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.PReLU())
    assert split(model, without=(nn.PReLU,)) == ({"0.weight", "1.weight", "1.bias"}, {"2.weight"})


def test_a_module_that_is_used_twice_has_its_parameters_once():
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    assert split(nn.Sequential(conv, norm, conv, norm)) == ({"0.weight", "0.bias"}, {"1.weight", "1.bias"})


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_parameter_shared_with_a_layer_that_decays_is_decayed_once(norm_first):
    norm, linear = nn.LayerNorm(4), nn.Linear(4, 4)
    linear.bias = norm.bias
    model = nn.Sequential(norm, linear) if norm_first else nn.Sequential(linear, norm)
    groups = parameter_groups(model, weight_decay=DECAY)
    assert [id(p) for group in groups for p in group["params"]].count(id(norm.bias)) == 1
    assert any(p is norm.bias for p in groups[0]["params"])
    assert groups[0]["weight_decay"] == DECAY


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    model[1].requires_grad_(False)
    assert split(model) == ({"0.bias"}, set())
    assert len(parameter_groups(model, weight_decay=DECAY)) == 1  # no empty group


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)], ids=["none", "all frozen"])
def test_a_model_without_a_trainable_parameter_is_refused_by_name(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no trainable parameter"):
        parameter_groups(model, weight_decay=DECAY)


def gradient_of_loss(weight: Tensor, scale: float = 1.0) -> Tensor:
    """(1/n)·Σ∇ε of ε = ½ (x·w)², its loss scaled."""
    data = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return scale * (data @ weight)[:, None].mul(data).mean(0)


def stepped(lr: float, scale: float = 1.0, decay: float = DECAY) -> Tensor:
    """One update of torch's SGD with these parameter groups."""
    layer = nn.Linear(3, 1, bias=False).double()
    nn.init.ones_(layer.weight)
    optimizer = torch.optim.SGD(parameter_groups(layer, weight_decay=decay), lr=lr)
    layer.weight.grad = gradient_of_loss(layer.weight.detach()[0], scale)[None]
    optimizer.step()
    return layer.weight.detach()[0]


def test_an_update_with_these_groups_is_equation_8():
    w = torch.ones(3, dtype=torch.float64)
    exact(stepped(LR), w - LR * DECAY * w - LR * gradient_of_loss(w))


def test_scaling_the_loss_is_not_scaling_the_rate():
    """k times the loss leaves the term in λ behind: the update is ηλ(k − 1)·w short of decay."""
    w = torch.ones(3, dtype=torch.float64)
    exact(stepped(LR, scale=K, decay=0.0), stepped(K * LR, decay=0.0))
    exact(stepped(LR, scale=K) - stepped(K * LR), LR * DECAY * (K - 1) * w)
    assert (stepped(LR, scale=K) - stepped(K * LR)).abs().min() > 1e-3


def test_decaying_gamma_and_beta_too_gives_another_model():
    def trained(groups: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
        optimizer = torch.optim.SGD(groups(model), lr=LR, weight_decay=0.5)
        model(torch.ones(2, 3, dtype=torch.float64) * torch.tensor([[1.0], [2.0]])).square().sum().backward()
        optimizer.step()
        return dict(model.named_parameters())

    right = trained(lambda model: parameter_groups(model, weight_decay=0.5))
    wrong = trained(lambda model: model.parameters())
    exact(right["0.weight"], wrong["0.weight"])
    exact(wrong["1.weight"] - right["1.weight"], torch.full((4,), -LR * 0.5, dtype=torch.float64))
