"""Initial weights (paper §5.1): He fan-out, zero γ at the end of each residual block, a small classifier."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import pooling
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["init_weights_", "initialize", "last_batchnorms"]

Model = TypeVar("Model", bound=nn.Module)
SHORTCUTS = ("downsample", "shortcut")
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
POOLING = (pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._AdaptiveMaxPoolNd, pooling._AdaptiveAvgPoolNd)


def init_weights_(model: Model, *, zero_gamma: bool = True, generator: torch.Generator | None = None) -> Model:
    """Give a model the paper's initial weights, in place, as torch's functions whose names end in `_` do.

    Convolutions: N(0, 2/fan_out). Linear layers: N(0, 0.01²), bias 0. BatchNorm: γ = 1, β = 0, but γ = 0 in the
    last BatchNorm of each residual block that ends with one, which so starts as the identity (T2b: 24.11 → 23.74 % at
    8k).

    Args:
        model: any model; residual blocks are found by `last_batchnorms`.
        zero_gamma: whether blocks start as the identity.
        generator: the source of randomness; None is torch's own.

    Returns:
        The same model.

    >>> model = init_weights_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    >>> model[1].weight.unique().tolist()
    [1.0]
    """
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01, generator=generator)
        elif isinstance(module, _BatchNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear | _BatchNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)
    if zero_gamma:
        for batchnorm in last_batchnorms(model).values():
            nn.init.zeros_(batchnorm.weight)
    return model


def initialize(model: Model, *, zero_gamma: bool = True, generator: torch.Generator | None = None) -> Model:
    """Use `init_weights_`: this is its old name, which is here for one version more.

    >>> with warnings.catch_warnings(action="ignore"):
    ...     initialize(nn.Linear(2, 3)).bias.tolist()
    [0.0, 0.0, 0.0]
    """
    warnings.warn(
        "initialize is called init_weights_ now, and the old name will go; write init_weights_(model, …)",
        DeprecationWarning,
        stacklevel=2,
    )
    return init_weights_(model, zero_gamma=zero_gamma, generator=generator)


def last_batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The last BatchNorm of each residual block that ends with one, by name.

    A residual block is a module with an attribute `downsample` or `shortcut` (None where the shortcut is the
    identity), as in torchvision, timm and here; its last BatchNorm is the last one outside that shortcut. Left out are
    blocks in which a convolution or a linear layer follows it (pre-activation: a ReLU after γ = 0 would pass no
    gradient, and the branch would never learn), and those whose "shortcut" only pools, which have no residual.

    >>> from onehour.models.resnet import resnet8
    >>> list(last_batchnorms(resnet8()))
    ['layer1.0.bn2', 'layer2.0.bn2', 'layer3.0.bn2']
    """
    found = {}
    for name, block in model.named_modules():
        if not any(_is_shortcut(getattr(block, shortcut)) for shortcut in SHORTCUTS if hasattr(block, shortcut)):
            continue
        branch = [
            (child, module) for child, module in block.named_modules() if child.split(".")[0] not in (*SHORTCUTS, "")
        ]
        norms = [place for place, (_, each) in enumerate(branch) if isinstance(each, _BatchNorm) and each.affine]
        if norms and not _layer_follows(*branch[norms[-1]], branch[norms[-1] + 1 :]):
            child, batchnorm = branch[norms[-1]]
            found[f"{name}.{child}" if name else child] = batchnorm
    return found


def _is_shortcut(value: Any) -> bool:
    """Whether a block's attribute of that name can be its shortcut: a flag cannot, nor can pooling alone."""
    if isinstance(value, nn.Module):
        layers = [
            module for module in value.modules() if not [*module.children()] and type(module) is not nn.Sequential
        ]
        return not layers or not all(isinstance(layer, POOLING) for layer in layers)
    return value is None or callable(value)


def _layer_follows(name: str, batchnorm: nn.Module, rest: list[tuple[str, nn.Module]]) -> bool:
    """Whether the branch goes on after its last BatchNorm, in the same module or in one that wraps a layer.

    Others, such as squeeze-and-excitation, multiply what the BatchNorm gives, and pass its gradient at γ = 0 too.
    """
    layers = [(child.rpartition(".")[0], layer) for child, layer in rest if isinstance(layer, LAYERS)]
    parents = [parent for parent, _ in layers]
    return any(
        parent == name.rpartition(".")[0] or (parents.count(parent) == 1 and _takes(layer) == batchnorm.num_features)
        for parent, layer in layers
    )


def _takes(layer: nn.Module) -> Any:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
