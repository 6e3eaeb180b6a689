"""What a report says: numbers and names as it writes them, and the verdict in words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onehour.study.findings import Findings, Row
from onehour.study.paper import PAPER_REFERENCE, paper_verdicts
from onehour.study.verdict import BROKEN, break_share, breaks, points
from onehour.training.record import TOP1_ERROR


def size_label(minibatch: float) -> str:
    """A minibatch as the paper writes it, k for 1024: 512, 1.5k, 8k."""
    size = round(minibatch)
    return f"{size / 1024:g}k" if size >= 1024 and size % 512 == 0 else str(size)


def number(value: float, digits: int = 2) -> str:
    """A number with a real minus sign; a dash for nan."""
    return f"{value:.{digits}f}".replace("-", "−") if math.isfinite(value) else "–"


def error_text(mean: float, std: float, digits: int = 2) -> str:
    """An entry as the paper's tables write it."""
    return f"{number(mean, digits)} ± {number(std, digits)}" if math.isfinite(std) else number(mean, digits)


def value_text(findings: Findings, value: float) -> str:
    return f"{number(value, findings.digits)} {findings.metric.unit}".rstrip()


def error_words(findings: Findings, value: float) -> str:
    """What a run has: 3.60 % error, distance 0.12 m."""
    text = value_text(findings, value)
    return f"{text} error" if findings.metric == TOP1_ERROR else f"{findings.metric.name} {text}"


def cost_text(findings: Findings, cost: float) -> str:
    """How much worse something is, with what that is counted in."""
    return findings.metric.amount(points(cost, findings.digits))


def margin_text(findings: Findings) -> str:
    return findings.metric.amount(f"{findings.margin:g}")


def change_text(findings: Findings, cost: float) -> str:
    """By how much the metric itself has changed where it costs so much."""
    return cost_text(findings, findings.metric.cost(cost))


