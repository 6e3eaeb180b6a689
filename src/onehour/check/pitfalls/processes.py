"""Several processes: the gradient that they sum (§3, Remark 3), the model that they share, and their random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onehour.check.case import Case
from onehour.check.finding import Finding, pitfall
from onehour.check.pitfalls.gradient import WEIGHT, loss_line
from onehour.check.story import Update, ratio
from onehour.check.tape import BatchGiven, InitialWeights

CLOSE = 1e-2


@pitfall(
    "gradient-sum-not-mean",
    "error",
    "§3, Remark 3",
    why=WEIGHT,
    remedy="divide the loss by kn before backward, or the sum over processes by their count",
    write=(
        'loss = onehour.global_mean(F.cross_entropy(output, target, reduction="sum"), {kn})  # then sum gradients',
        "p.grad /= {p}  # without onehour, after the all_reduce",
    ),
)
def gradient_sum_not_mean(case: Case) -> Finding | None:
    """Means over each process's samples, summed: p times too large."""
    p = case.processes
    for updates in together(case):
        c, weight = communicated(updates), _mean_weight(updates)
        if c is None or weight is None:
            continue
        if abs(c - 1) < CLOSE and abs(weight - 1) < CLOSE:
            return gradient_sum_not_mean.found(
                measured=f"the update takes the sum of {p} processes' mean gradients: {p} times the mean over kn",
                expected=f"the sum divided by {p}",
                where=case.step_line(),
                p=p,
                kn=case.minibatch or "kn",
            )
    return None


@pitfall(
    "loss-scaled-by-world-size",
    "error",
    "§3, Remark 3",
    why=WEIGHT,
    remedy="do not multiply the loss by the world size: scale the rate instead",
    write=("loss.backward()  # the mean, without the factor {p}", "lr = {p} * lr  # if the rate was for 1 process"),
)
def loss_scaled_by_world_size(case: Case) -> Finding | None:
    """A loss multiplied by the number of processes, whose gradients are averaged: p times too large."""
    p = case.processes
    for updates in together(case):
        c, weight = communicated(updates), _mean_weight(updates)
        if c is None or weight is None or len(updates[0].microbatches) == p:
            continue
        if abs(c * p - 1) < CLOSE and abs(weight / p - 1) < CLOSE:
            return loss_scaled_by_world_size.found(
                measured=f"the loss is multiplied by {weight:.3g} and its gradients are averaged over {p} processes:"
                f" {p} times the mean over kn",
                expected="a mean loss, averaged",
                where=loss_line(updates[0].microbatches[0]),
                p=p,
            )
    return None


@pitfall(
    "different-initial-weights",
    "error",
    "§3",
    why="k workers compute the gradient of one model",
    remedy="broadcast the initial weights from process 0 (DistributedDataParallel does)",
    write=(
        "for tensor in [*model.parameters(), *model.buffers()]:",
        "    torch.distributed.broadcast(tensor.data, src=0)",
    ),
)
def different_initial_weights(case: Case) -> Finding | None:
    """Processes that begin with weights of their own."""
    known = [next(story.tape.of(InitialWeights), None) for story in case.stories]
    weights = [event.values for event in known if event is not None]
    if len(weights) < max(len(known), 2):
        return None
    for rank, other in enumerate(weights[1:], start=1):
        size = math.hypot(*weights[0])
        if len(other) == len(weights[0]) and size and math.dist(other, weights[0]) > 1e-6 * size:
            return different_initial_weights.found(
                measured=f"process {rank}'s weights differ from process 0's by"
                f" {100 * math.dist(other, weights[0]) / size:.3g} % before the first update",
                expected="equal weights",
                where=case.optimizer_line(),
            )
    return None


@pitfall(
    "same-augmentation-on-every-worker",
    "warning",
    "§3, Remark 4",
    why="kn samples are kn independent draws, their augmentation too",
    remedy="seed each process with seed + rank after the weights are made",
    write=("torch.manual_seed(seed + rank)  # once the model is made",),
)
def same_augmentation_on_every_worker(case: Case) -> Finding | None:
    """Data sets that draw random numbers from generators in one state on all processes."""
    if case.processes < 2 or case.story.training is None:
        return None
    loader = case.story.loaders[case.story.training]
    batches = [
        [
            (batch, batch.random)
            for batch in story.tape.of(BatchGiven)
            if batch.random and batch.loader == story.training
        ]
        for story in case.stories
    ]
    same: set[str] = set()
    # The first batch's draw is the sampler's own; it says nothing of the samples.
    for index, given in enumerate(list(zip(*batches, strict=False))[1:]):
        drew = set(given[0][0].drew).intersection(*[batch.drew for batch, _ in given])
        # Processes that load data get all their generators' seeds from torch's.
        judged = {name: "torch" if loader.processes else name for name in drew}
        equal = {name for name, source in judged.items() if len({random.get(source) for _, random in given}) == 1}
        same = equal if index == 0 else same & equal
    if not same:
        return None
    return same_augmentation_on_every_worker.found(
        measured=f"{' and '.join(sorted(same))}'s generator is in the same state on all {case.processes} processes"
        " before each batch, and the data set draws from it",
        expected="another seed on each process",
        where=loader.where or case.step_line(),
    )


def together(case: Case) -> Iterator[list[Update]]:
    """The same update on each process, of runs with one optimizer."""
    if case.processes > 1 and all(story.one_optimizer for story in case.stories):
        yield from (list(each) for each in zip(*[story.updates for story in case.stories], strict=False))


def communicated(updates: list[Update]) -> float | None:
    """By what the sum of all processes' own gradients was multiplied on its way to the step: 1/p for a mean.

    None where it cannot be seen: gradients not looked at, or not a multiple of the sum.
    """
    own = [update.local for update in updates]
    sums = [numbers for numbers in own if numbers is not None]
    final = updates[0].step.final
    if not final or len(sums) < len(own) or len({len(numbers) for numbers in sums}) != 1:
        return None
    c, rest = ratio(final, [math.fsum(numbers) for numbers in zip(*sums, strict=True)])
    return c * updates[0].microbatches[0].backward.scale if rest < CLOSE and c > 0 else None


def _mean_weight(updates: list[Update]) -> float | None:
    """Σ of the weights of a process's own samples, the same on each: 1 for a mean over them."""
    sums: list[float] = []
    for update in updates:
        each = [micro.weight for micro in update.microbatches if micro.weight is not None]
        if not each or len(each) < len(update.microbatches) or not all(m.is_mean for m in update.microbatches):
            return None
        sums.append(math.fsum(each))
    return sums[0] if max(sums) - min(sums) < CLOSE * max(sums) else None
