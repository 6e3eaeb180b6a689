"""Several models of one shape as one network: model s owns the s-th share of every layer's channels.

Convolutions get S times the groups, BatchNorm S times the channels, linear layers become batched products; what stands
between them in the model's forward works channel by channel and need not know. That this is so is tried, not assumed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer

__all__ = ["JoinedLinear", "join_models", "join_optimizer", "refuse_difference", "split_models", "split_optimizer"]


class JoinedLinear(nn.Module):
    """S linear layers side by side.

    Args:
        layers: of one shape.

    Shape:
        (N, S·in) → (N, S·out).

    >>> JoinedLinear([nn.Linear(3, 2), nn.Linear(3, 2)])(torch.zeros(5, 6)).shape
    torch.Size([5, 4])
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.models = len(layers)
        weight = _joined([layer.weight for layer in layers])
        assert weight is not None
        self.weight = weight
        self.bias = _joined([layer.bias for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        parts = x.view(len(x), self.models, -1).transpose(0, 1)
        weight = self.weight.view(self.models, -1, parts.shape[2]).transpose(1, 2)
        y = torch.bmm(parts, weight).transpose(0, 1).reshape(len(x), -1)
        return y if self.bias is None else y + self.bias


def join_models(models: Sequence[nn.Module]) -> nn.Module:
    """One network of several: (N, S·C, …) → (N, S·classes), for models of convolutions, linear layers and BatchNorm.

    Raises:
        ValueError: for a layer with parameters or buffers of another kind, or a parameter that several layers share.

    >>> join_models([nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)])(torch.zeros(2, 2, 5, 5)).shape
    torch.Size([2, 8, 3, 3])
    """
    named = list(models[0].named_parameters(remove_duplicate=False))
    if len(named) > len(list(models[0].parameters())):
        raise ValueError("several layers share a parameter, which cannot be joined")
    joined = copy.deepcopy(models[0])
    for path, module in list(joined.named_modules()):
        alike = [model.get_submodule(path) for model in models]
        if isinstance(module, nn.Linear):
            replaced: nn.Module = JoinedLinear(alike)  # type: ignore[arg-type]
        elif isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
            replaced = _widen(module, alike, ("in_channels", "out_channels", "groups"))
        elif isinstance(module, _BatchNorm):
            replaced = _widen(module, alike, ("num_features",))
        elif list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
            raise ValueError(f"{path or 'the model'} is a {type(module).__name__}, which cannot be joined")
        else:
            continue
        if not path:
            return replaced
        parent, _, name = path.rpartition(".")
        setattr(joined.get_submodule(parent), name, replaced)
    return joined


def split_models(joined: nn.Module, models: Sequence[nn.Module]) -> None:
    """Copy each model's share of the joined network back into it.

    >>> models = [nn.Linear(2, 1), nn.Linear(2, 1)]
    >>> split_models(join_models(models), models)
    """
    for name, tensor in joined.state_dict().items():
        targets = [model.state_dict()[name] for model in models]
        for target, part in zip(targets, _split(tensor, targets[0], len(models)), strict=True):
            target.copy_(part)


def join_optimizer(joined: Optimizer, model: nn.Module, parts: Sequence[tuple[Optimizer, nn.Module]]) -> None:
    """Fill the state of the joined network's optimizer with that of each model's."""
    parameters = [dict(part.named_parameters()) for _, part in parts]
    for name, parameter in model.named_parameters():
        states = [optimizer.state.get(own[name], {}) for (optimizer, _), own in zip(parts, parameters, strict=True)]
        for key, first in states[0].items():
            if torch.is_tensor(first) and first.shape == parameters[0][name].shape:
                joined.state[parameter][key] = torch.cat([state[key] for state in states])
            else:
                joined.state[parameter][key] = copy.deepcopy(first)


def split_optimizer(joined: Optimizer, model: nn.Module, parts: Sequence[tuple[Optimizer, nn.Module]]) -> None:
    """Copy each model's share of the joined optimizer's state back."""
    parameters = [dict(part.named_parameters()) for _, part in parts]
    for name, parameter in model.named_parameters():
        for key, value in joined.state.get(parameter, {}).items():
            shares = _split(value, parameters[0][name], len(parts)) if torch.is_tensor(value) else [value] * len(parts)
            for (optimizer, _), own, share in zip(parts, parameters, shares, strict=True):
                optimizer.state[own[name]][key] = share.clone() if torch.is_tensor(share) else share


@torch.no_grad()
def refuse_difference(models: Sequence[nn.Module], images: Tensor) -> None:
    """Try the joined network on each model's own images, in float64, in training and in evaluation.

    Args:
        images: (S, N, C, …), a whole number of workers.

    Raises:
        ValueError: if the models do not give the same logits alone: something in between mixes the channels.
    """
    try:
        alone = [copy.deepcopy(model).double() for model in models]
        # As weights are later: a γ of zero hides what its block does, a scale of one that it was left out.
        noise = torch.Generator().manual_seed(0)
        for parameter in (p for model in alone for p in model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=noise).to(parameter), alpha=0.1)
        joined = join_models(alone)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the model cannot be copied and joined: {type(error).__name__}") from error
    images = images.double()
    for training in (True, False):
        joined.train(training)
        try:
            together = joined(images.transpose(0, 1).flatten(1, 2))
        except Exception as error:
            raise ValueError(f"the joined network fails: {type(error).__name__}") from error
        for number, (model, own) in enumerate(zip(alone, images, strict=True)):
            expected = model.train(training)(own)
            classes = expected.shape[1]
            found = together[:, number * classes : (number + 1) * classes]
            if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-9, atol=1e-9):
                raise ValueError("the joined network gives other logits")


def _widen(layer: nn.Module, alike: Sequence[nn.Module], fields: tuple[str, ...]) -> nn.Module:
    wide: Any = copy.deepcopy(layer)
    for field in fields:
        setattr(wide, field, getattr(layer, field) * len(alike))
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(wide, name, _joined([getattr(other, name) for other in alike]))
        assert parameter.shape[0] * len(alike) == getattr(wide, name).shape[0]
    for name, buffer in layer.named_buffers(recurse=False):
        if buffer.ndim:
            setattr(wide, name, torch.cat([getattr(other, name) for other in alike]))
    return wide


def _joined(parameters: Sequence[Tensor | None]) -> nn.Parameter | None:
    given = [parameter.detach() for parameter in parameters if parameter is not None]
    first = parameters[0]
    return None if first is None else nn.Parameter(torch.cat(given), requires_grad=first.requires_grad)


def _split(tensor: Tensor, like: Tensor, models: int) -> Sequence[Tensor]:
    if not tensor.ndim:  # a count, the same for all
        return [tensor] * models
    return [part.view(like.shape) for part in tensor.chunk(models)]
