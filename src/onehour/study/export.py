"""A study as data: results.json with everything, results.csv with a line a run."""

from __future__ import annotations

import csv
import io
import re
from pathlib import PurePath
from typing import Any

from onehour.files import to_json
from onehour.study.results import Result
from onehour.study.tables import Findings, Row, curve_of
from onehour.study.text import printable, short
from onehour.study.wording import headline

__all__ = ["FORMAT", "results_csv", "results_json"]

FORMAT = "onehour report 1"
COLUMNS = (
    *("arm", "minibatch", "per_worker", "workers", "target_lr", "seed", "outcome", "error"),
    *("seconds", "together", "source"),
)


FORMULA = re.compile(r'((?:^|[,;|])[ "]*)([=+\-@＝＋－＠])')
"""What a spreadsheet computes, where a cell begins."""


def results_json(findings: Findings, pictures: tuple[str, ...] = (), written_by: str = "") -> str:
    """Everything that the page says, and each run's curve, as JSON; what is not known is null.

    Args:
        pictures: names of the figures beside it.
        written_by: the version that wrote it.
    """
    study = findings.study
    content = {
        "format": FORMAT,
        "written_by": written_by,
        "margin": findings.margin,
        "verdict": [{"text": sentence.text, "state": sentence.state} for sentence in headline(findings)],
        "recipe": study.recipe.as_dict() if study.recipe else None,
        "reference": findings.reference.entry.minibatch if findings.reference else None,
        "entries": [_entry(row, "") for row in findings.sizes]
        + [_entry(row, group) for (_, group), rows in findings.groups.items() for row in rows],
        "curves": [{"label": entry.label, "runs": [_run(run) for run in entry.results]} for entry in findings.loose],
        "figures": list(pictures),
    }
    return printable(to_json(content, indent=1)) + "\n"


def results_csv(findings: Findings) -> str:
    """A line a run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    rows = [*findings.sizes, *findings.arms, *(Row(entry, "") for entry in findings.loose)]
    for row in rows:
        for result in row.entry.results:
            values = {"arm": row.entry.label, **_derived(row), **_run(result)}
            writer.writerow([_cell(values[name]) for name in COLUMNS])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Others' text as a spreadsheet shows it: on one line, and no formula wherever its program divides the line."""
    if isinstance(value, str):
        return FORMULA.sub(r"\1'\2", short(value, most=len(value)))
    return "" if value is None else value


def _derived(row: Row) -> dict[str, Any]:
    recipe = row.recipe
    return {
        "minibatch": row.entry.minibatch,
        "per_worker": recipe.per_worker if recipe else None,
        "workers": recipe.workers.workers if recipe else None,
        "target_lr": recipe.target_lr if recipe else None,
    }


def _entry(row: Row, group: str) -> dict[str, Any]:
    verdict = row.verdict
    return {
        "arm": row.entry.label,
        "name": row.name,
        "group": group,
        **_derived(row),
        "n": row.entry.n,
        "mean": row.entry.mean,
        "std": row.entry.std,
        "non_finite": row.non_finite,
        "difference": row.cost,
        "verdict": verdict.state if verdict else "reference",
        "text": verdict.text if verdict else "",
        "upper": verdict.upper if verdict else None,
        "p": verdict.p if verdict else None,
        "more_seeds": verdict.more_seeds if verdict else None,
        "family": verdict.family if verdict else None,
        "paper_difference": row.paper,
        "early_gap": row.early,
        "mean_seconds": row.mean_seconds,
        "curve": curve_of(row.entry),
        "runs": [_run(result) for result in row.entry.results],
    }


def _run(result: Result) -> dict[str, Any]:
    place = PurePath(result.source)
    return {
        "seed": result.seed,
        "outcome": result.outcome,
        "error": result.error,
        "seconds": result.seconds,
        "together": result.together,
        # The end of the path alone: a report may be shown to others.
        "source": f"cells/{place.name}" if place.parent.name == "cells" else place.name,
        "curve": [[point.epoch, point.top1_error, point.train_error] for point in result.curve],
    }
