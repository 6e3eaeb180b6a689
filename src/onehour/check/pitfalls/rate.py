"""The rate and its minibatch (§2.1), and how a run comes up to it (§2.2)."""

from __future__ import annotations

from typing import Any

from onehour.check.case import Case
from onehour.check.finding import Finding, found
from onehour.check.pitfalls.schedule import scheduler_too_slow

__all__ = [
    "adam_linear_scaling",
    "lr_not_scaled",
    "lr_scaled_wrong",
    "no_warmup",
    "warmup_per_epoch",
    "warmup_start",
]

NEAR = 0.05
"""Rates that differ by less are meant to be equal."""


def near(a: float, b: float, tolerance: float = NEAR) -> bool:
    """Whether two rates are meant to be equal.

    >>> near(0.1, 0.102), near(0.1, 0.2)
    (True, False)
    """
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def adaptive(case: Case) -> bool | None:
    """Whether the main optimizer divides by the gradient's own size; None where its copy could not be stepped.

    >>> from onehour.check.story import Story
    >>> from onehour.check.tape import Tape
    >>> adaptive(Case([Story(Tape())])) is None
    True
    """
    story = case.story
    event = story.optimizers.get(story.main) if story.main is not None else None
    return event.facts["adaptive"] if event is not None else None


def lr_not_scaled(case: Case) -> Finding | None:
    """The base's own rate with another minibatch."""
    scaled, target = case.scaled_from, case.schedule().target
    if scaled is None or not target or adaptive(case):
        return None
    lr, base, minibatch = scaled
    expected = lr * minibatch / base
    if near(expected, lr) or not near(target, lr):
        return None
    return _rate("lr-not-scaled", case, target, expected)


def lr_scaled_wrong(case: Case) -> Finding | None:
    """Another rate than the rule's, and not the base's."""
    scaled, target = case.scaled_from, case.schedule().target
    if scaled is None or target is None or adaptive(case):
        return None
    lr, base, minibatch = scaled
    expected = lr * minibatch / base
    if near(target, expected) or (near(target, lr) and not near(expected, lr)):
        return None
    return _rate("lr-scaled-wrong", case, target, expected)


def adam_linear_scaling(case: Case) -> Finding | None:
    """The linear rule for an optimizer whose steps do not grow with the gradient.

    Seen from a declared base, or from a rate that doubles with the processes.
    """
    target = case.schedule().target
    if not adaptive(case) or not target:
        return None
    if case.scaled_from is not None:
        lr, base, minibatch = case.scaled_from
        k = minibatch / base
        if near(k, 1) or not near(target, lr * k):
            return None
        return found(
            "adam-linear-scaling",
            measured=f"rate {target:g} = {lr:g} · {minibatch} / {base}",
            expected=f"about {lr * k**0.5:g} = {lr:g} · √({minibatch} / {base}), tuned",
            where=case.optimizer_line(),
            lr=lr,
            base=base,
            kn=minibatch,
        )
    if case.single is None or case.processes < 2:
        return None
    one = Case([case.single], case.base)
    before, samples = one.schedule().target, one.minibatch
    if not before or not samples or not case.minibatch or near(target, before):
        return None
    if not (near(target / before, case.processes) and near(case.minibatch / samples, case.processes)):
        return None
    return found(
        "adam-linear-scaling",
        measured=f"rate {before:g} on 1 process, {target:g} on {case.processes}",
        expected="a rate that grows at most with the square root of the minibatch",
        where=case.optimizer_line(),
        lr=before,
        base=f"{samples:g}",
        kn=f"{case.minibatch:g}",
    )


def no_warmup(case: Case) -> Finding | None:
    """At the target from the first iteration on, though it is at least twice the base's rate."""
    schedule, lr = case.schedule(), case.base.lr
    if lr is None or not schedule.first or not schedule.target or schedule.target < 2 * lr * (1 - 1e-9):
        return None
    if schedule.first < 0.9 * schedule.target:
        return None
    return found(
        "no-warmup",
        measured=f"the first iteration has rate {schedule.first:g}",
        expected=f"{lr:g} at first, {schedule.target:g} after 5 epochs",
        where=case.optimizer_line(),
        **_warmup(case, lr, schedule.target),
    )


def warmup_start(case: Case) -> Finding | None:
    """A warmup that starts elsewhere than at the base's rate."""
    schedule, lr = case.schedule(), case.base.lr
    if lr is None or schedule.first is None or not schedule.highest or schedule.highest < 2 * lr * (1 - 1e-9):
        return None
    if schedule.first >= 0.9 * schedule.highest or near(schedule.first, lr, 0.1):
        return None
    if 0.5 * lr <= schedule.first < lr:
        return None
    return found(
        "warmup-start",
        measured=f"the warmup starts at rate {schedule.first:g}",
        expected=f"at the base's, {lr:g}",
        where=_scheduler_line(case),
        **_warmup(case, lr, schedule.highest),
    )


def warmup_per_epoch(case: Case) -> Finding | None:
    """A rate that stays for a whole epoch and then jumps up."""
    by_epoch: dict[int, list[float]] = {}
    for epoch, rate in case.schedule().seen:
        if epoch is not None:
            by_epoch.setdefault(epoch, []).append(rate)
    first, second = by_epoch.get(0, []), by_epoch.get(1, [])
    if len(first) < 2 or len(second) < 2 or len({*first}) > 1 or len({*second}) > 1:
        return None
    if second[0] <= first[0] * 1.05 or scheduler_too_slow(case):
        return None
    updates = case.story.updates_an_epoch
    return found(
        "warmup-per-epoch",
        measured=f"rate {first[0]:g} all through epoch 0, {second[0]:g} all through epoch 1"
        + (f" ({updates} iterations each)" if updates else ""),
        expected="a little more at every iteration",
        where=_scheduler_line(case),
        **_warmup(case, first[0], case.schedule().highest or second[0]),
    )


def _rate(pitfall: str, case: Case, target: float, expected: float) -> Finding:
    lr, base, minibatch = case.scaled_from or (0.0, 0, 0)
    return found(
        pitfall,
        measured=f"target rate {target:g} at minibatch {minibatch}",
        expected=f"{expected:g} = {lr:g} · {minibatch} / {base}",
        where=case.optimizer_line(),
        lr=lr,
        base=base,
        kn=minibatch,
    )


def _warmup(case: Case, start: float, target: float) -> dict[str, Any]:
    """What the lines of a warmup of 5 epochs need."""
    updates = case.story.updates_an_epoch
    return {
        "start": start,
        "target": target,
        "kn": case.minibatch or "minibatch",
        "samples": case.samples or "len(data)",
        "steps": 5 * updates if updates else "5 * len(loader)",
    }


def _scheduler_line(case: Case) -> str | None:
    number = case.schedule().scheduler
    event = case.story.schedulers.get(number) if number is not None else None
    parts = event.facts["parts"] if event is not None else []
    first = case.story.schedulers.get(parts[0]) if parts else event  # of a chain, what the run begins with
    return (first.where if first else None) or case.optimizer_line()
