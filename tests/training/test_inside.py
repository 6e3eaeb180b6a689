"""Form B (eq 10): the rate inside the velocity. Equal to `torch.optim.SGD` where it is corrected, and only there."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onehour.rules.momentum import correct_momentum, momentum_form, set_rate, velocity_inside
from onehour.training.decisions import InsideSGD

RATES = [0.1, 0.1, 0.25, 0.4, 0.04, 0.04, 0.3]
FORMS = pytest.mark.parametrize("nesterov", [True, False])


def groups(weights: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]


def inside(weights: list[Tensor], *, nesterov: bool) -> InsideSGD:
    return InsideSGD(groups(weights), lr=RATES[0], momentum=0.9, nesterov=nesterov)


def outside(weights: list[Tensor], *, nesterov: bool) -> torch.optim.SGD:
    return torch.optim.SGD(groups(weights), lr=RATES[0], momentum=0.9, nesterov=nesterov)


def trajectory(
    make: Callable[..., Any], rates: list[float], change: Callable[[Any, float], None], *, nesterov: bool
) -> list[Tensor]:
    """The weights after each step on a fixed sequence of gradients."""
    draw = torch.Generator().manual_seed(0)
    weights = [torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer, seen = make(weights, nesterov=nesterov), []
    for rate in rates:
        change(optimizer, rate)
        for weight in weights:
            weight.grad = torch.randn(3, generator=draw, dtype=torch.float64)
        optimizer.step()
        seen.append(torch.cat([weight.detach().clone() for weight in weights]))
    return seen


def only_set(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def exact(actual: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@FORMS
def test_at_a_constant_rate_it_is_torchs(nesterov: bool):
    found, expected = (trajectory(make, [0.1] * 9, only_set, nesterov=nesterov) for make in (inside, outside))
    exact(found, expected)


@FORMS
@pytest.mark.parametrize("change", [correct_momentum, lambda o, rate: set_rate(o, rate, {"momentum_buffer"})])
def test_corrected_at_every_change_of_the_rate_it_is_torchs(change: Callable[[Any, float], None], nesterov: bool):
    found = trajectory(inside, RATES, change, nesterov=nesterov)
    exact(found, trajectory(outside, RATES, only_set, nesterov=nesterov))


@FORMS
def test_uncorrected_the_velocity_keeps_the_old_rates_share(nesterov: bool):
    found = trajectory(inside, RATES, only_set, nesterov=nesterov)
    expected = trajectory(outside, RATES, only_set, nesterov=nesterov)
    exact(found[:2], expected[:2])
    assert (found[2] - expected[2]).abs().max() > 1e-2
    # w' = w − v' without a gradient: v' = m·v, whatever the rate has become (form A would move by m·v·η'/η).
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = InsideSGD([weight], lr=0.5, momentum=0.9, nesterov=nesterov)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before, velocity = weight.item(), 0.5
    only_set(optimizer, 5.0)
    weight.grad.zero_()
    optimizer.step()
    assert weight.item() - before == pytest.approx(-(0.9 * velocity) * (0.9 if nesterov else 1), abs=1e-12)


@FORMS
@pytest.mark.parametrize("steps", [0, 1])
def test_the_probe_says_form_b_before_and_after_a_step(nesterov: bool, steps: int):
    weight = torch.ones(3, requires_grad=True)
    optimizer = InsideSGD([weight], lr=0.1, momentum=0.9, nesterov=nesterov)
    weight.grad = torch.ones(3)
    for _ in range(steps):
        optimizer.step()
    state = {key: value.clone() for key, value in optimizer.state[weight].items()}
    assert momentum_form(optimizer) == "inside"
    assert velocity_inside(optimizer) == {"momentum_buffer"}
    assert {key: value.tolist() for key, value in optimizer.state[weight].items()} == {
        key: value.tolist() for key, value in state.items()
    }


def test_a_weight_without_a_gradient_stays_and_its_velocity_with_it():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = InsideSGD(weights, lr=0.1, momentum=0.9)
    for weight in weights:
        weight.grad = torch.ones(2)
    optimizer.step()
    weights[1].grad = None
    before, velocity = weights[1].detach().clone(), optimizer.state[weights[1]]["momentum_buffer"].clone()
    optimizer.step()
    assert torch.equal(weights[1].detach(), before)
    assert torch.equal(optimizer.state[weights[1]]["momentum_buffer"], velocity)
    assert (weights[0] < before).all()


def test_its_state_can_be_saved_and_loaded():
    def step(optimizer: InsideSGD, weight: Tensor, gradient: float) -> None:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()

    weight = nn.Parameter(torch.ones(2))
    optimizer = InsideSGD([weight], lr=0.1, momentum=0.9)
    step(optimizer, weight, 1.0)
    twin = nn.Parameter(weight.detach().clone())
    other = InsideSGD([twin], lr=0.1, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((optimizer, weight), (other, twin)):
        step(one, its, 0.5)
    assert torch.equal(weight, twin)
