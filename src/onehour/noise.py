"""Gradient noise: how large a minibatch is when its gradient is as large as the noise in it.

Usable alone in anyone's loop. The noise scale is B = tr Σ / |G|², with G the mean of single samples' gradients and Σ
their covariance (McCandlish et al. 2018, arXiv:1812.06162). Well below B a gradient is mostly noise, and a minibatch
twice as large allows a step twice as long, which is the linear rule (§2.1); well above it allows none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from onehour.rules.arguments import number

__all__ = ["FEWEST", "NoiseScale", "noise_scale", "trace_and_square"]

FEWEST = 8
"""Points below which an interval says little."""
Z = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class NoiseScale:
    """What some points of a run say together.

    Args:
        points: how many.
        trace: mean of tr Σ.
        square, square_error: mean of |G|², and its standard error.
        scale: B, in samples; None where it is not estimable, since |G|² is not above its own error or tr Σ not above 0.
        low, high: the 95 % interval of B; `high` is None where nothing bounds it, `low` where nothing is known.
    """

    points: int
    trace: float
    square: float
    square_error: float
    scale: float | None
    low: float | None
    high: float | None


def trace_and_square(small: float, big: float, *, small_size: int, big_size: int) -> tuple[float, float]:
    """Unbiased (tr Σ, |G|²) of one point, from squared norms of gradients at the same weights for two sizes.

    E|g_b|² = |G|² + tr Σ / b for the mean g_b of b samples' gradients, hence with s < b

        |G|² = (b·|g_b|² − s·|g_s|²) / (b − s)  and  tr Σ = (|g_s|² − |g_b|²) / (1/s − 1/b).

    Either may be below zero by chance: pool points, and divide once.

    Args:
        small: |g_s|²; of several disjoint minibatches of `small_size`, their mean.
        big: |g_b|²; of the same minibatches, the square of their gradients' mean.
        small_size, big_size: s and b in samples.

    Raises:
        ValueError: unless 1 ≤ small_size < big_size.

    >>> trace_and_square(5.0, 2.0, small_size=1, big_size=4)
    (4.0, 1.0)
    """
    if not 1 <= small_size < big_size:
        raise ValueError(f"small_size must be from 1 to below big_size, got {small_size} and {big_size}")
    small, big = number("small", small), number("big", big)
    square = (big_size * big - small_size * small) / (big_size - small_size)
    return (small - big) / (1 / small_size - 1 / big_size), square


def noise_scale(points: Iterable[tuple[float, float]]) -> NoiseScale:
    """B = Σ tr Σ_t / Σ |G_t|² over the points t of a run, with its 95 % interval (Fieller's).

    The interval has every B for which the mean of tr Σ_t − B·|G_t|² is not told from zero by Student's t-test. Where
    |G|² is not above its own error it has no upper end.

    Args:
        points: (tr Σ_t, |G_t|²) of `trace_and_square`, from iterations far enough apart to be different ones.

    Raises:
        ValueError: for fewer than two points, or one that is not finite.

    >>> noise_scale([(90.0, 1.0), (110.0, 1.2), (100.0, 0.8)]).scale
    100.0
    """
    known = list(points)
    count = len(known)
    if count < 2:
        raise ValueError(f"a noise scale needs at least two points, got {count}")
    if overflown := [point for point in known if not all(map(math.isfinite, point))]:
        raise ValueError(f"points must be finite, got {overflown[0]}; leave out those whose gradients overflowed")
    traces, squares = [trace for trace, _ in known], [square for _, square in known]
    trace, square = statistics.fmean(traces), statistics.fmean(squares)
    wide = _student(count - 1) ** 2 / count
    square_variance = statistics.variance(squares)
    # Those B for which a·B² − 2·b·B + c ≤ 0.
    a = square**2 - wide * square_variance
    b = trace * square - wide * statistics.covariance(traces, squares)
    c = trace**2 - wide * statistics.variance(traces)
    scale = low = high = None
    root = math.sqrt(max(0.0, b * b - a * c))  # rounding alone brings it below zero
    if trace <= 0:
        pass  # no B above zero is likelier than B = 0
    elif a > 0 and square > 0:
        scale, low, high = trace / square, max(0.0, (b - root) / a), (b + root) / a
    elif a < 0 < c:
        low = (b - root) / a
    return NoiseScale(count, trace, square, math.sqrt(square_variance / count), scale, low, high)


def _student(freedom: int) -> float:
    """The 97.5 % point of Student's t: exact for ν ≤ 2, from there on to 0.01 by an expansion about the normal's."""
    if freedom <= 2:
        return math.tan(0.475 * math.pi) if freedom == 1 else 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
