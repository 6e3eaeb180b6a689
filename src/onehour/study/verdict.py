"""What may be said of a minibatch or an arm after so many seeds: it holds, is worse or undecided; the tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from onehour.rules.checks import positive

ALPHA = 0.05
MOST = 100  # further seeds up to which their number is looked for
COUNTED = 60  # runs in all up to which the rank test counts every arrangement: the counts fit in 64 bits
ROUNDING = 1e-9  # points that floats may add to a difference, which matters where no run differs from another

State = Literal["holds", "worse", "undecided", "untested", "one seed"]


@dataclass(frozen=True)
class Sample:
    """Final errors over seeds, as an entry of a table gives them (paper §5.1): mean ± std of n runs.

    Args:
        mean: in percent; nan for n = 0.
        std: in points, with n − 1; nan for n < 2.
        n: how many runs.
        values: each run's error where they are known; without them rank tests give way to Welch's.
    """

    mean: float
    std: float
    n: int
    values: tuple[float, ...] | None = None

    @classmethod
    def of(cls, values: Iterable[float]) -> Sample:
        """The sample of each run's error, in percent; a run that diverged has the error of chance."""
        errors = tuple(float(value) for value in values)
        mean = statistics.fmean(errors) if errors else math.nan
        return cls(mean, statistics.stdev(errors) if len(errors) > 1 else math.nan, len(errors), errors)


@dataclass(frozen=True)
class Verdict:
    """What the seeds say of an error against a reference's.

    HOLDS: the upper end of the one-sided Welch 95 % interval of the difference is under the margin. WORSE: it does not
    hold, and the one-sided rank test has p < .05. Otherwise undecided.

    "Holds" speaks of what the seeds show: a break that occurs in one run of ten usually occurs in none of 5.

    Args:
        state: "one seed" where a side has fewer than two runs, hence no std; "untested" behind a minibatch that does
            not hold.
        difference: mean error − the reference's mean error, in points.
        upper: the upper end of its interval, of this comparison alone.
        p: that it is worse; of an arm after Holm's correction.
        p_holds: that it is within the margin; of an arm after Holm's correction.
        more_seeds: of an undecided one: so many more on each side would decide it if means and stds stayed; None
            above 100.
        family: how many comparisons were corrected for; 1 for none.
        smallest_p: the smallest p (worse) that so many runs in such a family can give.
        why: of an untested one and one seed.
    """

    state: State
    difference: float
    upper: float = math.nan
    p: float = math.nan
    p_holds: float = math.nan
    more_seeds: int | None = None
    family: int = 1
    smallest_p: float = 0.0
    why: str = ""

    @property
    def out_of_reach(self) -> bool:
        """Whether "worse" cannot be said with so few runs, whatever their errors."""
        return self.smallest_p >= ALPHA

    @property
    def text(self) -> str:
        """The verdict with its numbers, as results.json has it."""
        family = f" (Holm, {self.family} arms)" if self.family > 1 else ""
        if self.state == "holds" and family:
            return f"holds: {_points(self.difference)}, {p_text(self.p_holds)}{family}"
        if self.state == "holds":
            side = f"at most {self.upper:.2f} points above" if self.upper >= 0 else f"at least {_points(self.upper)}"
            return f"holds: {side}"
        if self.state == "worse":
            return f"worse: {self.difference:z.2f} points, {p_text(self.p)}{family}"
        if self.state == "undecided":
            more = f"more than {MOST}" if self.more_seeds is None else f"{self.more_seeds}"
            arms = f"among {self.family} arms " if family else ""
            few = f"; {arms}so few seeds cannot show worse" if self.out_of_reach else ""
            return f"undecided: {self.difference:z.2f} points, needs {more} more seed{'s' * (more != '1')}{few}"
        return f"not tested: {self.why}; {_points(self.difference)}" if self.state == "untested" else self.why


def judge_minibatches(reference: int, samples: Mapping[int, Sample], margin: float = 0.5) -> dict[int, Verdict]:
    """A verdict for each minibatch but the reference.

    They are tested in the order of their size and only up to the first that does not hold (fixed sequence): the chance
    that any minibatch beyond the margin is said to hold stays at 5 % without a correction. Larger ones are untested,
    with their difference. So a minibatch with fewer than two runs ends the sequence too.

    Minibatches below the reference answer another question, whether the reference itself is small enough: they are a
    sequence of their own, from the reference downwards, with its own 5 %.

    Args:
        reference: the minibatch that the others are compared with; one of `samples`.
        samples: by minibatch; one without any run yet is `Sample.of(())`.
        margin: in points; a ValueError unless above zero.
    """
    positive("margin", margin)
    larger = sorted(size for size in samples if size > reference)
    smaller = sorted((size for size in samples if size < reference), reverse=True)
    verdicts = _sequence(larger, samples, reference, margin) | _sequence(smaller, samples, reference, margin)
    return dict(sorted(verdicts.items()))


