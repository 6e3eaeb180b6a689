"""Steps that have taken hold of their model, for tests that take iterations one by one; and flags that come late."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from onehour import Recipe
from onehour.dist.group import Group
from onehour.training.decisions import decisions_of
from onehour.training.step import HostFlags, Step


def step_of(
    recipe: Recipe,
    model: nn.Module,
    own: list[range],
    *,
    group: Group | None = None,
    optimizer: Optimizer | None = None,
    **options: Any,
) -> Step:
    """Of a recipe's decisions, with its own optimizer unless one is given.

    Args:
        own: the workers of each pass.
    """
    decisions, group = decisions_of(recipe), group or Group()
    optimizer = optimizer or decisions.optimizer(model)
    return Step(decisions, model, optimizer, passes=own, group=group, **options).__enter__()


class LateFlags(HostFlags):
    """Tells of an iteration one later, as on CUDA."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.late, self.earlier = 1, (False, False)

    def read(self, stop: Tensor, alive: Tensor, *, now: bool = False) -> tuple[bool, bool]:
        found = super().read(stop, alive)
        told, self.earlier = found if now else self.earlier, found
        return told
