"""The model that a recipe names."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from onehour.entry import LIBRARIES, is_entry, resolve
from onehour.messages import blame, nearest
from onehour.models import resnet

SMALL = (resnet.resnet8, resnet.resnet8_wide, resnet.resnet18, resnet.resnet18_cifar, resnet.resnet34)
LARGE = (resnet.resnet50, resnet.resnet101, resnet.resnet152)
MODELS: dict[str, Callable[..., nn.Module]] = {function.__name__: function for function in (*SMALL, *LARGE)}


def brings_weights(spec: str) -> bool:
    """Whether a model comes from someone's function, whose initial weights are theirs to choose."""
    if spec in MODELS or spec.partition(":")[0] in LIBRARIES:
        return False
    if not is_entry(spec):
        raise ValueError(
            f"no model is called {spec!r}; expected {nearest(spec, MODELS)}, timm:NAME, torchvision:NAME or"
            " package.module:function"
        )
    return True


def load_model(spec: str, *, channels: int, classes: int | None) -> nn.Module:
    """Build a model by name, or by calling package.module:function without arguments.

    Args:
        spec: one of `MODELS`, timm:NAME, torchvision:NAME, or package.module:function.
        channels: channels of the images; not for functions.
        classes: labels; not for functions.
    """
    if not brings_weights(spec):
        if classes is None:
            raise ValueError(f"model {spec} must know how many classes the data has; give --classes")
        if spec in MODELS:
            return MODELS[spec](channels=channels, classes=classes)
        return _from_library(*spec.split(":", 1), channels=channels, classes=classes)
    return call(f"model {spec}", resolve("model", spec))


def call(title: str, function: Callable[[], Any]) -> nn.Module:
    """The model that someone's function makes."""
    try:
        model = function()
    except Exception as error:
        raise ValueError(f"{title} failed when called: {blame(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{title} returned {type(model).__name__}; expected a torch.nn.Module")
    return model


def pretrained_weights(spec: str) -> dict[str, Tensor]:
    """The weights that timm or torchvision has for a model, its own classifier among them."""
    library, _, name = spec.partition(":")
    found = _imported(library, f"init {spec}")
    try:
        if library == "timm":
            model = found.create_model(name, pretrained=True)
        else:
            model = found.models.get_model(name, weights="DEFAULT", progress=False)
    except Exception as error:
        raise ValueError(
            f"init {spec} cannot be loaded: {blame(error)}; check the name and the network connection"
        ) from error
    return model.state_dict()


def _imported(library: str, title: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ValueError(f"{title} needs a package: pip install 'onehour[vision]'") from error
    except Exception as error:  # a torchvision that was built for another torch
        raise ValueError(f"{title}: {library} cannot be imported: {blame(error)}") from error


def _from_library(library: str, name: str, *, channels: int, classes: int) -> nn.Module:
    found = _imported(library, f"model {library}:{name}")
    try:
        if library == "timm":
            return found.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
        return found.models.get_model(name, weights=None, num_classes=classes)
    except Exception as error:
        raise ValueError(f"model {library}:{name} cannot be built: {blame(error)}") from error