def judge_arms(pairs: Iterable[tuple[Sample, Sample]], margin: float = 0.5) -> list[Verdict]:
    """A verdict for each arm against the recipe at the same minibatch, corrected by Holm.

    What is corrected is each of the two families of p, worse and holds, over all arms with two runs or more: the chance
    of any false "holds" stays at 5 %, and so does that of any false "worse".

    With 5 seeds the smallest p of the rank test is 1/252 = .004, so with more than 12 arms nothing can be called worse,
    however bad it is (`Verdict.out_of_reach`); with 4 seeds (1/70) that is so from 4 arms on, with 3 (1/20) always.
    Train more seeds then, or judge arms that answer different questions apart.

    Args:
        pairs: (arm, recipe at its minibatch).
        margin: in points; a ValueError unless above zero.
    """
    positive("margin", margin)
    pairs = list(pairs)
    judged = iter(_judge([pair for pair in pairs if not _few(*pair)], margin))
    return [_one_seed(*pair) if _few(*pair) else next(judged) for pair in pairs]


def _sequence(sizes: list[int], samples: Mapping[int, Sample], reference: int, margin: float) -> dict[int, Verdict]:
    """Verdicts in this order, tested up to the first that does not hold."""
    verdicts: dict[int, Verdict] = {}
    stop = ""
    for size in sizes:
        pair = (samples[size], samples[reference])
        if _few(*pair):
            verdict = _one_seed(*pair)
        elif stop:
            verdict = Verdict("untested", _difference(pair), why=stop)
        else:
            (verdict,) = _judge([pair], margin)
        verdicts[size] = verdict
        if not stop and verdict.state != "holds":
            found = {"worse": "does not hold", "undecided": "is undecided"}.get(verdict.state, "has no verdict")
            stop = f"minibatch {size} {found}"
    return verdicts


def _judge(pairs: Sequence[tuple[Sample, Sample]], margin: float) -> list[Verdict]:
    """One family of comparisons, each side with two runs or more."""
    holds = holm([p_holds(*pair, margin) for pair in pairs])
    worse = holm([p_worse(*pair) for pair in pairs])
    verdicts = [
        Verdict(
            state="holds" if hold < ALPHA else "worse" if bad < ALPHA else "undecided",
            difference=_difference(pair),
            upper=welch_upper(*pair, level=1 - ALPHA),
            p=bad,
            p_holds=hold,
            family=len(pairs),
            smallest_p=min(1.0, len(pairs) * smallest_p(*pair)),
        )
        for pair, hold, bad in zip(pairs, holds, worse, strict=True)
    ]
    waiting = {place for place, verdict in enumerate(verdicts) if verdict.state == "undecided"}
    for more in range(1, MOST + 1):
        for place in _decided(pairs, margin, more) & waiting if waiting else ():
            verdicts[place] = replace(verdicts[place], more_seeds=more)
            waiting.remove(place)
    return verdicts


def _decided(pairs: Sequence[tuple[Sample, Sample]], margin: float, more: int) -> set[int]:
    """Which hold or are worse with so many more seeds on each side of every pair, should means and stds stay.

    Later ranks are not known: Welch's p stands in for theirs, but never below the smallest that ranks can give.
    """
    grown = [tuple(replace(sample, n=sample.n + more, values=None) for sample in pair) for pair in pairs]
    holds = holm([p_holds(a, b, margin) for a, b in grown])
    least = [smallest_p(*pair, more=more) for pair in pairs]
    worse = holm([max(p_worse(a, b), p) for (a, b), p in zip(grown, least, strict=True)])
    return {place for place, ps in enumerate(zip(holds, worse, strict=True)) if min(ps) < ALPHA}


def _difference(pair: tuple[Sample, Sample]) -> float:
    return pair[0].mean - pair[1].mean


def _few(a: Sample, b: Sample) -> bool:
    return min(a.n, b.n) < 2


