"""Several processes: the gradient that they sum (§3, Remark 3), the model that they share, and their random numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from onehour.check.case import Case
from onehour.check.finding import Finding, pitfall
from onehour.check.pitfalls.gradient import WEIGHT, factor, loss_line, windows
from onehour.check.story import Update, first_of, is_mean, losses, ratio
from onehour.check.tape import MEANS, InitialWeights, LossTerm, ModelWrapped, Projection, WeightsUpdated

CLOSE, EXACT = 1e-2, 1e-6
MANY = 30  # parameters that are named one by one


@pitfall(
    "error",
    "§2.1, eq 2; §3",
    why="an update takes the mean gradient of all kn samples, so that the k workers keep one model",
    remedy="wrap the model in DistributedDataParallel, or average the gradients before each optimizer.step()",
    write=(
        "model = DistributedDataParallel(model)  # and call it in training: model(x), not model.module(x)",
        "for p in model.parameters():  # without it, between backward() and step()",
        "    torch.distributed.all_reduce(p.grad); p.grad /= {p}",
    ),
    symptoms=(
        *("different-initial-weights", "batchnorm-stats-diverge", "batchnorm-stats-of-rank-0"),
        *("gradient-mean-of-unequal", "lr-not-scaled", "lr-scaled-wrong", "adam-linear-scaling"),
    ),
)
def gradients_not_averaged(case: Case) -> Finding | None:
    """Processes that each take their own gradient."""
    names, parted, every = unequal_parameters(case)
    if not names:
        return None
    wrapped = any(case.story.tape.of(ModelWrapped))
    alike = f"; {listed(parted)} differ too, and appear to be meant to" if parted else ""
    return gradients_not_averaged.found(
        measured=f"{len(names)} of {len(every)} parameters are updated by another gradient on each of the"
        f" {case.processes} processes: {listed(names)}{alike}",
        expected=f"one gradient for all, the mean over {case.processes} processes",
        where=case.step_line(),
        remedy="call the wrapped model itself, model(x), in every forward pass of training, with all that is trained in"
        " it: what goes past DistributedDataParallel is not averaged"
        if wrapped
        else None,
        p=case.processes,
    )


def unequal_parameters(case: Case) -> tuple[list[str], list[str], list[str]]:
    """The parameters that processes update by gradients of their own; those that are meant to; and all."""
    unequal, parted, every = list[str](), set[str](), list[str]()
    by_rank = [list(story.tape.of(WeightsUpdated)) for story in case.stories]
    for optimizer in dict.fromkeys(event.optimizer for event in by_rank[0]) if case.processes > 1 else ():
        ranks = [[event for event in events if event.optimizer == optimizer] for events in by_rank]
        steps = [list(each) for each in zip(*ranks, strict=False)]
        for name in steps[0][0].before if steps else ():
            every.append(name)
            if all(name in event.before for step in steps for event in step) and _unequal(steps, name):
                unequal.append(name)
        parted.update(name for step in steps for event in step for name in event.parted)
    return [name for name in unequal if name not in parted], [name for name in unequal if name in parted], every


def _unequal(steps: list[list[WeightsUpdated]], name: str) -> bool:
    """Whether a parameter's updates differ between processes, and nobody averages the weights themselves later."""
    before = [[event.before[name] for event in step] for step in steps]
    after = [[event.after[name] for event in step] for step in steps]
    for now, then in zip(after, before[1:], strict=False):
        if not _equal(now) and _equal(then):
            mean = [math.fsum(numbers) / len(now) for numbers in zip(*now, strict=True)]
            return math.dist(then[0], mean) > CLOSE * math.dist(now[0], now[-1])  # one process's are sent to the others
    for step, was, now in zip(steps, before, after, strict=True):
        gradients = [event.gradients.get(name, [0.0] * len(was[0])) for event in step]
        noise = EXACT * max(math.hypot(*numbers) for numbers in step[0].gradients.values() or gradients)
        if not _equal(gradients, CLOSE / 10, noise) or (_equal(was) and not _equal(now)):
            return True
    return False


def _equal(rows: list[Projection], tolerance: float = EXACT, noise: float = 0.0) -> bool:
    size = max(math.hypot(*row) for row in rows)
    return all(math.dist(row, rows[0]) <= tolerance * size + noise for row in rows)


