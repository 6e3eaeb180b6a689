"""Where a schedule leads by the end of the run, and at what pace (§5.1)."""

from __future__ import annotations

import ast
import linecache
from collections import Counter

from onehour.check.case import Case, RateSchedule
from onehour.check.finding import Finding, found
from onehour.check.tape import Event

__all__ = [
    "idle_scheduler",
    "lr_collapses",
    "scheduler_never_steps",
    "scheduler_steps_k_times",
    "scheduler_too_slow",
    "steps_later",
]

WARM_RESTARTS = ("CosineAnnealingWarmRestarts", "CyclicLR")
"""Schedules that are meant to jump up."""
STEPPED_LATER = ("ReduceLROnPlateau", "SWALR")
"""Those that a right loop may not step in its first epochs."""


def horizon(schedule: RateSchedule) -> int | None:
    """After how many of its steps a schedule is done: it has come to a hundredth of its peak, or refuses to go on.

    >>> horizon(RateSchedule(seen=[], steps=100, curve=[[10, 1.0], [10, 0.001], [81, 0.0]]))
    20
    """
    peak = max((rate for _, rate in schedule.curve), default=0.0)
    if not peak or schedule.steps is None:
        return None
    length = sum(count for count, _ in schedule.curve) - 1
    if length < schedule.steps:
        return int(length)
    passed, best, end = 0.0, peak, None
    for count, rate in schedule.curve:
        if rate <= 0.01 * peak and rate < best:
            best, end = rate, passed
        elif end is not None and rate > best:
            break  # a cosine that is stepped past its end rises again
        passed += count
    return None if end is None else int(end)


def scheduler_steps_k_times(case: Case) -> Finding | None:
    """A schedule planned in updates and stepped k times at each: it ends after 1/k of the run."""
    schedule, story = case.schedule(), case.story
    k, end, epochs, updates = schedule.a_update, horizon(schedule), story.planned, story.updates_an_epoch
    if k < 2 or end is None or not epochs or not updates or not schedule.planned:
        return None
    if abs(end - epochs * updates) > 0.1 * epochs * updates:
        return None
    return found(
        "scheduler-steps-k-times",
        measured=f"{k} scheduler steps an update: the schedule of {end} steps ends after {epochs / k:g} of"
        f" {epochs} epochs",
        expected=f"1 scheduler step an update: {epochs * updates} in the run",
        where=_step_line(case),
        steps=epochs * updates,
    )


def scheduler_too_slow(case: Case) -> Finding | None:
    """A schedule planned in iterations and stepped once an epoch: it hardly begins."""
    schedule, story = case.schedule(), case.story
    epochs, updates = story.planned, story.updates_an_epoch
    if schedule.an_epoch != 1 or schedule.a_update or not epochs or not updates or updates < 4:
        return None
    end = horizon(RateSchedule(seen=[], steps=sum(int(n) for n, _ in schedule.curve) - 1, curve=schedule.curve))
    if end is None or abs(end - epochs * updates) > 0.1 * epochs * updates:
        return None
    fallen = schedule.reaches(0.5 * (schedule.target or 0.0))
    if fallen is not None and fallen < epochs:
        return None
    return found(
        "scheduler-too-slow",
        measured=f"1 scheduler step an epoch: {epochs} in the run, and the schedule comes to its end after {end}",
        expected=f"1 scheduler step an update: {epochs * updates} in the run",
        where=_step_line(case),
        steps=epochs * updates,
    )


def scheduler_never_steps(case: Case) -> Finding | None:
    """A scheduler that two epochs never stepped, and that the loop steps nowhere."""
    event = idle_scheduler(case)
    if event is None or steps_later(case, event):
        return None
    return found(
        "scheduler-never-steps",
        measured=f"0 steps of {event.facts['name']} in 2 epochs; the rate stays {case.schedule().seen[0][1]:g}",
        expected="a step after every update, or after every epoch",
        where=event.where or case.optimizer_line(),
    )


