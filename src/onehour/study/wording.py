"""What a report says: numbers and names as it writes them, and the verdict in words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onehour.study.findings import Findings, Row
from onehour.study.paper import PAPER_REFERENCE, paper_states
from onehour.study.verdict import p_text


def size_label(minibatch: float) -> str:
    """A minibatch as the paper writes it, k for 1024: 512, 1.5k, 8k."""
    size = round(minibatch)
    return f"{size / 1024:g}k" if size >= 1024 and size % 512 == 0 else str(size)


def number(value: float, digits: int = 2) -> str:
    """A number with a real minus sign; a dash for nan."""
    return f"{value:.{digits}f}".replace("-", "−") if math.isfinite(value) else "–"


def points(value: float) -> str:
    """A difference with its sign; a dash for nan."""
    return f"{value:+z.2f}".replace("+0.00", "0.00").replace("-", "−") if math.isfinite(value) else "–"


def error_text(mean: float, std: float) -> str:
    """An entry as the paper's tables write it."""
    return f"{number(mean)} ± {number(std)}" if math.isfinite(std) else number(mean)


def seconds_text(seconds: float) -> str:
    """A time that people can read."""
    if not math.isfinite(seconds):
        return "–"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} s"


def joined(words: Sequence[str]) -> str:
    """A list in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def printable(text: str) -> str:
    """A text that every terminal, file and page can hold: other characters are escaped, as in JSON and TOML."""
    return "".join(c if c.isprintable() or c in "\n\u00a0" else json.dumps(c)[1:-1] for c in text)


def short(text: str, most: int = 48) -> str:
    """Outside text on one line: printable, and not too long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


@dataclass(frozen=True)
class Sentence:
    """A sentence of the verdict.

    Args:
        state: a verdict's; "" where it says nothing of the recipe.
        seeds: of each cell, with which the study should be run again; 0 where nothing is to be run.
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
    reference, failure = findings.reference, findings.first_failure
    if reference is None:
        return [Sentence("There is no minibatch to judge: none of these curves names its minibatch.")]
    entry = reference.entry
    seeds = f"{entry.n} seed{'s' * (entry.n != 1)}"
    own = f"minibatch {size_label(entry.minibatch or 0)}’s {error_text(entry.mean, entry.std)} % ({seeds})"
    if len(findings.sizes) == 1:
        text = f"There is one minibatch, {size_label(entry.minibatch or 0)}, and nothing to compare it with"
        return [Sentence(f"{text}: {error_text(entry.mean, entry.std)} % error ({seeds}).")]
    sentences = []
    if held := findings.held:
        end = "" if failure else ", the largest tried"
        text = f"The recipe holds to minibatch {multiple(findings, held[-1])}{end}: its error stays within"
        sentences.append(Sentence(f"{text} {findings.margin:g} points of {own}.", "holds"))
    if failure is not None:
        sentences.append(_failure(findings, failure, "" if held else f" than {own}"))
    # Below the reference: whether it is small enough itself.
    wrong = [row for row in findings.sizes if row not in findings.above and row.state in ("worse", "undecided")]
    below = [(f"Below it, {multiple(findings, row)} is {row.verdict.text}.", row.state) for row in wrong if row.verdict]
    return sentences + [Sentence(*sentence) for sentence in below]


def _failure(findings: Findings, row: Row, than: str) -> Sentence:
    verdict, where, n = row.verdict, f"At {multiple(findings, row)}", row.entry.n
    assert verdict is not None
    untested = [size_label(other.entry.minibatch or 0) for other in findings.above if other.state == "untested"]
    have = "has" if len(untested) == 1 else "have"
    rest = f" Testing stops there: {joined(untested)} {have} no verdict." if untested else ""
    if verdict.state == "worse":
        by = f"{number(verdict.difference)} points worse ({p_text(verdict.p)})"
        return Sentence(f"{where} it is {by}{than or ' than the reference'}.{rest}", "worse")
    if verdict.state == "undecided":
        more = verdict.more_seeds
        few = f"about {more} more seed{'s' * (more != 1)}" if more else "not even 100 more seeds"
        found = f"{points(verdict.difference)} points, perhaps up to {points(verdict.upper)}; {few} would decide it."
        found += f" ({n} seeds cannot show worse.)" if verdict.out_of_reach else ""
        return Sentence(f"{where} it is undecided: {found}{rest}", "undecided", n + more if more else 0)
    if n == 0:
        return Sentence(f"{where} no run has ended yet, so there is no verdict.{rest}", "one seed")
    why = "one seed has no standard deviation" if n == 1 else "the reference, of one seed, has no standard deviation"
    return Sentence(f"{where} there is no verdict: {why}.{rest}", "one seed", max(5, n))


def verdict_words(row: Row) -> tuple[str, str]:
    """A row's verdict as a table's cell holds it: a word, and what is left out where there is little room."""
    verdict = row.verdict
    if not row.entry.n:
        return "no run", ""
    if verdict is None:
        return "reference", ""
    if verdict.state == "holds" and verdict.family == 1:
        return "holds", f"at most {points(verdict.upper)}"
    if verdict.state == "undecided":
        more = verdict.more_seeds
        return "undecided", f"{more} more seed{'s' * (more != 1)}" if more else "over 100 more seeds"
    if verdict.state in ("holds", "worse"):
        return verdict.state, p_text(verdict.p if verdict.state == "worse" else verdict.p_holds)
    return "not tested" if verdict.state == "untested" else "no verdict", ""


def break_caption(findings: Findings) -> str:
    """The first figure's finding, with the paper's beside it."""
    reference, failure, held = findings.reference, findings.first_failure, findings.held
    assert reference is not None
    text = f"Minibatch {size_label(reference.entry.minibatch or 0)} has {number(reference.entry.mean)} % error"
    if held:
        text += f", and up to {multiple(findings, held[-1])} it stays within {findings.margin:g} points of that"
    if failure is not None and failure.entry.n:
        at, error = multiple(findings, failure), number(failure.entry.mean)
        text += f"; at {at} it is {error} %, {points(failure.cost)} points"
    above = {size: state for size, state in paper_states(findings.margin).items() if size > PAPER_REFERENCE}
    end = next((size for size, state in above.items() if state != "holds"), None)
    sizes = [size for size in above if end is None or size < end]
    parts = [f"holds to {size_label(sizes[-1])}"] if sizes else []
    parts += [f"is {above[end]} at {size_label(end)}"] if end else []
    return f"{text}; the paper’s recipe {' and '.join(parts)}."


def non_finite_notes(rows: Iterable[Row]) -> tuple[str, ...]:
    """Which runs diverged: nothing is dropped, and nothing is hidden."""
    notes = []
    for row in rows:
        if row.non_finite:
            chance = next(r.error for r in row.entry.results if r.outcome == "non-finite") or 0.0
            name = row.name if row.entry.arm else f"minibatch {size_label(row.entry.minibatch or 0)}"
            notes.append(
                f"{row.non_finite} of {len(row.entry.results)} runs of {name} diverged (NaN or infinity); each counts"
                f" as chance, {number(chance, 1)} %, and is marked with a cross."
            )
    return tuple(notes)
