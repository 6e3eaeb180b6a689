"""The model that a recipe names."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from onehour.config import nearest
from onehour.entry import blame, is_entry, resolve
from onehour.models import resnet, small

__all__ = ["MODELS", "load_model"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": small.resnet8,
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
}


def load_model(spec: str, *, channels: int, classes: int | None) -> nn.Module:
    """Build a model by name, or by calling package.module:function without arguments.

    Args:
        spec: one of `MODELS`, or package.module:function.
        channels: channels of the images; for named models.
        classes: labels; for named models.

    Raises:
        ValueError: for an unknown name, a function that fails, or one that returns no torch.nn.Module.

    >>> load_model("resnet8", channels=1, classes=10).fc.out_features
    10
    """
    if spec in MODELS:
        if classes is None:
            raise ValueError(f"model {spec} must know how many classes the data has; give --classes")
        return MODELS[spec](channels=channels, classes=classes)
    if not is_entry(spec):
        raise ValueError(f"no model is called {spec!r}; expected {nearest(spec, MODELS)}, or package.module:function")
    function = resolve("model", spec)
    try:
        model = function()
    except Exception as error:
        raise ValueError(f"model {spec} failed when called: {blame(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {spec} returned {type(model).__name__}; expected a torch.nn.Module")
    return model