def idle_scheduler(case: Case) -> Event | None:
    """A scheduler of the main optimizer, where two epochs stepped none of them.

    >>> from onehour.check.story import Story
    >>> from onehour.check.tape import Tape
    >>> idle_scheduler(Case([Story(Tape())]))
    """
    story = case.story
    if len(story.trained()) < 2 or len({rate for _, rate in case.schedule().seen}) != 1:
        return None
    stepped = {event.facts["scheduler"] for event in story.tape.of("schedule")}
    parts = {part for event in story.schedulers.values() for part in event.facts["parts"]}
    own = {n: event for n, event in story.schedulers.items() if event.facts["optimizer"] == story.main}
    if own.keys() & stepped:
        return None
    idle = [event for n, event in own.items() if n not in parts and event.facts["name"] not in STEPPED_LATER]
    return idle[0] if idle else None


def steps_later(case: Case, scheduler: Event) -> bool:
    """Whether the loop's source steps a scheduler by its name, though the epochs that were seen did not come to it.

    Args:
        case: what was seen.
        scheduler: the event of its making.
    """
    places = [scheduler.where, case.step_line()]
    trees = [_tree(place.rpartition(":")[0]) for place in places if place]
    line = int(scheduler.where.rpartition(":")[2]) if scheduler.where else 0
    made = [
        _name(target)
        for node in (ast.walk(trees[0]) if scheduler.where else ())
        if isinstance(node, ast.Assign) and node.lineno <= line <= (node.end_lineno or 0)
        for target in node.targets
    ]
    stepped = [
        _name(node.func.value)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step"
    ]
    return any(name and (name in made or "sched" in name.lower()) for name in stepped)


def _tree(filename: str) -> ast.Module:
    try:
        return ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _name(node: ast.expr) -> str | None:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)


def lr_collapses(case: Case) -> Finding | None:
    """A rate that is nothing long before the end, or rises again after it had fallen."""
    schedule, story = case.schedule(), case.story
    epochs, steps = story.planned, schedule.steps
    if not schedule.curve or not schedule.planned or not epochs or not steps:
        return None
    if scheduler_steps_k_times(case) or scheduler_too_slow(case):
        return None
    event = story.schedulers.get(schedule.scheduler) if schedule.scheduler is not None else None
    if event is not None and event.facts["name"] in WARM_RESTARTS:
        return None
    peak = schedule.target or 0.0
    for share, before in ((1e-7, 0.9), (1e-4, 0.5), (1e-2, 0.05)):
        reached = schedule.reaches(share * peak)
        if reached is not None and reached < before * steps:
            rate, epoch = schedule.at(reached) or 0, reached * epochs / steps
            return found(
                "lr-collapses",
                measured=f"rate {rate:.2g} from epoch {epoch:.3g} of {epochs} on, {peak:g} before",
                expected=f"a rate that falls over {epochs} epochs",
                where=_line(case),
                epochs=epochs,
                steps=epochs * (story.updates_an_epoch or 0) or f"{epochs} * len(loader)",
            )
    return _rises(case, schedule, epochs, steps)


def _rises(case: Case, schedule: RateSchedule, epochs: int, steps: int) -> Finding | None:
    """Up again by a tenth of the peak, after it had fallen to a tenth."""
    peak = max(rate for _, rate in schedule.curve)
    passed, lowest, at, after_peak = 0.0, peak, 0.0, False
    for count, rate in schedule.curve:
        after_peak = after_peak or rate >= peak * (1 - 1e-9)
        if after_peak and rate < lowest:
            lowest, at = rate, passed
        if after_peak and lowest < 0.1 * peak and rate > lowest + 0.1 * peak and passed < steps:
            return found(
                "lr-collapses",
                measured=f"rate {lowest:.2g} at epoch {at * epochs / steps:.3g} of {epochs}, then up again"
                f" to {rate:.2g}",
                expected=f"a rate that falls over {epochs} epochs",
                where=_line(case),
                epochs=epochs,
                steps=epochs * (case.story.updates_an_epoch or 0) or f"{epochs} * len(loader)",
            )
        passed += count
    return None


def _line(case: Case) -> str | None:
    number = case.schedule().scheduler
    event = case.story.schedulers.get(number) if number is not None else None
    return (event.where if event else None) or case.optimizer_line()


def _step_line(case: Case) -> str | None:
    """Where the scheduler is stepped, most often."""
    number = case.schedule().scheduler
    lines = Counter(e.where for e in case.story.tape.of("schedule") if e.where and e.facts["scheduler"] == number)
    return lines.most_common(1)[0][0] if lines else _line(case)
