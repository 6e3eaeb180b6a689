"""Where a schedule leads by the end of the run, and at what pace (§5.1)."""

from __future__ import annotations

import ast
import itertools
import linecache
import math

from onehour.check.case import UNKNOWN_EPOCHS, Case, RateSchedule, schedule_of
from onehour.check.finding import Finding, pitfall
from onehour.check.story import most_common
from onehour.check.tape import SchedulerMade, SchedulerStep

FEW = 3
"""Steps in which a rate falls before a restart; a cosine over fewer, run on, jumps up as well."""
STEPPED_LATER = ("ReduceLROnPlateau", "SWALR")  # those that a right loop may not step in its first epochs


@pitfall(
    "error",
    "§2.1, §5.1",
    why="a schedule is a function of the epoch: it must not end k times too early",
    remedy="call scheduler.step() once after each optimizer.step(), or plan the schedule in the steps that it takes",
    write=("optimizer.step()", "scheduler.step()  # only here: {steps} steps in the run"),
    symptoms=("lr-collapses",),
)
def scheduler_steps_k_times(case: Case) -> Finding | None:
    """A schedule planned in updates and stepped k times at each: it ends after 1/k of the run."""
    schedule, story = case.schedule(), case.story
    k, end, epochs, updates = schedule.a_update, horizon(schedule), story.planned, story.updates_an_epoch
    planned = end is not None and epochs and updates and abs(end - epochs * updates) <= 0.1 * epochs * updates
    if k < 2 or not planned or not epochs or not updates:
        return _more_on_several(case)
    return scheduler_steps_k_times.found(
        measured=f"{k} scheduler steps an update: the schedule of {end} steps ends after {epochs / k:g} of"
        f" {epochs} epochs",
        expected=f"1 scheduler step an update: {epochs * updates} in the run",
        where=_step_line(case),
        steps=epochs * updates,
    )


def _more_on_several(case: Case) -> Finding | None:
    """More scheduler steps an update on several processes than on one, and so another rate at the same epoch."""
    if case.single is None or case.processes < 2:
        return None
    one, now = schedule_of(case.single), case.schedule()
    if not one.an_epoch or not now.an_epoch or not one.target or not now.target:
        return None
    by_update = bool(one.a_update and now.a_update)
    before, after = (one.a_update, now.a_update) if by_update else (one.an_epoch, now.an_epoch)
    if after <= before or by_update != bool(one.a_update or now.a_update):
        return None
    unit = "an update" if by_update else "an epoch"
    # Shares that are padded to one length end in an update more, whose steps are no other schedule.
    padded = by_update and abs(now.an_epoch - one.an_epoch) < after
    an_epoch = one.an_epoch if padded else now.an_epoch
    epochs = case.story.planned or UNKNOWN_EPOCHS
    places = [epochs * part / 64 for part in range(64)]
    start = max(_reaches_highest(schedule, places) for schedule in (one, now))  # warmups may begin where they like
    for epoch in (place for place in places if place >= start):
        alone, together = one.at(epoch * one.an_epoch), now.at(epoch * an_epoch)
        if together is None or alone is None or abs(alone / one.target - together / now.target) < 0.02:
            continue
        return scheduler_steps_k_times.found(
            measured=f"{after} scheduler steps {unit} on {case.processes} processes, {before} on 1: in"
            f" epoch {epoch:.3g} the rate is {together / now.target:.2g} of its highest, {alone / one.target:.2g} on 1",
            expected="one schedule, whatever the number of processes",
            where=_step_line(case),
            steps=epochs * (case.story.updates_an_epoch or 1),
        )
    return None


def _reaches_highest(schedule: RateSchedule, epochs: list[float]) -> float:
    """The first of some epochs at which a schedule is at its highest rate; infinite if none is."""
    rates = ((epoch, schedule.at(epoch * (schedule.an_epoch or 0))) for epoch in epochs)
    return next((epoch for epoch, rate in rates if rate and rate >= 0.98 * (schedule.target or math.inf)), math.inf)


