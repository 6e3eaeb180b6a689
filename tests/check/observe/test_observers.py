"""What the observers write down, against loops whose numbers are known."""

from typing import Any

import pytest
import torch
from observing import Watched, events, scalar
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from onehour.check.observe.backward import LOSSES, penalties
from onehour.check.observe.digests import projections
from onehour.check.observe.optimizer import character, replay
from onehour.check.tape import BackwardPass, BatchNormSizes, ModelSeen, OptimizerStep, Trouble


class Inside(torch.optim.Optimizer):
    """v = m·v + η·g, w = w − v."""

    def __init__(self, parameters: Any, lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                v = self.state[p].setdefault("v", torch.zeros_like(p))
                v.mul_(group["momentum"]).add_(p.grad, alpha=group["lr"])
                p.sub_(v)


OPTIMIZERS: list[tuple[Any, str, bool, float]] = [
    (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5), "outside", False, 2.0),
    (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5), "outside", False, 2.0),
    (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5), "outside", True, 2.0),
    (lambda p: torch.optim.RMSprop(p, lr=0.1), "outside", True, 0.0),
    (lambda p: torch.optim.Adagrad(p, lr=0.1), "outside", True, 0.0),
    (lambda p: Inside(p, lr=0.1, momentum=0.9), "inside", False, 0.0),
]


@pytest.mark.parametrize(("make", "form", "adaptive", "doubled"), OPTIMIZERS)
def test_the_character_of_an_optimizer(make: Any, form: str, adaptive: bool, doubled: float):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = make([parameter])
    before = repr(dict(optimizer.state))  # Adagrad makes its own at once
    kind = character(optimizer)
    assert (kind["form"], kind["adaptive"]) == (form, adaptive)
    assert kind["velocity"] == (["v"] if form == "inside" else [])
    assert [b / a for a, b in kind["decay"]] == pytest.approx([doubled] if doubled else [], rel=1e-6)
    assert parameter.tolist() == [1.0] * 3
    assert repr(dict(optimizer.state)) == before


def test_of_an_optimizer_that_cannot_be_stepped_nothing_is_claimed():
    kind = character(torch.optim.LBFGS([nn.Parameter(torch.ones(2))]))
    assert kind == {"form": None, "velocity": [], "adaptive": None, "decay": []}


