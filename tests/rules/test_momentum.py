"""Remark 2 (§3, eq 9-10): momentum when the rate changes, and which optimizers need the correction."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import exact
from forms import FormB
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from onehour.rules.momentum import correct_momentum, momentum_form, velocity_keys
from onehour.rules.schedule import gradual_warmup, step_decay

M = 0.9


def rates() -> list[float]:
    """A warmup at every iteration and two drops, where form B errs most: 40 iterations, 4 an epoch."""
    schedule = gradual_warmup(step_decay(0.4, [5, 8]), start_lr=0.1, epochs=3)
    return [schedule(iteration / 4) for iteration in range(40)]


class RmspropTF(FormB):
    """RMSprop of TensorFlow: the rate is inside the momentum, the mean square beside it holds none."""

    def follow(self, parameter: Tensor, group: dict[str, Any], direction: Tensor) -> None:
        square = self.state[parameter].setdefault("square", torch.zeros_like(parameter))
        square.mul_(0.99).addcmul_(direction, direction, value=0.01)
        super().follow(parameter, group, direction / square.sqrt().add(1e-8))


class Wrapper(Optimizer):
    """As Accelerate's: an Optimizer that forwards its attributes to the one inside."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]
    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


def weight(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([1.0, -2.0, 3.0], dtype=dtype, requires_grad=True)


def gradient(w: Tensor) -> Tensor:
    """∇ of Σ a·w²/2 with curvatures that the rates above keep stable."""
    return w * torch.tensor([0.1, 0.3, 0.5], dtype=w.dtype)


def set_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def trajectory(make: Callable[[list[Tensor]], Optimizer], set_lr: Any, schedule: list[float]) -> Tensor:
    """The weights after every iteration of an optimizer whose rate is set by `set_lr`."""
    w = weight()
    optimizer, weights = make([w]), []
    for lr in schedule:
        set_lr(optimizer, lr)
        w.grad = gradient(w.detach())
        optimizer.step()
        weights.append(w.detach().clone())
    return torch.stack(weights)


def step_outside(
    weight: Tensor, velocity: Tensor, gradient: Tensor, *, lr: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """Form A (eq 9): u' = m·u + g; w' = w − η·u'."""
    velocity = momentum * velocity + gradient
    return weight - lr * velocity, velocity


def step_inside(
    weight: Tensor,
    velocity: Tensor,
    gradient: Tensor,
    *,
    lr: float,
    momentum: float,
    previous_lr: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Form B with the correction (eq 10): v' = m·(η_{t+1}/η_t)·v + η_{t+1}·g; w' = w − v'; without η_t none."""
    factor = momentum if previous_lr is None else momentum * lr / previous_lr
    velocity = factor * velocity + lr * gradient
    return weight - velocity, velocity


def stepped(step: Callable[..., tuple[Tensor, Tensor]], schedule: list[float], *, correct: bool = False) -> Tensor:
    """The weights after every iteration of a pure step; `correct` tells it the rate before."""
    w, velocity, weights = weight().detach(), torch.zeros(3, dtype=torch.float64), []
    for before, lr in itertools.pairwise([schedule[0], *schedule]):
        told = {"previous_lr": before} if correct else {}
        w, velocity = step(w, velocity, gradient(w), lr=lr, momentum=M, **told)
        weights.append(w)
    return torch.stack(weights)


def sgd(schedule: list[float]) -> Tensor:
    """The oracle: torch's SGD, its rate set and nothing else."""
    return trajectory(lambda w: torch.optim.SGD(w, lr=1.0, momentum=M), set_rate, schedule)


def differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 0.05)


def test_both_forms_are_their_equations():
    w, v, g = (torch.tensor(x, dtype=torch.float64) for x in (1.0, 0.5, 0.25))
    outside = step_outside(w, v, g, lr=0.2, momentum=0.9)
    inside = step_inside(w, v, g, lr=0.2, momentum=0.9, previous_lr=0.1)
    uncorrected = step_inside(w, v, g, lr=0.2, momentum=0.9)
    exact(torch.stack(outside), torch.tensor([1 - 0.2 * 0.7, 0.7], dtype=torch.float64))
    exact(torch.stack(inside), torch.tensor([1 - 0.95, 0.9 * 2 * 0.5 + 0.2 * 0.25], dtype=torch.float64))
    exact(torch.stack(uncorrected), torch.tensor([1 - 0.5, 0.9 * 0.5 + 0.2 * 0.25], dtype=torch.float64))


def test_form_b_with_the_correction_is_torchs_sgd_and_without_it_is_not():
    exact(stepped(step_inside, rates(), correct=True), sgd(rates()))
    assert differ(stepped(step_inside, rates()), sgd(rates()))


def test_correct_momentum_makes_a_form_b_optimizer_follow_torchs_sgd():
    exact(trajectory(lambda w: FormB(w, lr=1.0), correct_momentum, rates()), sgd(rates()))
    exact(trajectory(lambda w: Wrapper(FormB(w, lr=1.0)), correct_momentum, rates()), sgd(rates()))
    assert differ(trajectory(lambda w: FormB(w, lr=1.0), set_rate, rates()), sgd(rates()))


def test_correct_momentum_scales_the_momentum_of_rmsprop_but_not_its_mean_square():
    right = trajectory(lambda w: torch.optim.RMSprop(w, lr=1.0, momentum=M), set_rate, rates())
    exact(trajectory(lambda w: RmspropTF(w, lr=1.0), correct_momentum, rates()), right)
    assert differ(trajectory(lambda w: RmspropTF(w, lr=1.0), set_rate, rates()), right)


def test_correct_momentum_leaves_torchs_sgd_alone():
    corrected = trajectory(lambda w: torch.optim.SGD(w, lr=1.0, momentum=M), correct_momentum, rates())
    assert torch.equal(corrected, sgd(rates()))


def test_correcting_torchs_sgd_is_wrong():
    """The bug of Remark 2's readers: form A's velocity holds no rate, so scaling it errs."""

    def scale(optimizer: Optimizer, lr: float) -> None:
        for state in optimizer.state.values():
            state["momentum_buffer"].mul_(lr / optimizer.param_groups[0]["lr"])
        set_rate(optimizer, lr)

    assert differ(trajectory(lambda w: torch.optim.SGD(w, lr=0.1, momentum=M), scale, rates()), sgd(rates()))


OUTSIDE = {
    "SGD": lambda w: torch.optim.SGD(w, lr=0.1, momentum=M),
    "SGD momentum 0": lambda w: torch.optim.SGD(w, lr=0.1),
    "SGD small momentum": lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.1),
    "SGD nesterov": lambda w: torch.optim.SGD(w, lr=0.1, momentum=M, nesterov=True),
    "SGD dampening": lambda w: torch.optim.SGD(w, lr=0.1, momentum=M, dampening=0.5),
    "SGD weight decay": lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.1, weight_decay=10.0),
    "SGD foreach": lambda w: torch.optim.SGD(w, lr=0.1, momentum=M, foreach=True),
    "SGD fused": lambda w: torch.optim.SGD(w, lr=0.1, momentum=M, fused=True),
    "SGD tensor lr": lambda w: torch.optim.SGD(w, lr=torch.tensor(0.1), momentum=M),
    "Adam": lambda w: torch.optim.Adam(w, lr=0.1),
    "AdamW": lambda w: torch.optim.AdamW(w, lr=0.1, weight_decay=0.5),
    "RMSprop": lambda w: torch.optim.RMSprop(w, lr=0.1),
    "RMSprop momentum": lambda w: torch.optim.RMSprop(w, lr=0.1, momentum=M),
    "Adagrad": lambda w: torch.optim.Adagrad(w, lr=0.1),
    "FormB momentum 0": lambda w: FormB(w, lr=0.1, momentum=0.0),
    "wrapped SGD": lambda w: Wrapper(torch.optim.SGD(w, lr=0.1, momentum=M)),
}
INSIDE = {
    "FormB": (lambda w: FormB(w, lr=0.1), {"velocity"}),
    "FormB small momentum": (lambda w: FormB(w, lr=0.1, momentum=0.1), {"velocity"}),
    "FormB weight decay": (lambda w: FormB(w, lr=0.1, momentum=0.1, weight_decay=10.0), {"velocity"}),
    "FormB tensor lr": (lambda w: FormB(w, lr=torch.tensor(0.1)), {"velocity"}),  # type: ignore[arg-type]
    "FormB rate 0": (lambda w: FormB(w, lr=0.0), {"velocity"}),
    "RmspropTF": (lambda w: RmspropTF(w, lr=0.1), {"velocity"}),
    "wrapped twice": (lambda w: Wrapper(Wrapper(FormB(w, lr=0.1))), {"velocity"}),
}
FORMS = [OUTSIDE["SGD"], INSIDE["FormB"][0]]


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_rate_of_torchs_optimizers_is_outside(name):
    assert momentum_form(OUTSIDE[name]([weight(torch.float32)])) == "outside"


