"""How near float64 sums of another order must be."""

from typing import Any

import torch


def exact(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)  # float64 sums of order 1
