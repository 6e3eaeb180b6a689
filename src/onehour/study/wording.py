"""What a report says in sentences: the verdict, and what each number must be read with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from onehour.study.paper import paper_samples
from onehour.study.tables import Findings, Row
from onehour.study.text import error_text, joined, number, p_text, points, size_label
from onehour.study.verdict import judge_minibatches

__all__ = ["PAPER_REFERENCE", "Sentence", "break_caption", "headline", "multiple", "non_finite_notes"]

PAPER_REFERENCE = 256


@dataclass(frozen=True)
class Sentence:
    """A sentence of the verdict.

    Args:
        state: a verdict's; "" where it says nothing of the recipe.
        seeds: of each cell, with which the study should be run again; 0 where nothing is to be run.

    >>> Sentence("It holds.", "holds").seeds
    0
    """

    text: str
    state: str = ""
    seeds: int = 0


def multiple(findings: Findings, row: Row) -> str:
    """A minibatch, and how many times the base it is."""
    recipe, reference = findings.study.recipe, findings.study.reference
    size = row.entry.minibatch or 0
    base = recipe.base_minibatch if recipe else reference.minibatch if reference else None
    return f"{size_label(size)} ({size / base:.3g}×)" if base else size_label(size)


def headline(findings: Findings) -> list[Sentence]:
    """The verdict in a sentence or two."""
    reference, failure = findings.reference, findings.first_failure()
    if reference is None:
        return [Sentence("There is no minibatch to judge: these are curves without a place on the axis.")]
    entry = reference.entry
    seeds = f"{entry.n} seed{'s' * (entry.n != 1)}"
    own = f"minibatch {size_label(entry.minibatch or 0)}’s {error_text(entry.mean, entry.std)} % ({seeds})"
    if len(findings.sizes) == 1:
        text = f"There is one minibatch, {size_label(entry.minibatch or 0)}, and nothing to hold it against"
        return [Sentence(f"{text}: {error_text(entry.mean, entry.std)} % error ({seeds}).")]
    sentences = []
    if held := findings.held:
        end = "" if failure else ", the largest tried"
        text = f"The recipe holds to minibatch {multiple(findings, held[-1])}{end}: its error stays within"
        sentences.append(Sentence(f"{text} {findings.margin:g} points of {own}.", "holds"))
    if failure is not None:
        sentences.append(_failure(findings, failure, "" if held else f" than {own}"))
    return sentences + _below(findings)


def _failure(findings: Findings, row: Row, than: str) -> Sentence:
    verdict, where = row.verdict, f"At {multiple(findings, row)}"
    assert verdict is not None
    untested = [
        size_label(r.entry.minibatch or 0) for r in findings.above if r.verdict and r.verdict.state == "untested"
    ]
    have = "has" if len(untested) == 1 else "have"
    rest = f" Tests stop there: {joined(untested)} {have} no verdict." if untested else ""
    if verdict.state == "worse":
        by = f"{number(verdict.difference)} points worse ({p_text(verdict.p)})"
        return Sentence(f"{where} it is {by}{than or ' than the reference'}.{rest}", "worse")
    if verdict.state == "undecided":
        more = verdict.more_seeds
        few = "100 more seeds would not decide it"
        if more:
            few = f"about {more} more seed{'s' * (more != 1)} would decide it"
        found = f"{points(verdict.difference)} points, perhaps up to {points(verdict.upper)}; {few}."
        found += f" ({row.entry.n} seeds cannot show worse.)" if verdict.out_of_reach else ""
        return Sentence(f"{where} it is undecided: {found}{rest}", "undecided", row.entry.n + more if more else 0)
    if row.entry.n == 0:
        return Sentence(f"{where} no run has ended yet, so there is no verdict.{rest}", "one seed")
    why = "one seed has no standard deviation" if row.entry.n == 1 else "the reference has one seed, so no deviation"
    return Sentence(f"{where} there is no verdict: {why}.{rest}", "one seed", max(5, row.entry.n))


def _below(findings: Findings) -> list[Sentence]:
    """What is to be said of minibatches below the reference: whether it is small enough itself."""
    above = {id(row) for row in findings.above}
    rows = [(row, row.verdict) for row in findings.sizes if row.verdict and id(row) not in above]
    wrong = [(row, verdict) for row, verdict in rows if verdict.state in ("worse", "undecided")]
    return [Sentence(f"Below it, {multiple(findings, row)} is {v.text}.", v.state) for row, v in wrong]


def break_caption(findings: Findings) -> str:
    """The first figure's finding, with the paper's beside it.

    >>> from onehour.study.results import Entry, Result, Study
    >>> from onehour.study.tables import findings_of
    >>> runs = (Result("a", (), 32, 0, "finished", 3.6),)
    >>> break_caption(findings_of(Study(None, (Entry((), 32, runs),))))
    'Minibatch 32 has 3.60 % error; the paper’s recipe holds to 8k and is worse at 16k.'
    """
    reference, failure, held = findings.reference, findings.first_failure(), findings.held
    assert reference is not None
    text = f"Minibatch {size_label(reference.entry.minibatch or 0)} has {number(reference.entry.mean)} % error"
    if held:
        text += f", and up to {multiple(findings, held[-1])} it stays within {findings.margin:g} points of that"
    if failure is not None and failure.entry.n:
        text += (
            f"; at {multiple(findings, failure)} it is {number(failure.entry.mean)} %, {points(failure.cost)} points"
        )
    return f"{text}; the paper’s recipe {_of_paper(findings.margin)}."


def _of_paper(margin: float) -> str:
    verdicts = judge_minibatches(PAPER_REFERENCE, paper_samples(), margin)
    above = {size: verdict.state for size, verdict in verdicts.items() if size > PAPER_REFERENCE}
    end = next((size for size, state in above.items() if state != "holds"), None)
    held = [size for size in above if end is None or size < end]
    parts = [f"holds to {size_label(held[-1])}"] if held else []
    parts += [f"is {above[end]} at {size_label(end)}"] if end else []
    return " and ".join(parts)


def non_finite_notes(rows: Iterable[Row]) -> tuple[str, ...]:
    """Which runs left the finite numbers: nothing is dropped, and nothing is hidden.

    >>> non_finite_notes(())
    ()
    """
    notes = []
    for row in rows:
        if row.non_finite:
            chance = next(r.error for r in row.entry.results if r.outcome == "non-finite") or 0.0
            name = row.name if row.entry.arm else f"minibatch {size_label(row.entry.minibatch or 0)}"
            runs = f"{row.non_finite} of {len(row.entry.results)} runs of {name}"
            notes.append(
                f"{runs} left the finite numbers; each counts as chance, {number(chance, 1)} %, and has a cross."
            )
    return tuple(notes)
