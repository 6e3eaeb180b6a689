"""The digits, read by index; an epoch of two processes takes PACE seconds, in which the run can be disturbed."""

from __future__ import annotations

import os
import time
from typing import Any

from torch.utils.data import Dataset, TensorDataset

from onehour.data import digits as plain

__all__ = ["digits"]


SAMPLES = 2048


class Paced(Dataset[Any]):
    """A data set whose samples take their time."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples
        self.seconds = 2 * float(os.environ.get("PACE", "0")) / SAMPLES

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.seconds)
        return self.samples[index]


def digits() -> tuple[Paced, TensorDataset]:
    """A quarter of the recipe's own data, so that starting takes longer than training, paced."""
    train, validation = plain.digits()
    return Paced(train), TensorDataset(*(tensor[:512] for tensor in validation.tensors))
