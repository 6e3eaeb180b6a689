"""Weight decay (§3, Remark 1; §5.1): which parameters, and that it follows the rate and not the loss."""

from __future__ import annotations

from onehour.check.case import Case
from onehour.check.finding import Finding, found
from onehour.check.pitfalls.gradient import loss_line, weights, windows

__all__ = ["decay_decoupled_scales_with_lr", "decay_in_loss", "decay_on_batchnorm", "decay_scaled_with_loss"]


def decay_on_batchnorm(case: Case) -> Finding | None:
    """γ and β of BatchNorm in a group with weight decay."""
    for model in case.story.models:
        decayed = model.facts["decayed"]
        if decayed:
            names = ", ".join(decayed[:2]) + (" …" if len(decayed) > 2 else "")
            event = case.story.optimizers.get(model.facts["optimizer"])
            return found(
                "decay-on-batchnorm",
                measured=f"λ = {model.facts['decay']:g} on {len(decayed)} of {model.facts['affine']} BatchNorm"
                f" parameters ({names})",
                expected="λ = 0 on all of them",
                where=(event.where if event else None) or case.optimizer_line(),
                decay=model.facts["decay"],
            )
    return None


def decay_in_loss(case: Case) -> Finding | None:
    """The weights' squares or norms in the loss."""
    for event in case.story.tape.of("backward"):
        penalty = event.facts.get("penalty")
        if penalty and penalty["strength"] > 0 and case.story.updates:
            return found(
                "decay-in-loss",
                measured=f"a penalty on {penalty['parameters']} parameters in the loss adds {penalty['strength']:.3g}·w"
                " to the gradient",
                expected=f"weight_decay={penalty['strength']:.3g} in the optimizer, nothing in the loss",
                where=event.where,
                decay=penalty["strength"],
            )
    return None


def decay_scaled_with_loss(case: Case) -> Finding | None:
    """A loss multiplied by a whole number, beside an optimizer's weight decay."""
    story = case.story
    event = story.optimizers.get(story.main) if story.main is not None else None
    decay = max((group["weight_decay"] for group in event.facts["groups"]), default=0.0) if event else 0.0
    if not decay or case.processes > 1:
        return None
    for update in windows(case):
        each = weights(update)
        terms = [term for micro in update.microbatches for term in micro.terms]
        single = len(terms) == len(update.microbatches) == 1 and terms[0]["reduction"] == "mean"
        if each is None or not single or terms[0]["name"] not in ("cross_entropy", "nll_loss"):
            continue
        s = each[0]
        if s > 1.5 and abs(s - round(s)) < 1e-3 * s:
            return found(
                "decay-scaled-with-loss",
                measured=f"the loss is multiplied by {s:.4g}, and λ = {decay:g} is not: against the gradient the decay"
                f" is {s:.4g} times weaker",
                expected="a mean loss, and a rate that is multiplied",
                where=loss_line(update.microbatches[0]),
                factor=s,
            )
    return None


def decay_decoupled_scales_with_lr(case: Case) -> Finding | None:
    """A decay that knows the rate only relative to its start: k times the minibatch, 1/k of the decay an epoch."""
    story = case.story
    event = story.optimizers.get(story.main) if story.main is not None else None
    if event is None or case.scaled_from is None:
        return None
    _, base, minibatch = case.scaled_from
    if minibatch <= base:
        return None
    k = minibatch / base
    given = max((group["weight_decay"] for group in event.facts["groups"]), default=0.0)
    if case.base.weight_decay is not None and given >= 0.95 * k * case.base.weight_decay:
        return None
    for shrunk, doubled in event.facts["decay"]:
        if shrunk > 0 and abs(doubled / shrunk - 1) < 0.01:
            return found(
                "decay-decoupled-scales-with-lr",
                measured=f"a step shrinks weights by {shrunk:.3g}, whatever the initial rate: with {k:g} times the"
                f" minibatch 1/{k:g} of the base's decay an epoch",
                expected=f"{k * shrunk:.3g} a step"
                + (", unless it was multiplied already: declare the base's" if case.base.weight_decay is None else ""),
                where=case.optimizer_line(),
                k=k,
            )
    return None
