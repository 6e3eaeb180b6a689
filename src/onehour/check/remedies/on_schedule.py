"""Edits of when a scheduler is stepped (§5.1), and of a velocity that is corrected in vain (§3, Remark 2)."""

from __future__ import annotations

import ast

from onehour.check.rates import Schedule
from onehour.check.remedies.fix import Fix
from onehour.check.remedies.source import UnsureError, name_of

__all__ = ["begin_scheduler", "step_at_epochs", "step_at_updates", "velocity_as_it_is"]

_PLANNED = ("StepLR", "MultiStepLR", "CosineAnnealingLR")


def step_at_updates(fix: Fix) -> None:
    """The scheduler steps behind the optimizer; Accelerate's no longer steps once for each process."""
    source = fix.source
    statement = _scheduler_step(fix)
    accelerators = source.calls("Accelerator")
    if accelerators and fix.finding.pitfall == "scheduler-steps-k-times":
        if len(accelerators) != 1 or fix.case.story.window != 1:
            raise UnsureError("the scheduler is stepped for each process, and batches are gathered")
        fix.changes.keyword(accelerators[0], "step_scheduler_with_optimizer", "False")
        return
    step = fix.step()
    assert isinstance(statement.value, ast.Call)
    assert isinstance(statement.value.func, ast.Attribute)
    fix.need(source.segment(statement.value.func.value), source.scope(step))
    fix.changes.delete(statement)
    fix.changes.insert_after(step, source.segment(statement))


def step_at_epochs(fix: Fix) -> None:
    """A schedule that is planned in epochs is stepped at their ends."""
    source, schedule, planned = fix.source, fix.case.schedule(), fix.case.story.planned
    statement, loop = _scheduler_step(fix), fix.batches()
    if schedule.a_update != 1 or not planned or not _falls(schedule, planned):
        raise UnsureError("the schedule is not planned in epochs")
    if loop not in source.around(statement) or next(iter(source.around(statement))) is not loop:
        raise UnsureError("the scheduler is not stepped in the loop over batches")
    fix.changes.delete(statement)
    fix.changes.insert_after(loop, source.segment(statement))


def _falls(schedule: Schedule, epochs: int) -> bool:
    """Whether the curve, stepped once an epoch, neither ends early nor comes to nothing."""
    peak = schedule.target or 0.0
    for share, before in ((1e-7, 0.9), (1e-4, 0.5), (1e-2, 0.05)):
        reached = schedule.reaches(share * peak)
        if reached is not None and reached < before * epochs:
            return False
    fallen = schedule.reaches(0.5 * peak)
    return fallen is not None and fallen < epochs


def _scheduler_step(fix: Fix) -> ast.Expr:
    """The one statement that steps the scheduler."""
    places = {event.where for event in fix.case.story.tape.of("schedule") if event.where}
    if len(places) != 1:
        raise UnsureError("the scheduler is stepped in several places")
    statement = fix.source.at(fix.line_of(places.pop(), "the scheduler's step"))
    value = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(statement, ast.Expr) or not isinstance(value, ast.Call) or name_of(value.func) != "step":
        raise UnsureError("the scheduler's step is part of another statement")
    return statement


def begin_scheduler(fix: Fix) -> None:
    """scheduler.step() at the end of each epoch, or behind each update, as the schedule is planned."""
    source = fix.source
    call = source.call(fix.line, *_PLANNED)
    made = source.statement(call)
    if not isinstance(made, ast.Assign) or made.value is not call or not isinstance(made.targets[0], ast.Name):
        raise UnsureError("the scheduler has no name")
    name, loop = made.targets[0].id, fix.batches()
    length = next((k.value for k in call.keywords if k.arg in ("step_size", "T_max")), None)
    length = length or (call.args[1] if len(call.args) > 1 else None)
    planned, number = fix.case.story.planned, fix.constant(length) if length is not None else None
    if number is not None and planned and number <= planned:
        fix.need(name, source.scope(loop))
        fix.changes.insert_after(loop, f"{name}.step()")
    elif length is not None and f"len({fix.loader()})" in source.segment(length):
        fix.need(name, source.scope(fix.step()))
        fix.changes.insert_after(fix.step(), f"{name}.step()")
    else:
        raise UnsureError("it is not clear whether the schedule is planned in epochs or in updates")


def velocity_as_it_is(fix: Fix) -> None:
    """The statement that scales the momentum buffer goes, with the loop that holds nothing else."""
    source = fix.source
    fix.measured(r"^(velocity)")
    scaled: list[ast.stmt] = [
        n
        for n in source.every(ast.AugAssign)
        if isinstance(n.op, ast.Mult) and "momentum_buffer" in source.segment(n.target)
    ]
    scaled += [
        source.statement(c)
        for c in source.calls("mul_")
        if isinstance(c.func, ast.Attribute) and "momentum_buffer" in source.segment(c.func.value)
    ]
    if len(scaled) != 1 or source.text.count("momentum_buffer") != 1:
        raise UnsureError("the momentum buffer is used in several places, or in none")
    statement = scaled[0]
    for outer in source.around(statement):
        if isinstance(outer, ast.For | ast.If) and outer.body == [statement] and not outer.orelse:
            statement = outer
        else:
            break
    fix.changes.delete(statement)
