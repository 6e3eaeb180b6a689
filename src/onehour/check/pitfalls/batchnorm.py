"""BatchNorm (§2.3): how many samples it normalises over, and whose statistics are evaluated and saved."""

from __future__ import annotations

import math

from onehour.check.case import Case
from onehour.check.finding import Finding, pitfall
from onehour.check.story import Story
from onehour.check.tape import BatchNormSizes, ModelWrapped, RunningStatistics, SyncBatchNormMade

EQUAL = 1e-6

_AVERAGED = (
    "for name, buffer in model.named_buffers():  # before evaluating and saving",
    '    if name.endswith(("running_mean", "running_var")):',
    "        torch.distributed.all_reduce(buffer); buffer /= {p}",
)


@pitfall(
    "warning",
    "§2.3",
    why="statistics are of n samples of one worker; over all workers they are another loss",
    remedy="leave BatchNorm local: remove convert_sync_batchnorm",
    write=("model = onehour.convert_batchnorm(model, per_worker={n})  # instead of convert_sync_batchnorm",),
)
def batchnorm_synced(case: Case) -> Finding | None:
    """SyncBatchNorm in a run of several processes."""
    for model in case.story.models:
        if model.synced and case.processes > 1:
            n = max(sizes(case.story), default=0)
            place = next((made.where for made in case.story.tape.of(SyncBatchNormMade) if made.where), None)
            return batchnorm_synced.found(
                measured=f"{model.synced} SyncBatchNorm layers normalise over all {case.processes} processes'"
                f" {case.processes * n} samples",
                expected=f"each process over its own {n}",
                where=place or case.step_line(),
                n=n,
            )
    return None


@pitfall(
    "warning",
    "§2.3",
    why="running statistics estimate the training data; one worker's see 1/k of it",
    remedy="average the running statistics over the processes before evaluating and saving (broadcast_buffers=False)",
    write=_AVERAGED,
)
def batchnorm_stats_of_rank_0(case: Case) -> Finding | None:
    """One process's running statistics, evaluated or saved for all."""
    known = _used(case)
    if known is None:
        return None
    used, own = known
    wrapped = list(case.story.tape.of(ModelWrapped))
    broadcast, alone = any(model.broadcast for model in wrapped), len(used) == 1
    if not (broadcast or alone) or _equal(own) or (alone and _averaged(used[0].numbers, own)):
        return None
    what = "DistributedDataParallel overwrites the others' at every forward pass" if broadcast else "no others are used"
    wrapper_line = next((model.where for model in wrapped if model.where), None) or case.step_line()
    return batchnorm_stats_of_rank_0.found(
        measured=f"process 0's running statistics at the {used[0].when}: 1 of {case.processes} processes counts"
        f" ({what})",
        expected=f"the mean over {case.processes} processes",
        where=wrapper_line if broadcast else used[0].where,
        p=case.processes,
    )


@pitfall(
    "error",
    "§2.3",
    why="the model that is evaluated must be the model that is saved",
    remedy="average the running statistics over the processes before evaluating and saving",
    write=_AVERAGED,
)
def batchnorm_stats_diverge(case: Case) -> Finding | None:
    """Processes that evaluate, each with statistics of its own."""
    known = _used(case)
    if known is None or any(model.broadcast for model in case.story.tape.of(ModelWrapped)):
        return None
    first, *others = known[0]
    apart = max((_apart(other.values, first.values) for other in others), default=0.0)
    if apart <= EQUAL:
        return None
    return batchnorm_stats_diverge.found(
        measured=f"at the {first.when} the processes' running means differ by {100 * apart:.3g} %",
        expected="one set of statistics, the mean over processes",
        where=first.where,
        p=case.processes,
    )


@pitfall(
    "warning",
    "§2.3",
    why="n, the samples that BatchNorm normalises over, is part of the loss and stays when k changes",
    remedy="keep n: onehour.convert_batchnorm(model, per_worker=n), or another batch size for each process",
    write=(
        "model = onehour.convert_batchnorm(model, per_worker={n})",
        "loader = DataLoader(data, batch_size={n})  # without onehour, on each process",
    ),
)
def batchnorm_n_changed(case: Case) -> Finding | None:
    """Another n than the base recipe's, or one that depends on the number of processes."""
    story, base = case.story, case.base.per_worker
    now, before = sizes(story), sizes(case.single) if case.single is not None else []
    if not now:
        return None
    n = max(now)
    if base is not None and n != base:
        measured, expected, right = f"BatchNorm normalises over n = {n} samples", f"n = {base}, the base recipe's", base
    elif before and case.processes > 1 and max(before) != n:
        right = max(before)
        measured = f"n = {right} on 1 process, {n} on {case.processes}"
        expected = "one n, whatever the number of processes"
    else:
        return None
    where = case.loader.where if case.loader else case.step_line()
    return batchnorm_n_changed.found(measured=measured, expected=expected, where=where, n=right)


def sizes(story: Story) -> list[int]:
    """n of every BatchNorm in training, as far as it was seen."""
    return [n for event in story.tape.of(BatchNormSizes) for n in event.sizes]


def _used(case: Case) -> tuple[list[RunningStatistics], list[list[float]]] | None:
    """The statistics that process 0 and others evaluate first, or else save, and each process's own at that update."""
    everyone = [list(story.tape.of(RunningStatistics)) for story in case.stories]
    for when in ("evaluation", "save") if case.processes > 1 else ():
        used = [next((event for event in events if event.when == when), None) for events in everyone]
        if used[0] is None:
            continue
        at = "update", used[0].updates
        own = [next((e.numbers for e in events if (e.when, e.updates) == at), None) for events in everyone]
        known = [numbers for numbers in own if numbers is not None]
        return ([event for event in used if event is not None], known) if len(known) == len(own) else None
    return None


def _equal(own: list[list[float]]) -> bool:
    """Whether the processes' own never differ: frozen, synchronised, or averaged at every update."""
    return max(_apart(numbers, own[0]) for numbers in own) <= EQUAL


def _averaged(used: list[float], own: list[list[float]]) -> bool:
    mean = [math.fsum(numbers) / len(own) for numbers in zip(*own, strict=True)]
    return _apart(used, mean) <= 1e-3 * max(_apart(numbers, mean) for numbers in own)


def _apart(a: list[float], b: list[float]) -> float:
    size = math.hypot(*b)
    return math.dist(a, b) / size if size and len(a) == len(b) else 0.0
