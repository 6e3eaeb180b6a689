"""A few numbers that stand for gradients and weights: fixed random projections, which add as the tensors do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

PARAMETERS, PROJECTIONS, ELEMENTS = 4, 2, 1 << 16
"""How many parameters of an optimizer are looked at, numbers for each, and how much of a large one."""


def chosen_parameters(parameters: Iterable[Tensor]) -> list[Tensor]:
    """A few trainable parameters, the first, the last and some between: enough to see how gradients are combined.

    >>> [p.numel() for p in chosen_parameters(torch.ones(n, requires_grad=True) for n in range(1, 9))]
    [1, 3, 6, 8]
    """
    trainable = [p for p in parameters if p.requires_grad and p.is_leaf and p.is_floating_point() and p.numel()]
    last = len(trainable) - 1
    picks = sorted({round(i * last / (PARAMETERS - 1)) for i in range(PARAMETERS)}) if trainable else []
    return [trainable[i] for i in picks]


def projections(tensors: Sequence[Tensor | None]) -> list[float]:
    """Projections of each tensor onto fixed directions, in float64; None counts as zeros.

    >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    >>> all(abs(x + y - z) < 1e-9 for x, y, z in zip(projections([a]), projections([b]), projections([a + b])))
    True
    """
    return [number for tensor in tensors for number in _project(tensor)]


def _project(tensor: Tensor | None) -> list[float]:
    if tensor is None:
        return [0.0] * PROJECTIONS
    directions = _directions(min(tensor.numel(), ELEMENTS))
    numbers = (directions @ leading(tensor)).tolist()
    return [number if math.isfinite(number) else 0.0 for number in numbers]


@torch.no_grad()
def leading(tensor: Tensor) -> Tensor:
    """The first elements of a tensor, flat, in float64 on the CPU: always the same ones.

    >>> leading(torch.ones(2, 2)).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    return dense.reshape(-1)[:ELEMENTS].to("cpu", torch.float64, copy=True)


@lru_cache(maxsize=64)
def _directions(elements: int) -> Tensor:
    generator = torch.Generator().manual_seed(elements)  # one of its own: the user's numbers stay as they are
    return torch.randn(PROJECTIONS, elements, generator=generator, dtype=torch.float64)
