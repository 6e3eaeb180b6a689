"""The gradient over several processes (§3, Remark 3), and the model that they share."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onehour.check.case import Case
from onehour.check.finding import Finding, found
from onehour.check.pitfalls.gradient import loss_line
from onehour.check.story import Update, ratio

__all__ = [
    "different_initial_weights",
    "gradient_sum_not_mean",
    "loss_scaled_by_world_size",
    "same_augmentation_on_every_worker",
]

EXACT = 1e-2


def together(case: Case) -> Iterator[list[Update]]:
    """The same update on each process, of runs with one optimizer.

    >>> list(together(Case([])))
    []
    """
    if case.processes > 1 and all(story.one_optimizer for story in case.stories):
        yield from (list(each) for each in zip(*[story.updates for story in case.stories], strict=False))


def communicated(updates: list[Update]) -> float | None:
    """By what the sum of all processes' own gradients was multiplied on its way to the step: 1/p for a mean.

    None where it cannot be seen: gradients not looked at, or not a multiple of the sum.

    >>> communicated([]) is None
    True
    """
    sums = []
    for update in updates:
        name = str(update.optimizer)
        local = [micro.event.facts.get("local", {}).get(name) for micro in update.microbatches]
        if not local or any(numbers is None for numbers in local):
            return None
        sums.append([math.fsum(numbers) for numbers in zip(*[n for n in local if n], strict=True)])
    final = updates[0].event.facts.get("final") if updates else None
    if not final or len({len(numbers) for numbers in sums}) != 1:
        return None
    c, rest = ratio(final, [math.fsum(numbers) for numbers in zip(*sums, strict=True)])
    scale = updates[0].microbatches[0].event.facts.get("scale", 1.0)
    return c * scale if rest < EXACT and c > 0 else None


def gradient_sum_not_mean(case: Case) -> Finding | None:
    """Means over each process's samples, summed: p times too large.

    >>> gradient_sum_not_mean(Case([]))
    """
    p = case.processes
    for updates in together(case):
        c, weight = communicated(updates), _mean_weight(updates)
        if c is None or weight is None:
            continue
        if abs(c - 1) < EXACT and abs(weight - 1) < EXACT:
            return found(
                "gradient-sum-not-mean",
                measured=f"the update takes the sum of {p} processes' mean gradients: {p} times the mean over kn",
                expected=f"the sum divided by {p}",
                where=case.step_line(),
                p=p,
                kn=case.minibatch or "kn",
            )
    return None


def loss_scaled_by_world_size(case: Case) -> Finding | None:
    """A loss multiplied by the number of processes, whose gradients are averaged: p times too large.

    >>> loss_scaled_by_world_size(Case([]))
    """
    p = case.processes
    for updates in together(case):
        c, weight = communicated(updates), _mean_weight(updates)
        if c is None or weight is None or len(updates[0].microbatches) == p:
            continue
        if abs(c * p - 1) < EXACT and abs(weight / p - 1) < EXACT:
            return found(
                "loss-scaled-by-world-size",
                measured=f"the loss is multiplied by {weight:.3g} and its gradients are averaged over {p} processes:"
                f" {p} times the mean over kn",
                expected="a mean loss, averaged",
                where=loss_line(updates[0].microbatches[0]),
                p=p,
            )
    return None


def _mean_weight(updates: list[Update]) -> float | None:
    """Σ of the weights of a process's own samples, the same on each: 1 for a mean over them."""
    weights = []
    for update in updates:
        each = [micro.weight for micro in update.microbatches]
        if (
            not each
            or None in each
            or not all(micro.term and micro.term["reduction"] == "mean" for micro in update.microbatches)
        ):
            return None
        weights.append(math.fsum(weight for weight in each if weight is not None))
    return weights[0] if max(weights) - min(weights) < EXACT * max(weights) else None


def different_initial_weights(case: Case) -> Finding | None:
    """Processes that begin with weights of their own.

    >>> different_initial_weights(Case([]))
    """
    first = [next(story.tape.of("weights"), None) for story in case.stories]
    if len(first) < 2 or any(event is None for event in first):
        return None
    numbers = [event.facts["values"] for event in first if event is not None]
    for rank, other in enumerate(numbers[1:], start=1):
        size = math.hypot(*numbers[0])
        if len(other) == len(numbers[0]) and size and math.dist(other, numbers[0]) > 1e-6 * size:
            return found(
                "different-initial-weights",
                measured=f"process {rank}'s weights differ from process 0's by"
                f" {100 * math.dist(other, numbers[0]) / size:.3g} % before the first update",
                expected="equal weights",
                where=case.optimizer_line(),
            )
    return None


def same_augmentation_on_every_worker(case: Case) -> Finding | None:
    """Data sets that draw random numbers from generators in one state on all processes.

    >>> same_augmentation_on_every_worker(Case([]))
    """
    if case.processes < 2 or case.story.training is None:
        return None
    loader = case.story.loaders[case.story.training]
    batches = [
        [e.facts for e in story.tape.of("batch") if "random" in e.facts and e.facts["loader"] == story.training]
        for story in case.stories
    ]
    same: set[str] = set()
    # The first batch's draw is the sampler's own; it says nothing of the samples.
    for index, facts in enumerate(list(zip(*batches, strict=False))[1:]):
        drew = set.intersection(*[set(each["drew"]) for each in facts])
        # Processes that load data get all their generators' seeds from torch's.
        judged = {name: "torch" if loader.facts["processes"] else name for name in drew}
        equal = {name for name, source in judged.items() if len({each["random"].get(source) for each in facts}) == 1}
        same = equal if index == 0 else same & equal
    if not same:
        return None
    return found(
        "same-augmentation-on-every-worker",
        measured=f"{' and '.join(sorted(same))}'s generator is in the same state on all {case.processes} processes"
        " before each batch, and the data set draws from it",
        expected="another seed on each process",
        where=loader.where or case.step_line(),
    )
