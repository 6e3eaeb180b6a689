"""The velocity when the rate changes (§3, Remark 2): what happened to it between two steps, against its form."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from onehour.check.case import Case
from onehour.check.finding import Finding, pitfall
from onehour.check.story import Update


@pitfall(
    "momentum-inside-uncorrected",
    "error",
    "§3, Remark 2",
    why="a velocity that holds the rate must be scaled with it: v′ = m·(η′/η)·v + η′·g",
    remedy="set the rate with onehour.correct_momentum, or use torch.optim.SGD, which keeps the rate outside",
    write=(
        "onehour.correct_momentum(optimizer, lr={rate:g})",
        "velocity.mul_({rate:g} / {before:g})  # without onehour, as the rate changes",
    ),
)
def momentum_inside_uncorrected(case: Case) -> Finding | None:
    """The rate inside the velocity (form B), and the velocity kept as it was while the rate changed."""
    optimizer = case.story.main_optimizer
    if optimizer is None or optimizer.form != "inside":
        return None
    worst: tuple[float, Finding] | None = None
    for before, after in _changes(case):
        holds = optimizer.velocity or after.step.kept
        kept = {key: value for key, value in after.step.kept.items() if key in holds}
        factor = after.rate / before.rate
        if not kept or any(abs(value - 1) > 0.1 * abs(factor - 1) for value in kept.values()):
            continue
        off = (after.step.off or [0.0, 0.0])[1]
        finding = momentum_inside_uncorrected.found(
            measured=f"velocity × {next(iter(kept.values())):.3g} as the rate went from {before.rate:g} to"
            f" {after.rate:g}; that update lies {100 * off:.2g} % from eq 10",
            expected=f"velocity × {factor:.3g}",
            where=case.step_line(),
            rate=after.rate,
            before=before.rate,
        )
        if worst is None or off > worst[0]:
            worst = off, finding
    return worst[1] if worst else None


@pitfall(
    "momentum-outside-corrected",
    "error",
    "§3, Remark 2",
    why="a velocity that does not hold the rate must stay when the rate changes: u′ = m·u + g",
    remedy="remove the correction: this optimizer multiplies by the rate outside its velocity",
    write=(
        "onehour.correct_momentum(optimizer, lr={rate:g})  # scales only a velocity that holds the rate",
        'group["lr"] = {rate:g}  # without onehour: nothing else changes',
    ),
)
def momentum_outside_corrected(case: Case) -> Finding | None:
    """The rate outside the velocity (form A), and the velocity, or the momentum for a step, scaled by η′/η."""
    optimizer = case.story.main_optimizer
    if optimizer is None or optimizer.form != "outside":
        return None
    usual = max((group.momentum for group in optimizer.groups), default=0.0)
    seen: dict[str, list[bool]] = {"velocity": [], "momentum": []}
    findings: dict[str, Finding] = {}
    for before, after in _changes(case):
        factor, step = after.rate / before.rate, after.step
        values = {"velocity": list(step.kept.values()), "momentum": list[float]()}
        if usual and step.momenta:
            values["momentum"] = [max(step.momenta) / usual]
        for what, now in values.items():
            followed = [value for value in now if abs(value - factor) < 0.1 * abs(factor - 1)]
            seen[what] += [bool(followed)] if now else []
            if followed and what not in findings:
                off = (step.off or [0.0])[0]
                findings[what] = momentum_outside_corrected.found(
                    measured=f"{what} × {followed[0]:.3g} as the rate went from {before.rate:g} to {after.rate:g}"
                    + (f"; that update lies {100 * off:.2g} % from eq 9" if off else ""),
                    expected=f"{what} × 1",
                    where=case.step_line(),
                    rate=after.rate,
                )
    # A policy that moves the momentum on its own may meet the rates' ratio here and there.
    return next((finding for what, finding in findings.items() if 2 * sum(seen[what]) > len(seen[what])), None)


def _changes(case: Case) -> Iterator[tuple[Update, Update]]:
    """Neighbouring updates between which the rate changed."""
    for before, after in itertools.pairwise(case.story.steps):
        if before.rate > 0 and after.rate > 0 and abs(after.rate / before.rate - 1) > 1e-4:
            yield before, after
