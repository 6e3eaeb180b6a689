"""Momentum when the rate changes: which form an optimizer has, and the correction (paper §3, Remark 2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from onehour.rules.arguments import not_negative
from onehour.rules.probe import probe, unwrapped

__all__ = ["correct_momentum", "momentum_form"]

Form = Literal["outside", "inside"]


def momentum_form(optimizer: Optimizer) -> Form:
    """Whether the optimizer keeps the rate outside its velocity (form A) or inside (form B), by probing a copy.

    Form A (eq 9): u' = m·u + g; w' = w − η·u', as in `torch.optim.SGD`. Form B with its correction (eq 10):
    v' = m·(η_{t+1}/η_t)·v + η_{t+1}·g; w' = w − v', as in Caffe2 and Keras, which leave the correction out.

    A copy with one-element parameters takes a step with a gradient and one without, at two second rates: what the
    second step moves is the velocity's doing. It follows the second rate in form A and ignores it in form B.
    Without momentum nothing needs correcting, and the answer is "outside". The optimizer is not touched.

    Raises:
        ValueError: if the optimizer cannot be probed (its step needs a closure, say).

    >>> momentum_form(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))
    'outside'
    """
    optimizer = unwrapped(optimizer)
    same, doubled = (probe(optimizer, rates=(1e-2, rate), gradients=(1.0, 0.0)) for rate in (1e-2, 2e-2))
    for a, b in zip(same.moved, doubled.moved, strict=True):
        if a != 0 and abs(b - a) < 0.5 * abs(a):
            return "inside"
    return "outside"


def velocity_keys(optimizer: Optimizer) -> set[str]:
    """Names of the per-parameter state tensors that hold the rate inside: those that double when the rate does."""
    optimizer = unwrapped(optimizer)
    single, double = (probe(optimizer, rates=(rate,), gradients=(1.0,)) for rate in (1e-2, 2e-2))
    return {
        key
        for a, b in zip(single.state, double.state, strict=True)
        for key in a
        if a[key] != 0 and abs(b[key] / a[key] - 2) < 1e-3
    }


def velocity_inside(optimizer: Optimizer) -> set[str]:
    """The state tensors that must be scaled when the rate changes: `velocity_keys` for form B, none for form A.

    Raises:
        ValueError: if the form is B, but no state tensor holds the velocity, so that nothing could correct it.
    """
    if momentum_form(optimizer) == "outside":
        return set()
    keys = velocity_keys(optimizer)
    if not keys:
        raise ValueError(
            f"{type(optimizer).__name__} carries its rate from step to step, but not in the state of its parameters,"
            " so its momentum cannot be corrected; keep its rate constant"
        )
    return keys


def correct_momentum(optimizer: Optimizer, lr: float) -> None:
    """Set the rate of the next step, and scale the velocity by η_{t+1}/η_t where the rate is inside it (eq 10).

    For form A (`torch.optim.SGD`, Adam) only the rate is set: scaling the velocity there would be the bug.

    Args:
        optimizer: any torch optimizer that can be probed: not LBFGS or SparseAdam.
        lr: η_{t+1}, for every parameter group, times its `lr_scale` where it has one, as timm's groups do.

    Raises:
        ValueError: if a velocity was made at rate 0 and so cannot be scaled: start the warmup above zero.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    >>> correct_momentum(optimizer, lr=0.2)
    >>> optimizer.param_groups[0]["lr"]
    0.2
    """
    lr = not_negative("lr", lr)
    # Probed once for an optimizer and its hyper-parameters.
    settings = [
        {key: value for key, value in group.items() if isinstance(value, bool | int | float) and key != "lr"}
        for group in optimizer.param_groups
    ]
    known = _INSIDE.get(optimizer)
    if known is None or known[0] != settings:
        known = _INSIDE[optimizer] = (settings, velocity_inside(optimizer))
    set_rate(optimizer, lr, known[1])


_INSIDE: WeakKeyDictionary[Optimizer, tuple[Any, set[str]]] = WeakKeyDictionary()


def set_rate(optimizer: Optimizer, lr: float | Tensor, inside: set[str]) -> None:
    """As `correct_momentum`, for the state tensors `inside` that `velocity_inside` has found.

    A tensor, as a CUDA graph reads its rate, becomes the groups' own; a number is written into theirs.
    """
    rates = [lr * group["lr_scale"] if "lr_scale" in group else lr for group in optimizer.param_groups]
    scale_velocity(optimizer, rates, inside)
    write_rates(optimizer, rates)


def write_rates(optimizer: Optimizer, rates: Sequence[float | Tensor]) -> None:
    """Set each parameter group's rate; a number is written into a tensor that the group keeps its rate in."""
    written: dict[int, float] = {}
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if torch.is_tensor(group["lr"]) and not torch.is_tensor(rate):
            if written.setdefault(id(group["lr"]), rate) != rate:  # torch lets groups share the tensor of its default
                group["lr"] = group["lr"].clone()
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def scale_velocity(optimizer: Optimizer, rates: Sequence[float | Tensor], keys: set[str]) -> None:
    """Multiply the state tensors named `keys` by each group's next rate / its rate now, in place.

    Args:
        rates: the next rate of each parameter group; where it is the rate now there is nothing to do, at rate 0 too.
    """
    if not keys:
        return
    found = [
        (group["lr"], rate, optimizer.state[parameter][key])
        for group, rate in zip(optimizer.param_groups, rates, strict=True)
        if group["lr"] != rate
        for parameter in group["params"]
        for key in keys & set(optimizer.state.get(parameter, {}))
    ]
    if any(before == 0 for before, _, _ in found):
        raise ValueError(
            "the velocity was made at rate 0, so it cannot be scaled to another rate; start the schedule above zero"
        )
    for before, rate, velocity in found:
        velocity.mul_(rate / before)


class InsideSGD(Optimizer):
    """v' = m·v + η·g; w' = w − v' (eq 10 without its correction), or with Nesterov w' = w − (m·v' + η·g).

    Equal to `torch.optim.SGD` while η is constant. When η changes, v must be scaled by η_{t+1}/η_t: whoever sets the
    rate does so (`set_rate`), or does not.

    Args:
        params: parameters or groups, with `weight_decay` λ, coupled.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float, nesterov: bool = False) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for weight in (p for p in group["params"] if p.grad is not None):
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                velocity = state["momentum_buffer"]
                move = torch.add(weight.grad, weight, alpha=group["weight_decay"]).mul_(group["lr"])
                velocity.mul_(group["momentum"]).add_(move)
                if group["nesterov"]:
                    weight.sub_(move).sub_(velocity, alpha=group["momentum"])
                else:
                    weight.sub_(velocity)
