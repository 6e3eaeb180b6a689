"""Figures of errors: against minibatch (the paper's figure 1), BatchNorm's n (§2.3) and time, and of each change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from onehour.study.advice import advice_of_study
from onehour.study.findings import Findings, Row
from onehour.study.marks import (
    NOTE,
    SHAPES,
    SMALL,
    Mark,
    Panel,
    draw_mark,
    draw_panels,
    mark_of,
    sheet_with_key,
    window_of,
)
from onehour.study.paper import PAPER_REFERENCE, paper_verdicts
from onehour.study.picture import FAINT, INK, SOFT, WASH, WIDE, Picture, Sheet, Window
from onehour.study.results import Entry
from onehour.study.spec import GROUPS
from onehour.study.verdict import points
from onehour.study.wording import (
    break_caption,
    change_text,
    error_words,
    joined,
    non_finite_notes,
    seconds_text,
    short,
    size_label,
    value_text,
)
from onehour.training.record import TOP1_ERROR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

READ = (
    "Bars are ±2 std over seeds, dots are seeds; the band is the reference’s ±2 std, the dashed line the margin. Above"
    " the break of the axis the scale is logarithmic."
)
READ_DOWN = "Less is worse, and drawn higher."
READ_BOTH = "The same number of points above the reference lies at the same height in both panels."
PAPER_TASK = ("resnet50", 1_281_167)
"""The model and the number of samples, ImageNet-1k's, with which a report has the paper's figure beside its own."""
FEWEST = 3  # values of n, beside the recipe's own, that make a figure

ROUND_SECONDS = {
    digit * unit for unit in (1e-3, 1e-2, 0.1, 1, 60, 3600, 36000) for digit in (1, 2, 3, 5, 7, 10, 15, 20, 30, 45)
}


def minibatch_picture(findings: Findings, *, papers: bool = False) -> list[Picture]:
    """The figure, with the paper's beside it if asked; none without a minibatch that has a run which ended."""
    if findings.reference is None:
        return []
    recipe = findings.study.recipe
    papers = papers or (recipe is not None and (recipe.model, recipe.samples) == PAPER_TASK)
    papers = papers and findings.metric == TOP1_ERROR
    panels = [_ours(findings), *([_papers(findings.margin)] if papers else [])]
    return [
        Picture(
            name="error-against-minibatch",
            title=f"{findings.metric.title} against minibatch",
            caption=break_caption(findings, papers=papers),
            draw=lambda width: draw_panels(panels, width),
            notes=(
                READ,
                *([READ_BOTH] if papers else []),
                *([READ_DOWN] if findings.metric.higher_is_better else []),
                *non_finite_notes(findings.sizes),
            ),
        )
    ]


def _ours(findings: Findings) -> Panel:
    reference, recipe = findings.study.reference, findings.study.recipe
    base = recipe.base_minibatch if recipe else reference.minibatch if reference else None
    about = f"{recipe.model} on {recipe.data}, {recipe.epochs:g} epochs" if recipe else "from others’ files"
    marks = {row.entry.minibatch or 1: row for row in findings.sizes if row.entry.n}
    advice = advice_of_study(findings.study)
    noise = advice.noise if advice is not None else None
    foreseen = None
    if noise is not None and noise.scale and noise.low and noise.high:
        foreseen = math.log2(noise.low), math.log2(noise.scale), math.log2(noise.high)
    return Panel(
        title=short(recipe.name, 24) if recipe else "These runs",
        about=f"{short(about, 40)}; {short(findings.metric.label)}",
        marks=tuple(mark_of(row, math.log2(size)) for size, row in marks.items()),
        ticks=_sizes(marks, base or 1),
        margin=findings.margin,
        breaks=True,
        foreseen=foreseen,
        metric=findings.metric,
    )


def _papers(margin: float) -> Panel:
    rows = paper_verdicts(margin=margin)
    return Panel(
        title="The paper",
        about="ResNet-50 on ImageNet, 90 epochs; top-1 error, %",
        marks=tuple(
            Mark(math.log2(row["minibatch"]), row["mean"], row["std"], verdict.state if verdict else "reference")
            for row, verdict in rows
        ),
        ticks=_sizes([row["minibatch"] for row, _ in rows], PAPER_REFERENCE),
        margin=margin,
        color=SOFT,
        breaks=True,
    )


