"""What pitfalls are judged by: the stories of all processes of a run, and what the user said of the base."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from onehour.check.story import Story, most_common
from onehour.check.tape import LoaderSeen, OptimizerStep, SchedulerMade, SchedulerStep

UNKNOWN_EPOCHS = 100
"""Run on a copy where the loop does not say how many it plans; then only the curve's beginning is judged."""


@dataclass
class RateSchedule:
    """How the rate of the main optimizer goes."""

    seen: list[tuple[int | None, float]]  # the rate of each update that was observed, with its epoch
    scheduler: int | None = None  # the number of the scheduler that sets it; None where the loop does so itself
    a_update: int = 0  # scheduler steps for each optimizer step, where it is stepped within epochs
    an_epoch: int | None = None  # scheduler steps in a whole epoch
    steps: int | None = None  # of the scheduler over the planned run
    curve: list[list[float]] = field(default_factory=list[list[float]])  # [count, rate] pairs of its whole life

    @property
    def first(self) -> float | None:
        return self.seen[0][1] if self.seen else None

    @property
    def highest(self) -> float | None:
        """The highest rate that is known: at most η̂."""
        return max((rate for _, rate in [*self.seen, *self.curve]), default=None)

    @property
    def rising(self) -> bool:
        """Whether the rates that were seen end within a warmup, and nothing else is known of them.

        A rise that is as old as two others took is the last one.
        """
        if self.curve:
            return False
        highest, rises = float("inf"), [0]
        for index, (_, rate) in enumerate(self.seen):
            if rate > highest * (1 + 1e-4):
                rises.append(index)
            highest = rate if index == 0 else max(highest, rate)
        longest = max((b - a for a, b in itertools.pairwise(rises)), default=0)
        return len(rises) > 1 and len(self.seen) - rises[-1] <= 2 * longest

    @property
    def target(self) -> float | None:
        """η̂: the highest rate of the run; None where it is not known yet."""
        return None if self.rising else self.highest

    def pieces(self) -> Iterator[tuple[float, float, float]]:
        """Of the curve: the scheduler steps before and behind each piece of one rate, and the rate."""
        passed = 0.0
        for count, rate in self.curve:
            yield passed, passed + count, rate
            passed += count

    def falling(self) -> Iterator[tuple[float, float, float]]:
        """The pieces from the curve's peak on."""
        peak = max((rate for _, rate in self.curve), default=0.0)
        return itertools.dropwhile(lambda piece: piece[2] < peak * (1 - 1e-9), self.pieces())

    def at(self, step: float) -> float | None:
        """The curve's rate after so many scheduler steps."""
        return next((rate for _, end, rate in self.pieces() if step < end), None)

    def reaches(self, rate: float) -> int | None:
        """The first scheduler step from which on the rate is at most so much, not before the curve's peak."""
        return next((int(start) for start, _, now in self.falling() if now <= rate * (1 + 1e-9)), None)


def schedule_of(story: Story) -> RateSchedule:
    """The schedule of a story's main optimizer."""
    schedule = RateSchedule(seen=[(update.epoch, update.rate) for update in story.steps])
    numbers = _schedulers(story)
    if len(numbers) != 1:
        return schedule
    schedule.scheduler = numbers[0]
    schedule.a_update, schedule.an_epoch = _pace(story, numbers[0])
    if schedule.an_epoch is not None:
        schedule.steps = schedule.an_epoch * (story.planned or UNKNOWN_EPOCHS)
    schedule.curve = story.curves.get(numbers[0], [])
    if schedule.curve and not _agrees(schedule, _calls_before(story, numbers[0])):
        schedule.curve = []
    return schedule


def by_group(story: Story, schedule: RateSchedule) -> list[RateSchedule]:
    """The main optimizer's schedule for each of its groups; one alone where they all have the same rate."""
    main = story.steps
    rates = [update.step.rates for update in main]
    if all(len({*each}) < 2 for each in rates):
        return [schedule]
    highest, schedules = max(update.rate for update in main), list[RateSchedule]()
    for group in range(max(map(len, rates))):
        seen = [(update.epoch, each[group]) for update, each in zip(main, rates, strict=True) if group < len(each)]
        share = max(rate for _, rate in seen) / highest  # the curve is that of the largest
        curve = [[count, rate * share] for count, rate in schedule.curve]
        schedules.append(replace(schedule, seen=seen, curve=curve))
    return schedules


def planned_steps(story: Story) -> dict[int, int]:
    """How many steps each scheduler of the main optimizer takes in the whole run, to run a copy to the end."""
    schedule = schedule_of(story)
    if schedule.scheduler is None or schedule.steps is None:
        return {}
    updates = (story.updates_an_epoch or 0) * (story.planned or 0)
    return {schedule.scheduler: max(schedule.steps, updates)}


def _schedulers(story: Story) -> list[int]:
    parts = {part for event in story.schedulers.values() for part in event.parts}
    stepped = {event.scheduler for event in story.tape.of(SchedulerStep)}
    return [
        made.scheduler
        for made in story.schedulers.values()
        if made.optimizer == story.main and made.scheduler in stepped - parts
    ]


