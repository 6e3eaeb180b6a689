"""A schedule as torch's LRScheduler, stepped at every iteration (paper §2.2)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from onehour.rules.arguments import positive_int, whole_number
from onehour.rules.minibatch import Minibatch, size_of
from onehour.rules.momentum import scale_velocity, velocity_inside, write_rates
from onehour.rules.schedule import Schedule

__all__ = ["ScheduleLR"]


class ScheduleLR(LRScheduler):
    """Sets the rate before iteration t from schedule(t·kn / N); call `step()` after every `optimizer.step()`.

    Group g gets schedule(t·kn / N) · η_g / η_0, where η_g is the rate that it starts with (torch's `initial_lr`). So
    the first group follows the schedule, and the others keep their ratios to it. Groups that start alike all get the
    schedule's rate, whatever theirs was. The `lr` of a group that is added later counts against η_0 too, not against
    the first group's rate by then, and is set at the next `step()`. A group with `lr_scale`, as timm's layer decay
    makes them, gets that many times its rate, as by `correct_momentum`.

    Applies the momentum correction where the optimizer keeps its rate inside the velocity (Remark 2).

    Its state and the optimizer's may be loaded in either order, the optimizer's also before the scheduler is made.

    Args:
        optimizer: any torch optimizer whose step() needs no arguments and takes dense gradients, since a copy of it is
            stepped to find the form of its momentum: not LBFGS, whose step needs a closure, nor SparseAdam.
        schedule: the first group's rate as a function of the fractional epoch.
        samples: N, the size of the data set.
        minibatch: kn, images an update over all workers.
        last_epoch: to resume with an optimizer whose state is loaded: the last iteration that was trained, from 0, as
            for torch's schedulers (which call it an epoch). −1 is the start.

    Raises:
        ValueError: if the first group starts at rate 0 and another does not, so that they have no ratio; for sizes or a
            `last_epoch` that are not counts; for an optimizer whose copy cannot be stepped.
        KeyError: torch's, for a `last_epoch` with an optimizer that has never had a scheduler.

    >>> import torch
    >>> from onehour import gradual_warmup, step_decay
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    >>> schedule = gradual_warmup(step_decay(0.4, [30]), start_lr=0.1, epochs=3)
    >>> scheduler = ScheduleLR(optimizer, schedule, samples=100, minibatch=100)
    >>> for _ in range(2):
    ...     optimizer.step(); scheduler.step()
    >>> round(scheduler.get_last_lr()[0], 12)
    0.3

    A head that learns at ten times the rate of the body, at every iteration:

    >>> groups = [{"params": [torch.zeros(1)], "lr": 0.1}, {"params": [torch.zeros(1)], "lr": 1.0}]
    >>> scheduler = ScheduleLR(torch.optim.SGD(groups), step_decay(0.4, [30]), samples=100, minibatch=100)
    >>> scheduler.get_last_lr()
    [0.4, 4.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        samples: int,
        minibatch: Minibatch | int,
        last_epoch: int = -1,
    ) -> None:
        self.schedule = schedule
        self.samples = positive_int("samples", samples)
        self.minibatch = size_of(minibatch)
        last_epoch = whole_number("last_epoch", last_epoch)
        if last_epoch < -1:
            raise ValueError(f"last_epoch must be an iteration, or -1 for the start, got {last_epoch}")
        self._ratios = [_ratio(group, optimizer.param_groups[0]) for group in optimizer.param_groups]
        self._velocity = velocity_inside(optimizer)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of iteration `last_epoch` (torch's name for the count of steps), for each group."""
        groups = self.optimizer.param_groups
        for group in groups[len(self._ratios) :]:
            self._ratios.append(_ratio(group, groups[0]))
            group.setdefault("initial_lr", float(group["lr"]))  # torch asks for it when it resumes
        rate = self.schedule(self.last_epoch * self.minibatch / self.samples)
        rates = [rate * ratio for ratio in self._ratios]
        scale_velocity(self.optimizer, rates, self._velocity)
        write_rates(self.optimizer, rates)  # torch would write them all into a tensor that groups share
        return [*rates]

    def state_dict(self) -> dict[str, Any]:
        """Only the count of iterations: the schedule itself is code."""
        return {"last_epoch": self.last_epoch, "_last_lr": self._last_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, at once: the optimizer's rate, and a velocity with it inside, are those of its iteration.

        Where the scheduler was made after the optimizer's state was loaded, it has set both to the first iteration's.
        """
        super().load_state_dict(state_dict)
        self._last_lr = self.get_lr()


def _ratio(group: dict[str, Any], first: dict[str, Any]) -> float:
    """η_g / η_0 of the rates that two groups start with, times the group's `lr_scale`."""
    own, base = (float(each.get("initial_lr", each["lr"])) for each in (group, first))
    scale, first_scale = (float(each.get("lr_scale", 1.0)) for each in (group, first))
    if own == base:
        return scale
    if base == 0:
        raise ValueError(
            f"the first parameter group starts at rate 0 and another at {own:g}, so that they have no ratio to keep;"
            " put a group whose lr is above zero first"
        )
    if math.isclose(own * first_scale, base * scale):  # its lr has the factor in it already (`layers.scale_rates`)
        return scale
    return own / base * scale
