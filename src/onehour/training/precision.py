"""How a batch goes through the model: precision and memory format, the same in training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from onehour.config import Recipe
from onehour.messages import blame
from onehour.training.memory import out_of_memory

__all__ = ["forward"]


def forward(model: Callable[[Tensor], Any], images: Tensor, recipe: Recipe) -> Tensor:
    """The model's logits, in float32 again after autocast: in bfloat16 a sum over kn would be coarse.

    Raises:
        ValueError: if the model fails, or returns no logits.

    >>> forward(torch.nn.Identity(), torch.zeros(1, 2), Recipe(precision="float64")).dtype
    torch.float64
    """
    if recipe.precision == "float64":
        images = images.double()
    if recipe.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    halved = recipe.precision == "bf16"
    try:
        with torch.autocast(images.device.type, torch.bfloat16) if halved else nullcontext():
            logits = model(images)
    except Exception as error:
        if out_of_memory(error):
            raise
        taken = f"{tuple(images.shape[1:])}, {images.dtype}"
        hint = "" if halved or images.dtype == torch.float32 else "; give float32 images, or precision float64"
        raise ValueError(f"the model cannot take the data's images {taken}: {blame(error)}{hint}") from error
    if not torch.is_tensor(logits) or logits.ndim != 2 or not logits.is_floating_point():
        shape = type(logits).__name__
        if torch.is_tensor(logits):
            shape = f"{tuple(logits.shape)}" + ("" if logits.is_floating_point() else f" of {logits.dtype}")
        raise ValueError(f"the model returned {shape}; expected logits of shape (N, classes)")
    return logits.float() if halved else logits
