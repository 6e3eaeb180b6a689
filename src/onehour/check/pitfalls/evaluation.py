"""The number that an evaluation comes to (§5.1): a count divided once, not a mean of rates."""

from __future__ import annotations

import math
from typing import Any

from onehour.check.case import Case
from onehour.check.finding import Finding, found
from onehour.check.tape import Event

__all__ = ["mean_of_rates_evaluation"]


def mean_of_rates_evaluation(case: Case) -> Finding | None:
    """A variable of the loop that is the mean of the batches' rates, where the last batch is smaller."""
    story = case.story
    for number, event in enumerate(story.tape.of("evaluation")):
        counts = [(correct, n) for correct, n in event.facts["counts"] if n]
        parts, what = counts, "batches'"
        if case.processes > 1:
            others = [list(other.tape.of("evaluation")) for other in case.stories]
            if any(len(events) <= number for events in others):
                return None
            shares = [[sum(column) for column in zip(*e[number].facts["counts"], strict=True)] for e in others]
            parts, what = [(share[0], share[1]) for share in shares if share], "processes'"
        finding = _judged(case, event, parts, what) or _judged(case, event, counts, "batches'")
        if finding is not None:
            return finding
    return None


def _judged(case: Case, event: Event, counts: list[tuple[int, int]], what: str) -> Finding | None:
    if len({n for _, n in counts}) < 2:
        return None
    pairs = _pairs(counts, event.facts)
    for value in case.story.tape.of("value"):
        same = value.facts["loader"] == event.facts["loader"] and value.facts["epoch"] == event.facts["epoch"]
        number = value.facts["value"]
        if not same or any(_near(number, right) for right, *_ in pairs):
            continue
        for right, wrong, count, samples in pairs:
            if _near(number, wrong):
                name = value.facts["name"].rpartition(":")[2].removesuffix(" 0")
                small, large = min(n for _, n in counts), max(n for _, n in counts)
                return found(
                    "mean-of-rates-evaluation",
                    measured=("" if name.startswith("line ") else f"{name}: ")
                    + f"{number:.6g} is the mean of the {what} rates; one of {small} samples weighs as much as one of"
                    f" {large}",
                    expected=f"{right:.6g}, of {count} in {samples} on what was evaluated here",
                    where=value.where,
                    samples=samples,
                )
    return None


def _pairs(counts: list[tuple[int, int]], facts: dict[str, Any]) -> list[tuple[float, float, int, int]]:
    """What the loop comes to if it is right, and if it is not, as a share or in percent; how many of how many.

    Of right answers or of wrong ones; of the samples and batches that were seen, or that there are where a pass is cut.
    """
    seen = sum(n for _, n in counts)
    pairs = []
    for hits in ([c for c, _ in counts], [n - c for c, n in counts]):
        rates = math.fsum(hit / n for hit, (_, n) in zip(hits, counts, strict=True))
        for samples, parts in ((seen, len(counts)), (facts["samples"] or seen, facts["batches"] or len(counts))):
            for unit in (1, 100):
                pairs.append((unit * sum(hits) / samples, unit * rates / parts, sum(hits), samples))
    return pairs


def _near(number: float, value: float) -> bool:
    return bool(value) and abs(number - value) < 2e-6 * abs(value)
