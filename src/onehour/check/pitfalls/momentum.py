"""The velocity when the rate changes (§3, Remark 2): what happened to it between two steps, against its form."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from onehour.check.case import Case
from onehour.check.finding import Finding, found
from onehour.check.story import Update

__all__ = ["momentum_inside_uncorrected", "momentum_outside_corrected"]


def momentum_inside_uncorrected(case: Case) -> Finding | None:
    """The rate inside the velocity (form B), and the velocity kept as it was while the rate changed."""
    if _form(case) != "inside":
        return None
    keys = case.story.optimizers[case.story.main or 0].facts["velocity"]
    worst: tuple[float, Finding] | None = None
    for before, after in _changes(case):
        kept = {key: value for key, value in after.event.facts.get("kept", {}).items() if not keys or key in keys}
        factor = after.rate / before.rate
        if not kept or any(abs(value - 1) > 0.1 * abs(factor - 1) for value in kept.values()):
            continue
        off = after.event.facts.get("off", [0.0, 0.0])[1]
        finding = found(
            "momentum-inside-uncorrected",
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


def momentum_outside_corrected(case: Case) -> Finding | None:
    """The rate outside the velocity (form A), and the velocity, or the momentum for a step, scaled by η′/η."""
    if _form(case) != "outside":
        return None
    usual = max((group["momentum"] for group in _groups(case)), default=0.0)
    seen: dict[str, list[bool]] = {"velocity": [], "momentum": []}
    findings: dict[str, Finding] = {}
    for before, after in _changes(case):
        factor, facts = after.rate / before.rate, after.event.facts
        values = {"velocity": facts.get("kept", {}).values(), "momentum": []}
        if usual and facts.get("momenta"):
            values["momentum"] = [max(facts["momenta"]) / usual]
        for what, now in values.items():
            followed = [value for value in now if _follows(value, factor)]
            seen[what] += [bool(followed)] if now else []
            if followed and what not in findings:
                findings[what] = _corrected(case, what, followed[0], before, after)
    # A policy that moves the momentum on its own may meet the rates' ratio here and there.
    return next((finding for what, finding in findings.items() if 2 * sum(seen[what]) > len(seen[what])), None)


def _corrected(case: Case, what: str, value: float, before: Update, after: Update) -> Finding:
    off = after.event.facts.get("off", [0.0])[0]
    return found(
        "momentum-outside-corrected",
        measured=f"{what} × {value:.3g} as the rate went from {before.rate:g} to {after.rate:g}"
        + (f"; that update lies {100 * off:.2g} % from eq 9" if off else ""),
        expected=f"{what} × 1",
        where=case.step_line(),
        rate=after.rate,
    )


def _follows(value: float, factor: float) -> bool:
    return abs(value - factor) < 0.1 * abs(factor - 1)


def _form(case: Case) -> str | None:
    event = case.story.optimizers.get(case.story.main) if case.story.main is not None else None
    return event.facts["form"] if event is not None else None


def _groups(case: Case) -> list[dict[str, float]]:
    event = case.story.optimizers.get(case.story.main) if case.story.main is not None else None
    return event.facts["groups"] if event is not None else []


def _changes(case: Case) -> Iterator[tuple[Update, Update]]:
    """Neighbouring updates between which the rate changed."""
    main = [update for update in case.story.updates if update.optimizer == case.story.main]
    for before, after in itertools.pairwise(main):
        if before.rate > 0 and after.rate > 0 and abs(after.rate / before.rate - 1) > 1e-4:
            yield before, after
