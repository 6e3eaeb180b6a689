"""§2.2: the schedule inside torch's LRScheduler protocol, set at every iteration."""

import copy
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from forms import FormB
from torch import Tensor
from torch.optim import Optimizer

from onehour.rules.layers import scale_rates
from onehour.rules.minibatch import Minibatch
from onehour.rules.momentum import correct_momentum
from onehour.rules.schedule import gradual_warmup, step_decay
from onehour.rules.scheduler import ScheduleLR

SAMPLES, KN = 1000, 96
SCHEDULE = gradual_warmup(step_decay(0.4, ["7/2", 5]), start_lr=0.1, epochs=2)
ITERATIONS = 63  # six epochs of 10.4 iterations: a warmup, a plateau and two drops


def sgd(parameters: list[Tensor], lr: Any = 1.0) -> Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def form_b(parameters: list[Tensor], lr: Any = 1.0) -> Optimizer:
    return FormB(parameters, lr=lr)


def weight() -> Tensor:
    return torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)


def schedule_lr(optimizer: Optimizer, schedule: Any = SCHEDULE) -> ScheduleLR:
    return ScheduleLR(optimizer, schedule, samples=SAMPLES, minibatch=KN)


def step(w: Tensor, optimizer: Optimizer) -> None:
    w.grad = w.detach() * torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64)
    optimizer.step()


def train(w: Tensor, optimizer: Optimizer, scheduler: ScheduleLR, iterations: int) -> list[Tensor]:
    weights = []
    for _ in range(iterations):
        step(w, optimizer)
        scheduler.step()
        weights.append(w.detach().clone())
    return weights


def oracle() -> Tensor:
    """torch's SGD whose rate is set by hand before each iteration."""
    w, weights = weight(), []
    optimizer = sgd([w])
    for iteration in range(ITERATIONS):
        optimizer.param_groups[0]["lr"] = SCHEDULE(iteration * KN / SAMPLES)
        step(w, optimizer)
        weights.append(w.detach().clone())
    return torch.stack(weights)


@pytest.mark.parametrize("minibatch", [KN, Minibatch(per_worker=32, workers=3)])
def test_the_rate_of_every_iteration_is_the_schedules_to_the_bit(minibatch):
    optimizer = torch.optim.SGD([weight()], lr=1.0)
    scheduler = ScheduleLR(optimizer, SCHEDULE, samples=SAMPLES, minibatch=minibatch)
    rates = []
    for _ in range(ITERATIONS):
        rates.append(optimizer.param_groups[0]["lr"])
        assert scheduler.get_last_lr() == [rates[-1]]
        optimizer.step()
        scheduler.step()
    assert rates == [SCHEDULE(iteration * KN / SAMPLES) for iteration in range(ITERATIONS)]
    assert len(set(rates)) == 21 + 3  # one for each iteration of the warmup, then three


@pytest.mark.parametrize("make", [sgd, form_b])
def test_an_optimizer_of_either_form_follows_torchs_sgd(make):
    w = weight()
    optimizer = make([w])
    weights = torch.stack(train(w, optimizer, schedule_lr(optimizer), ITERATIONS))
    torch.testing.assert_close(weights, oracle(), rtol=0, atol=1e-12)


def test_a_scheduler_of_torch_that_does_not_correct_makes_form_b_err():
    w = weight()
    optimizer = form_b([w])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: SCHEDULE(t * KN / SAMPLES))
    weights = torch.stack(train(w, optimizer, scheduler, ITERATIONS))  # type: ignore[arg-type]
    assert (weights - oracle()).abs().max() > 0.05


@pytest.mark.parametrize("make", [sgd, form_b])
@pytest.mark.parametrize("stop", [1, 20, 21, 37, 38])  # in the warmup, at its end, around the first drop
@pytest.mark.parametrize("order", ["made, optimizer, state", "optimizer, made, state", "made, state, optimizer"])
def test_a_resumed_run_continues_as_if_it_had_not_stopped(make, stop, order):
    whole = weight()
    optimizer = make([whole])
    expected = train(whole, optimizer, schedule_lr(optimizer), ITERATIONS)[-1]

    first = weight()
    optimizer = make([first])
    scheduler = schedule_lr(optimizer)
    train(first, optimizer, scheduler, stop)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)

    second = first.detach().clone().requires_grad_()
    optimizer = make([second])
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    scheduler: Any = None
    for part in order.split(", "):
        if part == "made":
            scheduler = schedule_lr(optimizer)
        elif part == "optimizer":
            optimizer.load_state_dict(saved["optimizer"])
        else:
            scheduler.load_state_dict(saved["scheduler"])
    rate = SCHEDULE(stop * KN / SAMPLES)
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]] == [rate]
    found = train(second, optimizer, scheduler, ITERATIONS - stop)[-1]
    # A velocity that went to the first iteration's rate and back is rounded twice.
    exact = make is sgd or not order.startswith("optimizer")
    torch.testing.assert_close(found, expected, rtol=0 if exact else 1e-12, atol=0)


