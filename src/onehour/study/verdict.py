"""What so many seeds say of a minibatch or an arm: its 90 % interval beside the margin, and how many runs broke."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from onehour.rules.arguments import positive, positive_int
from onehour.training.record import TOP1_ERROR, Metric

ERROR = 0.05  # of each end of an interval
BROKEN = 10  # margins above the reference's median, beyond which a run has broken
MOST = 100  # further seeds up to which their number is looked for
ROUNDING = 1e-9  # points that floats may add to a difference, which matters where no run differs from another

State = Literal["within", "above", "beyond", "undecided", "broke", "no verdict"]

OPEN: tuple[State, ...] = ("above", "undecided")


@dataclass(frozen=True)
class Sample:
    """Final errors over seeds, as an entry of a table gives them (paper §5.1): mean ± std (n − 1) of n runs, or nan.

    Of a metric where higher is better they are its negatives (`Metric.cost`), so that more is always worse. `broke`
    is None where single runs are not known; `by_seed` holds errors where every run has a seed of its own.
    """

    mean: float
    std: float
    n: int
    broke: int | None = None
    by_seed: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, errors: Sequence[float], seeds: Sequence[int | None] = (), broke: int = 0) -> Sample:
        """The sample of each run's error, in percent; a run that diverged has the error of chance."""
        mean = statistics.fmean(errors) if errors else math.nan
        std = statistics.stdev(errors) if len(errors) > 1 else math.nan
        by_seed = {seed: error for seed, error in zip(seeds, errors, strict=False) if seed is not None}
        return cls(mean, std, len(errors), broke, by_seed if len(by_seed) == len(errors) else {})


@dataclass(frozen=True)
class Verdict:
    """What the seeds say of an error against another: where the interval of the difference lies.

    WITHIN: all of it is under the margin. BEYOND: all of it is above the margin. ABOVE: it is above zero, and holds the
    margin. UNDECIDED: it holds both. BROKE: a run did, and a mean over such runs tells nothing. NO VERDICT: there are
    too few runs, or what it is compared with broke.

    It depends on these two samples alone, never on what else was run.
    """

    state: State
    difference: float  # mean error − the other's, in points; of the seeds that both have where it is paired
    lower: float = math.nan  # the ends of its 90 % interval; each errs with 5 %
    upper: float = math.nan
    paired: bool = False  # whether it is of the same seeds' differences, else it is Welch's
    broke: int | None = None  # how many runs broke, of n; None where that is not known
    n: int = 0
    more_seeds: int | None = None
    """Of an open one: so many more would decide about the margin if means and stds stayed; None above 100."""
    why: str = ""  # there is no verdict
    metric: Metric = TOP1_ERROR  # what the errors are
    digits: int = 2  # decimals of its numbers

    @property
    def open(self) -> bool:
        """Whether more seeds may decide about the margin."""
        return self.state in OPEN

    @property
    def found(self) -> str:
        found, lower, upper = (points(value, self.digits) for value in (self.difference, self.lower, self.upper))
        return f"{found} [{lower}, {upper}]"

    @property
    def text(self) -> str:
        """The verdict with its numbers, as results.json has it."""
        if self.state == "no verdict":
            return f"no verdict: {self.why}"
        if self.state == "broke":
            count, share = breaks(self.broke or 0, self.n)
            return f"{count} broke: {share}; {self.metric.amount(points(self.difference, self.digits))} on average"
        words = {"within": "within the margin", "beyond": "beyond the margin", "above": "above zero, margin open"}
        text = f"{words.get(self.state, self.state)}: {self.found}"
        if not self.open:
            return text
        more = f"more than {MOST}" if self.more_seeds is None else f"about {self.more_seeds}"
        return f"{text}; {more} more seed{'s' * (self.more_seeds != 1)} would decide"


