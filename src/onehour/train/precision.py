"""How a batch goes through the model: precision and memory format, the same in training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onehour.config import Recipe

__all__ = ["forward"]


def forward(model: Callable[[Tensor], Any], images: Tensor, recipe: Recipe) -> Tensor:
    """The model's logits, in float32 again after autocast: in bfloat16 a sum over kn would be coarse.

    >>> forward(torch.nn.Identity(), torch.zeros(1, 2), Recipe(precision="float64")).dtype
    torch.float64
    """
    if recipe.precision == "float64":
        images = images.double()
    if recipe.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    if recipe.precision != "bf16":
        return model(images)
    with torch.autocast(images.device.type, torch.bfloat16):
        return model(images).float()
