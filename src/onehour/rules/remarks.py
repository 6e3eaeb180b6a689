"""What a schedule does that whoever wrote it may not have meant; all of it is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from onehour.rules.schedule import Schedule

__all__ = ["schedule_remarks"]

NEARLY = 0.9
"""A cosine has always begun to fall when a warmup ends; so much of the target is not worth a line."""


def schedule_remarks(
    schedule: Schedule,
    *,
    milestones: Iterable[Fraction],
    epochs: float,
    warmup: float,
    target: float,
    last: float | None,
) -> list[str]:
    """A line for each thing about a schedule that should be known before it is trained with.

    Args:
        milestones: epochs at which the rate drops; none for another decay.
        epochs: of the run.
        warmup: epochs of warmup; 0 for none.
        target: η̂, the rate after warmup.
        last: the epoch of the last iteration's first sample, at which the rate is set for the last time; None where
            the number of samples is not known.

    >>> from onehour.rules.schedule import step_decay
    >>> schedule = step_decay(0.1, [30, 60])
    >>> schedule_remarks(schedule, milestones=[Fraction(30), Fraction(60)], epochs=40, warmup=0, target=0.1, last=None)
    ['milestone 60 is not before the end of the run of 40 epochs: the rate never drops there']
    """
    remarks: list[str] = []
    given, end = list(milestones), schedule(warmup)
    never = [m for m in given if m >= epochs]
    late = [m for m in given if last is not None and last < m < epochs]
    early = [m for m in given if m <= warmup]
    if never:
        remarks.append(
            f"{_named(never)} not before the end of the run of {epochs:g} epochs: the rate never drops there"
        )
    if late:
        remarks.append(
            f"{_named(late)} behind the last iteration, which begins at {last:g}: the rate never drops there"
        )
    if early:
        why = f"{_named(early)} not behind the warmup of {warmup:g} epochs, which thus ends at {end:g}"
        remarks.append(f"{why}: the rate never stands at {target:g}")
    elif warmup and end < NEARLY * target:
        remarks.append(
            f"the decay has begun in the warmup of {warmup:g} epochs, which thus ends at {end:g}: the rate never"
            f" stands at {target:g}"
        )
    elif warmup >= epochs:
        remarks.append(f"the warmup of {warmup:g} epochs is the whole run: the rate stands at {target:g} nowhere")
    if warmup and end < schedule(0.0):
        remarks.append(f"the rate falls in the warmup, from {schedule(0.0):g} to {end:g}")
    return remarks


def _named(milestones: list[Fraction]) -> str:
    """ "milestone 30 is", "milestones 30, 60 are"."""
    many = len(milestones) > 1
    return f"milestone{'s' * many} {', '.join(map(str, milestones))} {'are' if many else 'is'}"
