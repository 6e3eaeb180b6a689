"""What each change to the recipe costs at its minibatch: a dot plot, the costliest first (paper T1, T2a)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onehour.study.charts.panel import SHAPES, Mark, draw_key, draw_mark, key_height, mark_of, window_of
from onehour.study.charts.picture import FAINT, INK, SOFT, WASH, WIDE, Picture, Sheet, Window
from onehour.study.results import Entry
from onehour.study.tables import Findings, Row
from onehour.study.text import GROUPS, joined, number, points, short, size_label
from onehour.study.wording import non_finite_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["arm_pictures"]


def arm_pictures(findings: Findings, *, elsewhere: Sequence[str] = ()) -> list[Picture]:
    """A figure for each minibatch that has arms.

    Args:
        elsewhere: groups that have a figure of their own.
    """
    pictures = []
    for size in sorted({size for size, _ in findings.groups}):
        groups = [
            (GROUPS[kind], [row for row in rows if math.isfinite(row.cost)])
            for (at, kind), rows in findings.groups.items()
            if at == size and kind not in elsewhere
        ]
        groups = [(title, rows) for title, rows in groups if rows]
        if groups:
            pictures.append(_picture(findings, size, groups))
    return pictures


def _picture(findings: Findings, size: int, groups: Sequence[tuple[str, Sequence[Row]]]) -> Picture:
    rows = [row for _, rows in groups for row in rows]
    own = findings.beside(rows[0])
    assert own is not None
    worse = sum(row.verdict is not None and row.verdict.state == "worse" for row in rows)
    most = [f"{short(row.name)} ({points(row.cost)})" for row in sorted(rows, key=lambda row: -row.cost)[:3]]
    caption = f"At minibatch {size_label(size)}, where the recipe has {number(own.mean)} % error, "
    if all(row.verdict is not None and row.verdict.state == "one seed" for row in rows):
        caption += "no change has a verdict from one seed; "
    else:
        caption += f"{worse} of {len(rows)} changes {'is' if worse == 1 else 'are'} worse; "
    caption += f"the costliest, in points: {joined(most)}."
    return Picture(
        name=f"arms-at-{size}",
        title=f"What each change costs at {size_label(size)}",
        caption=caption,
        draw=lambda width: _draw(findings.margin, own, groups, width),
        notes=non_finite_notes(rows),
    )


def _draw(margin: float, own: Entry, groups: Sequence[tuple[str, Sequence[Row]]], width: float) -> Sheet:
    """A line an arm: its name at the left, or above where the sheet is narrow."""
    wide = width == WIDE
    head, step, left, right = (20, 21, 236, 60) if wide else (36, 36, 0, 0)
    rows: list[tuple[float, Row]] = []
    spans, titles, place = [], [], 0.0
    for title, members in groups:
        titles.append((place + 12, title))
        begin, place = place, place + (9 if wide else 10)
        for row in members:
            place += step
            rows.append((place, row))
            spans += [] if wide else [(place - 6, place + 6)]
        spans += [(begin, place + 10)] if wide else []
        place += 32
    tall = place - 20
    marks = [mark_of(row.entry, place, row.verdict.state, own.mean) for place, row in rows if row.verdict]
    paper = [Mark(place, row.paper, math.nan, "paper") for place, row in rows if row.paper is not None]
    states = [m.state for m in (*marks, *paper)] + ["cross" for mark in marks if mark.crosses]
    sheet = Sheet(width, head + 14 + tall + 24 + key_height(states, width))
    sheet.text(0, 12, "points of top-1 error above the recipe", fontsize=10, color=SOFT)
    axes = sheet.axes(left=left + 4, top=head + 14, width=width - left - right - 8, height=tall)
    window = window_of([*marks, *paper], base=0.0, margin=margin, floor=-own.mean)
    _frame(axes, own, window, margin, tall, spans)
    for place, title in titles:
        sheet.text(0, head + 14 + place, title, weight="bold", fontsize=10.5)
    for mark in paper:
        axes.plot([mark.mean], [mark.place], linestyle="none", markersize=5.2, markeredgewidth=1.2, **SHAPES["paper"])
    for mark, (place, row) in zip(marks, rows, strict=True):
        line = head + 14 + place + (4 if wide else -10)
        sheet.text(0, line, short(row.name, 40), fontsize=10.5)
        sheet.text(
            width, line, points(row.cost), ha="right", fontsize=10.5, color=SHAPES[mark.state]["markeredgecolor"]
        )
        draw_mark(axes, mark, upright=False, width=3.5, ends=(-own.mean, 100 - own.mean))
    draw_key(sheet, states, left=0, top=sheet.height - key_height(states, width) + 11, right=width)
    return sheet


def _frame(
    axes: Axes, own: Entry, window: Window, margin: float, tall: float, spans: Sequence[tuple[float, float]]
) -> None:
    """The scale, drawn over these spans of the other axis alone."""
    window.apply(axes, "x")
    axes.grid(visible=False)
    axes.set_ylim(tall, 0)
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    begins, ends = zip(*spans, strict=True)
    for tick in window.ticks():
        axes.vlines([tick] * len(spans), begins, ends, color=FAINT, linewidth=0.6, zorder=0.5)
    for begin, end in spans if math.isfinite(own.std) else ():
        axes.fill_betweenx([begin, end], -2 * own.std, 2 * own.std, color=WASH, linewidth=0, zorder=0)
    axes.vlines([0] * len(spans), begins, ends, color=INK, linewidth=0.7, zorder=1)
    axes.vlines([margin] * len(spans), begins, ends, color=INK, linewidth=0.7, linestyles=(0, (4, 3)), zorder=1)
    note = {"textcoords": "offset points", "fontsize": 9.5}
    axes.annotate("0", (0, 0), xytext=(0, 5), ha="center", color=INK, **note)
    axes.annotate(f"+{margin:g}", (margin, 0), xytext=(0, 5), ha="center", color=INK, **note)
    if window.broken:
        far = {"ha": "left", "color": SOFT, **note, "fontsize": 8}
        axes.annotate("log →", (window.knee, 0), xytext=(0, 5), **far)
