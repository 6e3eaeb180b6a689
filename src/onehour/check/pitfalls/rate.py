"""The rate and its minibatch (§2.1), and how a run comes up to it (§2.2)."""

from __future__ import annotations

from typing import Any

from onehour.check.case import Case
from onehour.check.finding import Finding, Pitfall, pitfall

NEAR = 0.05  # rates that differ by less are meant to be equal

_LINEAR = "the rate belongs to its minibatch: k times the minibatch, k times the rate"
_SET = "set it to base_lr · kn / base_minibatch (onehour.linear_scaling)"
_SCALED = (
    "lr = onehour.linear_scaling({lr:g}, {base}, {kn})",
    "lr = {lr:g} * {kn} / {base}  # without onehour",
)
_WARMUP = (
    "schedule = onehour.gradual_warmup(schedule, start_lr={start:g}, epochs=5)",
    "scheduler = onehour.ScheduleLR(optimizer, schedule, samples={samples}, minibatch={kn})",
    "warmup = LinearLR(optimizer, {start:g} / {target:g}, total_iters={steps})  # without onehour, at every update",
)


@pitfall("error", "§2.1", why=_LINEAR, remedy=_SET, write=_SCALED)
def lr_not_scaled(case: Case) -> Finding | None:
    """The base's own rate with another minibatch."""
    return _misscaled(lr_not_scaled, case, of_base=True)


@pitfall("error", "§2.1", why=_LINEAR, remedy=_SET, write=_SCALED)
def lr_scaled_wrong(case: Case) -> Finding | None:
    """Another rate than the rule's, and not the base's."""
    return _misscaled(lr_scaled_wrong, case, of_base=False)


def _misscaled(pitfall: Pitfall, case: Case, *, of_base: bool) -> Finding | None:
    """Another target than the rule's; the base's own rate, or any other."""
    scaled, target = case.scaled_from, case.schedule().target
    if scaled is None or target is None or case.adaptive:
        return None
    lr, base, minibatch = scaled
    expected = lr * minibatch / base
    at_base = bool(target) and near(target, lr) and not near(expected, lr)
    if at_base != of_base or (not of_base and near(target, expected)):
        return None
    return pitfall.found(
        measured=f"target rate {target:g} at minibatch {minibatch}",
        expected=f"{expected:g} = {lr:g} · {minibatch} / {base}",
        where=case.optimizer_line(),
        lr=lr,
        base=base,
        kn=minibatch,
    )


@pitfall(
    "warning",
    "§2.1",
    why="the linear rule's argument needs steps that grow with the gradient; this optimizer divides by its size",
    remedy="tune the rate for this minibatch, or start from base_lr · √(kn / base_minibatch) (onehour.sqrt_scaling)",
    write=(
        "lr = onehour.sqrt_scaling({lr:g}, {base}, {kn})  # where to start tuning",
        "lr = {lr:g} * ({kn} / {base}) ** 0.5  # without onehour",
    ),
)
def adam_linear_scaling(case: Case) -> Finding | None:
    """The linear rule for an optimizer whose steps do not grow with the gradient.

    Seen from a declared base, or from a rate that doubles with the processes.
    """
    target = case.schedule().target
    if not case.adaptive or not target:
        return None
    if case.scaled_from is not None:
        lr, base, minibatch = case.scaled_from
        k = minibatch / base
        if near(k, 1) or not near(target, lr * k):
            return None
        return adam_linear_scaling.found(
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
    return adam_linear_scaling.found(
        measured=f"rate {before:g} on 1 process, {target:g} on {case.processes}",
        expected="a rate that grows at most with the square root of the minibatch",
        where=case.optimizer_line(),
        lr=before,
        base=f"{samples:g}",
        kn=f"{case.minibatch:g}",
    )


@pitfall(
    "warning",
    "§2.2",
    why="a rate far above the base's fails early in training, when weights change fast",
    remedy="grow the rate from the base's at every iteration of the first 5 epochs (onehour.gradual_warmup)",
    write=_WARMUP,
)
def no_warmup(case: Case) -> Finding | None:
    """At the target from the first iteration on, though it is at least twice the base's rate."""
    schedule, lr = case.schedule(), case.base.lr
    if lr is None or not schedule.first or not schedule.target or schedule.target < 2 * lr * (1 - 1e-9):
        return None
    if schedule.first < 0.9 * schedule.target:
        return None
    return no_warmup.found(
        measured=f"the first iteration has rate {schedule.first:g}",
        expected=f"{lr:g} at first, {schedule.target:g} after 5 epochs",
        where=case.optimizer_line(),
        **_warmup(case, lr, schedule.target),
    )


@pitfall(
    "warning",
    "§2.2",
    why="the warmup adds a constant amount at every iteration, so that the rate never jumps",
    remedy="step the warmup after every optimizer.step(), with its length in iterations",
    write=_WARMUP,
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
    if second[0] <= first[0] * 1.05:
        return None
    updates = case.story.updates_an_epoch
    return warmup_per_epoch.found(
        measured=f"rate {first[0]:g} all through epoch 0, {second[0]:g} all through epoch 1"
        + (f" ({updates} iterations each)" if updates else ""),
        expected="a little more at every iteration",
        where=_scheduler_line(case),
        **_warmup(case, first[0], case.schedule().highest or second[0]),
    )


@pitfall(
    "note",
    "§2.2",
    why="the warmup starts at the base's own rate, which is right for the base's minibatch",
    remedy="start the warmup at the base rate",
    write=_WARMUP,
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
    return warmup_start.found(
        measured=f"the warmup starts at rate {schedule.first:g}",
        expected=f"at the base's, {lr:g}",
        where=_scheduler_line(case),
        **_warmup(case, lr, schedule.highest),
    )


def near(a: float, b: float, tolerance: float = NEAR) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def _warmup(case: Case, start: float, target: float) -> dict[str, Any]:
    updates = case.story.updates_an_epoch
    return {
        "start": start,
        "target": target,
        "kn": case.minibatch or "minibatch",
        "samples": (case.loader.samples if case.loader else None) or "len(data)",
        "steps": 5 * updates if updates else "5 * len(loader)",
    }


def _scheduler_line(case: Case) -> str | None:
    made = case.scheduler
    first = case.story.schedulers.get(made.parts[0]) if made and made.parts else made  # of a chain, its beginning
    return (first.where if first else None) or case.optimizer_line()
