"""Weight decay is coupled, by parameter group, and never folded into the loss (paper §3, Remark 1; §5.1)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from onehour.rules.arguments import not_negative

__all__ = ["parameter_groups"]

NORMALISATION: tuple[type[nn.Module], ...] = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Modules whose γ and β are not decayed; BatchNorm and InstanceNorm of every dimension derive from the first."""


def parameter_groups(
    model: nn.Module, *, weight_decay: float, without: tuple[type[nn.Module], ...] = NORMALISATION
) -> list[dict[str, Any]]:
    """Two parameter groups for any torch optimizer: decayed with λ, and not decayed.

    w' = w − ηλw − η(1/n)Σ∇ε (eq 8): λ belongs to the optimizer, so that it follows η and not the loss. Which
    parameters decay is decided by the type of the module that owns them, never by a part of a name. A parameter
    that several modules share is decayed if any of them would decay it.

    Args:
        model: its trainable parameters are divided.
        weight_decay: λ, 1e-4 in the paper.
        without: module types whose parameters do not decay.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> [(len(group["params"]), group["weight_decay"]) for group in parameter_groups(model, weight_decay=1e-4)]
    [(1, 0.0001), (2, 0.0)]
    """
    weight_decay = not_negative("weight_decay", weight_decay)
    decayed: dict[int, nn.Parameter] = {}
    kept: dict[int, nn.Parameter] = {}
    for module in model.modules():
        owner = kept if isinstance(module, without) else decayed
        owner.update({id(p): p for p in module.parameters(recurse=False) if p.requires_grad})
    if not decayed and not kept:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    groups = [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": [p for key, p in kept.items() if key not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
