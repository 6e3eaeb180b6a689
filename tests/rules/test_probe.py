"""Whether an optimizer's update grows with the gradient, by what it does; and that nothing of the user's notices."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from onehour.config import ADAPTIVE
from onehour.rules.momentum import InsideSGD
from onehour.rules.muon import Muon
from onehour.rules.probe import is_adaptive
from onehour.training.build import OPTIMIZERS

Params = list[Tensor]


class Own(Optimizer):
    """w ← w − η·`direction`(w, g) of each parameter; what someone writes in an afternoon."""

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.sub_(group["lr"] * self.direction(p, p.grad, group))

    def direction(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        return g


class SignSGD(Own):
    def direction(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        return g.sign()


class Lion(Own):
    def direction(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
        update = (0.9 * momentum + 0.1 * g).sign()
        momentum.mul_(0.99).add_(g, alpha=0.01)
        return update + 0.1 * p


class Lars(Own):
    """A layer's rate is ‖w‖ / ‖g‖, and 1 while its weights are zero, as the usual ones have it."""

    def direction(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        if not p.norm() or not g.norm():
            return g
        velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
        return velocity.mul_(0.9).add_(g * p.norm() / g.norm())


class Lamb(Own):
    def direction(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        square = self.state[p].setdefault("square", torch.zeros_like(p)).mul_(0.9).addcmul_(g, g, value=0.1)
        update = g / (square.sqrt() + 1e-6)
        return update * (p.norm() / update.norm() if p.norm() and update.norm() else 1)


class RmspropTF(Own):
    """Its mean square begins with one."""

    def direction(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        square = self.state[p].setdefault("square", torch.ones_like(p)).mul_(0.9).addcmul_(g, g, value=0.1)
        return g / square.sqrt()


class MadeAtOnce(Own):
    """Adagrad that makes its state in its constructor, as torch's did up to 2.12."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(p)}

    def direction(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        state["step"] += 1
        return g / state["sum"].addcmul_(g, g).sqrt().add_(1e-10)


class Decaying(Own):
    """SGD with a decay under another name, and a counter and the last gradients' sizes of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr, shrink=0.3)
        self.count = torch.zeros(())
        self.sizes: deque[float] = deque(maxlen=8)

    def direction(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        self.count += 1
        self.sizes.append(float(g.norm()))
        return g + group["shrink"] * p


class Wrapped(Optimizer):
    """Another optimizer under a name of one's own, whose groups and state are that one's; averages every fifth step."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        super().__init__(base.param_groups, dict(base.defaults))
        self.param_groups, self.state = base.param_groups, base.state
        self.slow = {p: p.detach().clone() for group in base.param_groups for p in group["params"]}
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.base.step()
        self.steps += 1
        if self.steps % 5 == 0:
            for p, slow in self.slow.items():
                p.copy_(slow.add_(p - slow, alpha=0.5))


SCALES: dict[str, Callable[[Params], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=10.0),
    "SGD dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.9),
    "SGD maximize": lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "SGD tensor lr": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)),
    "SGD rate 0": lambda p: torch.optim.SGD(p, lr=0.0),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "inside": lambda p: InsideSGD(p, lr=0.1, momentum=0.9),
    "decay by another name": Decaying,
    "own": Own,
    "wrapped SGD": lambda p: Wrapped(torch.optim.SGD(p, lr=0.1, momentum=0.9)),
}
DIVIDES: dict[str, Callable[[Params], Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "Adam capturable": lambda p: torch.optim.Adam(p, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, weight_decay=0.5),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adagrad that begins above zero": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Muon": lambda p: torch.optim.Muon([q.view(1, -1).detach().requires_grad_() for q in p]),
    "Muon of ours": lambda p: Muon([q.view(1, -1).detach().requires_grad_() for q in p], lr=0.1),
    "sign": SignSGD,
    "Lion": Lion,
    "LARS": Lars,
    "LAMB": Lamb,
    "RmspropTF": RmspropTF,
    "Adagrad whose state is there at once": MadeAtOnce,
    "wrapped Adam": lambda p: Wrapped(torch.optim.Adam(p)),
    "SGD and Adam": lambda p: Wrapped(torch.optim.AdamW([{"params": p}, {"params": weights()}])),
}
EVERY = SCALES | DIVIDES


def weights(dtype: torch.dtype = torch.float32) -> Params:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=draw).to(dtype).requires_grad_() for size in (3, 4)]


@pytest.mark.parametrize("name", SCALES)
def test_an_update_that_is_linear_in_the_gradient_is_not_adaptive(name: str):
    assert not is_adaptive(SCALES[name](weights()))


@pytest.mark.parametrize("name", DIVIDES)
def test_an_update_that_does_not_grow_with_the_gradient_is_adaptive(name: str):
    assert is_adaptive(DIVIDES[name](weights()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_precision_of_the_weights_does_not_matter(dtype: torch.dtype):
    assert not is_adaptive(torch.optim.SGD(weights(dtype), lr=0.1, momentum=0.9))
    assert is_adaptive(torch.optim.AdamW(weights(dtype)))


def test_what_the_names_say_is_what_the_optimizers_do():
    assert (*OPTIMIZERS, "muon") == ADAPTIVE
    for make in OPTIMIZERS.values():
        assert is_adaptive(make(weights()))


@pytest.mark.parametrize("name", EVERY)
def test_probing_changes_nothing_that_the_optimizer_holds(name: str):
    parameters = weights()
    optimizer = EVERY[name](parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def seen() -> Any:
        own = {key: value for key, value in vars(optimizer).items() if not callable(value)}
        return copy.deepcopy((own, torch.get_rng_state())), [p.detach().clone() for p in parameters]

    (before, state), values = seen()
    is_adaptive(optimizer)
    (after, state_after), values_after = seen()
    assert str(after) == str(before)
    assert torch.equal(state, state_after)
    torch.testing.assert_close(values, values_after, rtol=0, atol=0)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in parameters if p.grad is not None)


class Asking(Own):
    """Cannot step without what nobody gives it."""

    def step(self, closure: Any = None, *, losses: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise AssertionError


@pytest.mark.parametrize("make", [lambda p: torch.optim.LBFGS(p), Asking, lambda p: torch.optim.SparseAdam(p)])
def test_one_that_needs_more_than_gradients_is_one_message(make: Callable[[Params], Optimizer]):
    with pytest.raises(ValueError, match=r"optimizer \w+ cannot be probed: its step\(\) without arguments") as raised:
        is_adaptive(make(weights()[:1]))
    assert "\n" not in str(raised.value)
