"""Momentum when the rate changes: which form an optimizer has, and the correction (paper §3, Remark 2)."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from onehour.rules.checks import not_negative

__all__ = ["correct_momentum", "momentum_form", "step_inside", "step_outside", "velocity_keys"]

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
    not_negative("lr", lr)
    scale_velocity(optimizer, lr, _keys_to_scale(optimizer))
    for group in optimizer.param_groups:
        group["lr"] = lr


def scale_velocity(optimizer: Optimizer, lr: float, keys: set[str]) -> None:
    """Multiply the state tensors named `keys` by `lr` / the group's rate, in place.

    >>> scale_velocity(torch.optim.SGD([torch.zeros(1)], lr=0.1), 0.2, set())
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key in keys & set(optimizer.state.get(parameter, {})):
                if group["lr"] == 0:
                    raise ValueError(
                        "the velocity was made at rate 0, so it cannot be scaled to another rate;"
                        " start the schedule above zero"
                    )
                optimizer.state[parameter][key].mul_(lr / group["lr"])


_KEYS: WeakKeyDictionary[Optimizer, tuple[Any, set[str]]] = WeakKeyDictionary()


def _keys_to_scale(optimizer: Optimizer) -> set[str]:
    """The velocities to scale, probed once for an optimizer and its hyper-parameters."""
    settings = [
        {key: value for key, value in group.items() if isinstance(value, bool | int | float) and key != "lr"}
        for group in optimizer.param_groups
    ]
    known = _KEYS.get(optimizer)
    if known is None or known[0] != settings:
        keys = velocity_keys(optimizer) if momentum_form(optimizer) == "inside" else set()
        known = _KEYS[optimizer] = (settings, keys)
    return known[1]


class _Probed:
    """What the probe's parameters moved by in its last step, and the state tensors after it."""

    def __init__(self, moved: list[float], state: list[dict[str, float]]) -> None:
        self.moved, self.state = moved, state


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself behind wrappers such as Accelerate's, which forward every attribute to it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _probe(optimizer: Optimizer, rates: tuple[float, ...]) -> _Probed:
    """Step a copy once at each rate: first with gradient 1, then with gradient 0."""
    probe = object.__new__(type(optimizer))  # copy.copy would drop a custom optimizer's own attributes
    probe.__dict__.update(optimizer.__dict__)
    # Schedulers patch `step` on the instance and users hang hooks on it: both would act on the real optimizer.
    probe.__dict__.pop("step", None)
    probe._optimizer_step_pre_hooks = OrderedDict()
    probe._optimizer_step_post_hooks = OrderedDict()
    probe.state = defaultdict(dict)
    probe.param_groups = [_probe_group(group) for group in optimizer.param_groups]
    parameters = [group["params"][0] for group in probe.param_groups]
    before = parameters
    try:
        for number, rate in enumerate(rates):
            before = [parameter.detach().clone() for parameter in parameters]
            for group in probe.param_groups:
                group["lr"] = torch.full_like(group["lr"], rate) if torch.is_tensor(group["lr"]) else rate
                group["params"][0].grad = torch.full_like(group["params"][0], 0.0 if number else 1.0)
            probe.step()
    except Exception as error:
        raise ValueError(
            f"the momentum form of {type(optimizer).__name__} cannot be probed: its step() failed with"
            f" {type(error).__name__}: {error}"
        ) from error
    moved = [float(new.detach() - old) for new, old in zip(parameters, before, strict=True)]
    state = [
        {key: float(value) for key, value in probe.state[parameter].items() if _is_scalar(value)}
        for parameter in parameters
    ]
    return _Probed(moved, state)


def _probe_group(group: dict[str, Any]) -> dict[str, Any]:
    real = group["params"][0]
    parameter = torch.nn.Parameter(torch.ones((1,) * real.ndim, dtype=real.dtype, device=real.device))
    without_decay = {"weight_decay": 0.0} if "weight_decay" in group else {}
    return {**group, **without_decay, "params": [parameter]}


def _is_scalar(value: Any) -> bool:
    return torch.is_tensor(value) and value.numel() == 1 and value.is_floating_point()