def _sizes(sizes: Iterable[int], base: int) -> tuple[tuple[float, str, str], ...]:
    return tuple((math.log2(size), size_label(size), f"{size / base:.3g}×") for size in sizes)


def per_worker_pictures(findings: Findings) -> list[Picture]:
    """A figure for each minibatch at which `FEWEST` other values of n were run."""
    pictures = []
    for size in findings.arms_at:
        found = {
            int(row.entry.arm[0][1]): row
            for row in findings.arms
            if row.entry.minibatch == size and [name for name, _ in row.entry.arm] == ["per_worker"] and row.entry.n
        }
        own = next((row for row in findings.sizes if row.entry.minibatch == size and row.entry.n), None)
        if len(found) >= FEWEST and own is not None and findings.study.recipe is not None:
            n = findings.study.recipe.per_worker
            pictures.append(_per_worker_picture(findings, size, dict(sorted({**found, n: own}.items())), n))
    return pictures


def _per_worker_picture(findings: Findings, size: int, found: dict[int, Row], own: int) -> Picture:
    metric = findings.metric
    panel = Panel(
        title=f"Minibatch {size_label(size)}",
        about=f"{short(metric.label)}, against n, the images per worker",
        marks=tuple(mark_of(row, math.log2(n), state="reference" if n == own else "") for n, row in found.items()),
        ticks=tuple((math.log2(n), size_label(n), f"k={size // n}") for n in found),
        margin=findings.margin,
        metric=metric,
    )
    by_mean = sorted(found, key=lambda n: found[n].entry.mean)
    values = {n: value_text(findings, row.entry.mean) for n, row in found.items()}
    low, high = (f"n = {n} ({values[n]})" for n in (by_mean[0], by_mean[-1]))
    extremes = f"lowest with {low} and highest with {high}"
    rest = f"; with the recipe’s n = {own} it is {values[own]}."
    if own in (by_mean[0], by_mean[-1]):
        rest = f"; the recipe has n = {own}."
    return Picture(
        name=f"per-worker-at-{size}",
        title=f"BatchNorm’s n at {size_label(size)}",
        caption=f"At minibatch {size_label(size)} the {metric.short} is {extremes}{rest}",
        draw=lambda width: draw_panels([panel], width, tall=190),
        notes=non_finite_notes(row for n, row in found.items() if n != own),
    )


def seconds_picture(findings: Findings) -> list[Picture]:
    """What a shorter run costs in accuracy; none where fewer than two minibatches have a time."""
    rows, reference = findings.timed, findings.reference
    if reference is None or not rows:
        return []
    marks = tuple(mark_of(row, math.log2(row.mean_seconds)) for row in rows)
    recipe, pad = findings.study.recipe, 0.25
    low, high = (pick(mark.place for mark in marks) for pick in (min, max))
    times = sorted(time for time in ROUND_SECONDS if low - pad <= math.log2(time) <= high + pad)
    panel = Panel(
        title=short(recipe.name, 24) if recipe else "These runs",
        about=f"{short(findings.metric.label)}, against the time of training a run",
        marks=marks,
        ticks=tuple((math.log2(time), seconds_text(time), "") for time in times),
        margin=findings.margin,
        names=tuple(size_label(row.entry.minibatch or 0) for row in rows),
        pad=pad,
        room=44,
        metric=findings.metric,
    )
    notes = ["Time is that of training alone, on this machine, without evaluation; unfinished runs have none."]
    if together := {result.together for row in rows for result in row.entry.results if result.seconds} - {1}:
        many = " or ".join(map(str, sorted(together)))
        notes.append(f"{many} seeds were trained at once, as one network: a run’s time is its share of theirs.")
    return [
        Picture(
            name="error-against-time",
            title=f"{findings.metric.title} against time",
            caption=_seconds_caption(findings, reference, rows),
            draw=lambda width: draw_panels([panel], width, tall=210 if width == WIDE else 200),
            notes=tuple(notes),
        )
    ]


def _seconds_caption(findings: Findings, reference: Row, rows: Sequence[Row]) -> str:
    held = [row for row in findings.held if row.seconds]
    end = held[-1] if held else next(row for row in reversed(rows) if row is not reference)
    start, stop = reference.mean_seconds, end.mean_seconds
    sizes = f"{size_label(reference.entry.minibatch or 0)} to {size_label(end.entry.minibatch or 0)}"
    times = f"from {seconds_text(start)} to {seconds_text(stop)}"
    faster = f", {start / stop:.1f} times as fast," if stop < start else ""
    changes = f"its {findings.metric.short} changes by {change_text(findings, end.cost)}"
    return f"From minibatch {sizes} a run’s time goes {times}{faster} and {changes}."


