"""§5.1: He fan-out, a small classifier, and blocks that start as the identity."""

import math

import pytest
import torch
from torch import nn

from onehour.models.resnet import BasicBlock, Bottleneck, ResNet, resnet8
from onehour.rules.initialize import init_weights_, initialize, last_batchnorms


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def near(weight: torch.Tensor, std: float) -> bool:
    """Whether mean and deviation lie within 5 standard errors: std/√M and std/√(2M) for M weights."""
    count = weight.numel()
    mean_fits = abs(weight.mean().item()) < 5 * std / math.sqrt(count)
    return mean_fits and abs(weight.std().item() - std) < 5 * std / math.sqrt(2 * count)


@pytest.mark.parametrize(
    ("conv", "fan_out", "fan_in"),
    [
        (nn.Conv2d(64, 128, 3), 128 * 9, 64 * 9),
        (nn.Conv2d(3, 64, 7, stride=2), 64 * 49, 3 * 49),
        (nn.Conv2d(256, 64, 1), 64, 256),
        (nn.Conv1d(32, 64, 5), 64 * 5, 32 * 5),
        (nn.Conv3d(8, 16, 3), 16 * 27, 8 * 27),
    ],
    ids=str,
)
def test_convolutions_are_he_normal_by_what_goes_out(conv, fan_out, fan_in):
    init_weights_(conv.double(), generator=generator())
    weight = conv.weight.detach()
    assert near(weight, math.sqrt(2 / fan_out))
    assert not near(weight, math.sqrt(2 / fan_in))
    # A normal has 4.55 % beyond two deviations, a uniform none.
    beyond = (weight.abs() > 2 * math.sqrt(2 / fan_out)).double().mean().item()
    assert abs(beyond - 0.0455) < 5 * math.sqrt(0.0455 * 0.9545 / weight.numel())
    assert not conv.bias.any()


def test_linear_layers_have_deviation_a_hundredth_and_no_bias():
    layer = nn.Linear(512, 100).double()
    init_weights_(layer, generator=generator())
    assert near(layer.weight.detach(), 0.01)
    assert torch.equal(layer.bias, torch.zeros(100, dtype=torch.float64))


NETWORKS = {
    "resnet8": resnet8,
    "basic": lambda: ResNet(BasicBlock, (2, 1, 1, 1), classes=2),
    "bottleneck": lambda: ResNet(Bottleneck, (2, 1, 1, 1), classes=2),
}
LAST = {
    "resnet8": {f"layer{stage}.0.bn2" for stage in (1, 2, 3)},
    "basic": {"layer1.0.bn2", "layer1.1.bn2", "layer2.0.bn2", "layer3.0.bn2", "layer4.0.bn2"},
    "bottleneck": {"layer1.0.bn3", "layer1.1.bn3", "layer2.0.bn3", "layer3.0.bn3", "layer4.0.bn3"},
}


@pytest.fixture(params=NETWORKS)
def network(request) -> tuple[nn.Module, set[str]]:
    model = NETWORKS[request.param]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that what init_weights_ leaves alone shows
            nn.init.constant_(module.weight, 7.0)
            nn.init.constant_(module.bias, 7.0)
    return model, LAST[request.param]


