"""A minibatch that grows while a run goes on, and the rate with it (Smith et al. 2018): a way past the break.

The number of workers k grows and n stays, so BatchNorm's part of the loss does too (§2.3). At each iteration the rate
is what a run at that minibatch has at that epoch: where it would drop by a factor and the minibatch grows by its
inverse, the rate stays, and the minibatch has grown in place of a drop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from onehour.rules.arguments import positive_int
from onehour.rules.minibatch import Minibatch, parse_size
from onehour.rules.schedule import Schedule

__all__ = ["Phase", "Ramp", "RampedSchedule", "parse_ramp"]


def parse_ramp(given: Any) -> tuple[tuple[int, Fraction], ...]:
    """Minibatches and the epochs until which they last, of texts KN:EPOCH or one with commas; both must grow.

    Raises:
        ValueError: for another form or order.

    >>> parse_ramp(["256:8", "1k:64/3"])
    ((256, Fraction(8, 1)), (1024, Fraction(64, 3)))
    """
    stages: list[tuple[int, Fraction]] = []
    if not isinstance(given, Iterable):
        raise ValueError(f"ramp must be KN:EPOCH or a list of such texts, got {given!r}; for example 256:8")
    listed: Iterable[Any] = given.split(",") if isinstance(given, str) else given
    for text in listed:
        size, _, epoch = str(text).partition(":")
        try:
            stages.append((parse_size(size), Fraction(epoch)))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"ramp has {text!r}; expected a minibatch and its last epoch, such as 256:8") from None
    for number, whose in enumerate(("minibatches", "epochs")):
        values = [stage[number] for stage in stages]
        if any(value <= 0 for value in values) or values != sorted(set(values)):
            raise ValueError(f"ramp's {whose} must be above zero and growing, got {', '.join(map(str, values))}")
    return tuple(stages)


@dataclass(frozen=True)
class Phase:
    """Iterations of one minibatch.

    Args:
        minibatch: n and k.
        first: its first iteration.
        position: in the stream, of that iteration's first sample.
    """

    minibatch: Minibatch
    first: int = 0
    position: int = 0


@dataclass(frozen=True)
class Ramp:
    """The phases of a run in their order; a run of one minibatch has one.

    >>> ramp = Ramp.of([(Minibatch(2, 1), Fraction(1)), (Minibatch(2, 3), None)], samples=5)
    >>> [ramp.position(t) for t in range(5)], ramp.reaching(15)
    ([0, 2, 4, 6, 12], 5)
    """

    phases: tuple[Phase, ...]

    @classmethod
    def of(cls, stages: Sequence[tuple[Minibatch, Fraction | None]], *, samples: int) -> Ramp:
        """A phase ends before the first iteration that begins at or behind its epoch, as the rate drops at a milestone.

        Args:
            stages: minibatches and the epochs until which they last; None is the end of the run.
            samples: N.
        """
        phases, first, position = list[Phase](), 0, 0
        for minibatch, until in stages:
            phase = Phase(minibatch, first, position)
            if until is not None:
                left = Fraction(until) * positive_int("samples", samples) - position
                first += max(0, -(-left // minibatch.size))
                position += (first - phase.first) * minibatch.size
            if until is None or first > phase.first:  # else the phase before it went on beyond its end
                phases.append(phase)
        return cls(tuple(phases))

    def at(self, iteration: int) -> Phase:
        """The phase that an iteration is in."""
        return next(phase for phase in reversed(self.phases) if phase.first <= iteration)

    def holding(self, position: int) -> Phase:
        """The phase whose iterations take a position of the stream."""
        return next(phase for phase in reversed(self.phases) if phase.position <= position)

    def position(self, iteration: int) -> int:
        """Where in the stream an iteration begins: so many samples come before it."""
        phase = self.at(iteration)
        return phase.position + (iteration - phase.first) * phase.minibatch.size

    def reaching(self, position: int) -> int:
        """How many iterations take every sample before a position of the stream."""
        phase = self.holding(position)
        return phase.first - (phase.position - position) // phase.minibatch.size

    def iterations(self, samples: int, epochs: float) -> int:
        """Updates of a whole run of E = `epochs` over N = `samples`; E·N is rounded to a whole image."""
        return max(1, self.reaching(round(Fraction(epochs) * samples)))

    def parts(self, iterations: range) -> list[range]:
        """Iterations cut where the minibatch changes."""
        inside = [phase.first for phase in self.phases if iterations.start < phase.first < iterations.stop]
        edges = [iterations.start, *inside, iterations.stop]
        return [range(*edge) for edge in pairwise(edges) if edge[0] < edge[1]]


@dataclass(frozen=True)
class RampedSchedule:
    """At each epoch the rate that a run at that epoch's minibatch has there.

    Args:
        stages: the epoch at which each begins, and its minibatch's own schedule; the first begins at 0.

    >>> from onehour.rules.schedule import step_decay
    >>> schedule = RampedSchedule(((0.0, step_decay(1.6, [8])), (8.0, step_decay(12.8, [8]))))
    >>> [round(schedule(epoch), 6) for epoch in (0, 7.99, 8)]
    [1.6, 1.6, 1.28]
    """

    stages: tuple[tuple[float, Schedule], ...]

    def __call__(self, epoch: float) -> float:
        return next(schedule for begins, schedule in reversed(self.stages) if begins <= epoch)(epoch)