def test_the_state_is_plain_data_without_the_schedule():
    optimizer = sgd([weight()])
    scheduler = schedule_lr(optimizer)
    train(optimizer.param_groups[0]["params"][0], optimizer, scheduler, 3)
    state = scheduler.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert state["last_epoch"] == 3


@pytest.mark.parametrize("make", [sgd, form_b])
def test_a_rate_kept_in_a_tensor_stays_in_that_tensor(make):
    w, rate = weight(), torch.tensor(1.0, dtype=torch.float64)
    optimizer = make([w], lr=rate)
    weights = torch.stack(train(w, optimizer, schedule_lr(optimizer), ITERATIONS))
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == SCHEDULE(ITERATIONS * KN / SAMPLES)
    torch.testing.assert_close(weights, oracle(), rtol=0, atol=1e-12)


def groups_of(*rates: Any) -> Any:
    return [{"params": [weight()], "lr": rate} for rate in rates]


@pytest.mark.parametrize("kept", [float, lambda rate: torch.tensor(rate, dtype=torch.float64)], ids=["float", "tensor"])
def test_groups_with_rates_of_their_own_keep_their_ratios(kept):
    """As LambdaLR's do where its lambda is schedule / η_0."""
    optimizer, torchs = (torch.optim.SGD(groups_of(*map(kept, (0.5, 0.125, 2.0, 0.0)))) for _ in range(2))
    scheduler = schedule_lr(optimizer)
    oracle = torch.optim.lr_scheduler.LambdaLR(torchs, lambda t: SCHEDULE(t * KN / SAMPLES) / 0.5)
    for iteration in range(ITERATIONS):
        rate = SCHEDULE(iteration * KN / SAMPLES)
        assert scheduler.get_last_lr() == oracle.get_last_lr() == [rate, rate / 4, rate * 4, 0]  # by powers of two
        for each in (optimizer, scheduler, torchs, oracle):
            each.step()


@pytest.mark.parametrize("make", [sgd, form_b])
def test_each_group_follows_torchs_sgd_at_its_own_rate(make):
    """Each group's velocity is corrected by its own rates, and one at rate 0 is left alone."""
    apart = []
    for rate in (0.5, 0.125):
        w = weight()
        optimizer = sgd([w])
        for iteration in range(ITERATIONS):
            optimizer.param_groups[0]["lr"] = SCHEDULE(iteration * KN / SAMPLES) * rate / 0.5
            step(w, optimizer)
        apart.append(w.detach())
    groups = groups_of(0.5, 0.125, 0.0)
    first, second, still = (group["params"][0] for group in groups)
    optimizer = make(groups)
    scheduler = schedule_lr(optimizer)
    for _ in range(ITERATIONS):
        for w in (second, still):
            w.grad = w.detach() * torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64)
        train(first, optimizer, scheduler, 1)
    torch.testing.assert_close([first.detach(), second.detach()], apart, rtol=0, atol=1e-12)
    assert torch.equal(still, weight())


def test_a_group_that_is_added_later_keeps_the_ratio_of_the_rate_that_it_comes_with():
    optimizer = sgd([weight()], lr=0.5)
    scheduler = schedule_lr(optimizer)
    train(weight(), optimizer, scheduler, 40)
    optimizer.add_param_group({"params": [weight()]})
    optimizer.add_param_group({"params": [weight()], "lr": 0.125})
    train(weight(), optimizer, scheduler, 1)
    rate = SCHEDULE(41 * KN / SAMPLES)
    assert [group["lr"] for group in optimizer.param_groups] == [rate, rate, rate / 4]


def test_a_group_that_is_added_later_resumes_by_last_epoch():
    optimizer = sgd([weight()], lr=0.5)
    scheduler = schedule_lr(optimizer)
    optimizer.add_param_group({"params": [weight()], "lr": 0.125})
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    groups = [{"params": [weight()]}, {"params": [weight()]}]
    again = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
    again.load_state_dict(optimizer.state_dict())
    last: Any = np.int64(2)
    resumed = ScheduleLR(again, SCHEDULE, samples=SAMPLES, minibatch=KN, last_epoch=last)
    assert type(resumed.last_epoch) is int
    assert resumed.get_last_lr() == scheduler.get_last_lr()


