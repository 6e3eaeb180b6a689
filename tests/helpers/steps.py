"""Steps that have taken hold of their model, for tests that take iterations one by one."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from onehour import Recipe
from onehour.dist.group import Group
from onehour.training.decisions import decisions_of
from onehour.training.step import Step


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
