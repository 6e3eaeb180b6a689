"""Which samples an epoch takes, and in which order (§3, Remark 4), on one process."""

from __future__ import annotations

from onehour.check.case import Case
from onehour.check.finding import Finding, found

__all__ = ["drop_last_large", "same_order_every_epoch"]

LARGE = 0.02
"""Of an epoch; less may be dropped."""


def same_order_every_epoch(case: Case) -> Finding | None:
    """Two epochs in one order."""
    story = case.story
    if story.training is None:
        return None
    loader = story.loaders[story.training]
    passes = [event for event in story.epochs(story.training) if "digest" in event.facts]
    if len(passes) < 2 or (loader.facts["batches"] or 0) < 2 or passes[0].facts["count"] < 2:
        return None
    if passes[0].facts["digest"] != passes[1].facts["digest"]:
        return None
    kind = "the order of the data set" if passes[0].facts["sequential"] else "one order"
    return found(
        "same-order-every-epoch",
        measured=f"epochs 0 and 1 take their {passes[0].facts['count']} samples in {kind} ({loader.facts['sampler']})",
        expected="a new permutation each epoch",
        where=loader.where or passes[0].where,
        batch=loader.facts["batch_size"] or "batch_size",
    )


def drop_last_large(case: Case) -> Finding | None:
    """A rest that is dropped each epoch, and is no small share."""
    story = case.story
    if story.training is None:
        return None
    loader = story.loaders[story.training]
    samples, passes = loader.facts["samples"], story.epochs(story.training)
    if not loader.facts["drop_last"] or not samples or not passes or "count" not in passes[0].facts:
        return None
    share = samples / (loader.facts["replicas"] or case.processes)
    dropped = share - passes[0].facts["count"]
    if loader.facts["replacement"] or dropped <= LARGE * share or dropped >= (loader.facts["batch_size"] or 0):
        return None
    return found(
        "drop-last-large",
        measured=f"{dropped:.0f} of {share:.0f} samples ({100 * dropped / share:.2g} %) are dropped each epoch",
        expected=f"under {100 * LARGE:g} %, better none",
        where=loader.where or passes[0].where,
        n=loader.facts["batch_size"],
        p=case.processes,
        samples=samples,
    )