def arm_pictures(findings: Findings, *, elsewhere: Sequence[str] = ()) -> list[Picture]:
    """What each change to the recipe costs (paper T1, T2a), the costliest first: a figure for each minibatch with arms.

    Groups that have a figure of their own are `elsewhere`.
    """
    pictures = []
    for size in findings.arms_at:
        groups = [
            (GROUPS[kind], [row for row in rows if math.isfinite(row.cost)])
            for (at, kind), rows in findings.groups.items()
            if at == size and kind not in elsewhere
        ]
        groups = [(title, rows) for title, rows in groups if rows]
        if groups:
            pictures.append(_arm_picture(findings, size, groups))
    return pictures


def _arm_picture(findings: Findings, size: int, groups: Sequence[tuple[str, Sequence[Row]]]) -> Picture:
    rows = [row for _, rows in groups for row in rows]
    own = findings.study.beside(rows[0].entry)
    assert own is not None
    worse = sum(row.state in ("beyond", "broke") for row in rows)
    costliest = sorted(rows, key=lambda row: -row.cost)[:3]
    most = [f"{short(row.name)} ({points(row.cost, findings.digits)})" for row in costliest]
    caption = f"At minibatch {size_label(size)}, where the recipe has {error_words(findings, own.mean)}, "
    if all(row.state == "no verdict" for row in rows):
        caption += "no change has a verdict; "
    else:
        caption += f"{worse} of {len(rows)} changes {'is' if worse == 1 else 'are'} beyond the margin or broke; "
    in_points = f", in {findings.metric.points}" if findings.metric.points else ""
    return Picture(
        name=f"arms-at-{size}",
        title=f"What each change costs at {size_label(size)}",
        caption=f"{caption}the costliest{in_points}: {joined(most)}.",
        draw=lambda width: _draw_arms(findings, own, groups, width),
        notes=non_finite_notes(rows),
    )


def _draw_arms(findings: Findings, own: Entry, groups: Sequence[tuple[str, Sequence[Row]]], width: float) -> Sheet:
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
    metric, margin, (least, most) = findings.metric, findings.margin, findings.metric.ends
    marks = [mark_of(row, place, above=own.cost) for place, row in rows]
    paper = [Mark(place, row.paper, math.nan, "paper") for place, row in rows if row.paper is not None]
    sheet = sheet_with_key(width, head + 14 + tall + 24, [*marks, *paper], metric)
    axis = f"worse than the recipe: {metric.label}"
    axis = "points of top-1 error above the recipe" if metric == TOP1_ERROR else axis
    sheet.text(0, 12, short(axis), fontsize=10, color=SOFT)
    axes = sheet.axes(left=left + 4, top=head + 14, width=width - left - right - 8, height=tall)
    window = window_of([*marks, *paper], base=0.0, margin=margin, floor=least - own.cost)
    window = replace(window, most=most)
    _frame_arms(axes, own, window, margin, tall, spans)
    for place, title in titles:
        sheet.text(0, head + 14 + place, title, weight="bold", fontsize=10.5)
    for mark in paper:
        axes.plot([mark.mean], [mark.place], linestyle="none", markersize=5.2, markeredgewidth=1.2, **SHAPES["paper"])
    for mark, (place, row) in zip(marks, rows, strict=True):
        line, color = head + 14 + place + (4 if wide else -10), SHAPES[mark.state]["markeredgecolor"]
        sheet.text(0, line, short(row.name, 40), fontsize=10.5)
        sheet.text(width, line, points(row.cost, findings.digits), ha="right", fontsize=10.5, color=color)
        draw_mark(axes, mark, upright=False, width=3.5, ends=(least - own.cost, most - own.cost))
    return sheet


def _frame_arms(
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
    for text, value in (("0", 0), (f"+{margin:g}", margin)):
        axes.annotate(text, (value, 0), xytext=(0, 5), ha="center", color=INK, **NOTE)
    if window.broken:
        axes.annotate("log →", (window.knee, 0), xytext=(0, 5), ha="left", **SMALL)
