"""How entries are drawn: marks with ±2 std and single seeds, what they mean, and panels of them over a log2 axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from onehour.study.findings import Row
from onehour.study.picture import ACCENT, ALERT, INK, PAPER, SOFT, WASH, WIDE, Sheet, Window
from onehour.study.wording import WORDS, number, size_label
from onehour.training.record import TOP1_ERROR, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHAPES: dict[str, dict[str, Any]] = {
    "reference": {"marker": "o", "markerfacecolor": INK, "markeredgecolor": INK},
    "within": {"marker": "o", "markerfacecolor": ACCENT, "markeredgecolor": ACCENT},
    "undecided": {"marker": "o", "markerfacecolor": PAPER, "markeredgecolor": ACCENT},
    "above": {"marker": "D", "markerfacecolor": PAPER, "markeredgecolor": ALERT},
    "beyond": {"marker": "D", "markerfacecolor": ALERT, "markeredgecolor": ALERT},
    "broke": {"marker": "X", "markerfacecolor": ALERT, "markeredgecolor": ALERT},
    "no verdict": {"marker": "o", "markerfacecolor": PAPER, "markeredgecolor": SOFT},
    "cross": {"marker": "x", "markerfacecolor": ALERT, "markeredgecolor": ALERT},
    "paper": {"marker": "s", "markerfacecolor": PAPER, "markeredgecolor": SOFT},
}
"""Of a mark by its state, and of what else is drawn; colour never says it alone."""

KEYS = {
    **WORDS,
    "broke": "some runs broke",
    "cross": "diverged (NaN or ∞), scored as chance",
    "paper": "the paper, at 8k",
}
"""What a shape means."""

FAR = 8  # margins from the reference, up to which a bar of ±2 std stretches the even part of a scale
SMALLEST = 1e-6  # of margins: below it floats do not tell a scale's ends apart
MOST_TIMES = 1e200  # the knee: beyond it floats overflow
LINE = 16  # points from a line of the key to the next
HEAD, FOOT, LEFT, RIGHT = 46, 48, 34, 42  # points around a panel's axes
NOTE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9.5}
SMALL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": SOFT}


@dataclass(frozen=True)
class Mark:
    """An entry to draw; all in percent, or all in points above something, or costs of a metric (`Metric.cost`).

    Its place is on the other axis, its state one of `SHAPES`; dots are of seeds, crosses of those that diverged.
    """

    place: float
    mean: float
    std: float
    state: str
    dots: tuple[float, ...] = ()
    crosses: tuple[float, ...] = ()

    @property
    def reach(self) -> float:
        """The far end of its bar; its mean where one seed has no std."""
        return self.mean + 2 * self.std if math.isfinite(self.std) else self.mean


def mark_of(row: Row, place: float, above: float = 0.0, state: str = "") -> Mark:
    """A row as a mark, whose costs are counted from so much, in percent."""
    ended = [(result.outcome, result.cost - above) for result in row.entry.results if result.cost is not None]
    return Mark(
        place=place,
        mean=row.entry.cost - above,
        std=row.entry.std,
        state=state or row.state,
        dots=tuple(error for outcome, error in ended if outcome == "finished"),
        crosses=tuple(error for outcome, error in ended if outcome == "non-finite"),
    )


def draw_mark(axes: Axes, mark: Mark, *, upright: bool = True, width: float, ends: Sequence[float]) -> None:
    """Draw an entry at its place, upright where errors are on the vertical axis.

    Seeds are spread over `width`, in units of the other axis; its bar lies between `ends`, for top-1 error 0 and 100.
    """
    color = SHAPES[mark.state]["markeredgecolor"]

    def plot(places: list[float], values: Iterable[float], **style: Any) -> None:
        pair = (places, list(values)) if upright else (list(values), places)
        axes.plot(*pair, **({"linestyle": "none", "color": color} | style))

    dot = {"marker": "o", "markersize": 4.4, "alpha": 0.6, "markeredgewidth": 0}
    cross = {"marker": "x", "markersize": 4.6, "markeredgecolor": ALERT, "markeredgewidth": 1.1, "zorder": 5}
    plot([mark.place + width * offset for offset in _spaced(mark.dots)], mark.dots, **dot)
    plot([mark.place + width * (2 + 0.7 * offset) for offset in _spaced(mark.crosses)], mark.crosses, **cross)
    if math.isfinite(mark.std) and mark.state != "broke":  # whose runs are of two kinds
        low, high = (min(max(mark.mean + sign * 2 * mark.std, ends[0]), ends[1]) for sign in (-1, 1))
        plot([mark.place] * 2, [low, high], linestyle="-", linewidth=1.3, solid_capstyle="butt")
    plot([mark.place], [mark.mean], markersize=6.2, markeredgewidth=1.4, zorder=4, **SHAPES[mark.state])


def _spaced(values: Sequence[float]) -> list[float]:
    """Small even offsets around 0, one a value, so that equal seeds do not hide each other."""
    middle = (len(values) - 1) / 2
    return [(number - middle) / max(middle, 1) for number in range(len(values))]


def window_of(marks: Iterable[Mark], *, base: float, margin: float, floor: float) -> Window:
    """A scale that shows differences of a margin's size, and puts what lies far above on a logarithmic one.

    The margin is counted from `base`; below `floor` there is nothing.
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
    return Window(low, knee, base + (knee - base) * min(times, MOST_TIMES) ** 1.25, base)  # with air above the highest


