"""What an optimizer adds to the gradient: velocity, as the rate changes (§3, Remark 2), and weight decay (Remark 1)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from onehour.check.case import Case
from onehour.check.finding import Finding, pitfall
from onehour.check.pitfalls.gradient import loss_line, weights, windows
from onehour.check.story import Update
from onehour.check.tape import BackwardPass

NEGLIGIBLE = 1e-6  # a weight decay that takes less than a thousandth of a weight in a million steps at rate 1e-3


@pitfall(
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
    for before, after in itertools.pairwise(case.story.steps):
        if before.rate > 0 and after.rate > 0 and abs(after.rate / before.rate - 1) > 1e-4:
            yield before, after


@pitfall(
    "warning",
    "§5.1",
    why="no weight decay on BatchNorm's γ and β",
    remedy="give them a separate group with weight_decay 0 (onehour.parameter_groups)",
    write=(
        "groups = onehour.parameter_groups(model, weight_decay={decay:g})",
        "rest = [p for p in model.parameters() if p.ndim < 2]  # without onehour, and the others alike",
        'groups = [{{"params": others, "weight_decay": {decay:g}}}, {{"params": rest, "weight_decay": 0}}]',
    ),
)
def decay_on_batchnorm(case: Case) -> Finding | None:
    """γ and β of BatchNorm in a group with weight decay."""
    for model in case.story.models:
        if model.decayed:
            names = ", ".join(model.decayed[:2]) + (" …" if len(model.decayed) > 2 else "")
            made = case.story.optimizers.get(model.optimizer)
            return decay_on_batchnorm.found(
                measured=f"λ = {model.decay:g} on {len(model.decayed)} of {model.affine} BatchNorm parameters"
                f" ({names})",
                expected="λ = 0 on all of them",
                where=(made.where if made else None) or case.optimizer_line(),
                severity="note" if model.decay < NEGLIGIBLE else None,
                decay=model.decay,
            )
    return None


@pitfall(
    "warning",
    "§3, Remark 1, eq 8",
    why="weight decay belongs to the update, so that it follows the rate and not the loss",
    remedy="remove the penalty from the loss and give the optimizer weight_decay",
    write=(
        "groups = onehour.parameter_groups(model, weight_decay={decay:.3g})",
        "optimizer = torch.optim.SGD(groups, lr=lr)",
        "optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay={decay:.3g})  # without onehour",
    ),
)
def decay_in_loss(case: Case) -> Finding | None:
    """The weights' squares or norms in the loss."""
    for backward in case.story.tape.of(BackwardPass):
        if backward.penalty > 0 and case.story.updates:
            return decay_in_loss.found(
                measured=f"a penalty on {backward.penalized} parameters in the loss adds {backward.penalty:.3g}·w to"
                " the gradient",
                expected=f"weight_decay={backward.penalty:.3g} in the optimizer, nothing in the loss",
                where=backward.where,
                decay=backward.penalty,
            )
    return None


@pitfall(
    "error",
    "§3, Remark 1, eq 8",
    why="scaling the loss is not scaling the rate: the decay does not follow",
    remedy="leave the loss a mean over the minibatch and scale the rate",
    write=("loss.backward()  # the mean, without the factor {factor:.4g}", "lr = {factor:.4g} * lr"),
)
def decay_scaled_with_loss(case: Case) -> Finding | None:
    """A loss multiplied by a whole number, beside an optimizer's weight decay."""
    optimizer = case.story.main_optimizer
    decay = optimizer.weight_decay if optimizer else 0.0
    if not decay or case.processes > 1:
        return None
    for update in windows(case):
        each = weights(update)
        terms = [term for micro in update.microbatches for term in micro.terms]
        single = len(terms) == len(update.microbatches) == 1 and terms[0].reduction == "mean"
        if each is None or not single or terms[0].name not in ("cross_entropy", "nll_loss"):
            continue
        s = each[0]
        if s > 1.5 and abs(s - round(s)) < 1e-3 * s:
            return decay_scaled_with_loss.found(
                measured=f"the loss is multiplied by {s:.4g}, and λ = {decay:g} is not: against the gradient the decay"
                f" is {s:.4g} times weaker",
                expected="a mean loss, and a rate that is multiplied",
                where=loss_line(update.microbatches[0]),
                factor=s,
            )
    return None


@pitfall(
    "warning",
    "§3, Remark 1, eq 8",
    why="decay an epoch must stay when the minibatch grows; a decay that knows only η/η₀ takes k times fewer steps",
    remedy="multiply weight_decay by kn / base_minibatch, or use an optimizer whose decay is η·λ",
    write=("weight_decay = {k:g} * weight_decay  # of the base recipe",),
)
def decay_decoupled_scales_with_lr(case: Case) -> Finding | None:
    """A decay that knows the rate only relative to its start: k times the minibatch, 1/k of the decay an epoch."""
    optimizer = case.story.main_optimizer
    if optimizer is None or case.scaled_from is None:
        return None
    _, base, minibatch = case.scaled_from
    if minibatch <= base:
        return None
    k = minibatch / base
    if case.base.weight_decay is not None and optimizer.weight_decay >= 0.95 * k * case.base.weight_decay:
        return None
    for shrunk, doubled in optimizer.decay:
        if shrunk > 0 and abs(doubled / shrunk - 1) < 0.01:
            return decay_decoupled_scales_with_lr.found(
                measured=f"a step shrinks weights by {shrunk:.3g}, whatever the initial rate: with {k:g} times the"
                f" minibatch 1/{k:g} of the base's decay an epoch",
                expected=f"{k * shrunk:.3g} a step"
                + (", unless it was multiplied already: declare the base's" if case.base.weight_decay is None else ""),
                where=case.optimizer_line(),
                k=k,
            )
    return None