@pitfall(
    "error",
    "§2.1, §5.1",
    why="a schedule is a function of the epoch: planned in iterations, it must be stepped at each",
    remedy="call scheduler.step() after every optimizer.step()",
    write=("optimizer.step()", "scheduler.step()  # in the loop over batches: {steps} steps in the run"),
    symptoms=("lr-collapses", "warmup-per-epoch"),
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
    return scheduler_too_slow.found(
        measured=f"1 scheduler step an epoch: {epochs} in the run, and the schedule comes to its end after {end}",
        expected=f"1 scheduler step an update: {epochs * updates} in the run",
        where=_step_line(case),
        steps=epochs * updates,
    )


@pitfall(
    "error",
    "§5.1",
    why="the rate must fall as training goes on",
    remedy="call scheduler.step(), or remove the scheduler",
    write=("scheduler.step()  # after every optimizer.step(), or at the end of every epoch",),
)
def scheduler_never_steps(case: Case) -> Finding | None:
    """A scheduler that two epochs never stepped, and that the loop steps nowhere."""
    idle = idle_scheduler(case)
    if idle is None or steps_later(case, idle):
        return None
    return scheduler_never_steps.found(
        measured=f"0 steps of {idle.name} in 2 epochs; the rate stays {case.schedule().seen[0][1]:g}",
        expected="a step after every update, or after every epoch",
        where=idle.where or case.optimizer_line(),
    )


@pitfall(
    "error",
    "§5.1",
    why="the rate of the whole run decides what is learned, not that of its first epochs",
    remedy="give the schedule the length of the run, in the unit in which it is stepped",
    write=(
        "scheduler = CosineAnnealingLR(optimizer, T_max={epochs})  # stepped once an epoch",
        "scheduler = CosineAnnealingLR(optimizer, T_max={steps})  # stepped at every update",
    ),
)
def lr_collapses(case: Case) -> Finding | None:
    """A rate that is nothing long before the end, or rises again after it had fallen."""
    schedule, story = case.schedule(), case.story
    epochs, steps = story.planned, schedule.steps
    if not schedule.curve or not epochs or not steps:
        return None
    if case.scheduler is not None and case.scheduler.restarts:
        return None
    peak = schedule.target or 0.0
    early = ((schedule.reaches(share * peak), before) for share, before in ((1e-7, 0.9), (1e-4, 0.5), (1e-2, 0.05)))
    measured = _rises(schedule, epochs, steps) or next(
        (
            f"rate {schedule.at(reached) or 0:.2g} from epoch {reached * epochs / steps:.3g} of {epochs} on,"
            f" {peak:g} before"
            for reached, before in early
            if reached is not None and reached < before * steps
        ),
        None,
    )
    if measured is None:
        return None
    return lr_collapses.found(
        measured=measured,
        expected=f"a rate that falls over {epochs} epochs",
        where=_line(case),
        epochs=epochs,
        steps=epochs * (story.updates_an_epoch or 0) or f"{epochs} * len(loader)",
    )


def _rises(schedule: RateSchedule, epochs: int, steps: int) -> str | None:
    """Up again by a tenth of the peak, after it had fallen to a tenth.

    But for a jump back to the peak, which is a restart, and a rise like that of the beginning, which is a cycle.
    """
    peak = max(rate for _, rate in schedule.curve)
    first = [*itertools.takewhile(lambda piece: piece[2] < 0.999 * peak, schedule.pieces())]
    lowest, at, before, falls = peak, 0.0, peak, 0
    for start, _, rate in schedule.falling():
        if rate > 0.9 * peak and before < 0.1 * peak and falls > FEW:
            lowest = rate
        before, falls = rate, falls + 1 if rate < before else 0
        if rate < lowest:
            lowest, at = rate, start
        if lowest < 0.1 * peak and rate > lowest + 0.1 * peak and start < steps:
            alike = (abs((schedule.at(at + step) or 0.0) - own) < 0.01 * peak for step, _, own in first)
            if len(first) > FEW and all(alike):
                return None
            return f"rate {lowest:.2g} at epoch {at * epochs / steps:.3g} of {epochs}, then up again to {rate:.2g}"
    return None


def horizon(schedule: RateSchedule) -> int | None:
    """After how many of its steps a schedule is done: it has come to a hundredth of its peak, or refuses to go on."""
    peak = max((rate for _, rate in schedule.curve), default=0.0)
    if not peak or schedule.steps is None:
        return None
    length = sum(count for count, _ in schedule.curve) - 1
    if length < schedule.steps:
        return int(length)
    best, end = peak, None
    for start, _, rate in schedule.pieces():
        if rate <= 0.01 * peak and rate < best:
            best, end = rate, start
        elif end is not None and rate > best:
            break  # a cosine that is stepped past its end rises again
    return None if end is None else int(end)


def idle_scheduler(case: Case) -> SchedulerMade | None:
    """A scheduler of the main optimizer, where two epochs stepped none of them."""
    story = case.story
    if len(story.trained()) < 2 or len({rate for _, rate in case.schedule().seen}) != 1:
        return None
    stepped = {event.scheduler for event in story.tape.of(SchedulerStep)}
    parts = {part for made in story.schedulers.values() for part in made.parts}
    own = {number: made for number, made in story.schedulers.items() if made.optimizer == story.main}
    if own.keys() & stepped:
        return None
    idle = [made for number, made in own.items() if number not in parts and made.name not in STEPPED_LATER]
    return idle[0] if idle else None


def steps_later(case: Case, scheduler: SchedulerMade) -> bool:
    """Whether the loop's source steps a scheduler by its name, though the epochs that were seen did not come to it."""
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


def _line(case: Case) -> str | None:
    return (case.scheduler.where if case.scheduler else None) or case.optimizer_line()


def _step_line(case: Case) -> str | None:
    number = case.schedule().scheduler
    steps = case.story.tape.of(SchedulerStep)
    return most_common(step.where for step in steps if step.scheduler == number) or _line(case)
