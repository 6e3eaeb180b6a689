"""The tables of a report: entries with what belongs to them and a verdict, in the paper's form (T1, T2a, F1)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from onehour.config import Recipe
from onehour.rules.schedule import parse_milestones
from onehour.study.results import Entry, Study
from onehour.study.spec import SweepSpec
from onehour.study.statistics import Sample, early_gap, mean_curve
from onehour.study.text import GROUPS, OTHERS, group_of, paper_cost, plain_name
from onehour.study.verdict import Verdict, judge_arms, judge_minibatches

__all__ = ["Findings", "Row", "curve_of", "findings_of", "sample_of", "sign_of"]


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Args:
        entry: its runs.
        name: in plain words.
        recipe: what its runs had; None for others' curves.
        verdict: against the reference, or of an arm against the recipe at the same minibatch; None for the reference.
        paper: of an arm, what it costs in the paper at 8k, in points.
        early: the early sign, in points: the mean gap of the training curves from the end of warmup to the first drop.

    >>> Row(Entry((), 512, ()), "512").non_finite
    0
    """

    entry: Entry
    name: str
    recipe: Recipe | None = None
    verdict: Verdict | None = None
    paper: float | None = None
    early: float = math.nan

    @property
    def non_finite(self) -> int:
        """How many runs left the finite numbers and count as chance.

        >>> Row(Entry((), 512, ()), "512").non_finite
        0
        """
        return sum(result.outcome == "non-finite" for result in self.entry.results)

    @property
    def cost(self) -> float:
        """Mean error − what it is compared with, in points; 0 for the reference.

        >>> Row(Entry((), 512, ()), "512").cost
        0.0
        """
        return self.verdict.difference if self.verdict else 0.0

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of training, of the runs that came to their end.

        >>> Row(Entry((), 512, ()), "512").seconds
        ()
        """
        return tuple(result.seconds for result in self.entry.results if result.seconds)

    @property
    def mean_seconds(self) -> float:
        """Their mean; nan without any.

        >>> Row(Entry((), 512, ()), "512").mean_seconds
        nan
        """
        return statistics.fmean(self.seconds) if self.seconds else math.nan


@dataclass(frozen=True)
class Findings:
    """A study, judged.

    Args:
        study: what was run.
        margin: in points, under which a difference does not matter.
        sizes: a row a minibatch, the recipe's own.
        groups: rows of arms by (minibatch, one of `GROUPS`), the costliest first; each group is Holm's family.
    """

    study: Study
    margin: float = 0.5
    sizes: tuple[Row, ...] = ()
    groups: Mapping[tuple[int, str], tuple[Row, ...]] = field(default_factory=dict)

    @property
    def reference(self) -> Row | None:
        """The row that the others are compared with."""
        return next((row for row in self.sizes if row.entry is self.study.reference), None)

    @property
    def arms(self) -> tuple[Row, ...]:
        """Every arm's row."""
        return tuple(row for rows in self.groups.values() for row in rows)

    @property
    def loose(self) -> tuple[Entry, ...]:
        """Curves without a minibatch, hence without a place on the axis.

        >>> findings_of(Study(None, (Entry((("curve", "mine"),), None, ()),))).loose[0].label
        'curve=mine'
        """
        return tuple(entry for entry in self.study.entries if entry.minibatch is None)

    def beside(self, arm: Row) -> Entry | None:
        """The recipe's own entry at an arm's minibatch."""
        return self.study.beside(arm.entry)

    def first_failure(self) -> Row | None:
        """The smallest minibatch above the reference that does not hold."""
        return next((row for row in self.above if row.verdict and row.verdict.state != "holds"), None)

    @property
    def held(self) -> tuple[Row, ...]:
        """The rows above the reference that hold: all up to the first that does not."""
        return tuple(row for row in self.above if row.verdict and row.verdict.state == "holds")

    @property
    def above(self) -> tuple[Row, ...]:
        """The rows of minibatches larger than the reference."""
        reference = self.study.reference
        least = reference.minibatch if reference and reference.minibatch else math.inf
        return tuple(row for row in self.sizes if (row.entry.minibatch or 0) > least)


