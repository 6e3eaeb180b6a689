"""One update, one gradient (§2.1, eq 2): nothing stepped twice, kept, or thrown away."""

from __future__ import annotations

from collections import Counter

from onehour.check.case import Case
from onehour.check.finding import Finding, found
from onehour.check.story import ratio
from onehour.check.tape import Event

__all__ = ["double_step", "step_without_zero_grad", "unused_gradients"]


def double_step(case: Case) -> Finding | None:
    """Two steps of one optimizer on one gradient."""
    story = case.story
    seen: dict[int, Event] = {}
    twice = 0
    where = None
    for event in story.tape.of("step", "backward"):
        if event.kind == "backward":
            seen.clear()
            continue
        facts = event.facts
        moved = any(facts["moved"]) if "moved" in facts else twice > 0  # later ones are counted by the pattern
        before = seen.get(facts["optimizer"])
        if before is not None and not facts["closure"] and moved and not _replaced(before, event):
            twice, where = twice + 1, event.where or where
        seen[facts["optimizer"]] = event
    if twice < 2:
        return None
    updates = sum(update.optimizer == story.main for update in story.updates)
    return found(
        "double-step",
        measured=f"{updates} steps on {updates - twice} gradients",
        expected="one step for each gradient",
        where=where,
    )


def _replaced(before: Event, step: Event) -> bool:
    """Whether another gradient lies there at a step: torch.autograd.grad and torch.func put it there themselves."""
    final = step.facts.get("final")
    return bool(final) and any(final) and final != before.facts.get("left", final)


def step_without_zero_grad(case: Case) -> Finding | None:
    """The gradient of the update before, in that of the next one."""
    left: dict[str, list[float]] = {}
    lying: dict[str, list[list[float]]] = {}
    kept: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    where: dict[str, str | None] = {}
    for event in case.story.tape.of("step", "backward"):
        if event.kind == "backward":
            local = event.facts.get("local", {})
            for name, gradients in event.facts.get("before", {}).items():
                if any(local.get(name, gradients)):  # other optimizers' passes say nothing of it
                    lying.setdefault(name, []).append(gradients)
            continue
        name = str(event.facts["optimizer"])
        kept[name] += _kept(left.pop(name, []), lying.pop(name, []))
        if "left" in event.facts:
            left[name] = event.facts["left"]
            steps[name] += 1
            where[name] = event.where or where.get(name)
    for name, count in kept.most_common():
        if count >= max(steps[name] - 1, 2):
            return found(
                "step-without-zero-grad",
                measured=f"after {count} of {steps[name]} steps the old gradient was still there when the next was"
                " added",
                expected="cleared gradients before each minibatch",
                where=where[name],
            )
    return None


def _kept(left: list[float], lying: list[list[float]]) -> bool:
    """Whether a step's gradient was there as its next window began, and was not cleared within it."""
    return any(left) and bool(lying) and all(map(any, lying)) and ratio(lying[0], left) == (1.0, 0.0)


def unused_gradients(case: Case) -> Finding | None:
    """Gradients for parameters that no optimizer has, cleared before the step, or an optimizer that gets none."""
    story = case.story
    for model in story.models:
        unused = model.facts["unused"]
        if unused and story.updates:
            names = ", ".join(unused[:3]) + (" …" if len(unused) > 3 else "")
            return found(
                "unused-gradients",
                measured=f"{len(unused)} of {model.facts['parameters']} trainable parameters get gradients and are in"
                f" no optimizer: {names}",
                expected="all of them",
                where=case.optimizer_line(),
                decay=_decay(case),
            )
    main = [update for update in story.updates if update.optimizer == story.main and "final" in update.event.facts]
    if len(main) < 2:
        return None
    name = str(story.main)
    cleared = [
        update
        for update in main
        if not any(update.event.facts["final"])
        and any(any(micro.event.facts.get("local", {}).get(name, [])) for micro in update.microbatches)
    ]
    if len(cleared) == len(main):
        return found(
            "unused-gradients",
            measured="the gradients are zero when the optimizer steps: cleared after backward()",
            expected="zero_grad() before backward(), or after step()",
            where=case.step_line(),
            remedy="call optimizer.zero_grad() before the backward pass, not between it and the step",
            write=("optimizer.zero_grad()", "loss.backward()", "optimizer.step()"),
        )
    if all(update.event.facts["with_gradient"] == 0 for update in main) and any(u.microbatches for u in main):
        return found(
            "unused-gradients",
            measured=f"none of the optimizer's {main[0].event.facts['parameters']} parameters has a gradient",
            expected="all of them",
            where=case.optimizer_line(),
            remedy="make the optimizer from the parameters of the model that is trained, after it was made or copied",
            decay=_decay(case),
        )
    return None


def _decay(case: Case) -> float:
    """λ of the main optimizer."""
    event = case.story.optimizers.get(case.story.main) if case.story.main is not None else None
    return max((group["weight_decay"] for group in event.facts["groups"]), default=0.0) if event else 0.0
