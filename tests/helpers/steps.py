"""Steps that have taken hold of their model, for tests that take iterations one by one."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from onehour import Recipe
from onehour.dist.group import Group
from onehour.training.decisions import decisions_of
from onehour.training.state import Network
from onehour.training.step import Step


def step_of(
    recipe: Recipe,
    model: nn.Module,
    own: list[range],
    *,
    group: Group | None = None,
    optimizer: Optimizer | None = None,
    ema: float | None = None,
    **options: Any,
) -> Step:
    """Of a recipe's decisions, with its own optimizer unless one is given.

    Args:
        own: the workers of each pass.
    """
    network = Network(model, optimizer or decisions_of(recipe).optimizer(model), ema=ema)
    return step_through(recipe, network, own, group=group, **options)


def step_through(
    recipe: Recipe, network: Network, own: list[range], *, group: Group | None = None, **options: Any
) -> Step:
    """As `step_of`, through a network that is there."""
    per_pass = max(map(len, own))
    step = Step(decisions_of(recipe), network, per_pass=per_pass, group=group or Group(), **options).__enter__()
    assert step.passes == own
    return step
