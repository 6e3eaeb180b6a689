"""Error against BatchNorm's n at a fixed minibatch: which n to choose, which the paper leaves open (§2.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onehour.study.charts.marks import draw_key, key_height
from onehour.study.charts.panel import FOOT, HEAD, Panel, draw_panel, mark_of
from onehour.study.charts.picture import Picture
from onehour.study.charts.style import Sheet
from onehour.study.results import Entry
from onehour.study.tables import Findings
from onehour.study.text import number, size_label
from onehour.study.wording import non_finite_notes

__all__ = ["FEWEST", "per_worker_pictures"]

FEWEST = 3
"""Values of n, beside the recipe's own, that make a figure."""


def per_worker_pictures(findings: Findings) -> list[Picture]:
    """A figure for each minibatch at which `FEWEST` other values of n were run.

    >>> from onehour.study.results import Study
    >>> from onehour.study.tables import findings_of
    >>> per_worker_pictures(findings_of(Study(None, ())))
    []
    """
    pictures = []
    for size in sorted({size for size, _ in findings.groups}):
        found: list[tuple[int, Entry, str]] = []
        for row in findings.arms:
            if row.entry.minibatch == size and [name for name, _ in row.entry.arm] == ["per_worker"] and row.entry.n:
                assert row.verdict is not None
                found.append((int(row.entry.arm[0][1]), row.entry, row.verdict.state))
        own = next((row for row in findings.sizes if row.entry.minibatch == size and row.entry.n), None)
        if len(found) >= FEWEST and own is not None and findings.study.recipe is not None:
            found.append((findings.study.recipe.per_worker, own.entry, "reference"))
            pictures.append(_picture(findings, size, sorted(found, key=lambda item: item[0])))
    return pictures


def _picture(findings: Findings, size: int, found: Sequence[tuple[int, Entry, str]]) -> Picture:
    rows = [row for row in findings.arms if any(row.entry is entry for _, entry, _ in found)]
    panel = Panel(
        title=f"Minibatch {size_label(size)}",
        about="top-1 error, %, against n, the images per worker",
        marks=tuple(mark_of(entry, math.log2(n), state) for n, entry, state in found),
        under=tuple(f"k={size // n}" for n, _, _ in found),
        margin=findings.margin,
        breaks=False,
    )
    return Picture(
        name=f"per-worker-at-{size}",
        title=f"BatchNorm’s n at {size_label(size)}",
        caption=_caption(size, found),
        draw=lambda width: _draw(panel, width),
        notes=non_finite_notes(rows),
    )


def _caption(size: int, found: Sequence[tuple[int, Entry, str]]) -> str:
    by_mean = sorted(found, key=lambda item: item[1].mean)
    (own,) = [item for item in found if item[2] == "reference"]
    best, worst = (f"n = {n} ({number(entry.mean)} %)" for n, entry, _ in (by_mean[0], by_mean[-1]))
    text = f"At minibatch {size_label(size)} the error is lowest with {best} and highest with {worst}"
    if own in (by_mean[0], by_mean[-1]):
        return f"{text}; the recipe has n = {own[0]}."
    return f"{text}; with the recipe’s n = {own[0]} it is {number(own[1].mean)} %."


def _draw(panel: Panel, width: float) -> Sheet:
    states = [mark.state for mark in panel.marks] + ["cross" for mark in panel.marks if mark.crosses]
    tall = 190
    sheet = Sheet(width, HEAD + tall + FOOT + key_height(states, width))
    draw_panel(sheet, panel, panel.window, left=0, top=0, width=width, tall=tall)
    draw_key(sheet, states, left=0, top=sheet.height - key_height(states, width) + 11, right=width)
    return sheet