def _one_seed(a: Sample, b: Sample) -> Verdict:
    """Of fewer than two runs on a side."""
    fewest = min(a.n, b.n)
    where = " at the reference" if b.n == fewest and b.n < a.n else ""
    if fewest == 0:
        why = f"no run has ended{where}, so no verdict"
    else:
        why = f"one seed{where}: no std, so no verdict; give at least 2 seeds"
    return Verdict("one seed", _difference((a, b)), why=why)


def _points(difference: float) -> str:
    return f"{abs(difference):.2f} points {'below' if difference < 0 else 'above'}"


def p_text(p: float) -> str:
    """A p-value, with a digit more where rounding would say 0.050 of something below it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.{3 if p < 0.0495 else 4}f}"


def welch_upper(a: Sample, b: Sample, level: float = 0.95) -> float:
    """The upper end of the one-sided Welch interval of mean(a) − mean(b), in points.

    d + t(level, ν)·s with s² = s_a²/n_a + s_b²/n_b and Welch and Satterthwaite's
    ν = s⁴ / ((s_a²/n_a)²/(n_a − 1) + (s_b²/n_b)²/(n_b − 1)); d itself where no run differs from another.
    """
    error, freedom = _welch(a, b)
    difference = a.mean - b.mean
    return difference + error * float(_scipy().special.stdtrit(freedom, level)) if error else difference


def p_holds(a: Sample, b: Sample, margin: float) -> float:
    """One-sided Welch p that mean(a) − mean(b) is under the margin, under the hypothesis that it is not.

    p < .05 says the same as `welch_upper(a, b) < margin`.
    """
    error, freedom = _welch(a, b)
    difference = a.mean - b.mean
    if not error:
        return 0.0 if margin - difference > ROUNDING else 1.0
    return float(_scipy().special.stdtr(freedom, (difference - margin) / error))


def p_worse(a: Sample, b: Sample) -> float:
    """One-sided p that a's errors are larger than b's, under the hypothesis that they are not.

    Mann and Whitney's test over every arrangement of the ranks, ties included (beyond 60 runs scipy's choice);
    Welch's t-test where a side's single errors are not known.
    """
    if a.values is None or b.values is None:
        return p_holds(b, a, 0.0)
    if a.n + b.n <= COUNTED:
        return _p_ranks(a.values, b.values)
    return float(_scipy().stats.mannwhitneyu(a.values, b.values, alternative="greater").pvalue)


def smallest_p(a: Sample, b: Sample, more: int = 0) -> float:
    """The smallest `p_worse` of these runs and `more` on each side: 1 / C(n_a + n_b, n_a); 0 where Welch's is used."""
    return 0.0 if a.values is None or b.values is None else 1 / math.comb(a.n + b.n + 2 * more, a.n + more)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: any of m true hypotheses is rejected with at most the stated chance.

    The i-th smallest becomes max over j ≤ i of (m − j + 1)·p_j, and at most 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = largest
    return adjusted


def _welch(a: Sample, b: Sample) -> tuple[float, float]:
    """Standard error of mean(a) − mean(b), and its degrees of freedom."""
    assert not _few(a, b)
    first, second = a.std**2 / a.n, b.std**2 / b.n
    if not first + second:
        return 0.0, math.inf
    share = first / (first + second)  # and not the squares themselves, which may underflow
    return math.sqrt(first + second), 1 / (share**2 / (a.n - 1) + (1 - share) ** 2 / (b.n - 1))


def _p_ranks(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The share of all arrangements in which a's ranks add up to at least what they do."""
    _, place, counts = np.unique(np.array(a + b), return_inverse=True, return_counts=True)
    ranks = (2 * np.cumsum(counts) - counts + 1)[place]  # twice the mean rank of a tie, a whole number
    ways = np.zeros((len(a) + 1, int(ranks.sum()) + 1), dtype=np.int64)  # of choosing so many runs with this rank sum
    ways[0, 0] = 1
    for rank in ranks.tolist():
        ways[1:, rank:] += ways[:-1, :-rank]
    return int(ways[-1, ranks[: len(a)].sum() :].sum()) / math.comb(len(a) + len(b), len(a))


def _scipy() -> Any:
    """scipy, whose parts load on first use."""
    try:
        import scipy
    except ImportError as error:
        raise ValueError("verdicts need scipy: pip install 'onehour[report]'") from error
    return scipy
