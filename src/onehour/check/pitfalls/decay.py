"""Weight decay (§3, Remark 1; §5.1): which parameters, and that it follows the rate and not the loss."""

from __future__ import annotations

from onehour.check.case import Case
from onehour.check.finding import Finding, pitfall
from onehour.check.pitfalls.gradient import loss_line, weights, windows
from onehour.check.tape import BackwardPass


@pitfall(
    "decay-on-batchnorm",
    "warning",
    "§5.1",
    why="no weight decay on BatchNorm's γ and β",
    remedy="give them a group of their own with weight_decay 0 (onehour.parameter_groups)",
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
            made = case.story.optimizers.get(model.optimizer) if model.optimizer is not None else None
            return decay_on_batchnorm.found(
                measured=f"λ = {model.decay:g} on {len(model.decayed)} of {model.affine} BatchNorm parameters"
                f" ({names})",
                expected="λ = 0 on all of them",
                where=(made.where if made else None) or case.optimizer_line(),
                decay=model.decay,
            )
    return None


@pitfall(
    "decay-in-loss",
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
    "decay-scaled-with-loss",
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
    "decay-decoupled-scales-with-lr",
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
