"""A schedule as torch's LRScheduler, stepped at every iteration (paper §2.2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from onehour.rules.checks import positive_int
from onehour.rules.minibatch import Minibatch
from onehour.rules.momentum import scale_velocity, velocity_inside
from onehour.rules.schedule import Schedule

__all__ = ["ScheduleLR"]


class ScheduleLR(LRScheduler):
    """Sets schedule(t·kn / N) before iteration t; call `step()` after every `optimizer.step()`.

    Applies the momentum correction where the optimizer keeps its rate inside the velocity (Remark 2).

    Args:
        optimizer: its parameter groups all get the schedule's rate.
        schedule: rate as a function of the fractional epoch.
        samples: N, the size of the data set.
        minibatch: kn, images an update over all workers.

    Raises:
        ValueError: if parameter groups start with different rates: one schedule cannot serve both.

    >>> import torch
    >>> from onehour import gradual_warmup, step_decay
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    >>> schedule = gradual_warmup(step_decay(0.4, [30]), start_lr=0.1, epochs=3)
    >>> scheduler = ScheduleLR(optimizer, schedule, samples=100, minibatch=100)
    >>> for _ in range(2):
    ...     optimizer.step(); scheduler.step()
    >>> round(scheduler.get_last_lr()[0], 12)
    0.3
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, *, samples: int, minibatch: Minibatch | int) -> None:
        self.schedule = schedule
        self.samples = positive_int("samples", samples)
        self.minibatch = minibatch.size if isinstance(minibatch, Minibatch) else positive_int("minibatch", minibatch)
        rates = {float(group["lr"]) for group in optimizer.param_groups}
        if len(rates) > 1:
            raise ValueError(
                f"ScheduleLR sets one rate, but the parameter groups have {sorted(rates)};"
                " give each group the same lr, or use one scheduler and optimizer for each rate"
            )
        self._velocity = velocity_inside(optimizer)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of iteration `last_epoch` (torch's name for the count of steps), for each group."""
        rate = self.schedule(self.last_epoch * self.minibatch / self.samples)
        if self._velocity:
            scale_velocity(self.optimizer, rate, self._velocity)
        return [rate for _ in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Only the count of iterations: the schedule itself is code.

        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> ScheduleLR(optimizer, lambda epoch: 0.1 + epoch, samples=4, minibatch=4).state_dict()
        {'last_epoch': 0, '_last_lr': [0.1]}
        """
        return {"last_epoch": self.last_epoch, "_last_lr": self._last_lr}
