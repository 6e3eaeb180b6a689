"""Error against minibatch, the paper's figure 1, and against BatchNorm's n, which the paper leaves open (§2.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onehour.study.charts.panel import FOOT, HEAD, Mark, Panel, draw_key, draw_panel, key_height, mark_of
from onehour.study.charts.picture import SOFT, WIDE, Picture, Sheet, Window
from onehour.study.paper import paper_samples
from onehour.study.results import Entry
from onehour.study.tables import Findings
from onehour.study.text import number, short, size_label
from onehour.study.verdict import judge_minibatches
from onehour.study.wording import PAPER_REFERENCE, break_caption, non_finite_notes

__all__ = ["FEWEST", "minibatch_picture", "per_worker_pictures"]

READ = (
    "Bars are ±2 std over seeds, faint dots are seeds; the band is the reference’s ±2 std, the dashed line the margin."
    " The same number of points above the reference lies at the same height in both panels; above the dotted line the"
    " scale is logarithmic."
)


def minibatch_picture(findings: Findings) -> Picture | None:
    """The figure; None without a minibatch that has a run which ended."""
    if findings.reference is None:
        return None
    panels = [_ours(findings), _papers(findings.margin)]
    return Picture(
        name="error-against-minibatch",
        title="Error against minibatch",
        caption=break_caption(findings),
        draw=lambda width: _draw_minibatches(panels, width),
        notes=(READ, *non_finite_notes(findings.sizes)),
    )


def _ours(findings: Findings) -> Panel:
    reference, recipe = findings.reference, findings.study.recipe
    assert reference is not None
    rows = [row for row in findings.sizes if row.entry.n]
    base = recipe.base_minibatch if recipe else reference.entry.minibatch or 1
    about = f"{recipe.model} on {recipe.data}, {recipe.epochs} epochs" if recipe else "from others’ files"
    return Panel(
        title=short(recipe.name, 24) if recipe else "These runs",
        about=f"{short(about, 36)}; top-1 error, %",
        marks=tuple(
            mark_of(
                row.entry,
                math.log2(row.entry.minibatch or 1),
                row.verdict.state if row.verdict and row is not reference else "reference",
            )
            for row in rows
        ),
        under=tuple(f"{(row.entry.minibatch or 0) / base:.3g}×" for row in rows),
        margin=findings.margin,
    )


def _papers(margin: float) -> Panel:
    samples = paper_samples()
    verdicts = judge_minibatches(PAPER_REFERENCE, samples, margin)
    return Panel(
        title="The paper",
        about="ResNet-50 on ImageNet, 90 epochs; top-1 error, %",
        marks=tuple(
            Mark(math.log2(size), sample.mean, sample.std, verdicts[size].state if size in verdicts else "reference")
            for size, sample in samples.items()
        ),
        under=tuple(f"{size / PAPER_REFERENCE:.3g}×" for size in samples),
        margin=margin,
        color=SOFT,
    )


def _draw_minibatches(panels: Sequence[Panel], width: float) -> Sheet:
    side = width == WIDE
    frame, tall = ((width - 24) / 2, 236) if side else (width, 216)
    states = [mark.state for panel in panels for mark in panel.marks]
    states += ["cross" for panel in panels for mark in panel.marks if mark.crosses]
    below = HEAD + tall + FOOT
    sheet = Sheet(width, below * (1 if side else len(panels)) + key_height(states, width))
    bases = [panel.reference.mean for panel in panels]
    low = max(min(panel.window.low - panel.reference.mean for panel in panels), -min(bases))
    knee = max(panel.window.knee - panel.reference.mean for panel in panels)
    for place, (panel, base) in enumerate(zip(panels, bases, strict=True)):
        high = panel.window.high if panel.window.broken else base + knee
        window = Window(base + low, base + knee, max(high, base + knee), base)
        left, top = (place * (frame + 24), 0) if side else (0, place * below)
        draw_panel(sheet, panel, window, left=left, top=top, width=frame, tall=tall)
    draw_key(sheet, states, left=0, top=sheet.height - key_height(states, width) + 11, right=width)
    return sheet


FEWEST = 3
"""Values of n, beside the recipe's own, that make a figure."""


def per_worker_pictures(findings: Findings) -> list[Picture]:
    """A figure for each minibatch at which `FEWEST` other values of n were run."""
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
            pictures.append(_per_worker_picture(findings, size, sorted(found, key=lambda item: item[0])))
    return pictures


def _per_worker_picture(findings: Findings, size: int, found: Sequence[tuple[int, Entry, str]]) -> Picture:
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
        caption=_per_worker_caption(size, found),
        draw=lambda width: _draw_per_worker(panel, width),
        notes=non_finite_notes(rows),
    )


def _per_worker_caption(size: int, found: Sequence[tuple[int, Entry, str]]) -> str:
    by_mean = sorted(found, key=lambda item: item[1].mean)
    (own,) = [item for item in found if item[2] == "reference"]
    best, worst = (f"n = {n} ({number(entry.mean)} %)" for n, entry, _ in (by_mean[0], by_mean[-1]))
    text = f"At minibatch {size_label(size)} the error is lowest with {best} and highest with {worst}"
    if own in (by_mean[0], by_mean[-1]):
        return f"{text}; the recipe has n = {own[0]}."
    return f"{text}; with the recipe’s n = {own[0]} it is {number(own[1].mean)} %."


def _draw_per_worker(panel: Panel, width: float) -> Sheet:
    states = [mark.state for mark in panel.marks] + ["cross" for mark in panel.marks if mark.crosses]
    tall = 190
    sheet = Sheet(width, HEAD + tall + FOOT + key_height(states, width))
    draw_panel(sheet, panel, panel.window, left=0, top=0, width=width, tall=tall)
    draw_key(sheet, states, left=0, top=sheet.height - key_height(states, width) + 11, right=width)
    return sheet
