"""The rate as a pure function of the fractional epoch, set at every iteration (paper §2.2, §5.1).

A schedule is any callable from epoch to rate; those made here are values that compare, print and pickle. At iteration t
the epoch is s/N with s = t·kn. Comparing it with a milestone is exact in floats: s/N and a fraction such as 64/3 are
both rounded once, and rounding keeps order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

from onehour.rules.arguments import not_negative, number, positive
from onehour.rules.minibatch import Minibatch, linear_scaling

__all__ = ["constant_warmup", "cosine_decay", "gradual_warmup", "scaled_step_schedule", "step_decay"]

Schedule = Callable[[float], float]
NEARLY = 0.9
"""A cosine has always begun to fall when a warmup ends; so much of the target is not worth a line."""


def scaled_step_schedule(
    *,
    base_lr: float,
    base_minibatch: int,
    minibatch: int | Minibatch,
    milestones: Iterable[float | str | Fraction],
    warmup_epochs: float,
    factor: float = 0.1,
) -> Schedule:
    """The paper's whole schedule, each number once: linear scaling, gradual warmup, step decay (§2.1, §2.2, §5.1).

    With η̂ = η · kn / base and e the fractional epoch: η + (η̂ − η) · e / `warmup_epochs` before `warmup_epochs`, and
    η̂ · factor^(milestones passed) from there on. As in the paper there is no warmup where the minibatch is no larger
    than the base's.

    Args:
        base_lr: η, the rate that is right for `base_minibatch`, and where the warmup starts.
        base_minibatch: images an update of the base recipe.
        minibatch: kn, images an update now, over all workers.
        milestones: epochs at which the rate drops, as for `step_decay`; the paper's are 30, 60 and 80 of 90.
        warmup_epochs: how long the warmup is; the paper takes 5. 0 is none.
        factor: what each drop multiplies by.

    Raises:
        ValueError: for a number that is out of its range, by its name.

    >>> recipe = dict(base_lr=0.1, base_minibatch=256, milestones=[30, 60, 80], warmup_epochs=5)
    >>> large, base = (scaled_step_schedule(minibatch=kn, **recipe) for kn in (8192, 256))
    >>> [round(large(epoch), 6) for epoch in (0, 2.5, 5, 30, 60, 80)]
    [0.1, 1.65, 3.2, 0.32, 0.032, 0.0032]
    >>> [round(base(epoch), 6) for epoch in (0, 2.5, 5, 30, 60, 80)]
    [0.1, 0.1, 0.1, 0.01, 0.001, 0.0001]
    """
    usual = step_decay(linear_scaling(base_lr, base_minibatch, minibatch), milestones, factor)
    if not_negative("warmup_epochs", warmup_epochs) == 0:
        return usual
    return gradual_warmup(usual, base_lr, warmup_epochs)


def step_decay(lr: float, milestones: Iterable[float | str | Fraction], factor: float = 0.1) -> Schedule:
    """η̂ · factor^(milestones passed): the paper drops by 0.1 at epochs 30, 60 and 80 (§5.1).

    Args:
        lr: η̂, the rate before the first milestone.
        milestones: epochs at which the rate drops; numbers or fractions such as "64/3".
        factor: what each drop multiplies by.

    >>> schedule = step_decay(3.2, milestones=[30, 60, 80], factor=0.1)
    >>> [round(schedule(epoch), 6) for epoch in (0, 29.99, 30, 60, 80)]
    [3.2, 3.2, 0.32, 0.032, 0.0032]
    """
    epochs = tuple(float(milestone) for milestone in parse_milestones(milestones))
    schedule = StepDecay(positive("lr", lr), epochs, positive("factor", factor))
    try:
        finite = math.isfinite(schedule(math.inf))
    except OverflowError:
        finite = False
    if not finite:
        raise ValueError(
            f"the rate {lr:g} times the factor {factor:g} at each of {len(epochs)} milestones is not finite; use a"
            " factor below 1, such as 0.1"
        )
    return schedule


def cosine_decay(lr: float, epochs: float) -> Schedule:
    """η̂ · ½ (1 + cos(π · epoch / epochs)), zero at the end and after it.

    >>> schedule = cosine_decay(1.0, epochs=10)
    >>> schedule(0), round(schedule(5), 12), schedule(10)
    (1.0, 0.5, 0.0)
    """
    return CosineDecay(positive("lr", lr), positive("epochs", epochs))


def gradual_warmup(schedule: Schedule, start_lr: float, epochs: float) -> Schedule:
    """Add a constant amount at every iteration: η_t = η + (η̂ − η) · t/T, then the schedule (§2.2).

    t/T is epoch / `epochs`, so the rate moves at each iteration and reaches the schedule's own at the end of the
    warmup. The warmup's epochs count inside the run's; milestones do not move.

    Args:
        schedule: the usual schedule, whose rate at `epochs` is η̂.
        start_lr: η, where to start: the rate of the base minibatch.
        epochs: how long; the paper takes 5.

    Where η̂ is no higher than η there is nothing to warm up, and the schedule stays as it is: the paper warms up
    only for minibatches above 256.

    >>> schedule = gradual_warmup(step_decay(3.2, [30, 60, 80]), start_lr=0.1, epochs=5)
    >>> schedule(0), round(schedule(2.5), 12), schedule(5)
    (0.1, 1.65, 3.2)
    """
    start_lr, epochs = not_negative("start_lr", start_lr), positive("epochs", epochs)
    if schedule(0.0) <= start_lr:
        return schedule
    return GradualWarmup(schedule, start_lr, epochs)


def constant_warmup(schedule: Schedule, start_lr: float, epochs: float) -> Schedule:
    """η for `epochs` epochs, then a jump to the schedule: worse than none at 8k (T1: 25.88 %, §2.2).

    Where η̂ is no higher than η the schedule stays as it is.

    >>> schedule = constant_warmup(step_decay(3.2, [30, 60, 80]), start_lr=0.1, epochs=5)
    >>> schedule(4.99), schedule(5)
    (0.1, 3.2)
    """
    start_lr, epochs = not_negative("start_lr", start_lr), positive("epochs", epochs)
    if schedule(0.0) <= start_lr:
        return schedule
    return ConstantWarmup(schedule, start_lr, epochs)


@dataclass(frozen=True)
class StepDecay:
    """See `step_decay`."""

    lr: float
    milestones: tuple[float, ...]
    factor: float

    def __call__(self, epoch: float) -> float:
        return self.lr * self.factor ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class CosineDecay:
    """See `cosine_decay`."""

    lr: float
    epochs: float

    def __call__(self, epoch: float) -> float:
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(epoch / self.epochs, 1.0)))


@dataclass(frozen=True)
class GradualWarmup:
    """See `gradual_warmup`."""

    schedule: Schedule
    start_lr: float
    epochs: float

    def __call__(self, epoch: float) -> float:
        if epoch >= self.epochs:
            return self.schedule(epoch)
        return self.start_lr + (self.schedule(self.epochs) - self.start_lr) * (epoch / self.epochs)


@dataclass(frozen=True)
class ConstantWarmup:
    """See `constant_warmup`."""

    schedule: Schedule
    start_lr: float
    epochs: float

    def __call__(self, epoch: float) -> float:
        return self.start_lr if epoch < self.epochs else self.schedule(epoch)


def parse_milestones(milestones: Iterable[float | str | Fraction]) -> list[Fraction]:
    """Milestones as exact fractions, refused unless positive and increasing.

    >>> parse_milestones([8, "64/3"])
    [Fraction(8, 1), Fraction(64, 3)]
    """
    parsed: list[Fraction] = []
    if isinstance(milestones, str) or not isinstance(milestones, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"milestones must be a list of epochs, got {milestones!r}; a single one is [{milestones!r}]")
    for milestone in milestones:
        try:
            exact = isinstance(milestone, str | Fraction)
            parsed.append(Fraction(milestone if exact else number("milestone", milestone)))
            float(parsed[-1])
        except (ValueError, OverflowError, ZeroDivisionError, TypeError):
            raise ValueError(f'milestone {milestone!r} is not an epoch; write a number or "64/3"') from None
    if any(milestone <= 0 for milestone in parsed) or parsed != sorted(set(parsed)):
        raise ValueError(f"milestones must be above zero and increasing, got {[str(m) for m in parsed]}")
    return parsed


def schedule_remarks(
    schedule: Schedule,
    *,
    milestones: Iterable[Fraction],
    epochs: float,
    warmup: float,
    target: float,
    last: float | None,
) -> list[str]:
    """A line for each thing about a schedule that should be known before it is trained with.

    Args:
        milestones: epochs at which the rate drops; none for another decay.
        warmup: epochs of warmup; 0 for none.
        target: η̂, the rate after warmup.
        last: the epoch of the last iteration's first sample, at which the rate is set for the last time; None where
            the number of samples is not known.

    >>> schedule = step_decay(0.1, [30, 60])
    >>> schedule_remarks(schedule, milestones=[Fraction(30), Fraction(60)], epochs=40, warmup=0, target=0.1, last=None)
    ['milestone 60 is not before the end of the run of 40 epochs: the rate never drops there']
    """
    remarks: list[str] = []
    given, end = list(milestones), schedule(warmup)
    never = [m for m in given if m >= epochs]
    late = [m for m in given if last is not None and last < m < epochs]
    early = [m for m in given if m <= warmup]
    if never:
        remarks.append(
            f"{_named(never)} not before the end of the run of {epochs:g} epochs: the rate never drops there"
        )
    if late:
        remarks.append(
            f"{_named(late)} behind the last iteration, which begins at {last:g}: the rate never drops there"
        )
    if early:
        why = f"{_named(early)} not behind the warmup of {warmup:g} epochs, which thus ends at {end:g}"
        remarks.append(f"{why}: the rate never stands at {target:g}")
    elif warmup and end < NEARLY * target:
        remarks.append(
            f"the decay has begun in the warmup of {warmup:g} epochs, which thus ends at {end:g}: the rate never"
            f" stands at {target:g}"
        )
    elif warmup >= epochs:
        remarks.append(f"the warmup of {warmup:g} epochs is the whole run: the rate stands at {target:g} nowhere")
    if warmup and end < schedule(0.0):
        remarks.append(f"the rate falls in the warmup, from {schedule(0.0):g} to {end:g}")
    return remarks


def _named(milestones: list[Fraction]) -> str:
    """ "milestone 30 is", "milestones 30, 60 are"."""
    many = len(milestones) > 1
    return f"milestone{'s' * many} {', '.join(map(str, milestones))} {'are' if many else 'is'}"