def test_layer_decay_is_kept_as_correct_momentum_keeps_it():
    """timm's groups have a factor and no rate of their own; `scale_rates` writes both, whose product is one factor."""
    timms = [{"params": [weight()], "lr_scale": scale} for scale in (0.25, 0.5, 1.0)]
    model = torch.nn.Linear(2, 2)
    ours = scale_rates([{"params": [*model.parameters()]}], model, {"weight": 0.3, "bias": 3.0}, lr=0.1)
    for groups in (timms, [{"params": [weight()]}, *timms], ours, [{"params": [weight()], "lr": 0.1}, *ours]):
        optimizer = torch.optim.SGD(groups, lr=0.1)
        found = schedule_lr(optimizer, step_decay(0.4, [])).get_last_lr()
        correct_momentum(optimizer, 0.4)
        assert found == pytest.approx([group["lr"] for group in optimizer.param_groups], rel=1e-12)


@pytest.mark.parametrize("by", ["scheduler", "correct_momentum"])
def test_groups_that_share_the_tensor_of_a_default_rate_follow_their_own_factors(by: str):
    groups = [{"params": [weight()], "lr_scale": scale} for scale in (0.25, 1.0, 1.0)]
    optimizer = torch.optim.Adam(groups, lr=torch.tensor(0.5))  # as a compiled step wants it
    if by == "scheduler":
        schedule_lr(optimizer, step_decay(1.0, []))
    else:
        correct_momentum(optimizer, 1.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert all(map(torch.is_tensor, rates))
    assert [float(rate) for rate in rates] == [0.25, 1.0, 1.0]


@pytest.mark.parametrize("make", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_an_optimizer_whose_copy_cannot_be_stepped_is_refused(make):
    with pytest.raises(ValueError, match=f"optimizer {make.__name__} cannot be probed: .*; use one"):
        schedule_lr(make([weight()]))


def test_groups_without_a_ratio_are_refused():
    with pytest.raises(ValueError, match=r"starts at rate 0 and another at 0\.01"):
        schedule_lr(torch.optim.SGD(groups_of(0.0, 0.01)))
    alike = torch.optim.SGD(groups_of(0.0, 0.0))
    assert schedule_lr(alike).get_last_lr() == [0.1, 0.1]


@pytest.mark.parametrize("make", [sgd, form_b])
@pytest.mark.parametrize("rates", [[1.0], [0.5, 0.125]], ids=str)
@pytest.mark.parametrize("stop", [1, 20, 21, 37, 38])
@pytest.mark.parametrize("stepped", [True, False])  # whether the scheduler was, when the optimizer was saved
def test_last_epoch_resumes_with_the_optimizers_state_alone(make, rates, stop, stepped):
    groups = groups_of(*rates)
    optimizer = make(groups)
    scheduler = schedule_lr(optimizer)
    w = groups[-1]["params"][0]
    train(w, optimizer, scheduler, stop - 1)
    step(w, optimizer)
    if stepped:
        scheduler.step()
    saved, half = copy.deepcopy(optimizer.state_dict()), w.detach().clone()
    if not stepped:
        scheduler.step()
    expected = train(w, optimizer, scheduler, ITERATIONS - stop)[-1]

    groups = groups_of(*rates)
    again = groups[-1]["params"][0]
    again.data.copy_(half)
    optimizer = make(groups)
    optimizer.load_state_dict(saved)
    resumed = ScheduleLR(optimizer, SCHEDULE, samples=SAMPLES, minibatch=KN, last_epoch=stop - 1)
    assert resumed.last_epoch == stop
    assert torch.equal(train(again, optimizer, resumed, ITERATIONS - stop)[-1], expected)
    assert resumed.get_last_lr() == scheduler.get_last_lr()


def test_last_epoch_without_the_optimizers_state_is_refused_as_torch_does():
    with pytest.raises(KeyError, match="initial_lr"):
        ScheduleLR(sgd([weight()]), SCHEDULE, samples=SAMPLES, minibatch=KN, last_epoch=3)


@pytest.mark.parametrize("value", [-2, 0.5, "3", None, True])
def test_a_last_epoch_that_is_no_iteration_is_refused(value):
    with pytest.raises(ValueError, match=r"^last_epoch must be"):
        ScheduleLR(sgd([weight()]), SCHEDULE, samples=SAMPLES, minibatch=KN, last_epoch=value)


def test_a_warmup_from_rate_0_is_right_for_form_a():
    w = weight()
    optimizer = sgd([w])
    schedule = gradual_warmup(step_decay(0.4, []), start_lr=0.0, epochs=2)
    weights = train(w, optimizer, schedule_lr(optimizer, schedule), 30)
    assert torch.equal(weights[0], weight())
    assert not torch.equal(weights[1], weight())
    assert optimizer.param_groups[0]["lr"] == 0.4
