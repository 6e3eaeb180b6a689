"""timm's own scheduler beside ours: what it must be given, and by how much its rate still differs.

train.py counts an epoch in its own updates, made of the full batches of a process's share, and its flags take whole
epochs only. A file given with --config takes parts of one too, so that a single update of its can be named.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction

from onehour.rules.schedule import parse_milestones
from onehour.translate.job import Job

__all__ = ["Sched", "batches", "flags_alone", "largest_difference", "sched", "updates_per_epoch"]


@dataclass(frozen=True)
class Sched:
    """timm's scheduler: what it is given, and the rate that follows (timm.scheduler, stepped on updates).

    >>> Sched(lr=3.2, warmup_lr=0.1, warmup_epochs=5, milestones=(30,), factor=0.1, epochs=90, updates=100).rate(250)
    1.6500000000000001
    """

    lr: float
    warmup_lr: float
    warmup_epochs: float
    milestones: tuple[float, ...] | None
    """None for cosine."""

    factor: float
    epochs: int
    updates: int

    def rate(self, update: int) -> float:
        """The rate of update t; a milestone at update m acts from update m − 1 on.

        >>> Sched(3.2, 0.1, 0, (30,), 0.1, 90, updates=100).rate(2999)
        0.32000000000000006
        """
        warmup, total = self.warmup_epochs * self.updates, self.epochs * self.updates
        if update < warmup:
            return self.warmup_lr + update * ((self.lr - self.warmup_lr) / warmup)
        if self.milestones is None:
            return 0.5 * self.lr * (1 + math.cos(math.pi * update / total)) if update < total else 0.0
        return self.lr * self.factor ** bisect_right([m * self.updates for m in self.milestones], update + 1)


def updates_per_epoch(job: Job) -> int:
    """Updates that timm makes of an epoch: full batches of a process's share, the last ones as a smaller update.

    >>> from onehour.planner import plan
    >>> updates_per_epoch(Job.of(plan("resnet50", minibatch=8192)))
    156
    """
    return -(-batches(job) // job.passes)


def sched(job: Job) -> Sched:
    """What timm must be given: each drop and the end of warmup as the fraction of its own epoch where ours is.

    >>> from onehour.planner import plan
    >>> found = sched(Job.of(plan("resnet50", minibatch=8192)))
    >>> found.warmup_epochs, found.milestones[0] * found.updates
    (5.012578719701523, 4692.5)
    """
    recipe, updates = job.recipe, updates_per_epoch(job)
    per_epoch = Fraction(job.samples, recipe.minibatch)
    warmup = job.warmup_epochs
    common = {"warmup_lr": recipe.schedule(0.0), "factor": recipe.decay_factor, "epochs": recipe.epochs}
    if recipe.decay == "cosine":
        return Sched(recipe.target_lr, warmup_epochs=warmup, milestones=None, updates=updates, **common)
    drops = [m for m in parse_milestones(recipe.milestones) if not warmup or m > warmup]
    return Sched(
        recipe.schedule(float(warmup)),  # with the drops inside the warmup, which timm would not warm up to
        warmup_epochs=float(warmup * per_epoch / updates),
        # Half an update behind, since it acts an update early; so that no rounding decides.
        milestones=tuple(float((math.ceil(m * per_epoch) + Fraction(1, 2)) / updates) for m in drops),
        updates=updates,
        **common,
    )


def flags_alone(job: Job) -> Sched | None:
    """What timm can be given by flags, without a file: whole epochs; None where the milestones are not.

    >>> from onehour.planner import plan
    >>> flags_alone(Job.of(plan("resnet50", minibatch=8192))).milestones
    (30, 60, 80)
    >>> flags_alone(Job.of(plan("digits")))
    """
    recipe, exact = job.recipe, sched(job)
    if exact.milestones is None:
        return exact
    warmup = job.warmup_epochs
    drops = [m for m in parse_milestones(recipe.milestones) if not warmup or m > warmup]
    if any(m.denominator != 1 for m in drops):
        return None
    whole = tuple(int(m) for m in drops)
    return Sched(exact.lr, exact.warmup_lr, warmup, whole, exact.factor, exact.epochs, exact.updates)


def largest_difference(job: Job, scheduler: Sched) -> tuple[float, int]:
    """By how much timm's rate differs from ours at most, and at which update; looked for where it can be largest.

    >>> from onehour.planner import plan
    >>> job = Job.of(plan("resnet50", minibatch=8192))
    >>> largest_difference(job, sched(job))[0] < 1e-9
    True
    """
    recipe, last = job.recipe, scheduler.epochs * scheduler.updates - 1
    per_epoch = Fraction(job.samples, recipe.minibatch)
    ours = [m * per_epoch for m in parse_milestones(recipe.milestones)] + [job.warmup_epochs * per_epoch]
    theirs = [m * scheduler.updates for m in (*(scheduler.milestones or ()), scheduler.warmup_epochs)]
    edges = {math.floor(edge) + step for edge in (*ours, *theirs) for step in (-2, -1, 0, 1, 2)}
    # Between edges both are straight lines, or cosines that this many points show to a millionth.
    spread = {last * i // 4000 for i in range(4001)}
    updates = sorted(update for update in edges | spread if 0 <= update <= last)
    return max((abs(scheduler.rate(t) - recipe.schedule(t * recipe.minibatch / job.samples)), t) for t in updates)


def batches(job: Job) -> int:
    """Full batches of a process's share of an epoch: the sampler pads the shares, the loader drops the rest.

    >>> from onehour.planner import plan
    >>> batches(Job.of(plan("resnet50", minibatch=8192, processes=8)))
    5004
    """
    return -(-job.samples // job.processes) // job.batch
