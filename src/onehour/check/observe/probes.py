"""What an optimizer does, found by stepping a copy: never by its name, and never with the user's own state."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from onehour.check.observe.digests import leading
from onehour.check.observe.internals import step_unseen
from onehour.rules.momentum import momentum_form, velocity_inside
from onehour.rules.probe import is_adaptive

RATE = 1e-2


def character(optimizer: Optimizer) -> dict[str, Any]:
    """What kind of optimizer it is; a key is None where the copy could not be stepped.

    Returns:
        form: "outside" or "inside": where the velocity keeps the rate (Remark 2).
        velocity: names of the state tensors that hold the rate.
        adaptive: whether a larger gradient makes no larger step, as in Adam.
        decay: for each group with weight decay, how much a weight of 1 shrinks in a step at the group's rate, or at
            its initial one if a warmup lies below it, and at twice that rate, the initial rate doubled too.
    """
    found: dict[str, Any] = {"form": None, "velocity": [], "adaptive": None, "decay": []}
    looks = {"form": momentum_form, "adaptive": is_adaptive, "decay": _decay, "velocity": _velocity}
    for key, look in looks.items():
        # Any optimizer may refuse to be stepped so; then nothing is claimed of it.
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            found[key] = look(optimizer)
    return found


def _velocity(optimizer: Optimizer) -> list[str]:
    return sorted(velocity_inside(optimizer))


def _decay(optimizer: Optimizer) -> list[list[float]]:
    pairs = []
    for group in optimizer.param_groups:
        if not group.get("weight_decay") or not group["params"]:
            continue
        shrunk = []
        rate = max(float(group.get("lr", 0.0)), float(group.get("initial_lr", 0.0))) or RATE
        for factor in (1.0, 2.0):
            copied, (parameter,) = _copied(
                optimizer, [[torch.ones(1)]], {"lr": rate * factor}, only=group, rate_factor=factor
            )
            parameter.grad = torch.zeros_like(parameter)
            step_unseen(copied)
            shrunk.append(1 - float(parameter.detach()[0]))
        pairs.append(shrunk)
    return pairs


def replay(
    optimizer: Optimizer,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    owners: Sequence[dict[str, Any]],
) -> list[Tensor]:
    """How far a step moves some weights, computed by the optimizer's own code in float64.

    Args:
        optimizer: is not touched.
        weights, gradients: flat float64 tensors of equal shapes, pairwise.
        states: the optimizer's state of each weight before the step, its tensors in the same shape.
        owners: the parameter group of each weight.

    Returns:
        Each weight's change.
    """
    copied, parameters = _copied(optimizer, [[w] for w in weights], groups=list(owners))
    for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
        parameter.grad = gradient.clone()
        if state:
            copied.state[parameter] = {key: copy.deepcopy(value) for key, value in state.items()}
    step_unseen(copied)
    return [p.detach() - w for p, w in zip(parameters, weights, strict=True)]


def state_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The optimizer's state of a parameter, tensors of its shape cut and widened as `part` does."""
    state = {}
    for key, value in optimizer.state.get(parameter, {}).items():
        if torch.is_tensor(value) and value.shape == parameter.shape and value.is_floating_point():
            state[key] = leading(value)
        else:
            state[key] = value.detach().cpu().clone() if torch.is_tensor(value) else copy.copy(value)
    return state


def _copied(
    optimizer: Optimizer,
    values: Sequence[Sequence[Tensor]],
    changes: dict[str, Any] | None = None,
    *,
    only: dict[str, Any] | None = None,
    groups: Sequence[dict[str, Any]] | None = None,
    rate_factor: float = 1.0,
) -> tuple[Optimizer, list[torch.nn.Parameter]]:
    """An optimizer of the same class and settings with parameters of its own, in float64 on the CPU, and no state."""
    copied = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        copied.__dict__[name] = copy.copy(value) if isinstance(value, list | dict | set) else value
        if "lr" in name and isinstance(value, float):
            copied.__dict__[name] = value * rate_factor
    for name in ("grad_scale", "found_inf"):  # of a fused step, which the copy's is not
        copied.__dict__.pop(name, None)
    copied.state = defaultdict(dict)
    sources = groups or [only or next(group for group in optimizer.param_groups if group["params"])]
    copied.param_groups, parameters = [], []
    for group, tensors in zip(sources, values, strict=True):
        own = {key: _scaled(key, value, rate_factor) for key, value in group.items()}
        own |= {key: False for key in ("fused", "foreach", "capturable", "differentiable") if key in own}
        own |= {key: value for key, value in (changes or {}).items() if key in own}
        own["params"] = [torch.nn.Parameter(t.clone().double()) for t in tensors]
        parameters += own["params"]
        copied.param_groups.append(own)
    return copied, parameters


def _scaled(key: str, value: Any, factor: float) -> Any:
    if "lr" not in key:
        return value
    if torch.is_tensor(value):
        return value.detach().cpu().clone() * factor
    return value * factor if isinstance(value, float) else value