def findings_of(study: Study, margin: float = 0.5) -> Findings:
    """Judge a study: minibatches as a fixed sequence, arms by Holm within each group.

    Raises:
        ValueError: if margin is not above zero, or scipy is missing.

    >>> findings_of(Study(None, (Entry((), 64, ()),))).sizes[0].name
    '64'
    """
    flat = [entry for entry in study.flat if entry.minibatch is not None]
    verdicts = _size_verdicts(study, flat, margin)
    sizes = tuple(
        Row(
            entry,
            str(entry.minibatch),
            recipe=_recipe(study, entry),
            verdict=verdicts.get(entry.minibatch or 0),
            early=_early(study, entry, study.reference),
        )
        for entry in flat
    )
    return Findings(study, margin, sizes, dict(_groups(study, margin)))


def sample_of(entry: Entry | None) -> Sample:
    """An entry's errors, for a test.

    >>> sample_of(None).n
    0
    """
    return Sample.of(entry.errors if entry else ())


def curve_of(entry: Entry, kind: Literal["top1_error", "train_error"] = "top1_error") -> list[tuple[float, float]]:
    """(epoch, error): the mean over the runs that have ended, over all where none has, at the epochs that each reached.

    >>> curve_of(Entry((), 64, ()))
    []
    """
    ended = [result for result in entry.results if result.error is not None] or entry.results
    curves = [[(point.epoch, getattr(point, kind)) for point in result.curve] for result in ended]
    return mean_curve([(epoch, error) for epoch, error in curve if error is not None] for curve in curves)


def sign_of(recipe: Recipe | None) -> tuple[float, float] | None:
    """The epochs between which the early sign is read: the end of warmup and the first drop; None without drops.

    >>> sign_of(Recipe())
    (5.0, 30.0)
    """
    if recipe is None or recipe.decay != "step":
        return None
    drops = [float(milestone) for milestone in parse_milestones(recipe.milestones) if milestone < recipe.epochs]
    return (float(recipe.warmup_epochs), drops[0]) if drops else None


def _size_verdicts(study: Study, flat: Iterable[Entry], margin: float) -> dict[int, Verdict]:
    reference = study.reference
    if reference is None or reference.minibatch is None:
        return {}
    samples = {entry.minibatch: sample_of(entry) for entry in flat if entry.minibatch is not None}
    return judge_minibatches(reference.minibatch, samples, margin)


def _groups(study: Study, margin: float) -> Iterable[tuple[tuple[int, str], tuple[Row, ...]]]:
    entries = [(entry, entry.minibatch) for entry in study.arms if entry.minibatch is not None]
    keys = sorted(
        {(minibatch, group_of(entry.arm, minibatch)) for entry, minibatch in entries},
        key=lambda key: (key[0], list(GROUPS).index(key[1])),
    )
    for key in keys:
        group = [entry for entry, minibatch in entries if (minibatch, group_of(entry.arm, minibatch)) == key]
        verdicts = judge_arms([(sample_of(entry), sample_of(study.beside(entry))) for entry in group], margin)
        rows = [
            Row(
                entry,
                plain_name(entry.arm, study.recipe, entry.minibatch),
                recipe=_recipe(study, entry),
                verdict=verdict,
                paper=paper_cost(entry.arm, study.recipe),
                early=_early(study, entry, study.beside(entry)),
            )
            for entry, verdict in zip(group, verdicts, strict=True)
        ]
        # What cannot be compared has the cost nan, and stands last.
        yield key, tuple(sorted(rows, key=lambda row: -row.cost if math.isfinite(row.cost) else math.inf))


def _recipe(study: Study, entry: Entry) -> Recipe | None:
    if study.recipe is None or entry.minibatch is None or any(name in OTHERS for name, _ in entry.arm):
        return None
    spec = SweepSpec(recipe=study.recipe, minibatches=(study.recipe.minibatch,), seeds=(0,))
    try:
        return spec.applied(entry.arm, entry.minibatch, 0)
    except ValueError:  # of somebody's CSV: a minibatch that this recipe could not have
        return None


def _early(study: Study, entry: Entry, base: Entry | None) -> float:
    sign = sign_of(study.recipe)
    if sign is None or base is None or base is entry:
        return math.nan
    return early_gap(curve_of(entry, "train_error"), curve_of(base, "train_error"), *sign)
