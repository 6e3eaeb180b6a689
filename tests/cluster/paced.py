"""The digits, read by index; every look at the validation data takes PACE seconds, in which a run can be disturbed."""

from __future__ import annotations

import os
import time
from typing import Any

from torch.utils.data import Dataset, TensorDataset

from onehour.data import digits as plain

__all__ = ["digits"]


class Paced(Dataset[Any]):
    """A data set whose first sample takes its time."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples) // 8

    def __getitem__(self, index: int) -> Any:
        if index == 0:
            time.sleep(float(os.environ.get("PACE", "0")))
        return self.samples[index]


def digits() -> tuple[TensorDataset, Paced]:
    """A quarter of the recipe's own data, so that starting takes longer than training, paced."""
    train, validation = plain.digits()
    return TensorDataset(*(tensor[:2048] for tensor in train.tensors)), Paced(validation)
