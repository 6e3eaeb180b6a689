"""Training and validation error over epochs, each over what it should overlap with: small multiples (paper F2-F4)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onehour.study.findings import Curve, Findings, Row, curve_of, sign_of
from onehour.study.marks import SHAPES
from onehour.study.picture import ACCENT, ALERT, FAINT, INK, SOFT, WIDE, Picture, Sheet
from onehour.study.results import Entry
from onehour.study.verdict import points
from onehour.study.wording import cost_text, multiple, number, short, size_label, value_text
from onehour.training.record import TOP1_ERROR, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 24  # small multiples in a figure
DETAIL = 80  # points of a curve that so small a picture can show

READ = "Solid: training {0}; dotted: validation {0}; grey: what they are compared with."
READ_VALIDATION = "Dotted: validation {0}; grey: what it is compared with."
LOGARITHMIC = " The scale is logarithmic."
READ_SIGN = (
    "The gap between the training {} is shaded; its mean between the two vertical lines, from the end of warmup to"
    " the first drop of the rate, is the early sign."
)


@dataclass(frozen=True)
class _Cell:
    title: str
    entry: Entry
    base: Entry | None
    state: str = "reference"
    early: float = math.nan

    @property
    def lines(self) -> list[str]:
        return textwrap.wrap(short(self.title, 44), 25) or [""]


def curve_pictures(findings: Findings) -> list[Picture]:
    """Of minibatches over the reference, of arms over the recipe at their minibatch, and of curves without a place."""
    reference, name = findings.reference, findings.metric.title
    groups: list[tuple[str, str, list[_Cell]]] = []
    if reference is not None:
        over = f"over minibatch {size_label(reference.entry.minibatch or 0)}’s"
        rows = [row for row in findings.sizes if row is not reference] or [reference]
        cells = [_cell(row, multiple(findings, row), reference.entry) for row in rows]
        groups.append(("curves", f"{name} over epochs, {over}", cells))
    for size in findings.arms_at:
        rows = sorted((row for row in findings.arms if row.entry.minibatch == size), key=lambda row: -row.cost)
        cells = [_cell(row, row.name, findings.study.beside(row.entry)) for row in rows]
        groups.append((f"curves-of-arms-at-{size}", f"{name} over epochs of each change at {size_label(size)}", cells))
    if findings.loose:
        base = reference.entry if reference else findings.loose[0]
        cells = [_Cell(entry.arm[0][1], entry, base) for entry in findings.loose if entry is not base]
        cells = cells or [_Cell(base.arm[0][1] if base.arm else "", base, None)]
        groups.append(("curves-without-a-place", f"{name} over epochs of other curves", cells))
    drawn = [(name, title, [cell for cell in cells if curve_of(cell.entry)]) for name, title, cells in groups]
    return [_picture(findings, name, title, cells) for name, title, cells in drawn if cells]


def _cell(row: Row, title: str, base: Entry | None) -> _Cell:
    return _Cell(title, row.entry, None if base is row.entry else base, row.state, row.early)


def _picture(findings: Findings, name: str, title: str, cells: Sequence[_Cell]) -> Picture:
    read = READ if any(curve_of(cell.entry, "train_error") for cell in cells) else READ_VALIDATION
    notes = [read.format(findings.metric.short) + LOGARITHMIC * (findings.metric == TOP1_ERROR)]
    if any(math.isfinite(cell.early) for cell in cells):
        notes.append(READ_SIGN.format(_plural(findings)))
    if len(cells) > MOST:
        notes.append(f"The first {MOST} of {len(cells)} are drawn; results.json holds all of them.")
    return Picture(
        name=name,
        title=title,
        caption=_caption(findings, cells),
        draw=lambda width: _draw(findings, cells[:MOST], width),
        notes=tuple(notes),
    )


def _plural(findings: Findings) -> str:
    return "errors" if findings.metric == TOP1_ERROR else "curves"


def _caption(findings: Findings, cells: Sequence[_Cell]) -> str:
    known = [cell for cell in cells if math.isfinite(cell.early)]
    if not known:
        ends = sorted(curve_of(cell.entry)[-1][1] for cell in cells)
        last, first = value_text(findings, ends[-1]), number(ends[0], findings.digits)
        span = last if len(ends) == 1 else f"from {first} to {last}"
        many = f"{len(cells)} curve{'s end' if len(cells) > 1 else ' ends'}"
        return f"{many} with a validation {findings.metric.short} of {span}."
    least, most = (pick(known, key=lambda cell: abs(cell.early)) for pick in (min, max))
    text = f"The mean gap of the training {_plural(findings)} before the first drop is"
    text += f" {cost_text(findings, most.early)} at its largest ({short(most.title)})"
    smallest = f" and {points(least.early, findings.digits)} at its smallest ({short(least.title)})"
    return text + smallest * (least is not most) + "."


def _draw(findings: Findings, cells: Sequence[_Cell], width: float) -> Sheet:
    metric = findings.metric
    columns = min(4 if width == WIDE else 2, max(len(cells), 2))
    lines = max(len(cell.lines) for cell in cells)
    gap, left, right, tall, head = 14.0, 26.0, 8.0, 112.0 if width == WIDE else 100.0, 8.0 + 13 * lines
    each = (width - left - right - gap * (columns - 1)) / columns
    rows = -(-len(cells) // columns)
    sheet = Sheet(width, rows * (head + tall + 14) + 22)
    entries = [entry for cell in cells for entry in (cell.entry, cell.base) if entry is not None]
    shown = [error for e in entries for kind in ("error", "train_error") for _, error in curve_of(e, kind)]
    ends = (max(0.8 * min(shown), 0.1), min(1.15 * max(shown), 100.0)) if metric == TOP1_ERROR else _ends(shown)
    last = max(point.epoch for cell in cells for result in cell.entry.results for point in result.curve)
    for order, cell in enumerate(cells):
        row, column = divmod(order, columns)
        place, top = left + column * (each + gap), row * (head + tall + 14)
        color = SHAPES[cell.state]["markeredgecolor"]
        for line, text in enumerate(reversed(cell.lines)):
            sheet.text(place, top + head - 7 - 13 * line, text, weight="bold", fontsize=9.5, color=color)
        axes = sheet.axes(left=place, top=top + head, width=each, height=tall)
        _frame(axes, metric, ends, last, first=column == 0, foot=order + columns >= len(cells))
        _draw_cell(axes, findings, cell, ALERT if color == ALERT else ACCENT)
    used = min(columns, len(cells))
    sheet.text(left + used * (each + gap) - gap, sheet.height - 3, "epoch", color=SOFT, fontsize=9.5, ha="right")
    sheet.text(0, sheet.height - 3, short(metric.short_label), color=SOFT, fontsize=9.5)
    return sheet


def _ends(shown: Sequence[float]) -> tuple[float, float]:
    """Of an even scale that shows all of it, with a little air."""
    air = 0.08 * (max(shown) - min(shown)) or 1.0
    return min(shown) - air, max(shown) + air


def _frame(axes: Axes, metric: Metric, ends: tuple[float, float], last: float, *, first: bool, foot: bool) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    axes.set(yscale="log" if metric == TOP1_ERROR else "linear", ylim=ends, xlim=(0, last))
    ticks: list[float] = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
    ticks = ticks if metric == TOP1_ERROR else [float(tick) for tick in MaxNLocator(3).tick_values(*ends)]
    ticks = [tick for tick in ticks if ends[0] <= tick <= ends[1]]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks] if first else [""] * len(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.tick_params(labelsize=9, labelbottom=foot, pad=4)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)


def _draw_cell(axes: Axes, findings: Findings, cell: _Cell, color: str) -> None:
    train, sign = curve_of(cell.entry, "train_error"), sign_of(findings.study.recipe)
    dotted: dict[str, Any] = {"linewidth": 1.1, "dashes": (1, 1.4)}
    if cell.base is not None:
        base = curve_of(cell.base, "train_error")
        _plot(axes, curve_of(cell.base), color=SOFT, **dotted)
        _plot(axes, base, color=SOFT, linewidth=1.1)
        if base and train:
            (epochs, errors), (base_epochs, base_errors) = np.transpose(_thinned(train)), np.transpose(base)
            beside = np.interp(epochs, base_epochs, base_errors)
            covered = (base_epochs[0] <= epochs) & (epochs <= base_epochs[-1])
            axes.fill_between(epochs, errors, beside, where=covered, color=color, alpha=0.16, linewidth=0)
        for epoch in sign or ():
            axes.axvline(epoch, ymin=0.17, color=SOFT, linewidth=0.7, dashes=(1, 2), zorder=0.5)
    _plot(axes, curve_of(cell.entry), color=color, **dotted)
    _plot(axes, train, color=color, linewidth=1.4)
    lost = [result for result in cell.entry.results if result.outcome == "non-finite" and result.curve]
    for result in cell.entry.results[: MOST // 2] if lost else ():
        _plot(axes, [(point.epoch, point.error) for point in result.curve], color=color, linewidth=0.5, alpha=0.5)
    for end in [result.curve[-1] for result in lost]:
        axes.plot([end.epoch], [end.error], linestyle="none", marker="x", color=ALERT, markersize=4.6)
    if math.isfinite(cell.early):
        text = f"gap {points(cell.early, findings.digits)}"
        axes.annotate(text, (0.03, 0.05), xycoords="axes fraction", fontsize=9, color=INK)


def _plot(axes: Axes, curve: Curve, **style: Any) -> None:
    if curve:
        axes.plot(*zip(*_thinned(curve), strict=True), **style)


def _thinned(curve: Curve) -> Curve:
    step = -(-len(curve) // DETAIL)
    return curve if step == 1 else [*curve[:-1:step], curve[-1]]