def seconds_text(seconds: float) -> str:
    """A time that people can read: 14.5 s, 1 min 30 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 59.5:
        return f"{seconds:.3g} s"
    names, total = (("min", "s"), round(seconds)) if seconds < 3570 else (("h", "min"), round(seconds / 60))
    parts = [f"{part} {name}" for part, name in zip(divmod(total, 60), names, strict=True) if part]
    return " ".join(parts)


def joined(words: Sequence[str]) -> str:
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
    """A sentence of the verdict, and with how many seeds of each cell the study should be run again, if at all."""

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
    """What to do, and why, in a sentence or two."""
    reference, failure, held, metric = findings.reference, findings.first_failure, findings.held, findings.metric
    if reference is None:
        return [Sentence("Name each curve’s minibatch (a column minibatch): without it there is nothing to judge.")]
    entry = reference.entry
    seeds = f"{entry.n} seed{'s' * (entry.n != 1)}"
    own = f"minibatch {size_label(entry.minibatch or 0)}"
    found = f"{error_text(entry.mean, entry.std, findings.digits)} {metric.unit}".rstrip() + f" ({seeds})"
    if len(findings.sizes) == 1:
        return [Sentence(f"Train another minibatch too: {own} alone, {found}, has nothing to be compared with.")]
    if reference.broke:
        text = f"Fix the reference first: at {own} {_broke(findings, reference)}; nothing can be compared with it."
        return [Sentence(text, "broke")]
    sentences = []
    if held:
        start, end = reference.mean_seconds, held[-1].mean_seconds
        faster = f", and a run takes {seconds_text(end)} in place of {seconds_text(start)}" if end < start else ""
        largest = "" if failure else ", the largest tried,"
        text = f"Train at minibatch {multiple(findings, held[-1])}{largest} or below: up to there the"
        text += f" {metric.short} stays within {margin_text(findings)} of {own}’s {found}"
        text += f"{faster}. None of the {held[-1].entry.n} runs there broke;"
        text += f" {breaks(0, held[-1].entry.n)[1]} (95 % confidence)."
        sentences.append(Sentence(text, "within"))
    if failure is not None:
        sentences.append(_failure(findings, failure, "" if held else f"{own}, {found}"))
    # Below the reference: whether it is small enough itself.
    smaller = [row for row in findings.sizes if row not in findings.above and row.verdict and row.state != "within"]
    below = [(f"Below it, {multiple(findings, row)}: {row.verdict.text}.", row.state) for row in smaller if row.verdict]
    return sentences + [Sentence(*sentence) for sentence in below]


def _broke(findings: Findings, row: Row) -> str:
    count, share = breaks(row.broke, row.entry.n)
    return f"{count} runs broke ({share}): they diverged, or ended {broken_words(findings)}"


def broken_words(findings: Findings) -> str:
    """How a run that has broken ended, if it did not diverge."""
    if findings.metric != TOP1_ERROR:
        return "no better than before training"
    return f"more than {BROKEN * findings.margin:g} points above the reference’s median"


def _failure(findings: Findings, row: Row, stay: str) -> Sentence:
    """Of the first minibatch to which it does not hold; where none does, with the minibatch to stay at."""
    verdict, n = row.verdict, row.entry.n
    assert verdict is not None
    found = "worse by " * (findings.metric != TOP1_ERROR) + findings.metric.amount(verdict.found)
    begins = f"at {multiple(findings, row)}"
    begins = f"Stay at {stay}: {begins}" if stay else begins.capitalize()
    if verdict.state == "no verdict":
        return Sentence(f"{begins} there is no verdict: {verdict.why}.", verdict.state, max(5, n) if n else 0)
    if verdict.state == "broke":
        return Sentence(f"{begins} {_broke(findings, row)}.", verdict.state)
    if verdict.state == "beyond":
        lies = f"lies {found} above it" if findings.metric == TOP1_ERROR else f"is {found}"
        return Sentence(f"{begins} the {findings.metric.short} {lies}, beyond the margin.", verdict.state)
    more = verdict.more_seeds or 0
    many = f"about {more} more seed{'s' * (more != 1)}" if more else "not even 100 more seeds"
    text = f"{begins} it is {WORDS[verdict.state]}: {found}; {many} would decide it, if means and std stayed."
    if more and findings.looks == 1:
        text += " Looking again makes a false “within” likelier; --looks 2 from the start keeps it at 5 %."
    return Sentence(text, verdict.state, n + more if more else 0)


WORDS = {
    "reference": "reference",
    "within": "within the margin",
    "beyond": "beyond the margin",
    "above": "above, margin open",
    "undecided": "undecided",
    "broke": "broke",
    "no verdict": "no verdict",
}
"""A state, where it stands alone."""


def verdict_words(row: Row) -> tuple[str, str]:
    """A row's verdict as a table's cell holds it: a word, and what is left out where there is little room."""
    verdict = row.verdict
    if not row.entry.n:
        return "no run", ""
    if verdict is None or not verdict.open:
        return row.state, ""
    more = verdict.more_seeds
    return row.state, f"{more} more seed{'s' * (more != 1)}" if more else "over 100 more seeds"


def broke_words(row: Row) -> tuple[str, str]:
    """How many of a row's runs broke, and what share that allows, as a table's cell holds it."""
    if not row.entry.n:
        return "–", ""
    low, high = (f"{100 * share:.0f}" for share in break_share(row.broke, row.entry.n))
    return breaks(row.broke, row.entry.n)[0], f"{low} to {high} %" if row.broke else f"≤ {high} %"


def break_caption(findings: Findings, *, papers: bool = False) -> str:
    """The first figure's finding, with the paper's beside it where that is drawn."""
    reference, failure, held = findings.reference, findings.first_failure, findings.held
    assert reference is not None
    text = f"Minibatch {size_label(reference.entry.minibatch or 0)} has {error_words(findings, reference.entry.mean)}"
    if held:
        text += f", and up to {multiple(findings, held[-1])} it stays within {margin_text(findings)} of that"
    if failure is not None and failure.entry.n:
        at, error = multiple(findings, failure), value_text(findings, failure.entry.mean)
        text += f"; at {at} it is {error}, {change_text(findings, failure.cost)}"
        text += f", and {failure.broke} of {failure.entry.n} runs broke" if failure.broke else ""
    if not papers:
        return f"{text}."
    above = {row["minibatch"]: verdict for row, verdict in paper_verdicts(margin=findings.margin) if verdict}
    above = {size: verdict.state for size, verdict in above.items() if size > PAPER_REFERENCE}
    end = next((size for size, state in above.items() if state != "within"), None)
    sizes = [size for size in above if end is None or size < end]
    parts = [f"holds to {size_label(sizes[-1])}"] if sizes else []
    parts += [f"is {WORDS[above[end]]} at {size_label(end)}"] if end else []
    return f"{text}; the paper’s recipe {' and '.join(parts)}."


def non_finite_notes(rows: Iterable[Row]) -> tuple[str, ...]:
    """Which runs diverged: nothing is dropped, and nothing is hidden."""
    notes = []
    for row in rows:
        if row.non_finite:
            lost = next(r for r in row.entry.results if r.outcome == "non-finite")
            counts = f"chance, {number(lost.error or 0.0, 1)} %," if lost.untrained is None else "its untrained network"
            name = row.name if row.entry.arm else f"minibatch {size_label(row.entry.minibatch or 0)}"
            notes.append(
                f"{row.non_finite} of {len(row.entry.results)} runs of {name} diverged (NaN or infinity); each counts"
                f" as {counts} and is marked with a cross."
            )
    return tuple(notes)
