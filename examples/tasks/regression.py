"""Regression: samples are dicts, targets are numbers, and each sample has a weight.

onehour train regression.toml --trust
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import onehour


class Springs(Dataset[dict[str, Any]]):
    """Length of a spring under a load, with how much each measurement is to be trusted."""

    def __init__(self, count: int, *, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.inputs = torch.rand(count, 3, generator=draw)
        self.weights = torch.rand(count, generator=draw)
        load, stiffness, length = self.inputs.unbind(1)
        noise = 0.1 * torch.randn(count, generator=draw) * (1 - self.weights)
        self.lengths = length + load / (0.5 + stiffness) + noise

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "inputs": self.inputs[index],
            "length": self.lengths[index],
            "weight": self.weights[index],
            "name": f"spring {index}",
        }


def data() -> tuple[Springs, Springs]:
    return Springs(400, seed=0), Springs(100, seed=1)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))


def task(model: nn.Module, batch: dict[str, Tensor]) -> onehour.Sums:
    off, weight = model(batch["inputs"])[:, 0] - batch["length"], batch["weight"]
    return onehour.Sums(
        loss=(weight * off.square()).sum(),
        count=weight.sum(),
        metrics={"distance [m]": (off.abs().sum(), off.numel())},
    )
