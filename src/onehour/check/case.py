"""What pitfalls are judged by: the stories of all processes of a run, and what the user said of the base."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from onehour.check.rates import Schedule, by_group, schedule_of
from onehour.check.story import Story

__all__ = ["Base", "Case"]


@dataclass(frozen=True)
class Base:
    """The recipe that the loop was scaled from, as far as it is known.

    Args:
        lr: the base rate.
        minibatch: the base minibatch.
        per_worker: n, the samples that BatchNorm normalises over.
        weight_decay: as it was given to the optimizer.

    >>> Base(0.1, 256).lr
    0.1
    """

    lr: float | None = None
    minibatch: int | None = None
    per_worker: int | None = None
    weight_decay: float | None = None


class Case:
    """One run to be judged.

    Args:
        stories: of each process, by rank.
        base: what was declared.
        alone: the story of the same script on one process, where these are several.

    >>> from onehour.check.tape import Tape
    >>> Case([Story(Tape())]).minibatch is None
    True
    """

    def __init__(self, stories: list[Story], base: Base | None = None, alone: Story | None = None) -> None:
        self.stories, self.base, self.alone = stories, base or Base(), alone

    @property
    def story(self) -> Story:
        """Of process 0.

        >>> from onehour.check.tape import Tape
        >>> Case([Story(Tape())]).story.updates
        []
        """
        return self.stories[0]

    @property
    def processes(self) -> int:
        """p.

        >>> Case([]).processes
        0
        """
        return len(self.stories)

    @property
    def minibatch(self) -> int | None:
        """kn: samples of an update over all processes.

        >>> from onehour.check.tape import Tape
        >>> Case([Story(Tape())]).minibatch is None
        True
        """
        sizes = [story.median_samples() for story in self.stories]
        return None if None in sizes else sum(size for size in sizes if size)

    @property
    def samples(self) -> int | None:
        """N: samples of the training data, where its loader says so.

        >>> from onehour.check.tape import Tape
        >>> Case([Story(Tape())]).samples is None
        True
        """
        story = self.story
        return None if story.training is None else story.loaders[story.training].facts["samples"]

    @property
    def scaled_from(self) -> tuple[float, int, int] | None:
        """base_lr, base_minibatch and kn, where all are known.

        >>> from onehour.check.tape import Tape
        >>> Case([Story(Tape())], Base(0.1, 256)).scaled_from is None
        True
        """
        if self.base.lr is None or self.base.minibatch is None or self.minibatch is None:
            return None
        return self.base.lr, self.base.minibatch, self.minibatch

    def schedule(self) -> Schedule:
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
        event = self.story.optimizers.get(self.story.main or 0)
        sizes = [group["parameters"] for group in event.facts["groups"]] if event is not None else []
        sizes += [0] * (len(groups) - len(sizes))
        learning = [(size, one.target, one) for size, one in zip(sizes, groups, strict=False) if one.target]
        return max(learning, key=lambda entry: entry[:2], default=(0, 0.0, schedule))[2]

    def _expected(self, lr: float) -> list[float]:
        """Rates that one may have that was scaled from the base's, or was not; what is right comes first."""
        _, base, minibatch = self.scaled_from or (lr, 1, 1)
        k = minibatch / base
        event = self.story.optimizers.get(self.story.main or 0)
        adaptive = event is not None and event.facts["adaptive"]
        return [lr, lr * k**0.5, lr * k] if adaptive else [lr * k, lr]

    def optimizer_line(self) -> str | None:
        """Where the main optimizer was made, or else where it steps."""
        story = self.story
        event = story.optimizers.get(story.main) if story.main is not None else None
        return (event.where if event else None) or self.step_line()

    def step_line(self) -> str | None:
        """Where the main optimizer steps, most often."""
        lines = Counter(u.event.where for u in self.story.updates if u.optimizer == self.story.main and u.event.where)
        return lines.most_common(1)[0][0] if lines else None
