"""The number that an evaluation comes to (§5.1): a count divided once, not a mean of rates."""

from __future__ import annotations

import math
from typing import Any

from onehour.check.case import Case
from onehour.check.finding import Finding, found
from onehour.check.tape import Event

__all__ = ["mean_of_rates_evaluation"]


def mean_of_rates_evaluation(case: Case) -> Finding | None:
    """A variable of the loop that is the mean of the batches' rates, where the last batch is smaller.

    >>> mean_of_rates_evaluation.__name__
    'mean_of_rates_evaluation'
    """
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
    right, wrong = _values(counts, event.facts)
    for value in case.story.tape.of("value"):
        same = value.facts["loader"] == event.facts["loader"] and value.facts["epoch"] == event.facts["epoch"]
        number = value.facts["value"]
        if not same or not _among(number, wrong) or _among(number, right):
            continue
        correct, samples = sum(c for c, _ in counts), sum(n for _, n in counts)
        name = value.facts["name"].rpartition(":")[2]
        small, large = min(n for _, n in counts), max(n for _, n in counts)
        return found(
            "mean-of-rates-evaluation",
            measured=f"{name}: {number:.6g} is the mean of the {what} rates; one of {small} samples weighs as much as"
            f" one of {large}",
            expected=f"{correct / samples:.6g} = {correct} of {samples} on what was evaluated here",
            where=value.where,
        )
    return None


def _values(counts: list[tuple[int, int]], facts: dict[str, Any]) -> tuple[list[float], list[float]]:
    """What the loop may come to if it is right, and if it is not: as a share or in percent, right or wrong answers."""
    correct, seen = sum(c for c, _ in counts), sum(n for _, n in counts)
    rates = math.fsum(c / n for c, n in counts)
    wrongs = math.fsum((n - c) / n for c, n in counts)
    right = [v / total for v in (correct, seen - correct) for total in {seen, facts["samples"] or seen}]
    wrong = [v / total for v in (rates, wrongs) for total in {len(counts), facts["batches"] or len(counts)}]
    return [f * v for f in (1, 100) for v in right], [f * v for f in (1, 100) for v in wrong]


def _among(number: float, values: list[float]) -> bool:
    return any(value and abs(number - value) < 2e-6 * abs(value) for value in values)
