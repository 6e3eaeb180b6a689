"""How entries are drawn: marks with ±2 std, seeds and lost ones, and panels of them over a size on a log2 axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from onehour.study.charts.picture import ACCENT, ALERT, INK, PAPER, SOFT, WASH, Sheet, Window, spaced
from onehour.study.results import Entry
from onehour.study.text import number, size_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "FOOT",
    "HEAD",
    "KEYS",
    "Mark",
    "Panel",
    "draw_key",
    "draw_mark",
    "draw_panel",
    "key_height",
    "mark_of",
    "window_of",
]

SHAPES: dict[str, dict[str, Any]] = {
    "reference": {"marker": "o", "markerfacecolor": INK, "markeredgecolor": INK},
    "holds": {"marker": "o", "markerfacecolor": ACCENT, "markeredgecolor": ACCENT},
    "undecided": {"marker": "o", "markerfacecolor": PAPER, "markeredgecolor": ACCENT},
    "worse": {"marker": "D", "markerfacecolor": ALERT, "markeredgecolor": ALERT},
    "untested": {"marker": "D", "markerfacecolor": PAPER, "markeredgecolor": ALERT},
    "one seed": {"marker": "o", "markerfacecolor": PAPER, "markeredgecolor": SOFT},
    "cross": {"marker": "x", "markerfacecolor": ALERT, "markeredgecolor": ALERT},
    "paper": {"marker": "s", "markerfacecolor": PAPER, "markeredgecolor": SOFT},
}
KEYS = {
    "reference": "reference",
    "holds": "holds",
    "undecided": "undecided",
    "worse": "worse",
    "untested": "beyond the break, not tested",
    "one seed": "one seed, no verdict",
    "cross": "left the finite numbers, scored as chance",
    "paper": "the paper, at 8k",
}
"""What each shape means; colour never says it alone."""


FAR = 8
"""Margins from the reference, up to which a bar of ±2 std stretches the even part of a scale."""

SMALLEST = 1e-6
"""Of margins: below it floats do not tell a scale's ends apart."""

LINE = 16
"""Points from a line of the key to the next."""


@dataclass(frozen=True)
class Mark:
    """An entry to draw; all in percent, or all in points above something.

    Args:
        place: on the other axis.
        state: one of `KEYS`.
        dots: of seeds.
        crosses: of seeds that left the finite numbers.

    >>> Mark(5.0, 3.5, 0.25, "holds").reach
    4.0
    """

    place: float
    mean: float
    std: float
    state: str
    dots: tuple[float, ...] = ()
    crosses: tuple[float, ...] = ()

    @property
    def reach(self) -> float:
        """The far end of its bar; its mean where one seed has no std.

        >>> Mark(5.0, 3.6, float("nan"), "one seed").reach
        3.6
        """
        return self.mean + 2 * self.std if math.isfinite(self.std) else self.mean


def draw_mark(axes: Axes, mark: Mark, *, upright: bool = True, width: float = 0.13, ends: Sequence[float]) -> None:
    """Draw an entry at its place.

    Args:
        upright: errors on the vertical axis.
        width: over which seeds are spread, in units of the other axis.
        ends: between which its bar may lie: no error is below 0 or above 100 %.

    >>> from onehour.study.charts.picture import looks
    >>> with looks():
    ...     draw_mark(Sheet(90, 90).axes(left=0, top=0, width=90, height=90), Mark(1, 2, 0.5, "holds"), ends=(0, 100))
    """
    color = SHAPES[mark.state]["markeredgecolor"]

    def plot(places: list[float], values: list[float], **style: Any) -> None:
        pair = (places, values) if upright else (values, places)
        axes.plot(*pair, **({"linestyle": "none", "color": color} | style))

    dot = {"marker": "o", "markersize": 3.2, "alpha": 0.35, "markeredgewidth": 0}
    cross = {"marker": "x", "markersize": 4.6, "markeredgecolor": ALERT, "markeredgewidth": 1.1, "zorder": 5}
    plot([mark.place + width * offset for offset in spaced(mark.dots)], list(mark.dots), **dot)
    beside = [mark.place + width * (2 + 0.7 * offset) for offset in spaced(mark.crosses)]
    plot(beside, list(mark.crosses), **cross)
    if math.isfinite(mark.std):
        low, high = (min(max(mark.mean + sign * 2 * mark.std, ends[0]), ends[1]) for sign in (-1, 1))
        plot([mark.place] * 2, [low, high], linestyle="-", linewidth=1.3, solid_capstyle="butt")
    plot([mark.place], [mark.mean], markersize=6.2, markeredgewidth=1.4, zorder=4, **SHAPES[mark.state])


