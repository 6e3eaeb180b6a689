"""The picture of one run."""

from __future__ import annotations

import io
from pathlib import Path

from onehour.files import replace_whole
from onehour.study.charts.style import ACCENT, ALERT, FAINT, INK, SOFT, looks
from onehour.study.text import short
from onehour.training.record import MEDIAN_OF, Run

__all__ = ["draw_curve"]

PICTURE = "curve.png"
POINTS = 2000
"""At which the schedule is drawn, so that its drops look like the steps that they are."""


def draw_curve(run: Run) -> Path | None:
    """Draw a run's training and validation error and its rate into curve.png in its folder.

    Returns:
        The picture's path; None without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
    except ImportError:
        return None
    metrics, recipe = run.metrics, run.recipe
    epochs = [record["epoch"] for record in metrics]
    with looks():
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        errors, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        last = min(MEDIAN_OF, len(metrics))
        found = f"validation: {run.final_error:.2f} %, the median of the last {last} epoch{'s' * (last > 1)}"
        for kind, color, label in (("train_error", SOFT, "training"), ("top1_error", ACCENT, found)):
            values = [record[kind] for record in metrics]
            errors.plot(epochs, values, color=color, marker=".", markersize=4, label=label)
        errors.axhline(run.final_error, color=ACCENT, linewidth=0.7, linestyle=":")
        lowest = min(record["top1_error"] for record in metrics)
        errors.set_ylim(0, min(100.0, max(6 * lowest, 5.0)))
        errors.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        errors.set_ylabel("top-1 error, %", fontsize=10)
        errors.legend(loc="upper right", framealpha=1, edgecolor="none", fontsize=10)
        errors.set_title(
            f"{short(recipe.name)}: minibatch {recipe.minibatch} = {recipe.workers.workers} workers ×"
            f" {recipe.per_worker}, seed {recipe.seed}",
            fontsize=10,
            loc="left",
            color=INK,
        )
        points = [i * recipe.epochs / POINTS for i in range(POINTS)]
        rates.semilogy(points, [recipe.schedule(point) or float("nan") for point in points], color=ALERT)
        rates.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        rates.yaxis.set_minor_locator(NullLocator())
        rates.set_ylabel("rate", fontsize=10)
        rates.set_xlabel("epoch", fontsize=10)
        rates.set_xlim(0, recipe.epochs)
        rates.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        for axes in (errors, rates):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color=FAINT, linewidth=0.6)
            axes.tick_params(labelsize=10, labelcolor=SOFT, color=FAINT)
            axes.set_axisbelow(True)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150)
    replace_whole(run.folder, PICTURE, content.getvalue())
    return run.folder / PICTURE
