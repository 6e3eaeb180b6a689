"""What may be said of a minibatch or an arm after so many seeds: it holds, it is worse, or it is not decided yet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from onehour.rules.arguments import positive
from onehour.study.statistics import Sample, holm, p_holds, p_worse, smallest_p, welch_upper

__all__ = ["Verdict", "judge_arms", "judge_minibatches", "summary"]

ALPHA = 0.05
MOST = 100
"""Further seeds up to which they are counted."""

State = Literal["holds", "worse", "undecided", "untested", "one seed"]


@dataclass(frozen=True)
class Verdict:
    """What the seeds say of an error against a reference's.

    HOLDS: the upper end of the one-sided Welch 95 % interval of the difference is under the margin. WORSE: it does not
    hold, and the one-sided rank test has p < .05. Else undecided.

    "Holds" speaks of what the seeds show: a break that comes in one run of ten is more often than not in none of 5.

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

    >>> Verdict("worse", difference=1.05, p=1 / 252).text
    'worse: 1.05 points, p = 0.004'
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
        """Whether "worse" cannot be said with so few runs, whatever their errors.

        5 seeds against 5 give p ≥ 1/252, so more than 12 arms at once are too many for them.

        >>> Verdict("undecided", difference=60.0, more_seeds=1, family=13, smallest_p=13 / 252).out_of_reach
        True
        """
        return self.smallest_p >= ALPHA

    @property
    def text(self) -> str:
        """One sentence.

        >>> Verdict("holds", difference=0.1, upper=0.31).text
        'holds: at most 0.31 points above'
        >>> Verdict("undecided", difference=0.41, more_seeds=6).text
        'undecided: 0.41 points, needs 6 more seeds'
        """
        family = f" (Holm, {self.family} arms)" if self.family > 1 else ""
        if self.state == "holds" and family:
            return f"holds: {_points(self.difference)}, {_p(self.p_holds)}{family}"
        if self.state == "holds":
            side = f"at most {self.upper:.2f} points above" if self.upper >= 0 else f"at least {_points(self.upper)}"
            return f"holds: {side}"
        if self.state == "worse":
            return f"worse: {_rounded(self.difference)} points, {_p(self.p)}{family}"
        if self.state == "undecided":
            more = f"more than {MOST}" if self.more_seeds is None else f"{self.more_seeds}"
            arms = f"among {self.family} arms " if family else ""
            few = f"; {arms}so few seeds cannot show worse" if self.out_of_reach else ""
            return f"undecided: {_rounded(self.difference)} points, needs {more} more seed{'s' * (more != '1')}{few}"
        if self.state == "untested":
            return f"not tested: {self.why}; {_points(self.difference)}"
        return self.why


def judge_minibatches(reference: int, samples: Mapping[int, Sample], margin: float = 0.5) -> dict[int, Verdict]:
    """A verdict for each minibatch but the reference.

    They are tested in the order of their size and only up to the first that does not hold (fixed sequence): the chance
    that any minibatch beyond the margin is said to hold stays at 5 % without a correction. Larger ones are untested,
    with their difference. So a minibatch with fewer than two runs ends the sequence too.

    Minibatches below the reference answer another question, whether the reference itself is small enough: they are a
    sequence of their own, from the reference downwards, with its own 5 %.

    Args:
        reference: the minibatch that the others are compared with.
        samples: by minibatch; one without any run yet is `Sample.of(())`.
        margin: in points.

    Raises:
        ValueError: if the reference is not among them, margin is not above zero, or scipy is missing.

    >>> samples = {256: Sample.known(23.60, 0.12, 5), 8192: Sample.known(23.74, 0.09, 5)}
    >>> judge_minibatches(256, samples)[8192].text
    'holds: at most 0.27 points above'
    """
    positive("margin", margin)
    if reference not in samples:
        raise ValueError(f"reference {reference} is not among the minibatches {', '.join(map(str, sorted(samples)))}")
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
        margin: in points.

    Raises:
        ValueError: if margin is not above zero, or scipy is missing.

    >>> recipe, arm = Sample.of([23.6, 23.7, 23.7, 23.8, 23.9]), Sample.of([24.4, 24.6, 24.8, 25.0, 25.2])
    >>> [verdict.text for verdict in judge_arms([(arm, recipe)])]
    ['worse: 1.06 points, p = 0.004']
    """
    positive("margin", margin)
    pairs = list(pairs)
    judged = iter(_judge([pair for pair in pairs if not _few(*pair)], margin))
    return [_one_seed(*pair) if _few(*pair) else next(judged) for pair in pairs]


def summary(reference: int, verdicts: Mapping[int, Verdict]) -> str:
    """What `judge_minibatches` found above the reference, in one line.

    >>> summary(32, {64: Verdict("holds", 0.1), 128: Verdict("worse", 2.0), 256: Verdict("untested", 9.0)})
    'holds to 64, worse at 128'
    """
    above = {size: verdict for size, verdict in sorted(verdicts.items()) if size > reference}
    end = next((size for size, verdict in above.items() if verdict.state != "holds"), None)
    held = [size for size in above if end is None or size < end]
    parts = [f"holds to {held[-1]}"] if held else []
    if end is not None:
        parts.append(f"{above[end].state} at {end}")
    return ", ".join(parts) or f"nothing above {reference}"


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
    grown = [(_grown(a, more), _grown(b, more)) for a, b in pairs]
    holds = holm([p_holds(*pair, margin) for pair in grown])
    ranked = [a.values is not None and b.values is not None for a, b in pairs]
    least = [1 / math.comb(a.n + b.n, a.n) if known else 0.0 for (a, b), known in zip(grown, ranked, strict=True)]
    worse = holm([max(p_worse(*pair), floor) for pair, floor in zip(grown, least, strict=True)])
    return {place for place, ps in enumerate(zip(holds, worse, strict=True)) if min(ps) < ALPHA}


def _grown(sample: Sample, more: int) -> Sample:
    return Sample.known(sample.mean, sample.std, sample.n + more)


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


def _rounded(difference: float) -> str:
    return f"{round(difference, 2) + 0.0:.2f}"  # and no -0.00


def _p(p: float) -> str:
    """With a digit more where rounding would say 0.050 of something below it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.{3 if p < 0.0495 else 4}f}"
