"""A study, judged: its entries with what belongs to them, each with a verdict (paper T1, T2a, F1)."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onehour.config import Recipe
from onehour.rules.arguments import positive, positive_int
from onehour.rules.schedule import parse_milestones
from onehour.study.paper import paper_cost
from onehour.study.results import Entry, Study
from onehour.study.spec import GROUPS, OTHERS, applied, group_of, plain_name
from onehour.study.verdict import BROKEN, Sample, Verdict, judge
from onehour.training.record import TOP1_ERROR, Metric

Curve = list[tuple[float, float]]

USUAL_MARGIN = 0.5  # points of top-1 error


@dataclass(frozen=True)
class Row:
    """A line of a table: an entry, named in plain words."""

    entry: Entry
    name: str
    recipe: Recipe | None = None  # what its runs had; None for others' curves
    verdict: Verdict | None = None
    """Against the reference, or of an arm against the recipe at the same minibatch; None for the reference."""
    broke: int = 0
    """How many runs diverged, or ended ten margins above the reference's median, or no better than untrained."""
    paper: float | None = None  # of an arm, what it costs in the paper at 8k, in points
    early: float = math.nan  # the early sign, in points (`early_gap`)

    @property
    def state(self) -> str:
        """Its verdict's; "reference" where it has none."""
        return self.verdict.state if self.verdict else "reference"

    @property
    def non_finite(self) -> int:
        """How many runs diverged to NaN or infinity and count as chance."""
        return sum(result.outcome == "non-finite" for result in self.entry.results)

    @property
    def cost(self) -> float:
        """Mean error − what it is compared with, in points; above 0 is worse; 0 for the reference."""
        return self.verdict.difference if self.verdict else 0.0

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of training, of the runs that came to their end."""
        return tuple(result.seconds for result in self.entry.results if result.seconds)

    @property
    def mean_seconds(self) -> float:
        return statistics.fmean(self.seconds) if self.seconds else math.nan


@dataclass(frozen=True)
class Findings:
    """What a study shows."""

    study: Study
    margin: float  # in points, under which a difference does not matter
    looks: int  # how often the verdicts are looked at while seeds are added
    sizes: tuple[Row, ...]  # a row a minibatch, the recipe's own
    groups: Mapping[tuple[int, str], tuple[Row, ...]]
    """Rows of arms by (minibatch, one of `GROUPS`), the costliest first."""

    @property
    def metric(self) -> Metric:
        return self.study.metric

    @property
    def digits(self) -> int:
        return self.metric.digits(self.margin)

    @property
    def reference(self) -> Row | None:
        """The row that the others are compared with."""
        return next((row for row in self.sizes if row.entry is self.study.reference), None)

    @property
    def arms(self) -> tuple[Row, ...]:
        return tuple(row for rows in self.groups.values() for row in rows)

    @property
    def arms_at(self) -> list[int]:
        return sorted({size for size, _ in self.groups})

    @property
    def loose(self) -> tuple[Entry, ...]:
        """Curves without a minibatch, hence without a place on the axis."""
        return tuple(entry for entry in self.study.entries if entry.minibatch is None)

    @property
    def timed(self) -> tuple[Row, ...]:
        """The minibatches that have a time and an error; none where the reference or all others lack them."""
        rows = tuple(row for row in self.sizes if row.seconds and row.entry.n)
        return rows if len(rows) > 1 and self.reference in rows else ()

    @property
    def above(self) -> tuple[Row, ...]:
        """The rows of minibatches larger than the reference."""
        reference = self.study.reference
        least = reference.minibatch if reference and reference.minibatch else math.inf
        return tuple(row for row in self.sizes if (row.entry.minibatch or 0) > least)

    @property
    def held(self) -> tuple[Row, ...]:
        """The rows above the reference to which the rule holds: all up to the first that is not within the margin.

        A fixed sequence: each is claimed only if all smaller ones are, so that the chance of claiming any that lies
        beyond the margin stays that of one verdict, however many there are.
        """
        return tuple(itertools.takewhile(lambda row: row.state == "within", self.above))

    @property
    def first_failure(self) -> Row | None:
        """The smallest minibatch above the reference that is not within the margin."""
        return next((row for row in self.above if row.state != "within"), None)


def findings_of(study: Study, margin: float | None = None, looks: int = 1) -> Findings:
    """Judge a study: each minibatch beside the reference, each arm beside the recipe at its minibatch.

    The margin is in points, or in the metric's unit; None is half a point of top-1 error.
    """
    metric = study.metric
    if margin is None and metric != TOP1_ERROR:
        raise ValueError(
            f"{metric.written} has no usual margin: say with --margin{' in' * bool(metric.points)}"
            f" {metric.points} how much worse still counts as equal"
        )
    margin = positive("margin", USUAL_MARGIN if margin is None else margin)
    positive_int("looks", looks)
    reference, sign = study.reference, sign_of(study.recipe)

    def row(entry: Entry, base: Entry | None, name: str, *, arm: bool) -> Row:
        sample, verdict, early = _sample(study, entry, margin), None, math.nan
        if sign is not None and base is not None and base is not entry:
            curves = (curve_of(each, "train_error") for each in (entry, base))
            early = metric.cost(early_gap(next(curves), next(curves), *sign))
        if entry is not base and (arm or base is not None):
            verdict = judge(sample, _sample(study, base, margin), margin, pair=arm, looks=looks, metric=metric)
        return Row(
            entry,
            name,
            recipe=_recipe(study, entry),
            verdict=verdict,
            broke=sample.broke or 0,
            paper=paper_cost(entry.arm, study.recipe) if metric == TOP1_ERROR else None,
            early=early,
        )

    sizes = [row(e, reference, str(e.minibatch), arm=False) for e in study.flat if e.minibatch is not None]
    groups: dict[tuple[int, str], list[Row]] = {}
    for entry in study.arms:
        if entry.minibatch is not None:
            name = plain_name(entry.arm, study.recipe, entry.minibatch)
            key = (entry.minibatch, group_of(entry.arm, entry.minibatch))
            groups.setdefault(key, []).append(row(entry, study.beside(entry), name, arm=True))
    order = list(GROUPS)
    arms = {
        key: tuple(sorted(groups[key], key=lambda row: -row.cost if math.isfinite(row.cost) else math.inf))
        for key in sorted(groups, key=lambda key: (key[0], order.index(key[1])))
    }
    return Findings(study, margin, looks, tuple(sizes), arms)


def curve_of(entry: Entry, kind: Literal["error", "train_error"] = "error") -> Curve:
    """(epoch, error) at the epochs that each run has reached: the mean over those that have ended, or over all."""
    ended = [result for result in entry.results if result.error is not None] or entry.results
    curves = [[(point.epoch, getattr(point, kind)) for point in result.curve] for result in ended]
    return mean_curve(
        [(epoch, error) for epoch, error in curve if error is not None and math.isfinite(error)] for curve in curves
    )


def mean_curve(curves: Iterable[Curve]) -> Curve:
    """The mean over seeds of curves of (epoch, error), at the epochs that every seed has reached."""
    tables = [dict(curve) for curve in curves]
    shared = set.intersection(*map(set, tables)) if tables else set()
    return [(epoch, statistics.fmean(table[epoch] for table in tables)) for epoch in sorted(shared)]


def early_gap(curve: Curve, base_curve: Curve, start: float, stop: float) -> float:
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


def sign_of(recipe: Recipe | None) -> tuple[float, float] | None:
    """The epochs between which the early sign is read: the end of warmup and the first drop; None without drops."""
    if recipe is None or recipe.decay != "step":
        return None
    drops = [float(milestone) for milestone in parse_milestones(recipe.milestones) if milestone < recipe.epochs]
    return (float(recipe.warmup_epochs), drops[0]) if drops else None


def _sample(study: Study, entry: Entry | None, margin: float) -> Sample:
    """An entry's ended runs; of these broke those that diverged, and those far above the reference's median.

    Of a metric of one's own, whose scale nobody knows, "far" is no better than the untrained network.
    """
    reference, far = study.reference, study.metric == TOP1_ERROR
    limit = statistics.median(reference.errors) + BROKEN * margin if reference and far else math.inf
    ended = [(r, r.cost) for r in (entry.results if entry else ()) if r.cost is not None]
    broke = sum(
        r.outcome == "non-finite" or cost > limit or (r.untrained is not None and cost >= r.metric.cost(r.untrained))
        for r, cost in ended
    )
    return Sample.of([cost for _, cost in ended], [result.seed for result, _ in ended], broke)


def _recipe(study: Study, entry: Entry) -> Recipe | None:
    if study.recipe is None or entry.minibatch is None or any(name in OTHERS for name, _ in entry.arm):
        return None
    try:
        return applied(study.recipe, entry.arm, entry.minibatch, 0)
    except ValueError:  # of somebody's CSV: a minibatch that this recipe could not have
        return None
