"""Parameters chosen by their names: what is frozen with them, and rates that keep their ratios."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onehour import ScheduleLR, correct_momentum, gradual_warmup, parameter_groups, step_decay
from onehour.rules.batchnorm import convert_batchnorm, ghost_layers
from onehour.rules.layers import freeze_, frozen_statistics, scale_rates
from onehour.rules.momentum import InsideSGD


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3), nn.BatchNorm1d(3))
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize(
    ("patterns", "frozen", "evaluating"),
    [(["1.*"], 2, [1]), (["1.weight", "*.bias"], 5, [1]), (["*.weight"], 4, []), (["[0-3].*"], 6, [1, 2])],
)
@pytest.mark.parametrize("ghosts", [False, True])
def test_batchnorm_is_frozen_with_all_of_its_parameters(
    patterns: list[str], frozen: int, evaluating: list[int], *, ghosts: bool
):
    model = network()
    if ghosts:
        convert_batchnorm(model, 2)
    freeze_(model, patterns).eval().train()
    for each in (model, copy.deepcopy(model).eval().train()):
        assert sum(not parameter.requires_grad for parameter in each.parameters()) == frozen
        layers: list[nn.Module] = [*each]
        assert [number for number, layer in enumerate(layers) if not layer.training] == evaluating
        assert frozen_statistics(each) == len(evaluating)
        assert len(ghost_layers(each)) == (3 - len(evaluating) if ghosts else 0)


def test_frozen_statistics_normalise_and_do_not_move():
    model = network()
    convert_batchnorm(model, 2)
    x = torch.randn(8, 3, dtype=torch.float64)
    expected = copy.deepcopy(model).eval()[:3](x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze_(model, ["[0-3].*"]).train()
    torch.testing.assert_close(model[:3](x), expected, rtol=0, atol=0)
    model(x)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"4.running_mean", "4.running_var", "4.num_batches_tracked"}


def test_a_model_with_nothing_left_to_train_is_refused():
    with pytest.raises(ValueError, match=r"freeze \* leaves no parameter to train"):
        freeze_(network(), ["*"])


def groups_of(model: nn.Module, lr: float = 0.1) -> list[dict]:
    """Those of weight decay, divided by rates."""
    return scale_rates(parameter_groups(model, weight_decay=0.1), model, {"3.*": 10.0, "[01].bias": 0.5}, lr=lr)


def test_groups_of_weight_decay_are_divided_by_rates():
    model = network()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        ([names[id(p)] for p in group["params"]], group["weight_decay"], group.get("lr"), group.get("lr_scale"))
        for group in groups_of(model)
    ]
    assert found == [
        (["0.weight"], 0.1, None, None),
        (["1.weight", "4.weight", "4.bias"], 0, None, None),
        (["0.bias"], 0.1, 0.05, 0.5),
        (["1.bias"], 0, 0.05, 0.5),
        (["3.weight", "3.bias"], 0.1, 1.0, 10.0),
    ]


def test_a_parameter_that_two_patterns_match_is_refused():
    groups = parameter_groups(model := network(), weight_decay=0.1)
    with pytest.raises(ValueError, match=r"layer_rates '0\.\*' and '\*\.bias' both match 0\.bias"):
        scale_rates(groups, model, {"0.*": 0.1, "*.bias": 0.5}, lr=0.1)


def test_a_rate_for_what_is_frozen_is_refused():
    groups = parameter_groups(model := freeze_(network(), ["0.*"]), weight_decay=0.1)
    with pytest.raises(ValueError, match=r"layer_rates '0\.\*' matches no parameter that trains; near it are"):
        scale_rates(groups, model, {"0.*": 0.1}, lr=0.1)


BATCH = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(8) % 3
SCHEDULE = gradual_warmup(step_decay(0.4, [3]), start_lr=0.1, epochs=2)
FACTORS = {"0.weight": 1, "0.bias": 0.5, "1.weight": 1, "1.bias": 0.5, "3.weight": 10, "3.bias": 10}


def by_hand() -> list[Tensor]:
    """Eq 9 with a rate for each parameter; decay as its group says."""
    model = network().train()
    velocity = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for epoch in range(5):
        model.zero_grad()
        F.cross_entropy(model(BATCH), LABELS).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            decay = 0.1 if name[0] in "03" else 0
            velocity[name] = 0.9 * velocity[name] + p.grad + decay * p.detach()
            p.data -= SCHEDULE(epoch) * FACTORS.get(name, 1) * velocity[name]
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("form", ["outside", "inside", "scheduler"])
def test_rates_keep_their_ratios_through_warmup_drops_and_momentum_correction(form: str):
    model = network().train()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(groups_of(model), lr=0.1, momentum=0.9)
    if form == "inside":
        optimizer = InsideSGD(groups_of(model), lr=0.1, momentum=0.9)
    scheduler = ScheduleLR(optimizer, SCHEDULE, samples=8, minibatch=8) if form == "scheduler" else None
    for epoch in range(5):
        if scheduler is None:
            correct_momentum(optimizer, SCHEDULE(epoch))
        optimizer.zero_grad()
        F.cross_entropy(model(BATCH), LABELS).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    for mine, expected in zip(model.parameters(), by_hand(), strict=True):
        torch.testing.assert_close(mine.detach(), expected, rtol=0, atol=1e-12)
