"""Error against minibatch, the paper's figure 1, with the paper's own curve on the same scale beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onehour.study.charts.marks import Mark, draw_key, key_height
from onehour.study.charts.panel import FOOT, HEAD, Panel, draw_panel, mark_of
from onehour.study.charts.picture import Picture
from onehour.study.charts.style import SOFT, WIDE, Sheet, Window
from onehour.study.paper import paper_samples
from onehour.study.tables import Findings
from onehour.study.text import short
from onehour.study.verdict import judge_minibatches
from onehour.study.wording import PAPER_REFERENCE, break_caption, non_finite_notes

__all__ = ["minibatch_picture"]

READ = (
    "Bars are ±2 std over seeds, faint dots are seeds; the band is the reference’s ±2 std, the dashed line the margin."
    " The same number of points above the reference lies at the same height in both panels; above the dotted line the"
    " scale is logarithmic."
)


def minibatch_picture(findings: Findings) -> Picture | None:
    """The figure; None without a minibatch that has a run which ended.

    >>> from onehour.study.results import Study
    >>> from onehour.study.tables import findings_of
    >>> minibatch_picture(findings_of(Study(None, ()))) is None
    True
    """
    if findings.reference is None:
        return None
    panels = [_ours(findings), _papers(findings.margin)]
    return Picture(
        name="error-against-minibatch",
        title="Error against minibatch",
        caption=break_caption(findings),
        draw=lambda width: _draw(panels, width),
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


def _draw(panels: Sequence[Panel], width: float) -> Sheet:
    side = width == WIDE
    frame, tall = ((width - 24) / 2, 236) if side else (width, 216)
    states = [mark.state for panel in panels for mark in panel.marks]
    states += ["cross" for panel in panels for mark in panel.marks if mark.crosses]
    below = HEAD + tall + FOOT
    sheet = Sheet(width, below * (1 if side else len(panels)) + key_height(states, width))
    bases = [panel.reference.mean for panel in panels]
    low = max(min(panel.window.low - panel.reference.mean for panel in panels), -min(bases))
    knee = max(panel.window.knee - panel.reference.mean for panel in panels)
    for number, (panel, base) in enumerate(zip(panels, bases, strict=True)):
        high = panel.window.high if panel.window.broken else base + knee
        window = Window(base + low, base + knee, max(high, base + knee), base)
        left, top = (number * (frame + 24), 0) if side else (0, number * below)
        draw_panel(sheet, panel, window, left=left, top=top, width=frame, tall=tall)
    draw_key(sheet, states, left=0, top=sheet.height - key_height(states, width) + 11, right=width)
    return sheet
