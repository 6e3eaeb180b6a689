"""Momentum with the rate inside, as no optimizer of torch has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class FormB(Optimizer):
    """Momentum of Caffe2 and Keras: v' = m·v + η·g; w' = w − v'."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def follow(self, parameter: Tensor, group: dict[str, Any], direction: Tensor) -> None:
        velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
        velocity.mul_(group["momentum"]).add_(direction * group["lr"])
        parameter.sub_(velocity)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                self.follow(parameter, group, parameter.grad + group["weight_decay"] * parameter)