def gammas(model: nn.Module) -> dict[str, set[float]]:
    return {n: set(m.weight.tolist()) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def test_gamma_is_zero_in_the_last_batchnorm_of_each_block_and_one_elsewhere(network):
    model, last = network
    init_weights_(model)
    assert {name for name, values in gammas(model).items() if values == {0.0}} == last
    assert all(values == {1.0} for name, values in gammas(model).items() if name not in last)
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_without_zero_gamma_every_gamma_is_one(network):
    model, last = network
    assert last <= set(gammas(model))
    init_weights_(model, zero_gamma=False)
    assert all(values == {1.0} for values in gammas(model).values())


def test_last_batchnorms_are_found_by_name(network):
    model, last = network
    found = last_batchnorms(model)
    assert set(found) == last
    assert all(module is model.get_submodule(name) for name, module in found.items())


@pytest.mark.parametrize("block", [lambda: BasicBlock(8, 8, stride=1), lambda: Bottleneck(8, 2, stride=1)])
@pytest.mark.parametrize("training", [True, False])
def test_a_block_starts_as_the_identity(block, training):
    """Of what a ReLU lets through, exactly: its branch is multiplied by zero."""
    x = torch.rand(4, 8, 5, 5, generator=generator())
    assert torch.equal(init_weights_(block().train(training), generator=generator())(x), x)
    usual = init_weights_(block().train(training), zero_gamma=False, generator=generator())
    assert not torch.allclose(usual(x), x, atol=0.1)


def test_a_block_with_a_shortcut_of_its_own_starts_as_that_shortcut():
    block = BasicBlock(4, 8, stride=2).eval()
    init_weights_(block, generator=generator())
    x = torch.rand(4, 4, 6, 6, generator=generator())
    assert block.downsample is not None
    assert torch.equal(block(x), block.downsample(x).relu())


class OwnBlock(nn.Module):
    """A block of someone else's: `shortcut` by name, its BatchNorm registered last."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), norm)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def test_a_shortcuts_own_batchnorm_is_never_the_last_of_its_block():
    assert list(last_batchnorms(OwnBlock(nn.BatchNorm2d(4)))) == ["branch.3"]
    assert list(last_batchnorms(nn.Sequential(OwnBlock(nn.BatchNorm2d(4))))) == ["0.branch.3"]


class PreActivation(nn.Module):
    """A block whose last convolution comes after its last BatchNorm, as such or in a module of its own."""

    def __init__(self, *, wrapped: bool) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.bn2, conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Sequential(conv2) if wrapped else conv2
        self.shortcut = nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_branch_that_goes_on_after_its_last_batchnorm_still_learns(wrapped):
    block = init_weights_(PreActivation(wrapped=wrapped), generator=generator())
    assert last_batchnorms(block) == {}
    block(torch.randn(2, 4, 5, 5, generator=generator())).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in block.named_parameters() if "weight" in name)


def test_a_gate_behind_the_last_batchnorm_is_no_layer_of_the_branch():
    block = OwnBlock(nn.BatchNorm2d(4))
    block.squeeze = nn.Sequential(nn.Conv2d(4, 1, 1), nn.ReLU(), nn.Conv2d(1, 4, 1), nn.Sigmoid())
    block.eca = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Sigmoid())
    assert list(last_batchnorms(block)) == ["branch.3"]


@pytest.mark.parametrize(
    ("shortcut", "residual"),
    [
        (None, True),
        (nn.Sequential(), True),
        (nn.Identity(), True),
        pytest.param(torch.relu, True, id="a function"),
        (nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 4, 1)), True),
        (nn.MaxPool2d(2), False),
        (nn.Sequential(nn.AvgPool2d(2)), False),
        (True, False),
    ],
    ids=str,
)
def test_a_block_that_only_pools_under_a_shortcuts_name_is_no_residual_one(shortcut, residual):
    block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    block.downsample = shortcut
    assert list(last_batchnorms(block)) == ["1"] * residual


def test_a_batchnorm_without_gamma_is_passed_over_but_a_convolution_is_not():
    assert last_batchnorms(OwnBlock(nn.BatchNorm2d(4, affine=False))) == {}
    block = OwnBlock(nn.BatchNorm2d(4))
    block.branch.append(nn.BatchNorm2d(4, affine=False))
    assert list(last_batchnorms(block)) == ["branch.3"]


def test_a_batchnorm_without_beta_is_initialised_too():
    try:
        layer = nn.BatchNorm2d(4, bias=False)
    except TypeError:
        pytest.skip("this torch has no BatchNorm without bias")
    nn.init.constant_(layer.weight, 7.0)
    init_weights_(layer)
    assert set(layer.weight.tolist()) == {1.0}


def test_a_model_without_blocks_has_no_last_batchnorm():
    assert last_batchnorms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))) == {}


def test_a_generator_decides_all_weights_and_torchs_own_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one, same = (init_weights_(resnet8(), generator=generator()).state_dict() for _ in range(2))
    torch.manual_seed(0)
    model = resnet8()
    torch.manual_seed(0)
    init_weights_(model, generator=generator(1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["conv1.weight"], model.conv1.weight)


def test_without_a_generator_torchs_own_seed_decides():
    states = []
    for _ in range(2):
        model = resnet8()
        torch.manual_seed(3)
        states.append(init_weights_(model).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_model_itself_is_returned_with_its_parameters_kept():
    model = resnet8()
    before = [id(parameter) for parameter in model.parameters()]
    assert init_weights_(model) is model
    assert [id(parameter) for parameter in model.parameters()] == before


@pytest.mark.parametrize("zero_gamma", [True, False])
def test_the_old_name_warns_with_the_new_one_and_does_the_same(zero_gamma):
    with pytest.warns(DeprecationWarning, match="write init_weights_") as caught:
        old = initialize(resnet8(), zero_gamma=zero_gamma, generator=generator())
    assert [warning.filename for warning in caught] == [__file__]
    new = init_weights_(resnet8(), zero_gamma=zero_gamma, generator=generator())
    assert all(torch.equal(old.state_dict()[name], value) for name, value in new.state_dict().items())