def _pace(story: Story, scheduler: int) -> tuple[int, int | None]:
    """Scheduler steps for each update, 0 for one that is stepped once an epoch, and in a whole epoch."""
    calls = sum(event.scheduler == scheduler for event in story.tape.of(SchedulerStep))
    updates = len(story.steps)
    ended = len(story.trained())
    if not calls or not updates:
        return 0, None
    if ended and (calls <= ended or calls % ended == 0) and updates >= 2 * calls:
        return 0, max(calls // ended, 1)
    a_update = round(calls / updates)
    if not a_update or abs(calls / updates - a_update) > 0.2 * a_update:
        return 0, None
    an_epoch = story.updates_an_epoch
    return a_update, None if an_epoch is None else a_update * an_epoch


def _calls_before(story: Story, scheduler: int) -> list[int]:
    """How often the scheduler was stepped before each update of the main optimizer."""
    calls = 0
    before: list[int] = []
    for event in story.tape.events:
        if isinstance(event, SchedulerStep):
            calls += event.scheduler == scheduler
        elif isinstance(event, OptimizerStep) and event.optimizer == story.main:
            before.append(calls)
    return before


def _agrees(schedule: RateSchedule, calls: list[int]) -> bool:
    """Whether the copy's curve begins as the loop's rates did; a loop that also sets rates itself leaves it."""
    pairs = zip([rate for _, rate in schedule.seen], [schedule.at(count) for count in calls], strict=True)
    return all(b is not None and abs(a - b) <= 1e-6 * max(abs(a), abs(b)) + 1e-12 for a, b in pairs)


@dataclass(frozen=True)
class Base:
    """The recipe that the loop was scaled from, as far as it is known.

    Args:
        lr: the base rate.
        minibatch: the base minibatch.
        per_worker: n, the samples that BatchNorm normalises over.
        weight_decay: as it was given to the optimizer.
    """

    lr: float | None = None
    minibatch: int | None = None
    per_worker: int | None = None
    weight_decay: float | None = None


class Case:
    """One run to be judged: the story of each process, and that of the same script on a single one beside several."""

    def __init__(self, stories: list[Story], base: Base | None = None, single: Story | None = None) -> None:
        self.stories, self.base, self.single = stories, base or Base(), single

    @property
    def story(self) -> Story:
        return self.stories[0]

    @property
    def processes(self) -> int:
        """p."""
        return len(self.stories)

    @property
    def minibatch(self) -> int | None:
        """kn: samples of an update over all processes."""
        sizes = [story.median_samples() for story in self.stories]
        return None if None in sizes else sum(filter(None, sizes))

    @property
    def loader(self) -> LoaderSeen | None:
        """The loader of the training data; None where no loader gives them."""
        return self.story.loaders.get(self.story.training)

    @property
    def scaled_from(self) -> tuple[float, int, int] | None:
        """base_lr, base_minibatch and kn, where all are known."""
        if self.base.lr is None or self.base.minibatch is None or self.minibatch is None:
            return None
        return self.base.lr, self.base.minibatch, self.minibatch

    def schedule(self) -> RateSchedule:
        """The rates of the main optimizer over the run, as far as they are known.

        Groups may have rates of their own, and the base's is that of one of them: the one that fits it, or else the
        one with the most parameters.
        """
        schedule = schedule_of(self.story)
        groups = by_group(self.story, schedule)
        if self.base.lr is None or len(groups) == 1:
            return schedule
        for rate in self._expected(self.base.lr):
            for one in groups:
                if one.target and math.isclose(one.target, rate, rel_tol=0.05):
                    return one
        optimizer = self.story.main_optimizer
        sizes = [group.parameters for group in optimizer.groups] if optimizer is not None else []
        sizes += [0] * (len(groups) - len(sizes))
        learning = [(size, one.target, one) for size, one in zip(sizes, groups, strict=False) if one.target]
        return max(learning, key=lambda entry: entry[:2], default=(0, 0.0, schedule))[2]

    @property
    def scheduler(self) -> SchedulerMade | None:
        """The scheduler that sets the rate; None where the loop does so itself."""
        return self.story.schedulers.get(self.schedule().scheduler)

    def _expected(self, lr: float) -> list[float]:
        """Rates that one may have that was scaled from the base's, or was not; what is right comes first."""
        _, base, minibatch = self.scaled_from or (lr, 1, 1)
        k = minibatch / base
        return [lr, lr * k**0.5, lr * k] if self.adaptive else [lr * k, lr]

    @property
    def adaptive(self) -> bool | None:
        """Whether the main optimizer divides by the gradient's own size; None where its copy could not be stepped."""
        optimizer = self.story.main_optimizer
        return optimizer.adaptive if optimizer is not None else None

    def optimizer_line(self) -> str | None:
        """Where the main optimizer was made, or else where it steps."""
        optimizer = self.story.main_optimizer
        return (optimizer.where if optimizer else None) or self.step_line()

    def step_line(self) -> str | None:
        """Where the main optimizer steps, most often."""
        return most_common(update.step.where for update in self.story.steps)
