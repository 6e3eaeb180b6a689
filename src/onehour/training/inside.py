"""SGD with the rate inside its velocity, as Caffe2 and Keras have it: form B of the paper's Remark 2 (§3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["InsideSGD"]


class InsideSGD(Optimizer):
    """v' = m·v + η·g; w' = w − v' (eq 10 without its correction), or with Nesterov w' = w − (m·v' + η·g).

    Equal to `torch.optim.SGD` while η is constant. When η changes, v must be scaled by η_{t+1}/η_t: whoever sets the
    rate does so (`onehour.rules.momentum.set_rate`), or does not.

    Args:
        params: parameters or groups, with `weight_decay` λ, coupled.
        lr, momentum, nesterov: η, m and the form.

    >>> weight = torch.zeros(1, requires_grad=True)
    >>> weight.grad = torch.ones(1)
    >>> InsideSGD([weight], lr=0.5, momentum=0.9).step()
    >>> weight.item()
    -0.5
    """

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float, nesterov: bool = False) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient.

        >>> InsideSGD([torch.zeros(1)], lr=0.5, momentum=0.9).step()
        """
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