@pytest.mark.parametrize("name", INSIDE)
def test_the_rate_of_form_b_optimizers_is_inside_their_velocity(name):
    make, keys = INSIDE[name]
    assert momentum_form(make([weight(torch.float32)])) == "inside"
    assert velocity_keys(make([weight(torch.float32)])) == keys


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_form_of_sgd_does_not_depend_on_its_momentum_or_precision(momentum, dtype, nesterov):
    optimizer = torch.optim.SGD([weight(dtype)], lr=0.1, momentum=momentum, nesterov=nesterov)
    assert momentum_form(optimizer) == "outside"
    assert momentum_form(FormB([weight(dtype)], lr=0.1, momentum=momentum)) == "inside"


@pytest.mark.parametrize("other", [{"params": []}, {"params": [weight()], "momentum": 0.0}], ids=["empty", "0"])
def test_a_group_without_parameters_or_momentum_does_not_hide_the_form_of_another(other):
    for make, form in ((torch.optim.SGD, "outside"), (FormB, "inside")):
        assert momentum_form(make([dict(other), {"params": [weight()]}], lr=0.1, momentum=M)) == form


def test_probing_fires_no_hook_of_this_optimizer_or_of_all():
    """A watcher of every optimizer in the process would count the probe's steps as the user's."""
    optimizer, fired = FormB([weight()], lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: fired.append("before"))
    optimizer.register_step_post_hook(lambda *_: fired.append("after"))
    handle = register_optimizer_step_post_hook(lambda *_: fired.append("any"))
    momentum_form(optimizer)
    handle.remove()
    assert fired == []


