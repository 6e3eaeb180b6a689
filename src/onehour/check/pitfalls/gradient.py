"""With what weight each sample enters an update (§3, Remark 3): it should be 1/kn, for all alike."""

from __future__ import annotations

from collections.abc import Iterator

from onehour.check.case import Case
from onehour.check.finding import Finding, found
from onehour.check.story import MicroBatch, Update, ratio

__all__ = ["accumulation_not_divided", "accumulation_tail", "gradient_mean_of_unequal"]

EXACT = 1e-3


def factor(update: Update) -> float:
    """By what the gradient was multiplied between the backward passes and the step, clipping left out: 1, or 1/a.

    A GradScaler's scale is taken out.

    >>> from onehour.check.tape import Event
    >>> factor(Update(0, Event("step", None, {}), []))
    1.0
    """
    final = update.event.facts.get("final")
    name = str(update.optimizer)
    local = [micro.event.facts.get("local", {}).get(name) for micro in update.microbatches]
    if not final or not local or any(numbers is None for numbers in local):
        return 1.0
    scales = {micro.event.facts.get("scale", 1.0) for micro in update.microbatches}
    if len(scales) > 1:
        return 1.0
    total = [sum(numbers) for numbers in zip(*[n for n in local if n], strict=True)]
    c, rest = ratio(final, total)
    return c * scales.pop() if rest < EXACT and c else 1.0


def windows(case: Case) -> Iterator[Update]:
    """The updates whose samples' weights are known, of a loop with one optimizer."""
    story = case.story
    if story.one_optimizer:
        for update in story.updates:
            if update.microbatches:
                yield update


def _alike(microbatches: list[MicroBatch]) -> bool:
    """Whether batches are parts of one minibatch: of one loader, through one loss. A batch of each task is not."""
    losses = {(micro.term["name"], micro.term.get("where")) for micro in microbatches if micro.term}
    return len({micro.loader for micro in microbatches}) <= 1 and len(losses) <= 1


def weights(update: Update) -> list[float] | None:
    """Σ of the samples' weights of each batch that an update gathered; None where one is not known.

    >>> from onehour.check.tape import Event
    >>> weights(Update(0, Event("step", None), [MicroBatch(0, 0, 0, 8, [{"total": 0.5}])]))
    [0.5]
    """
    known = [micro.weight for micro in update.microbatches]
    c = factor(update)
    return None if None in known else [c * weight for weight in known if weight is not None]


def accumulation_not_divided(case: Case) -> Finding | None:
    """Batches gathered as if each were the whole minibatch: a times too large."""
    for update in windows(case):
        a, each = len(update.microbatches), weights(update)
        if a < 2 or a != case.story.window or each is None or not _means(update) or not _alike(update.microbatches):
            continue
        if all(abs(weight - 1) < EXACT for weight in each):
            return found(
                "accumulation-not-divided",
                measured=f"{a} batches an update, each with the weight 1: the gradient is {a} times the mean",
                expected=f"each with the weight 1/{a}",
                where=_backward_line(update.microbatches),
                a=a,
            )
    return None


def gradient_mean_of_unequal(case: Case) -> Finding | None:
    """Means over unequal counts, averaged as if the counts were equal."""
    worst, finding = 1.01, None
    for microbatches in _gathered(case):
        terms = [micro.term for micro in microbatches]
        counted = [(t["low"], t["count"]) for t in terms if t and t["count"] and t["reduction"] != "none"]
        if len(counted) < max(len(terms), 2) or min(low for low, _ in counted) <= 0:
            continue
        (light, many), (heavy, few) = min(counted), max(counted)
        if heavy / light > worst:
            worst = heavy / light
            finding = found(
                "gradient-mean-of-unequal",
                measured=f"a sample of a batch of {few:g} weighs {worst:.3g} times one of a batch of {many:g}",
                expected="equal weights 1/kn",
                where=loss_line(microbatches[-1]),
                kn="count",  # it differs from update to update
            )
    return finding


def _gathered(case: Case) -> Iterator[list[MicroBatch]]:
    """What each update gathers, over all processes."""
    if case.processes == 1:
        yield from (update.microbatches for update in windows(case) if _alike(update.microbatches))
    elif all(story.one_optimizer for story in case.stories):
        for updates in zip(*[story.updates for story in case.stories], strict=False):
            if all(_alike(update.microbatches) for update in updates):
                yield [micro for update in updates for micro in update.microbatches]


def accumulation_tail(case: Case) -> Finding | None:
    """A last window that is thrown away, goes into the next epoch's first one, or is divided by the usual count."""
    story = case.story
    a = story.window
    if a < 2 or not story.one_optimizer or story.training is None:
        return None
    unsure = {e.facts["epoch"] for e in story.ends(story.training) if e.facts["cut"] and not e.facts["followed"]}
    complete = (update for update in windows(case) if len(update.microbatches) == a and _alike(update.microbatches))
    full = next((sum(each) for update in complete if (each := weights(update))), None)
    # Without the division a window's weight is that of its batches; the division is what is missing.
    for update in () if accumulation_not_divided(case) else windows(case):
        epochs = {micro.epoch for micro in update.microbatches}
        if len(update.microbatches) == a or epochs & unsure:
            continue
        each = weights(update)
        if full is None or each is None or abs(sum(each) / full - 1) < 0.02:
            continue
        what = f"an update of {len(update.microbatches)} batches"
        return _tail(f"{what} has the weight {sum(each) / full:.3g} in all", update.microbatches, a)
    for update in windows(case):
        lost = _lost(update)
        if lost and not {micro.epoch for micro in lost} & unsure:
            return _tail(f"the gradients of {len(lost)} batches at the end of the epoch are thrown away", lost, a)
    return None


def _lost(update: Update) -> list[MicroBatch]:
    """Batches before an update whose gradients were cleared before the next batch's backward pass."""
    name = str(update.optimizer)
    for index in range(len(update.microbatches) - 1, 0, -1):
        micro, before = update.microbatches[index], update.microbatches[index - 1]
        lying = micro.event.facts.get("before", {}).get(name)
        if lying is not None and not any(lying) and before.epoch != micro.epoch:
            return update.microbatches[:index]
    return []


def _tail(measured: str, microbatches: list[MicroBatch], a: int) -> Finding:
    return found(
        "accumulation-tail",
        measured=measured,
        expected="every sample in one update, all updates with the weight 1",
        where=_backward_line(microbatches),
        a=a,
    )


def _means(update: Update) -> bool:
    return all(micro.term and micro.term["reduction"] == "mean" for micro in update.microbatches)


def _backward_line(microbatches: list[MicroBatch]) -> str | None:
    micro = microbatches[-1]
    return micro.event.where if micro.event.facts.get("direct", True) else loss_line(micro)


def loss_line(micro: MicroBatch) -> str | None:
    """Where a batch's loss is computed, or else where its backward pass is called.

    >>> loss_line(MicroBatch(None, None, None, 8, [{"total": 1.0, "where": "train.py:7"}]))
    'train.py:7'
    """
    return (micro.term or {}).get("where") or micro.event.where
