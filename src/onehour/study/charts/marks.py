"""How an entry is drawn: its mean in its verdict's shape, ±2 std as a bar, seeds as dots, lost ones as crosses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onehour.study.charts.style import ACCENT, ALERT, INK, PAPER, SOFT, Sheet, Window, spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["KEYS", "Mark", "draw_key", "draw_mark", "key_height", "window_of"]

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

    >>> from onehour.study.charts.style import looks
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

    >>> from onehour.study.charts.style import looks
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
