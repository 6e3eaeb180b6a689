"""Parameters chosen by their names: those that do not train, and those with a rate of their own."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from onehour.rules.names import match_names


def freeze_(model: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """Parameters that a pattern matches no longer train, and their BatchNorm keeps its running statistics.

    A BatchNorm all of whose parameters match, or whose statistics do if it has none, normalises by them in training
    too, as in evaluation, and no iteration moves them.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    >>> [layer.training for layer in freeze_(model, ["0.*", "1.*"]).train()]
    [True, False, True]
    """
    if not patterns:
        return model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    match_names(patterns, [*parameters], what="freeze", of="parameter")
    tensors = [*parameters, *(name for name, _ in model.named_buffers())]
    matched = {name for pattern in patterns for name in fnmatch.filter(tensors, pattern)}
    for name in matched & parameters.keys():
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"freeze {', '.join(patterns)} leaves no parameter to train")
    for path, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)] or ["running_mean"]
        if isinstance(module, _NormBase) and matched.issuperset(f"{path}.{name}".lstrip(".") for name in own):
            module.eval()
            module.track_running_stats = False
            module.train = MethodType(_stay, module)
    return model


def _stay(layer: nn.Module, mode: bool = True) -> nn.Module:
    """In place of `train`: it is in evaluation mode, whatever its model is in."""
    return layer


def frozen_statistics(model: nn.Module) -> int:
    """How many layers have running statistics that nothing moves."""
    layers = [module for module in model.modules() if isinstance(module, _NormBase)]
    return sum(layer.running_mean is not None and not layer.track_running_stats for layer in layers)


def scale_rates(
    groups: Sequence[dict[str, Any]], model: nn.Module, factors: Mapping[str, float], *, lr: float
) -> list[dict[str, Any]]:
    """Parameter groups divided by factors of the rate, each with its `lr`, and the factor as `lr_scale`, as in timm.

    Those without a factor come first: where a schedule sets the first group's rate, the others keep their ratios to it.

    >>> model = nn.Linear(2, 2)
    >>> groups = scale_rates([{"params": [*model.parameters()]}], model, {"bias": 2.0}, lr=0.1)
    >>> [(len(group["params"]), group.get("lr")) for group in groups]
    [(1, None), (1, 0.2)]
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matched = match_names([*factors], [*trained], what="layer_rates", of="parameter that trains")
    pattern_of: dict[str, str] = {}
    for pattern, names in matched.items():
        for name in names:
            if name in pattern_of:
                raise ValueError(f"layer_rates {pattern_of[name]!r} and {pattern!r} both match {name}; only one may")
            pattern_of[name] = pattern
    factor_of = {id(trained[name]): factors[pattern] for name, pattern in pattern_of.items()}
    divided: list[dict[str, Any]] = []
    for factor in (1.0, *sorted({*factors.values()} - {1.0})):
        rate = {} if factor == 1 else {"lr": lr * factor, "lr_scale": factor}
        for group in groups:
            own = [p for p in group["params"] if factor_of.get(id(p), 1.0) == factor]
            if own:
                divided.append({**group, **rate, "params": own})
    return divided
