"""BatchNorm (§2.3): how many samples it normalises over, and whose statistics are evaluated and saved."""

from __future__ import annotations

import math

from onehour.check.case import Case
from onehour.check.finding import Finding, found
from onehour.check.story import Story
from onehour.check.tape import Event

__all__ = ["batchnorm_n_changed", "batchnorm_stats_diverge", "batchnorm_stats_of_rank_0", "batchnorm_synced"]

EQUAL = 1e-6


def sizes(story: Story) -> list[int]:
    """n of every BatchNorm in training, as far as it was seen.

    >>> from onehour.check.tape import Tape
    >>> sizes(Story(Tape()))
    []
    """
    return sorted({n for event in story.tape.of("batchnorm") for seen in event.facts["sizes"].values() for n in seen})


def batchnorm_n_changed(case: Case) -> Finding | None:
    """Another n than the base recipe's, or one that depends on the number of processes."""
    now = sizes(case.story)
    if not now:
        return None
    n = max(now)
    if case.base.per_worker is not None and n != case.base.per_worker:
        return found(
            "batchnorm-n-changed",
            measured=f"BatchNorm normalises over n = {n} samples",
            expected=f"n = {case.base.per_worker}, the base recipe's",
            where=_line(case),
            n=case.base.per_worker,
        )
    before = sizes(case.single) if case.single is not None else []
    if before and case.processes > 1 and max(before) != n:
        return found(
            "batchnorm-n-changed",
            measured=f"n = {max(before)} on 1 process, {n} on {case.processes}",
            expected="one n, whatever the number of processes",
            where=_line(case),
            n=max(before),
        )
    return None


def batchnorm_synced(case: Case) -> Finding | None:
    """SyncBatchNorm in a run of several processes."""
    for model in case.story.models:
        if model.facts["synced"] and case.processes > 1:
            n = max(sizes(case.story), default=0)
            place = next((event.where for event in case.story.tape.of("synced") if event.where), None)
            return found(
                "batchnorm-synced",
                measured=f"{model.facts['synced']} SyncBatchNorm layers normalise over all {case.processes} processes'"
                f" {case.processes * n} samples",
                expected=f"each process over its own {n}",
                where=place or case.step_line(),
                n=n,
            )
    return None


def batchnorm_stats_of_rank_0(case: Case) -> Finding | None:
    """One process's running statistics, evaluated or saved for all.

    >>> batchnorm_stats_of_rank_0(Case([]))
    """
    used = _used(case)
    if used is None:
        return None
    event, statistics, own = used
    broadcast = any(e.facts["broadcast"] for e in case.story.tape.of("ddp"))
    alone = sum(e is not None for e in statistics) == 1
    if not (broadcast or alone) or _equal(own) or (alone and _averaged(event.facts["numbers"], own)):
        return None
    what = "DistributedDataParallel overwrites the others' at every forward pass" if broadcast else "no others are used"
    return found(
        "batchnorm-stats-of-rank-0",
        measured=f"process 0's running statistics at the {event.facts['when']}: 1 of {case.processes} processes counts"
        f" ({what})",
        expected=f"the mean over {case.processes} processes",
        where=_ddp_line(case) if broadcast else event.where,
        p=case.processes,
    )


def batchnorm_stats_diverge(case: Case) -> Finding | None:
    """Processes that evaluate, each with statistics of its own.

    >>> batchnorm_stats_diverge(Case([]))
    """
    used = _used(case)
    if used is None or any(e.facts["broadcast"] for e in case.story.tape.of("ddp")):
        return None
    event, statistics, _ = used
    first = statistics[0]
    assert first is not None
    apart = [_apart(e.facts["values"], first.facts["values"]) for e in statistics[1:] if e is not None]
    if not apart or max(apart) <= EQUAL:
        return None
    return found(
        "batchnorm-stats-diverge",
        measured=f"at the {event.facts['when']} the processes' running means differ by {100 * max(apart):.3g} %",
        expected="one set of statistics, the mean over processes",
        where=event.where,
        p=case.processes,
    )


Numbering = list[float]


def _used(case: Case) -> tuple[Event, list[Event | None], list[Numbering]] | None:
    """What was evaluated first, or else saved: the statistics on each process, and those of its last update before."""
    if case.processes < 2:
        return None
    for when in ("evaluation", "save"):
        events = [next((e for e in s.tape.of("statistics") if e.facts["when"] == when), None) for s in case.stories]
        if events[0] is None:
            continue
        own = [_own(story, events[0].facts["updates"]) for story in case.stories]
        return None if None in own else (events[0], events, [numbers for numbers in own if numbers is not None])
    return None


def _own(story: Story, updates: int) -> Numbering | None:
    """A process's own statistics after so many updates."""
    return next((e.facts["numbers"] for e in story.tape.of("own") if e.facts["updates"] == updates), None)


def _equal(own: list[Numbering]) -> bool:
    """Whether the processes' own never differ: frozen, synchronised, or averaged at every update."""
    return max(_apart(numbers, own[0]) for numbers in own) <= EQUAL


def _averaged(used: Numbering, own: list[Numbering]) -> bool:
    """Whether what is used lies at the mean of the processes' own."""
    mean = [math.fsum(numbers) / len(own) for numbers in zip(*own, strict=True)]
    return _apart(used, mean) <= 1e-3 * max(_apart(numbers, mean) for numbers in own)


def _apart(a: Numbering, b: Numbering) -> float:
    size = math.hypot(*b)
    return math.dist(a, b) / size if size and len(a) == len(b) else 0.0


def _ddp_line(case: Case) -> str | None:
    return next((event.where for event in case.story.tape.of("ddp") if event.where), None) or case.step_line()


def _line(case: Case) -> str | None:
    story = case.story
    return story.loaders[story.training].where if story.training is not None else case.step_line()
