"""From sums over workers to the mean over the whole minibatch (paper §3, Remark 3)."""

from __future__ import annotations

from typing import Any

from onehour.rules.minibatch import Minibatch, size_of

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
    return loss_sum / size_of(minibatch)


def halve(span: range) -> tuple[range, range]:
    """The two halves of a range, the first the shorter: the one division that the canonical tree is made of."""
    middle = (span.start + span.stop) // 2
    return range(span.start, middle), range(middle, span.stop)


def merges_after(workers: range) -> list[int]:
    """How many sums of the tree over `workers` are complete, one within the other, once each worker's value is there.

    The tree is sum(a, b) = sum(a, m) + sum(m, b) with m the middle: floating-point addition depends on its order, and
    this order depends on k alone. Any division of the workers among processes that follows it (`place_by_halving`) can
    therefore give the same bits.

    Adding the two newest values that often after each worker walks the tree with at most log2(k) + 1 values held.

    >>> merges_after(range(0, 5))
    [0, 1, 0, 0, 3]
    """
    counts = [0] * len(workers)

    def visit(span: range) -> None:
        if len(span) > 1:
            counts[span.stop - 1 - workers.start] += 1
            for half in halve(span):
                visit(half)

    visit(workers)
    return counts