@pytest.mark.parametrize("make", [make for make, *_ in OPTIMIZERS])
def test_an_update_recomputed_in_float64_is_the_update(make: Any):
    parameter = nn.Parameter(torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    optimizer = make([parameter])
    for step in range(3):
        before, gradient = parameter.detach().clone(), torch.full((5,), 0.5 + step, dtype=torch.float64)
        state = {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state.get(parameter, {}).items()}
        (moved,) = replay(optimizer, [before], [gradient], [state], optimizer.param_groups)
        parameter.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(moved, parameter.detach() - before, rtol=1e-12, atol=1e-15)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total:UserWarning")  # of kl_div's default
@pytest.mark.parametrize("name", LOSSES)
def test_the_weight_of_a_sample_in_every_loss(name: str):
    n = 6
    inputs = torch.rand(n, 3, requires_grad=True)
    classes = name in ("cross_entropy", "nll_loss", "multi_margin_loss")
    targets = torch.tensor([0, 1, 2, 0, 1, 2]) if classes else torch.rand(n, 3).round()
    with Watched() as tape:
        values = torch.sigmoid(inputs)
        loss = getattr(F, name)(values, targets)
        (loss / 4).backward()
    (term,) = events(tape, BackwardPass)[0].terms
    assert term.name == name
    assert term.total == pytest.approx(0.25)
    assert term.count in (n, n * 3)
    assert term.low == term.high == pytest.approx(0.25 / term.count)


@pytest.mark.parametrize(
    ("loss", "total", "low"),
    [
        (lambda x, y: F.cross_entropy(x, y, reduction="sum"), 6.0, 1.0),
        (lambda x, y: F.cross_entropy(x, y, size_average=False), 6.0, 1.0),
        (lambda x, y: F.cross_entropy(x, y, reduction="none").mean(), 1.0, 1 / 6),
        (lambda x, y: (F.cross_entropy(x, y, reduction="none") * torch.arange(1.0, 7)).sum(), 21.0, 1.0),
        (lambda x, y: F.cross_entropy(x, torch.where(y == 0, -100, y)), 1.0, 1 / 4),
        (lambda x, y: F.cross_entropy(x, y, weight=torch.tensor([1.0, 2.0, 3.0])), 1.0, 1 / 6),
        (lambda x, y: F.kl_div(x, F.one_hot(y, 3).float(), reduction="batchmean"), 1.0, 1 / 6),
        (lambda x, y: nn.CrossEntropyLoss(label_smoothing=0.1)(x, y), 1.0, 1 / 6),
        (lambda x, y: F.cross_entropy(x, F.one_hot(y, 3).float()), 1.0, 1 / 6),
    ],
)
@pytest.mark.filterwarnings("ignore:size_average:UserWarning")
def test_what_a_loss_counts(loss: Any, total: float, low: float):
    inputs, labels = torch.rand(6, 3, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    with Watched() as tape:
        loss(inputs, labels).backward()
    (term,) = events(tape, BackwardPass)[0].terms
    assert (term.total, term.low) == (pytest.approx(total), pytest.approx(low))


def test_a_grad_scaler_s_scale_is_no_weight():
    inputs, scaler = torch.rand(6, 3, requires_grad=True), torch.amp.GradScaler("cpu", init_scale=512.0)
    with Watched() as tape:
        scaler.scale(F.cross_entropy(inputs, torch.zeros(6, dtype=torch.int64))).backward()
    (event,) = events(tape, BackwardPass)
    assert event.scale == 512.0
    assert event.terms[0].total == pytest.approx(1.0)


def test_gradients_are_written_down_as_projections():
    model = scalar()
    with Watched() as tape:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for value in (1.0, 3.0):
            optimizer.zero_grad()
            model(torch.full((1, 1), value, dtype=torch.float64)).sum().backward()
            optimizer.step()
    unit = projections([torch.ones(1, 1)])
    backwards, steps = events(tape, BackwardPass), events(tape, OptimizerStep)
    for value, backward, step in zip((1.0, 3.0), backwards, steps, strict=True):
        assert backward.local["0"] == pytest.approx([value * number for number in unit])
        assert step.final == pytest.approx([value * number for number in unit])
        assert step.moved == pytest.approx([-0.5 * value * number for number in unit])
        assert backward.before["0"] == [0.0, 0.0]


@pytest.mark.parametrize("clipped_before_it_comes", [False, True])
def test_the_gradient_that_a_step_takes_is_that_before_clipping(clipped_before_it_comes: bool):
    model = scalar()
    with Watched() as tape:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        loss = model(torch.full((1, 1), 100.0, dtype=torch.float64)).sum()
        if clipped_before_it_comes:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss.backward()
        if not clipped_before_it_comes:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert events(tape, OptimizerStep)[0].final == pytest.approx([100 * x for x in projections([torch.ones(1, 1)])])


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_a_velocity_that_someone_scales(factor: float):
    model = scalar()
    with Watched() as tape:
        optimizer = Inside(model.parameters(), lr=0.1, momentum=0.9)
        for lr in (0.1, 0.1, 0.4):
            if lr != optimizer.param_groups[0]["lr"]:
                optimizer.state[model.weight]["v"].mul_(factor)
                optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            model(torch.ones(1, 1, dtype=torch.float64)).sum().backward()
            optimizer.step()
    steps = events(tape, OptimizerStep)
    assert [step.rates for step in steps] == [[0.1], [0.1], [0.4]]
    assert steps[2].kept["v"] == pytest.approx(factor)
    assert steps[2].off is not None
    plain, corrected = steps[2].off
    # v = .19 after two steps: eq 10 moves by .9·4·.19 + .4, without the correction by .9·.19 + .4.
    right = 0.9 * 4 * 0.19 + 0.4
    assert corrected == pytest.approx(0.0 if factor == 4 else abs(0.9 * 0.19 + 0.4 - right) / right, abs=1e-9)
    assert plain == pytest.approx(
        0.0 if factor == 1 else abs(right - (0.9 * 0.19 + 0.4)) / (0.9 * 0.19 + 0.4), abs=1e-9
    )


def test_steps_within_steps_count_once():
    class Wrapped(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model = scalar()
    with Watched() as tape:
        torch.optim.SGD(model.parameters(), lr=0.1)  # so that the base class's step has torch's hooks too
        optimizer = Wrapped(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 1, dtype=torch.float64)).sum().backward()
            optimizer.step()
    assert len(events(tape, OptimizerStep)) == 3


@pytest.mark.parametrize(
    ("penalty", "strength"),
    [
        (lambda m: 0.05 * m.weight.pow(2).sum(), 0.1),
        (lambda m: 0.05 * (m.weight * m.weight).sum(), 0.1),
        (lambda m: 0.05 * sum(p.square().sum() for p in m.parameters()), 0.1),
        (lambda m: 0.05 * sum(p.norm() ** 2 for p in m.parameters()), 0.1),
        (lambda m: 0.05 * torch.cat([p.view(-1) for p in m.parameters()]).pow(2).sum(), 0.1),
        (lambda m: 0.05 * torch.cat([p.view(-1) for p in m.parameters()]).norm() ** 2, 0.1),
        (lambda m: 0.05 * sum(p.norm(1) for p in m.parameters()), None),
        (lambda m: 0.0 * m(torch.ones(1, 4)).pow(2).mean(), None),
        (lambda m: (m.weight.sum() - 1) ** 2, None),
        (lambda m: m(torch.ones(1, 4)).norm(), None),
    ],
)
def test_penalties_on_weights(penalty: Any, strength: float | None):
    model = nn.Linear(4, 2)
    loss = F.mse_loss(model(torch.ones(3, 4)), torch.zeros(3, 2)) + penalty(model)
    found = penalties(loss)
    loss.backward()
    measured = [each.strength() for each in found]
    assert measured == pytest.approx([strength] * len(measured) if strength else [], rel=1e-5)
    assert bool(measured) == (strength is not None)


def test_decayed_batchnorms_are_found_by_their_type():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with Watched() as tape:
        groups = [{"params": model[0].parameters()}, {"params": model[1].weight}, {"params": model[2].parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.1)
        model(torch.randn(6, 4)).sum().backward()
        optimizer.step()
    (described,) = events(tape, ModelSeen)
    assert described.decayed == ["1.weight"]
    assert described.unused == ["1.bias"]
    assert (described.affine, described.decay) == (2, 0.1)
    assert events(tape, BatchNormSizes) == [BatchNormSizes(sizes=[6])]


@pytest.mark.parametrize("copied", [True, False])
def test_weights_that_the_loop_copies_from_the_optimizer_s_are_no_unused_ones(copied: bool):
    model = nn.Linear(4, 2)
    with Watched() as tape:
        master = [p.detach().clone().requires_grad_() for p in model.parameters()]
        optimizer = torch.optim.SGD(master, lr=0.1)
        model(torch.ones(6, 4)).sum().backward()
        for own, p in zip(master, model.parameters(), strict=True):
            own.grad = p.grad
        optimizer.step()
        for own, p in zip(master, model.parameters(), strict=True):
            p.data.copy_(own.detach() if copied else p.data)
    assert events(tape, ModelSeen)[0].unused == ([] if copied else ["weight", "bias"])


def test_what_fails_in_an_observer_is_no_matter_of_the_loop():
    class Odd(nn.Module):
        def forward(self, x: Any) -> Any:
            return x

        def parameters(self, recurse: bool = True) -> Any:
            raise RuntimeError("not mine")

    with Watched() as tape:
        assert Odd()(3) == 3
    assert "not mine" in next(tape.of(Trouble)).error


def test_what_a_reentrant_checkpoint_runs_again_is_part_of_one_backward_pass():
    body, head = nn.Linear(3, 3), nn.Linear(3, 2)
    with Watched() as tape:
        hidden = checkpoint(body, torch.ones(4, 3, requires_grad=True), use_reentrant=True)
        F.cross_entropy(head(hidden), torch.zeros(4, dtype=torch.int64)).backward()
    (one,) = events(tape, BackwardPass)
    assert [(term.name, term.total) for term in one.terms] == [("cross_entropy", 1)]
    assert one.samples == 4


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_a_traced_graph_holds_nothing_of_the_observers():
    """As TensorBoard's add_graph traces one, twice, before the training."""
    model, inputs = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.ones(3, 4)

    def traced() -> list[str]:
        return [node.kind() for node in torch.jit.trace(model, inputs).inlined_graph.nodes()]  # type: ignore[attr-defined]

    bare = traced()
    with Watched(cut=True):
        assert traced() == bare


@pytest.mark.parametrize("lr", [0.0, 1e-9, 0.1])
def test_a_warmup_from_zero_does_not_hide_what_an_optimizer_is(lr: float):
    kind = character(torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=lr, weight_decay=0.5))
    assert (kind["form"], kind["adaptive"]) == ("outside", True)
    assert [b / a for a, b in kind["decay"]] == pytest.approx([2.0])
    assert not character(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=lr, momentum=0.9))["adaptive"]


class Decoupled(torch.optim.SGD):
    """Weights shrink by λ·η/η₀."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["weight_decay"] * group["lr"] / group["initial_lr"])


def test_decay_is_measured_at_the_initial_rate():
    optimizer = Decoupled([nn.Parameter(torch.ones(2))], lr=0.4, weight_decay=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.1
    ((shrunk, doubled),) = character(optimizer)["decay"]
    assert shrunk == doubled == pytest.approx(1e-3)


def test_what_a_fused_step_keeps_does_not_hinder_a_copy():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9, fused=True)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None  # type: ignore[attr-defined]
    assert character(optimizer)["form"] == "outside"
    (moved,) = replay(optimizer, [torch.ones(2).double()], [torch.ones(2).double()], [{}], optimizer.param_groups)
    assert moved.tolist() == pytest.approx([-0.1, -0.1])
    assert optimizer.found_inf is not None  # type: ignore[attr-defined]