def sheet_with_key(width: float, height: float, marks: Iterable[Mark], metric: Metric = TOP1_ERROR) -> Sheet:
    """A sheet of this height, in points, above a key of what the marks' shapes mean, on as many lines as it needs."""
    meant = KEYS if metric == TOP1_ERROR else KEYS | {"cross": "diverged (NaN or ∞), scored as untrained"}
    from matplotlib.lines import Line2D

    marks = list(marks)
    states = {mark.state for mark in marks} | {"cross" for mark in marks if mark.crosses}
    keys, place, line = [], 0.0, 0
    for state, words in ((state, meant[state]) for state in SHAPES if state in states):
        length = 26 + 5.7 * len(words)
        if place and place + length - 12 > width:
            place, line = 0.0, line + 1
        keys.append((state, words, place, height + 11 + line * LINE))
        place += length
    sheet = Sheet(width, height + LINE * (line + 1))
    for state, words, place, top in keys:
        x, y = (place + 4) / width, 1 - (top - 3.4) / sheet.height
        style = {"linestyle": "none", "markersize": 5.4, "markeredgewidth": 1.3, "transform": sheet.figure.transFigure}
        sheet.figure.add_artist(Line2D([x], [y], **(style | SHAPES[state])))
        sheet.text(place + 13, top, words, fontsize=9.5, color=SOFT)
    return sheet


@dataclass(frozen=True)
class Panel:
    """What a panel shows under its two lines of text."""

    title: str
    about: str
    marks: tuple[Mark, ...]  # one of them has the state "reference"
    ticks: tuple[tuple[float, str, str], ...]
    """(place, text, second line) on the lower axis; those that have no room are left out."""
    margin: float  # above the reference, in points
    color: str = ACCENT
    breaks: bool = False
    """Whether the first size that is not within the margin is marked; places are then log2 of sizes."""
    names: tuple[str, ...] = ()  # of the marks, written beside them
    foreseen: tuple[float, float, float] | None = None
    """The noise scale's interval and the noise scale, between its ends, on the lower axis."""
    pad: float = 0.6  # beyond the first and last mark
    room: float = 25  # points that a tick's text needs
    metric: Metric = TOP1_ERROR

    @property
    def digits(self) -> int:
        return self.metric.digits(self.margin)

    @property
    def reference(self) -> Mark:
        """What the others are compared with."""
        return next(mark for mark in self.marks if mark.state == "reference")

    @property
    def above(self) -> list[Mark]:
        """The marks behind it, in the order of their places."""
        return sorted((mark for mark in self.marks if mark.place > self.reference.place), key=lambda mark: mark.place)

    @property
    def window(self) -> Window:
        """The scale that its marks ask for."""
        floor, most = self.metric.ends
        window = window_of(self.marks, base=self.reference.mean, margin=self.margin, floor=floor)
        return replace(window, most=most, negated=self.metric.higher_is_better)


def draw_panels(panels: Sequence[Panel], width: float, tall: float = 0) -> Sheet:
    """Panels side by side, or one above the other on a narrow sheet, with one scale of points above the reference."""
    side = width == WIDE or len(panels) == 1
    gap = 24 * (len(panels) - 1)
    frame, tall = ((width - gap) / len(panels), tall or 236) if side else (width, tall or 216)
    below = HEAD + tall + FOOT
    marks = [mark for panel in panels for mark in panel.marks]
    sheet = sheet_with_key(width, below * (1 if side else len(panels)), marks, panels[0].metric)
    bases = [panel.reference.mean for panel in panels]
    windows = [panel.window for panel in panels]
    floor = panels[0].metric.ends[0] - min(bases)
    low = max(min(window.low - base for window, base in zip(windows, bases, strict=True)), floor)
    knee = max(window.knee - base for window, base in zip(windows, bases, strict=True))
    for place, (panel, window, base) in enumerate(zip(panels, windows, bases, strict=True)):
        high = window.high if window.broken else base + knee
        same = replace(window, low=base + low, knee=base + knee, high=max(high, base + knee))
        left, top = (place * (frame + gap), 0) if side else (0, place * below)
        _draw_panel(sheet, panel, same, left=left, top=top, width=frame, tall=tall)
    return sheet