def window_of(marks: Iterable[Mark], *, base: float, margin: float, floor: float) -> Window:
    """A scale that shows differences of a margin's size, and puts what lies far above on a logarithmic one.

    Args:
        marks: all that are to be seen.
        base: what the margin is counted from.
        floor: below which there is nothing.

    >>> window = window_of([Mark(5, 3.6, 0.1, "holds"), Mark(6, 43.0, 30.0, "worse")], base=3.6, margin=0.5, floor=0)
    >>> round(window.low, 2), round(window.knee, 2), round(window.high, 2)
    (2.7, 6.0, 82.91)
    """
    marks, margin = list(marks), max(margin, SMALLEST)
    near = [mark for mark in marks if mark.mean <= base + 4 * margin]
    bars = [max(2 * mark.mean - mark.reach, base - FAR * margin) for mark in near]
    lows = [*bars, *(low for mark in marks for low in (mark.mean, *mark.dots))]
    low = max(min([base - 1.8 * margin, *(value - 0.3 * margin for value in lows)]), floor)
    highs = [min(mark.reach, base + FAR * margin) for mark in near]
    knee = max([base + 3 * margin, *(high + 0.3 * margin for high in highs)])
    top = max([knee, *(top for mark in marks for top in (mark.mean, *mark.dots, *mark.crosses))])
    if top <= base + 2.5 * (max(knee, base + 4.8 * margin) - base):
        top = max(knee, top + 0.3 * margin)
        return Window(low, top, top, base)
    knee = max(knee, base + 4.8 * margin)
    times = max((top - base) / (knee - base), 1.2)
    return Window(low, knee, base + (knee - base) * times**1.25, base)  # with air above the highest


def draw_key(sheet: Sheet, states: Iterable[str], *, left: float, top: float, right: float) -> None:
    """Write what the shapes mean, on as many lines as `key_height` says.

    >>> from onehour.study.charts.picture import looks
    >>> with looks():
    ...     draw_key(Sheet(300, 50), ["holds", "worse"], left=10, top=20, right=290)
    """
    from matplotlib.lines import Line2D

    for state, place, line in _places(states, right - left):
        x, y = (left + place + 4) / sheet.width, 1 - (top + line * LINE - 3.4) / sheet.height
        style = {"linestyle": "none", "markersize": 5.4, "markeredgewidth": 1.3, "transform": sheet.figure.transFigure}
        sheet.figure.add_artist(Line2D([x], [y], **(style | SHAPES[state])))
        sheet.text(left + place + 13, top + line * LINE, KEYS[state], fontsize=9.5, color=SOFT)


def key_height(states: Iterable[str], width: float) -> float:
    """How much room `draw_key` takes, in points.

    >>> key_height(["holds", "worse"], 300), key_height(["holds", "worse", "cross"], 200)
    (16, 32)
    """
    return LINE * max((line + 1 for *_, line in _places(states, width)), default=0)


def _places(states: Iterable[str], width: float) -> list[tuple[str, float, int]]:
    """(state, left, line) of each shape's words."""
    found, place, line, wanted = [], 0.0, 0, set(states)
    for state in (state for state in KEYS if state in wanted):
        length = 26 + 5.7 * len(KEYS[state])
        if place and place + length - 12 > width:
            place, line = 0.0, line + 1
        found.append((state, place, line))
        place += length
    return found


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

    >>> from onehour.study.charts.picture import looks
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
