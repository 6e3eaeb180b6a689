"""Error against measured time: what accuracy each halving of a run's time costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onehour.study.charts.panel import Mark, draw_key, draw_mark, key_height, mark_of, window_of
from onehour.study.charts.picture import ACCENT, INK, SOFT, WIDE, Picture, Sheet, Window
from onehour.study.tables import Findings, Row
from onehour.study.text import number, points, seconds_text, size_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["seconds_picture"]

ROUND = [
    digit * unit for unit in (1e-3, 1e-2, 0.1, 1, 60, 3600, 36000) for digit in (1, 2, 3, 5, 7, 10, 15, 20, 30, 45)
]
LEFT, TOP, RIGHT, FOOT = 34, 24, 42, 40
"""Points around the axes."""


def seconds_picture(findings: Findings) -> Picture | None:
    """The figure; None where fewer than two minibatches have a time."""
    rows = [row for row in findings.sizes if row.seconds and row.entry.n]
    reference = findings.reference
    if reference is None or not reference.seconds or len(rows) < 2:
        return None
    return Picture(
        name="error-against-time",
        title="Error against time",
        caption=_caption(findings, reference, rows),
        draw=lambda width: _draw(findings, reference, rows, width),
        notes=_notes(rows),
    )


def _caption(findings: Findings, reference: Row, rows: Sequence[Row]) -> str:
    held = [row for row in findings.held if row.seconds]
    end = held[-1] if held else next(row for row in reversed(rows) if row is not reference)
    start, halvings = reference.mean_seconds, math.log2(reference.mean_seconds / end.mean_seconds)
    sizes = f"From minibatch {size_label(reference.entry.minibatch or 0)} to {size_label(end.entry.minibatch or 0)}"
    times = f"{seconds_text(start)} to {seconds_text(end.mean_seconds)}"
    if halvings <= 0:
        return f"{sizes} a run’s time does not fall ({times}), and the error changes by {points(end.cost)} points."
    return (
        f"{sizes} a run’s time falls from {times}, {number(halvings)} halvings, and the error changes by"
        f" {points(end.cost)} points: {points(end.cost / halvings)} for each halving."
    )


def _notes(rows: Sequence[Row]) -> tuple[str, ...]:
    results = [result for row in rows for result in row.entry.results if result.seconds]
    together = sorted({result.together for result in results if result.together > 1})
    notes = ["Time is that of training alone, on this machine, without evaluation; runs that did not end have none."]
    if together:
        many = " or ".join(map(str, together))
        notes.append(f"{many} seeds were trained at once, as one network: a run’s time is its share of theirs.")
    return tuple(notes)


def _draw(findings: Findings, reference: Row, rows: Sequence[Row], width: float) -> Sheet:
    marks = [
        mark_of(
            row.entry,
            math.log2(row.mean_seconds),
            row.verdict.state if row.verdict and row is not reference else "reference",
        )
        for row in rows
    ]
    states = [mark.state for mark in marks] + ["cross" for mark in marks if mark.crosses]
    tall = 210 if width == WIDE else 200
    sheet = Sheet(width, TOP + tall + FOOT + key_height(states, width))
    sheet.text(0, 12, "top-1 error, %, against the time of training a run", color=SOFT, fontsize=10)
    axes = sheet.axes(left=LEFT, top=TOP, width=width - LEFT - RIGHT, height=tall)
    base = reference.entry.mean
    window = window_of(marks, base=base, margin=findings.margin, floor=0.0)
    window.apply(axes)
    places = [mark.place for mark in marks]
    ends = (min(places) - 0.25, max(places) + 0.25)
    axes.set_xlim(*ends)
    ticks = _ticks(ends, width - LEFT - RIGHT)
    axes.set_xticks([math.log2(tick) for tick in ticks], [seconds_text(tick).replace(".0", "") for tick in ticks])
    axes.axhline(base, color=INK, linewidth=0.7, zorder=1)
    axes.axhline(base + findings.margin, color=INK, linewidth=0.7, dashes=(4, 3), zorder=1)
    side = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 9.5, "color": INK}
    axes.annotate(number(base), (ends[1], base), **side)
    axes.annotate(f"+{findings.margin:g}", (ends[1], base + findings.margin), **side)
    if window.broken:
        axes.annotate("log ↑", (ends[1], window.knee), **(side | {"fontsize": 8, "color": SOFT}))
    axes.plot(places, [mark.mean for mark in marks], color=ACCENT, linewidth=1, alpha=0.55, zorder=2)
    point = (ends[1] - ends[0]) / (width - LEFT - RIGHT)
    for mark in marks:
        draw_mark(axes, mark, width=4 * point, ends=(0, 100))
    _name(axes, rows, marks, window, apart=30 * point)
    draw_key(sheet, states, left=0, top=sheet.height - key_height(states, width) + 11, right=width)
    return sheet


def _name(axes: Axes, rows: Sequence[Row], marks: Sequence[Mark], window: Window, apart: float) -> None:
    """Write each minibatch below its bar, above where that place is taken, and nowhere where both are."""
    taken: dict[bool, list[float]] = {False: [], True: []}
    for row, mark in zip(rows, marks, strict=True):
        free = [above for above, places in taken.items() if all(abs(mark.place - place) >= apart for place in places)]
        if free:
            above = free[0]
            taken[above].append(mark.place)
            end = min(mark.reach, window.high) if above else max(2 * mark.mean - mark.reach, window.low)
            place = {"xytext": (0, 8 if above else -8), "va": "bottom" if above else "top", "ha": "center"}
            text = size_label(row.entry.minibatch or 0)
            axes.annotate(text, (mark.place, end), textcoords="offset points", fontsize=9.5, color=INK, **place)


def _ticks(ends: tuple[float, float], width: float) -> list[float]:
    """Round times between two powers of two, so far apart that their texts have room."""
    ticks: list[float] = []
    apart = 44 * (ends[1] - ends[0]) / width
    for time in sorted(set(ROUND)):
        inside = ends[0] <= math.log2(time) <= ends[1]
        if inside and (not ticks or math.log2(time / ticks[-1]) >= apart):
            ticks.append(time)
    return ticks
