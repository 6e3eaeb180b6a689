"""From sums over workers to the mean over the whole minibatch (paper §3, Remark 3)."""

from __future__ import annotations

from typing import Any

from onehour.rules.checks import positive_int
from onehour.rules.minibatch import Minibatch

__all__ = ["global_mean"]


def global_mean(loss_sum: Any, minibatch: Minibatch | int) -> Any:
    """(1/kn)·Σ: divide a worker's summed loss by the global count, once, before backward (Remark 3).

    Then the workers' gradients only need to be summed, and the sum is the mean over the minibatch whatever share
    each worker has. Means of 1/n summed would be k times too large.

    Args:
        loss_sum: Σ of the worker's sample losses (`reduction="sum"`), a tensor or a number.
        minibatch: kn, samples over all workers.

    >>> global_mean(6.0, Minibatch(per_worker=2, workers=3))
    1.0
    """
    size = minibatch.size if isinstance(minibatch, Minibatch) else positive_int("minibatch", minibatch)
    return loss_sum / size
