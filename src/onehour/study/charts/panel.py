"""Errors over a size on a log2 axis: means with ±2 std, seeds, the reference's band, the margin and the break."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from onehour.study.charts.marks import Mark, draw_mark, window_of
from onehour.study.charts.style import ACCENT, ALERT, INK, SOFT, WASH, Sheet, Window
from onehour.study.results import Entry
from onehour.study.text import number, size_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FOOT", "HEAD", "Panel", "draw_panel", "mark_of"]

HEAD, FOOT, LEFT, RIGHT = 46, 48, 34, 42
"""Points around a panel's axes."""

APART = 25
"""Points between the sizes that are written."""


@dataclass(frozen=True)
class Panel:
    """What a panel shows.

    Args:
        title, about: its two lines of text.
        marks: one a size, at log2 of it; one of them has the state "reference".
        under: a second line under each size.
        margin: above the reference, in points.
        color: of its line and title.
        breaks: whether the first size that does not hold is marked.

    >>> panel = Panel("digits", "", (Mark(5, 3.6, 0.1, "reference"),), ("1×",), 0.5)
    >>> panel.reference.mean
    3.6
    """

    title: str
    about: str
    marks: tuple[Mark, ...]
    under: tuple[str, ...]
    margin: float
    color: str = ACCENT
    breaks: bool = True

    @property
    def reference(self) -> Mark:
        """What the others are compared with.

        >>> Panel("", "", (Mark(5, 3.6, 0.1, "reference"),), ("1×",), 0.5).reference.place
        5
        """
        return next(mark for mark in self.marks if mark.state == "reference")

    @property
    def window(self) -> Window:
        """The scale that its marks ask for.

        >>> Panel("", "", (Mark(5, 3.6, 0.1, "reference"),), ("1×",), 0.5).window.broken
        False
        """
        return window_of(self.marks, base=self.reference.mean, margin=self.margin, floor=0.0)


def mark_of(entry: Entry, place: float, state: str, above: float = 0.0) -> Mark:
    """An entry as a mark.

    Args:
        above: what its errors are counted from, in percent.

    >>> from onehour.study.results import Result
    >>> mark_of(Entry((), 32, (Result("a", (), 32, 0, "finished", 3.0),)), 5, "reference").dots
    (3.0,)
    """
    ended = [(result.outcome, result.error - above) for result in entry.results if result.error is not None]
    return Mark(
        place=place,
        mean=entry.mean - above,
        std=entry.std,
        state=state,
        dots=tuple(error for outcome, error in ended if outcome == "finished"),
        crosses=tuple(error for outcome, error in ended if outcome == "non-finite"),
    )


def draw_panel(
    sheet: Sheet, panel: Panel, window: Window, *, left: float, top: float, width: float, tall: float
) -> None:
    """Draw a panel with its text; `HEAD` and `FOOT` belong to it.

    Args:
        left, top, width: of the whole, in points.
        tall: of the axes.

    >>> from onehour.study.charts.style import looks
    >>> panel = Panel("digits", "", (Mark(5, 3.6, 0.1, "reference"),), ("1×",), 0.5)
    >>> with looks():
    ...     draw_panel(Sheet(300, 300), panel, panel.window, left=0, top=0, width=300, tall=200)
    """
    sheet.text(left, top + 12, panel.title, color=panel.color if panel.color == ACCENT else INK, weight="bold")
    sheet.text(left, top + 28, panel.about, color=SOFT, fontsize=10)
    axes = sheet.axes(left=left + LEFT, top=top + HEAD, width=width - LEFT - RIGHT, height=tall)
    _draw_frame(axes, panel, window, width - LEFT - RIGHT)
    places, means = [mark.place for mark in panel.marks], [mark.mean for mark in panel.marks]
    axes.plot(places, means, color=panel.color, linewidth=1, alpha=0.55, zorder=2)
    for mark in panel.marks:
        draw_mark(axes, mark, ends=(0, 100))
        if mark.mean > window.knee:  # where the scale says little
            right = mark.state == "worse"  # the break's line is on its left
            axes.annotate(
                number(mark.mean, 1),
                (mark.place, mark.mean),
                xytext=(8, -3) if right else (0, 6) if mark.crosses else (-8, 0),
                textcoords="offset points",
                ha="left" if right else "center" if mark.crosses else "right",
                va="top" if right else "bottom" if mark.crosses else "center",
                fontsize=9.5,
                color=SOFT if mark.state == "one seed" else ALERT,
            )
    if panel.breaks:
        _draw_break(axes, panel)


def _draw_frame(axes: Axes, panel: Panel, window: Window, width: float) -> None:
    from matplotlib.transforms import blended_transform_factory

    places, reference = [mark.place for mark in panel.marks], panel.reference
    ends = (min(places) - 0.6, max(places) + 0.6)
    window.apply(axes)
    axes.set_xlim(*ends)
    written = _apart(places, APART * (ends[1] - ends[0]) / width)
    axes.set_xticks(places, [size_label(2**place) if place in written else "" for place in places])
    below = blended_transform_factory(axes.transData, axes.transAxes)
    small = {"textcoords": "offset points", "fontsize": 8, "color": SOFT}
    for place, text in zip(places, panel.under, strict=True):
        axes.annotate(
            text if place in written else "", (place, 0), xycoords=below, xytext=(0, -24), ha="center", **small
        )
    if window.broken:
        axes.annotate("log ↑", (ends[1], window.knee), xytext=(5, 0), va="center", **small)
    if math.isfinite(reference.std):
        axes.axhspan(reference.mean - 2 * reference.std, reference.reach, color=WASH, linewidth=0, zorder=0)
    axes.axhline(reference.mean, color=INK, linewidth=0.7, zorder=1)
    axes.axhline(reference.mean + panel.margin, color=INK, linewidth=0.7, dashes=(4, 3), zorder=1)
    side = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 9.5, "color": INK}
    axes.annotate(number(reference.mean), (ends[1], reference.mean), **side)
    axes.annotate(f"+{panel.margin:g}", (ends[1], reference.mean + panel.margin), **side)


def _apart(places: Sequence[float], least: float) -> set[float]:
    """Those of these places that texts have room at."""
    kept: list[float] = []
    for place in sorted(places):
        if not kept or place - kept[-1] >= least:
            kept.append(place)
    return set(kept)


def _draw_break(axes: Axes, panel: Panel) -> None:
    """A line between the largest size that holds and the first that does not."""
    above = [mark for mark in panel.marks if mark.place >= panel.reference.place]
    for before, after in pairwise(above):
        if after.state in ("worse", "undecided"):
            middle, color = (before.place + after.place) / 2, ALERT if after.state == "worse" else SOFT
            axes.axvline(middle, color=color, linewidth=0.9, dashes=(2, 2), zorder=1)
            note = {
                "xycoords": ("data", "axes fraction"),
                "textcoords": "offset points",
                "fontsize": 9.5,
                "color": color,
            }
            if before.state == "holds":
                text = f"holds to {size_label(2**before.place)}"
                axes.annotate(text, (middle, 1), xytext=(-3, 3), ha="right", **note)
            if before.state != "holds" or after.state == "undecided":
                axes.annotate(after.state, (middle, 1), xytext=(3, 3), ha="left", **note)
        if after.state != "holds":
            return
