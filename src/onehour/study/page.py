"""What the page of a report says, ready for its template."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

from onehour.study.charts.picture import Picture
from onehour.study.names import GROUPS
from onehour.study.reproduce import BASE, commands, environment_of, left_over, more_seeds, unfinished
from onehour.study.tables import Findings, Row
from onehour.study.text import error_text, joined, number, p_text, points, seconds_text, size_label
from onehour.study.verdict import Verdict
from onehour.study.wording import Sentence, headline, multiple

__all__ = ["context_of", "verdict_words"]


def context_of(findings: Findings, pictures: dict[str, list[Picture]], written_by: str) -> dict[str, Any]:
    """The template's variables; every text is plain and is escaped there.

    Args:
        pictures: by section: "sizes", "arms", "per_worker", "curves", "seconds".
        written_by: the version that writes it.

    >>> from onehour.study.results import Study
    >>> context_of(Findings(Study(None, ())), {}, "0")["title"]
    'Error over epochs'
    """
    study = findings.study
    recipe = study.recipe
    name = f"{recipe.name}: " if recipe else ""
    title = "error against minibatch" if findings.reference else "error over epochs"
    return {
        "title": f"{name}{title}" if name else title.capitalize(),
        "about": _about(findings),
        "headline": [
            {"sentence": sentence, "command": _command(findings, sentence)} for sentence in headline(findings)
        ],
        "margin": f"{findings.margin:g}",
        "last": _last(findings),
        "pictures": pictures,
        "sizes": [_size_row(findings, row) for row in findings.sizes],
        "derived": recipe is not None,
        "early": any(math.isfinite(row.early) for row in (*findings.sizes, *findings.arms)),
        "groups": [_group(findings, size, kind, rows) for (size, kind), rows in findings.groups.items()],
        "times": _times(findings),
        "environment": environment_of(study),
        "seeds": _seeds(findings),
        "commands": commands(study),
        "base_file": BASE,
        "recipe": recipe.to_toml() if recipe else "",
        "unfinished": unfinished(study),
        "left_over": left_over(study),
        "written_by": written_by,
    }


def verdict_words(verdict: Verdict | None) -> tuple[str, str]:
    """A verdict as a table's cell holds it: a word, and what is left out where there is little room.

    >>> verdict_words(None), verdict_words(Verdict("worse", 8.4, p=0.004))
    (('reference', ''), ('worse', 'p = 0.004'))
    """
    if verdict is None:
        return "reference", ""
    if verdict.state == "holds" and verdict.family == 1:
        return "holds", f"at most {points(verdict.upper)}"
    if verdict.state == "undecided":
        more = verdict.more_seeds
        return "undecided", f"{more} more seed{'s' * (more != 1)}" if more else "over 100 more seeds"
    if verdict.state in ("holds", "worse"):
        return verdict.state, p_text(verdict.p if verdict.state == "worse" else verdict.p_holds)
    return {"untested": "not tested", "one seed": "no verdict"}[verdict.state], ""


def _about(findings: Findings) -> str:
    study, recipe = findings.study, findings.study.recipe
    runs = [result for entry in study.entries for result in entry.results]
    asked = len(list(study.spec.cells())) if study.spec else len(runs)
    ended = sum(result.error is not None for result in runs)
    parts = [f"{recipe.model} on {recipe.data}", f"{recipe.epochs} epochs"] if recipe else []
    parts += [f"{len(findings.sizes)} minibatch{'es' * (len(findings.sizes) != 1)}"] if findings.sizes else []
    parts += [f"{len(findings.arms)} change{'s' * (len(findings.arms) != 1)} to the recipe"] if findings.arms else []
    return " · ".join([*parts, f"{ended} of {max(asked, len(runs))} runs ended"])


def _last(findings: Findings) -> str:
    """What a run's error is the median of; a curve may have several lines an epoch, or skip some."""
    curves = [[point.epoch for point in r.curve[-5:]] for entry in findings.study.entries for r in entry.results]
    gaps = {b - a for epochs in curves for a, b in itertools.pairwise(epochs)}
    return "five epochs" if gaps <= {1} else "five evaluations"


def _command(findings: Findings, sentence: Sentence) -> str:
    return more_seeds(findings.study, sentence.seeds) if sentence.seeds else ""


def _size_row(findings: Findings, row: Row) -> dict[str, Any]:
    return {
        "size": multiple(findings, row).partition(" ")[::2],
        "workers": str(row.recipe.workers.workers) if row.recipe else "–",
        "rate": f"{row.recipe.target_lr:.4g}" if row.recipe else "–",
        **_common(row),
        "difference": points(row.cost) if row.verdict and row.entry.n else "",
    }


def _common(row: Row) -> dict[str, Any]:
    return {
        "n": row.entry.n,
        "error": error_text(row.entry.mean, row.entry.std),
        "state": row.verdict.state if row.verdict else "reference",
        "verdict": verdict_words(row.verdict) if row.entry.n else ("no run", ""),
        "early": points(row.early),
        "non_finite": row.non_finite,
    }


def _group(findings: Findings, size: int, kind: str, rows: tuple[Row, ...]) -> dict[str, Any]:
    own = findings.beside(rows[0])
    family = max((row.verdict.family for row in rows if row.verdict), default=1)
    notes = []
    if own is None or not own.n:
        notes.append(f"The recipe itself has no run at {size_label(size)}, so there is nothing to hold these against.")
    if family > 1:
        notes.append(f"p is corrected by Holm for the {family} changes of this table.")
    if any(row.verdict and row.verdict.out_of_reach for row in rows):
        notes.append("With so few seeds nothing here could be called worse, however bad; train more.")
    if any(row.paper is not None for row in rows):
        notes.append("The paper’s differences are those at 8k on ImageNet (T1, T2).")
    return {
        "title": f"{GROUPS[kind]}, at minibatch {size_label(size)}",
        "paper": any(row.paper is not None for row in rows),
        "own": {"n": own.n, "error": error_text(own.mean, own.std)} if own and own.n else None,
        "rows": [
            {
                "name": row.name,
                "cost": points(row.cost),
                "paper": points(row.paper) if row.paper is not None else "",
                **_common(row),
            }
            for row in rows
        ],
        "notes": notes,
    }


def _times(findings: Findings) -> list[dict[str, Any]]:
    """What each halving of the reference's time costs."""
    reference = findings.reference
    if reference is None or not reference.seconds:
        return []
    rows = []
    for row in findings.sizes:
        if row.seconds and row.entry.n:
            halvings = math.log2(reference.mean_seconds / row.mean_seconds)
            std = statistics.stdev(row.seconds) / row.mean_seconds if len(row.seconds) > 1 else math.nan
            rows.append(
                {
                    "size": multiple(findings, row).partition(" ")[::2],
                    "time": seconds_text(row.mean_seconds),
                    "spread": f"± {100 * std:.0f} %" if math.isfinite(std) else "",
                    "ratio": f"{reference.mean_seconds / row.mean_seconds:.2f}×",
                    "halvings": number(halvings),
                    "error": error_text(row.entry.mean, row.entry.std),
                    "non_finite": row.non_finite,
                    "each": points(row.cost / halvings) if halvings > 0.05 else "–",
                }
            )
    return rows if len(rows) > 1 else []


def _seeds(findings: Findings) -> str:
    found = sorted({r.seed for entry in findings.study.entries for r in entry.results if r.seed is not None})
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]} to {found[-1]}"
    return joined([str(seed) for seed in found]) if found else ""