def _draw_panel(
    sheet: Sheet, panel: Panel, window: Window, *, left: float, top: float, width: float, tall: float
) -> None:
    """Draw a panel with its text; left, top and width are of the whole, in points, and tall of the axes."""
    sheet.text(left, top + 12, panel.title, color=panel.color if panel.color == ACCENT else INK, weight="bold")
    sheet.text(left, top + 28, panel.about, color=SOFT, fontsize=10)
    axes = sheet.axes(left=left + LEFT, top=top + HEAD, width=width - LEFT - RIGHT, height=tall)
    places, means = [mark.place for mark in panel.marks], [mark.mean for mark in panel.marks]
    first = next((mark for mark in panel.above if mark.state != "within"), None)  # the break's line is on its left
    ends = (min(places) - panel.pad, max(places) + panel.pad)
    point = (ends[1] - ends[0]) / (width - LEFT - RIGHT)
    window.apply(axes)
    axes.set_xlim(*ends)
    _draw_frame(axes, panel, window, point)
    axes.plot(places, means, color=panel.color, linewidth=1, alpha=0.55, zorder=2)
    for mark in panel.marks:
        draw_mark(axes, mark, width=5 * point, ends=panel.metric.ends)
        if mark.mean > window.knee and not panel.names:  # where the scale says little
            right = mark is first
            axes.annotate(
                number(panel.metric.cost(mark.mean), max(panel.digits - 1, 0)),
                (mark.place, mark.mean),
                xytext=(8, -3) if right else (0, 6) if mark.crosses else (-8, 0),
                ha="left" if right else "center" if mark.crosses else "right",
                va="top" if right else "bottom" if mark.crosses else "center",
                color=SOFT if mark.state == "no verdict" else ALERT,
                **NOTE,
            )
    _name(axes, panel, window, 30 * point)
    if panel.breaks:
        _draw_break(axes, panel)
    if panel.foreseen is not None:
        low, middle, high = panel.foreseen
        line: dict[str, Any] = {"color": SOFT, "transform": axes.get_xaxis_transform(), "zorder": 1}
        axes.plot([low, high], [0.03, 0.03], linewidth=2, solid_capstyle="butt", **line)
        axes.plot([middle], [0.03], marker="|", markersize=9, markeredgewidth=2, **line)
        where: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (0, 7), "ha": "center"}
        axes.annotate("noise scale", (min(middle, ends[1]), 0.03), va="bottom", **where, **SMALL)


def _draw_frame(axes: Axes, panel: Panel, window: Window, point: float) -> None:
    """Ticks, the reference and the margin; `point` is a point's length on the lower axis."""
    reference, end = panel.reference, axes.get_xlim()[1]
    written = _apart([place for place, *_ in panel.ticks], panel.room * point)
    axes.set_xticks([place for place, *_ in panel.ticks], [text if p in written else "" for p, text, _ in panel.ticks])
    for place, _, under in panel.ticks:
        text = under if place in written else ""
        axes.annotate(text, (place, 0), xycoords=("data", "axes fraction"), xytext=(0, -24), ha="center", **SMALL)
    if window.broken:
        axes.annotate("log ↑", (end, window.knee), xytext=(5, 0), va="center", **SMALL)
    if math.isfinite(reference.std):
        axes.axhspan(reference.mean - 2 * reference.std, reference.reach, color=WASH, linewidth=0, zorder=0)
    axes.axhline(reference.mean, color=INK, linewidth=0.7, zorder=1)
    axes.axhline(reference.mean + panel.margin, color=INK, linewidth=0.7, dashes=(4, 3), zorder=1)
    mean, sign = number(panel.metric.cost(reference.mean), panel.digits), "−" if panel.metric.higher_is_better else "+"
    for text, error in ((mean, 0), (f"{sign}{panel.margin:g}", panel.margin)):
        axes.annotate(text, (end, reference.mean + error), xytext=(5, 0), va="center", color=INK, **NOTE)


def _apart(places: Iterable[float], least: float) -> list[float]:
    kept: list[float] = []
    for place in sorted(places):
        if not kept or place - kept[-1] >= least:
            kept.append(place)
    return kept


def _name(axes: Axes, panel: Panel, window: Window, least: float) -> None:
    """Write each mark's name below its bar, above where that place is taken, and nowhere where both are."""
    taken: dict[bool, list[float]] = {False: [], True: []}
    for name, mark in zip(panel.names, panel.marks, strict=False):
        free = [above for above, places in taken.items() if all(abs(mark.place - place) >= least for place in places)]
        if free:
            above = free[0]
            taken[above].append(mark.place)
            end = min(mark.reach, window.high) if above else max(2 * mark.mean - mark.reach, window.low)
            place = {"xytext": (0, 8 if above else -8), "va": "bottom" if above else "top", "ha": "center"}
            axes.annotate(name, (mark.place, end), color=INK, **place, **NOTE)


def _draw_break(axes: Axes, panel: Panel) -> None:
    """A line between the largest size to which the rule holds and the first to which it does not."""
    for before, after in pairwise([panel.reference, *panel.above]):
        if after.state == "within":
            continue
        if after.state != "no verdict":
            middle, color = (before.place + after.place) / 2, SOFT if after.state == "undecided" else ALERT
            axes.axvline(middle, color=color, linewidth=0.9, dashes=(2, 2), zorder=1)
            at: dict[str, Any] = {"xy": (middle, 1), "xycoords": ("data", "axes fraction"), "color": color, **NOTE}
            if before.state == "within":
                axes.annotate(f"holds to {size_label(2**before.place)}", xytext=(-3, 3), ha="right", **at)
            else:
                axes.annotate(KEYS[after.state], xytext=(3, 3), ha="left", **at)
        return
