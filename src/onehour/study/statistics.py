"""Is one set of errors larger than another, or within a margin of it? The tests that verdicts rest on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

__all__ = ["Sample", "early_gap", "holm", "mean_curve", "p_holds", "p_worse", "smallest_p", "welch_upper"]

COUNTED = 60
"""Up to so many runs in all, the rank test counts every arrangement: the counts fit in 64 bits."""

ROUNDING = 1e-9
"""Points: what floats may add to the difference of two means, which matters where no run differs from another."""


@dataclass(frozen=True)
class Sample:
    """Final errors over seeds, as a table's entry gives them (paper §5.1): mean ± std of n runs.

    Args:
        mean: in percent; nan for n = 0.
        std: in points, with n − 1; nan for n < 2.
        n: how many runs.
        values: each run's error where they are known; without them rank tests give way to Welch's.

    Raises:
        ValueError: if these do not fit together, or an error is not finite.

    >>> Sample.of([3.0, 4.0]).n
    2
    """

    mean: float
    std: float
    n: int
    values: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.n < 0 or not (math.isfinite(self.mean) or self.n == 0):
            raise ValueError(f"a mean of n runs needs n of at least 0 and finite errors, got {self.mean} of {self.n}")
        if self.n > 1 and not 0 <= self.std < math.inf:
            raise ValueError(f"std must be finite and not below zero for {self.n} runs, got {self.std}")
        if self.n < 2 and not math.isnan(self.std):
            raise ValueError(f"{self.n} run has no std, got {self.std}; give nan")
        if self.values is not None and len(self.values) != self.n:
            raise ValueError(f"n is {self.n}, but there are {len(self.values)} values")

    @classmethod
    def of(cls, values: Iterable[float]) -> Sample:
        """The sample of each run's error, in percent.

        A run that left the finite numbers has the error of chance: nothing is dropped.

        >>> Sample.of([3.25, 3.75, 90.0]).n
        3
        >>> Sample.of([3.25])
        Sample(mean=3.25, std=nan, n=1, values=(3.25,))
        """
        errors = tuple(float(value) for value in values)
        if not all(map(math.isfinite, errors)):
            raise ValueError(f"errors must be finite, got {errors}; a run that diverged has the error of chance")
        mean = statistics.fmean(errors) if errors else math.nan
        return cls(mean, statistics.stdev(errors) if len(errors) > 1 else math.nan, len(errors), errors)

    @classmethod
    def known(cls, mean: float, std: float, n: int) -> Sample:
        """The sample of which only mean, std and n are known.

        >>> Sample.known(23.60, 0.12, n=5)
        Sample(mean=23.6, std=0.12, n=5, values=None)
        """
        return cls(mean, std, n)


def welch_upper(a: Sample, b: Sample, level: float = 0.95) -> float:
    """The upper end of the one-sided Welch interval of mean(a) − mean(b), in points.

    d + t(level, ν)·s with s² = s_a²/n_a + s_b²/n_b and Welch and Satterthwaite's
    ν = s⁴ / ((s_a²/n_a)²/(n_a − 1) + (s_b²/n_b)²/(n_b − 1)); d itself where no run differs from another.

    Raises:
        ValueError: if a side has fewer than two runs, level is not in (0, 1), or scipy is missing.

    >>> round(welch_upper(Sample.known(23.74, 0.09, 5), Sample.known(23.60, 0.12, 5)), 3)
    0.266
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    error, freedom = _welch(a, b)
    difference = a.mean - b.mean
    return difference + error * float(_special().stdtrit(freedom, level)) if error else difference


def p_worse(a: Sample, b: Sample) -> float:
    """One-sided p that a's errors are larger than b's, under the hypothesis that they are not.

    Mann and Whitney's test over every arrangement of the ranks, ties included (beyond 60 runs scipy's choice);
    Welch's t-test where a side's single errors are not known.

    Raises:
        ValueError: if a side has no run (for Welch's test: fewer than two), or scipy is needed and missing.

    >>> p_worse(Sample.of([5, 6, 7, 8, 9]), Sample.of([0, 1, 2, 3, 4])) == 1 / 252
    True
    >>> p_worse(Sample.known(24.79, 0.27, 5), Sample.known(23.60, 0.12, 5)) < 0.001
    True
    """
    if a.values is None or b.values is None:
        return _p_below(b, a, 0.0)
    if not (a.values and b.values):
        raise ValueError("a test needs at least one run on each side")
    if a.n + b.n <= COUNTED:
        return _p_ranks(a.values, b.values)
    return float(_stats().mannwhitneyu(a.values, b.values, alternative="greater").pvalue)


def p_holds(a: Sample, b: Sample, margin: float) -> float:
    """One-sided Welch p that mean(a) − mean(b) is under the margin, under the hypothesis that it is not.

    p < .05 says the same as `welch_upper(a, b) < margin`.

    Raises:
        ValueError: if a side has fewer than two runs, or scipy is missing.

    >>> p_holds(Sample.known(23.74, 0.09, 5), Sample.known(23.60, 0.12, 5), margin=0.5) < 0.001
    True
    """
    return _p_below(a, b, margin)


