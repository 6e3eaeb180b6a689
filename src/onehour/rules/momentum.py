"""Momentum when the rate changes: which form an optimizer has, and the correction (paper §3, Remark 2)."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from onehour.rules.checks import not_negative

__all__ = [
    "correct_momentum",
    "momentum_form",
    "scale_velocity",
    "set_rate",
    "step_inside",
    "step_outside",
    "velocity_inside",
    "velocity_keys",
]

Form = Literal["outside", "inside"]


def step_outside(weight: Tensor, velocity: Tensor, gradient: Tensor, *, lr: float, momentum: float):
    """Form A (eq 9): u' = m·u + g; w' = w − η·u'. The rate is outside; `torch.optim.SGD` is this form.

    >>> w, u, g = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0)
    >>> step_outside(w, u, g, lr=0.5, momentum=0.9)
    (tensor(0.5000), tensor(1.))
    """
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
):
    """Form B with the correction (eq 10): v' = m·(η_{t+1}/η_t)·v + η_{t+1}·g; w' = w − v'.

    The rate is inside the velocity, as in Caffe2 and Keras. `previous_lr` is η_t; None leaves the correction out,
    which is right only while the rate is constant.

    >>> w, v, g = torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.0)
    >>> step_inside(w, v, g, lr=0.2, momentum=0.5, previous_lr=0.1)
    (tensor(0.), tensor(1.))
    """
    factor = momentum if previous_lr is None else momentum * lr / previous_lr
    velocity = factor * velocity + lr * gradient
    return weight - velocity, velocity


def momentum_form(optimizer: Optimizer) -> Form:
    """Whether the optimizer keeps the rate outside its velocity (form A) or inside (form B), by probing a copy.

    A copy with one-element parameters takes a step with a gradient and one without, at two second rates: what the
    second step moves is the velocity's doing. It follows the second rate in form A and ignores it in form B.
    Without momentum nothing needs correcting, and the answer is "outside". The optimizer is not touched.

    Raises:
        ValueError: if the optimizer cannot be probed (its step needs a closure, say).

    >>> momentum_form(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))
    'outside'
    """
    optimizer = _unwrapped(optimizer)
    same, doubled = (_probe(optimizer, rates=(1e-2, rate)) for rate in (1e-2, 2e-2))
    for a, b in zip(same.moved, doubled.moved, strict=True):
        if a != 0 and abs(b - a) < 0.5 * abs(a):
            return "inside"
    return "outside"


def velocity_keys(optimizer: Optimizer) -> set[str]:
    """Names of the per-parameter state tensors that hold the rate inside: those that double when the rate does.

    >>> velocity_keys(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))
    set()
    """
    optimizer = _unwrapped(optimizer)
    single, double = (_probe(optimizer, rates=(rate,)) for rate in (1e-2, 2e-2))
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

    >>> velocity_inside(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))
    set()
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
        optimizer: any torch optimizer.
        lr: η_{t+1}, for every parameter group.

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


def set_rate(optimizer: Optimizer, lr: float, inside: set[str]) -> None:
    """As `correct_momentum`, for the state tensors `inside` that `velocity_inside` has found.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    >>> set_rate(optimizer, 0.2, inside=set())
    >>> optimizer.param_groups[0]["lr"]
    0.2
    """
    scale_velocity(optimizer, lr, inside)
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def scale_velocity(optimizer: Optimizer, lr: float, keys: set[str]) -> None:
    """Multiply the state tensors named `keys` by `lr` / the group's rate, in place.

    >>> scale_velocity(torch.optim.SGD([torch.zeros(1)], lr=0.1), 0.2, set())
    """
    if not keys:
        return
    found = [
        (group["lr"], optimizer.state[parameter][key])
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key in keys & set(optimizer.state.get(parameter, {}))
    ]
    if any(rate == 0 for rate, _ in found):
        raise ValueError(
            "the velocity was made at rate 0, so it cannot be scaled to another rate; start the schedule above zero"
        )
    for rate, velocity in found:
        velocity.mul_(lr / rate)


@dataclass(frozen=True)
class _Probed:
    """What the probe's parameters moved by in its last step, and their state tensors after it."""

    moved: list[float]
    state: list[dict[str, float]]


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself behind wrappers such as Accelerate's, which forward every attribute to it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


@torch.no_grad()
def _probe(optimizer: Optimizer, rates: tuple[float, ...]) -> _Probed:
    """Step a copy once at each rate: first with gradient 1, then with gradient 0."""
    probe = object.__new__(type(optimizer))  # copy.copy would drop a custom optimizer's own attributes
    for name, value in vars(optimizer).items():
        probe.__dict__[name] = copy.copy(value) if isinstance(value, list | dict | set) else value
    probe.state = defaultdict(dict)
    probe.param_groups = [_probe_group(group) for group in optimizer.param_groups if group["params"]]
    parameters = [group["params"][0] for group in probe.param_groups]
    # The class's own step without torch's wrapper: schedulers patch `step` on the instance, users hang hooks on it or
    # on all optimizers, and every one of those would act on the real thing.
    step = type(optimizer).step
    step = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    before = parameters
    try:
        for number, rate in enumerate(rates):
            before = [parameter.clone() for parameter in parameters]
            for group in probe.param_groups:
                group["lr"] = torch.full_like(group["lr"], rate) if torch.is_tensor(group["lr"]) else rate
                group["params"][0].grad = torch.full_like(group["params"][0], 0.0 if number else 1.0)
            step(probe)  # type: ignore[call-arg]
    except Exception as error:
        raise ValueError(
            f"the momentum form of {type(optimizer).__name__} cannot be probed: its step() failed with"
            f" {type(error).__name__}: {error}"
        ) from error
    return _Probed(
        moved=[float(new - old) for new, old in zip(parameters, before, strict=True)],
        state=[
            {key: float(value) for key, value in probe.state[parameter].items() if _is_scalar(value)}
            for parameter in parameters
        ],
    )


def _probe_group(group: dict[str, Any]) -> dict[str, Any]:
    real = group["params"][0]
    # From zero and in float32 at least, so that no step is lost in a weight's last bits.
    dtype = torch.promote_types(real.dtype, torch.float32)
    parameter = torch.nn.Parameter(torch.zeros((1,) * real.ndim, dtype=dtype, device=real.device))
    without_decay = {"weight_decay": 0.0} if "weight_decay" in group else {}
    return {**group, **without_decay, "params": [parameter]}


def _is_scalar(value: Any) -> bool:
    return torch.is_tensor(value) and value.numel() == 1 and value.is_floating_point()
