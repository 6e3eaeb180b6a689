"""The network of the folders that 0.1 wrote, and a logger that asks a run to stop after its first epoch."""

import os
import signal
from typing import Any

from torch import nn


def net() -> nn.Module:
    """A convolution, BatchNorm and a classifier: 3 KB of weights."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


class Stops:
    """Three methods make a logger."""

    def start(self, recipe: dict[str, Any], folder: Any) -> None:
        """Nothing."""

    def log(self, record: dict[str, Any]) -> None:
        """Ask for a stop."""
        os.kill(os.getpid(), signal.SIGTERM)

    def finish(self, summary: dict[str, Any]) -> None:
        """Nothing."""