def smallest_p(a: Sample, b: Sample) -> float:
    """The smallest `p_worse` that so many runs can give: 1 / C(n_a + n_b, n_a); 0 where Welch's test is used.

    >>> smallest_p(Sample.of([1, 2, 3]), Sample.of([4, 5, 6]))
    0.05
    """
    return 0.0 if a.values is None or b.values is None else 1 / math.comb(a.n + b.n, a.n)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: any of m true hypotheses is rejected with at most the stated chance.

    The i-th smallest becomes max over j ≤ i of (m − j + 1)·p_j, and at most 1.

    Raises:
        ValueError: if one is not in [0, 1].

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    if not all(0 <= p <= 1 for p in ps):
        raise ValueError(f"p-values must lie in [0, 1], got {list(ps)}")
    adjusted, largest = [0.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = largest
    return adjusted


def mean_curve(curves: Iterable[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean over seeds of curves of (epoch, error), at the epochs that every seed has reached.

    >>> mean_curve([[(1, 40.0), (2, 20.0)], [(1, 50.0)]])
    [(1, 45.0)]
    """
    tables = [dict(curve) for curve in curves]
    shared = set.intersection(*map(set, tables)) if tables else set()
    return [(epoch, statistics.fmean(table[epoch] for table in tables)) for epoch in sorted(shared)]


def early_gap(
    curve: Sequence[tuple[float, float]], base_curve: Sequence[tuple[float, float]], start: float, stop: float
) -> float:
    """The early sign of failure (§5.2, F2): the mean gap of two training curves, in points.

    Where scaling works the curves overlap from the end of warmup on; a gap before the first drop of the rate tells
    that the final error will be worse.

    Args:
        curve, base_curve: (epoch, training error in percent), by epoch; the mean over seeds (`mean_curve`). Between its
            epochs the base is taken as straight.
        start: the epoch at which warmup ends. What is logged at it was trained before, so it does not count.
        stop: the epoch of the first drop; it counts.

    Returns:
        Mean of curve − base over the curve's epochs in (start, stop] that the base covers; nan if there is none.

    >>> early_gap([(4, 50.0), (5, 30.0), (6, 22.0)], [(4, 20.0), (5, 20.0), (6, 20.0)], start=4, stop=6)
    6.0
    """
    if not base_curve:
        return math.nan
    epochs, errors = zip(*base_curve, strict=True)
    gaps = [
        error - float(np.interp(epoch, epochs, errors))
        for epoch, error in curve
        if start < epoch <= stop and epochs[0] <= epoch <= epochs[-1]
    ]
    return statistics.fmean(gaps) if gaps else math.nan


def _welch(a: Sample, b: Sample) -> tuple[float, float]:
    """Standard error of mean(a) − mean(b), and its degrees of freedom."""
    if min(a.n, b.n) < 2:
        raise ValueError(f"Welch's test needs at least 2 runs on each side, got {a.n} and {b.n}")
    first, second = a.std**2 / a.n, b.std**2 / b.n
    if not first + second:
        return 0.0, math.inf
    share = first / (first + second)  # and not the squares themselves, which may underflow
    return math.sqrt(first + second), 1 / (share**2 / (a.n - 1) + (1 - share) ** 2 / (b.n - 1))


def _p_below(a: Sample, b: Sample, bound: float) -> float:
    """One-sided Welch p that mean(a) − mean(b) < bound."""
    error, freedom = _welch(a, b)
    difference = a.mean - b.mean
    if not error:
        return 0.0 if bound - difference > ROUNDING else 1.0
    return float(_special().stdtr(freedom, (difference - bound) / error))


def _p_ranks(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The share of all arrangements in which a's ranks add up to at least what they do."""
    _, place, counts = np.unique(np.array(a + b), return_inverse=True, return_counts=True)
    ranks = (2 * np.cumsum(counts) - counts + 1)[place]  # twice the mean rank of a tie, a whole number
    ways = np.zeros((len(a) + 1, int(ranks.sum()) + 1), dtype=np.int64)  # of choosing so many runs with this rank sum
    ways[0, 0] = 1
    for rank in ranks.tolist():
        ways[1:, rank:] += ways[:-1, :-rank]
    return int(ways[-1, ranks[: len(a)].sum() :].sum()) / math.comb(len(a) + len(b), len(a))


def _special() -> ModuleType:
    try:
        from scipy import special
    except ImportError as error:
        raise ValueError("verdicts need scipy: pip install 'onehour[report]'") from error
    return special


def _stats() -> ModuleType:
    try:
        from scipy import stats
    except ImportError as error:
        raise ValueError("verdicts need scipy: pip install 'onehour[report]'") from error
    return stats