def judge(
    sample: Sample,
    other: Sample,
    margin: float = 0.5,
    *,
    pair: bool = False,
    looks: int = 1,
    metric: Metric = TOP1_ERROR,
) -> Verdict:
    """The verdict on a sample beside what it is compared with.

    Args:
        margin: in points; a ValueError unless above zero.
        pair: compare seed by seed where the other has all of the sample's seeds. Right for arms, which see the same
            samples in the same minibatches; another minibatch takes another course, and pairs would only cost degrees
            of freedom.
        looks: how often the verdict is looked at while seeds are added. Each look's ends err with 5 % / looks, so that
            all looks together call what lies at the margin "within" with at most 5 % (Bonferroni).
        metric: what the samples are of, for the words.
    """
    positive("margin", margin)
    positive_int("looks", looks)
    paired = pair and bool(sample.by_seed) and sample.by_seed.keys() <= other.by_seed.keys()
    runs: dict[str, Any] = {"broke": sample.broke, "n": sample.n, "metric": metric, "digits": metric.digits(margin)}
    if sample.broke:
        return Verdict("broke", sample.mean - other.mean, **runs)
    if why := _without_verdict(sample, other):
        return Verdict("no verdict", sample.mean - other.mean, why=why, **runs)
    difference, lower, upper = interval(sample, other, paired=paired, error=ERROR / looks)
    state = _state(difference, lower, upper, margin)
    later = (
        more
        for more in range(1, MOST + 1)
        if _state(*interval(sample, other, paired=paired, error=ERROR / looks, more=more), margin) not in OPEN
    )
    more_seeds = next(later, None) if state in OPEN else None
    return Verdict(state, difference, lower, upper, paired, more_seeds=more_seeds, **runs)


def interval(
    a: Sample, b: Sample, *, paired: bool = False, error: float = ERROR, more: int = 0
) -> tuple[float, float, float]:
    """The difference mean(a) − mean(b) and both ends of its interval, in points.

    d ± t(1 − error, ν)·s. Paired over the n seeds of a: d and s·√n are mean and std of the differences, ν = n − 1. Else
    Welch's s² = s_a²/n_a + s_b²/n_b, with ν = s⁴ / ((s_a²/n_a)²/(n_a − 1) + (s_b²/n_b)²/(n_b − 1)).

    Args:
        error: of each end.
        more: seeds of a in addition, and of b in proportion, should means and stds stay.

    >>> ends = interval(Sample(24.05, 0.18, 5), Sample(23.74, 0.09, 5))  # the paper's rate 0.2·32 beside its own, at 8k
    >>> [round(end, 2) for end in ends]
    [0.31, 0.13, 0.49]
    """
    if paired:
        differences = [error_a - b.by_seed[seed] for seed, error_a in a.by_seed.items()]
        n = a.n + more
        difference, parts = statistics.fmean(differences), [(statistics.variance(differences) / n, n - 1)]
    else:
        n_a, n_b = a.n + more, b.n * (a.n + more) // a.n
        difference, parts = a.mean - b.mean, [(a.std * a.std / n_a, n_a - 1), (b.std * b.std / n_b, n_b - 1)]
    total = sum(variance for variance, _ in parts)
    if not total:
        return difference, difference, difference
    freedom = 1 / sum((variance / total) ** 2 / degrees for variance, degrees in parts)
    half = float(_special().stdtrit(freedom, 1 - error)) * math.sqrt(total)
    return difference, difference - half, difference + half


def break_share(broke: int, n: int) -> tuple[float, float]:
    """Between which shares of all runs break, when so many of n did: Clopper and Pearson's exact ends, 5 % each."""
    low = float(_special().betaincinv(broke, n - broke + 1, ERROR)) if broke else 0.0
    return low, float(_special().betaincinv(broke + 1, n - broke, 1 - ERROR)) if broke < n else 1.0


def breaks(broke: int, n: int) -> tuple[str, str]:
    """How many runs broke, and what share of all that allows, in words."""
    low, high = (100 * share for share in break_share(broke, n))
    return f"{broke} of {n}", f"{low:.0f} to {high:.0f} % do" if broke else f"up to {high:.0f} % may"


def _state(difference: float, lower: float, upper: float, margin: float) -> State:
    if upper < margin - ROUNDING:
        return "within"
    if lower > margin + ROUNDING:
        return "beyond"
    return "above" if lower > ROUNDING else "undecided"


def _without_verdict(a: Sample, b: Sample) -> str:
    """Why two samples cannot be compared; "" where they can."""
    if b.broke:
        return f"{b.broke} of {b.n} runs that it is compared with broke"
    fewest = min(a.n, b.n)
    where = " at the reference" if b.n == fewest < a.n else ""
    if fewest == 0:
        return f"no run has ended{where}"
    return f"one seed{where} has no std; train at least 2" if fewest == 1 else ""


def points(value: float, digits: int = 2) -> str:
    """Points with their sign; a dash for nan."""
    if not math.isfinite(value):
        return "–"
    zero = f"{0:.{digits}f}"
    return f"{value:+z.{digits}f}".replace(f"+{zero}", zero).replace("-", "−")


def _special() -> Any:
    try:
        from scipy import special
    except ImportError as error:
        raise ValueError("verdicts need scipy: pip install 'onehour[report]'") from error
    return special