def listed(names: list[str]) -> str:
    """Each name; of very many, the modules that they are all of."""
    if len(names) <= MANY:
        return ", ".join(names)
    modules = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{module} ({count})" for module, count in modules.items())


@pitfall(
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
    """Means over each process's samples, summed: p times too large; on one process a loss that is a sum."""
    p = case.processes
    if p == 1:
        return _summed(case)
    for updates in together(case):
        c = communicated(updates)
        if c is not None and abs(c - 1) < CLOSE and _mean_weight(updates, 1, 1 / p) == 1:
            return gradient_sum_not_mean.found(
                measured=f"the update takes the sum of {p} processes' mean gradients: {p} times the mean over kn",
                expected=f"the sum divided by {p}",
                where=case.step_line(),
                p=p,
                kn=case.minibatch or "kn",
            )
    return None


def _summed(case: Case) -> Finding | None:
    """Every sample with the weight 1, whatever their number, where the update grows with the gradient."""
    updates = list(windows(case))[:8]
    terms = [term for update in updates for term in _terms(update)]
    summed = [term for term in terms if term.reduction not in MEANS and term.low == term.high and (term.count or 0) > 1]
    known = all(micro.terms for update in updates for micro in update.microbatches)
    if len(updates) < 2 or len(summed) < len(terms) or not known or case.adaptive is not False:
        return None
    if any(abs(factor(update) * term.low - 1) > CLOSE for update in updates for term in _terms(update)):
        return None
    return gradient_sum_not_mean.found(
        measured=f"the loss is the sum over {max(term.count or 0 for term in summed):g} values: the gradient, and with"
        " it the update, grows with the minibatch",
        expected="the mean over the minibatch, whose rate is scaled by a rule",
        where=loss_line(updates[0].microbatches[0]),
        severity="warning",
        remedy="take the mean over the minibatch, and multiply the rate by its size if it was chosen for the sum",
        write=("loss = loss / {kn}  # the mean", "lr = {kn} * lr  # if it was chosen for the sum"),
        kn=case.minibatch or "len(target)",
    )


def _terms(update: Update) -> list[LossTerm]:
    return [term for micro in update.microbatches for term in micro.terms]


@pitfall(
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
        c = communicated(updates)
        if c is None or len(updates[0].microbatches) == p:
            continue
        if abs(c * p - 1) < CLOSE and _mean_weight(updates, p, 1) == p:
            return loss_scaled_by_world_size.found(
                measured=f"the loss is multiplied by {p} and its gradients are averaged over {p} processes:"
                f" {p} times the mean over kn",
                expected="a mean loss, averaged",
                where=loss_line(updates[0].microbatches[0]),
                p=p,
            )
    return None


@pitfall(
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
    "warning",
    "§3, Remark 4",
    why="kn samples are kn independent draws, their augmentation too",
    remedy="seed each process with seed + rank after the weights are made",
    write=("torch.manual_seed(seed + rank)  # once the model is made",),
)
def same_augmentation_on_every_worker(case: Case) -> Finding | None:
    """Data sets that draw random numbers from generators in one state on all processes."""
    loader = case.loader
    if case.processes < 2 or loader is None:
        return None
    batches = [[batch for batch in story.given if batch.random] for story in case.stories]
    sets: list[set[str]] = []
    # The first batch's draw is the sampler's own; it says nothing of the samples.
    for given in list(zip(*batches, strict=False))[1:]:
        drew = set(given[0].drew).intersection(*[batch.drew for batch in given])
        # Processes that load data get all their generators' seeds from torch's.
        judged = {name: "torch" if loader.processes else name for name in drew}
        states: list[dict[str, str]] = [batch.random or {} for batch in given]
        sets.append({name for name, source in judged.items() if len({each.get(source) for each in states}) == 1})
    same = set[str].intersection(*sets) if sets else set[str]()
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


def _mean_weight(updates: list[Update], *shares: float) -> float | None:
    """Which of the shares Σ of the weights of a process's own samples is, on each: 1 for a mean over them."""
    sums: list[list[float]] = []
    for loss in losses([micro for update in updates for micro in update.microbatches]):
        terms = iter(loss)
        if is_mean(loss):
            sums.append([math.fsum(next(terms).total for _ in update.microbatches) for update in updates])
    return first_of(shares, sums, CLOSE)