@pytest.mark.parametrize("make", FORMS)
def test_probing_is_not_seen_by_an_attached_scheduler(make):
    """A scheduler patches `step` of its optimizer, and warns if it is never called."""
    w = weight()
    optimizer = make([w])
    form = momentum_form(optimizer)
    scheduler = StepLR(optimizer, step_size=1)
    assert momentum_form(optimizer) == form
    assert torch.equal(w.detach(), weight().detach())
    assert not getattr(optimizer, "_opt_called", False)
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()


@pytest.mark.parametrize("make", FORMS)
@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf, "0.1"])
def test_a_rate_that_is_no_number_of_at_least_zero_is_refused_and_nothing_set(make, lr):
    optimizer = make([weight()])
    with pytest.raises(ValueError, match="lr must be"):
        correct_momentum(optimizer, lr)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_velocity_made_at_rate_0_cannot_be_scaled():
    w = weight()
    optimizer = FormB([w], lr=0.1)
    correct_momentum(optimizer, 0.0)  # no velocity yet, so nothing is lost
    w.grad = gradient(w.detach())
    optimizer.step()
    with pytest.raises(ValueError, match=r"made at rate 0.*start the schedule above zero"):
        correct_momentum(optimizer, 0.1)


def test_each_groups_velocity_is_scaled_from_its_own_rate():
    a, b = weight(), weight()
    optimizer = FormB([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.4}], lr=1.0)
    a.grad, b.grad = gradient(a.detach()), gradient(b.detach())
    optimizer.step()
    correct_momentum(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2]
    exact(optimizer.state[a]["velocity"], 0.2 * gradient(weight().detach()))
    exact(optimizer.state[b]["velocity"], 0.2 * gradient(weight().detach()))


def test_momentum_that_is_switched_on_later_is_corrected_from_then_on():
    """What was probed is remembered for the settings that it was probed with, and no others."""
    w = weight()
    optimizer = FormB([w], lr=0.1, momentum=0.0)
    correct_momentum(optimizer, 0.1)
    optimizer.param_groups[0]["momentum"] = M
    w.grad = gradient(w.detach())
    optimizer.step()
    velocity = optimizer.state[w]["velocity"].clone()
    correct_momentum(optimizer, 0.3)
    exact(optimizer.state[w]["velocity"], 3 * velocity)


def test_a_rate_kept_in_a_tensor_stays_in_that_tensor():
    """A compiled step reads the rate from that tensor, as torch's own schedulers know."""
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD([weight()], lr=rate, momentum=M)
    correct_momentum(optimizer, 0.2)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.2)
