"""Pictures of runs."""

from __future__ import annotations

from pathlib import Path

from onehour.train.record import MEDIAN_OF, Run

__all__ = ["draw_curve"]

TRAIN, VALIDATION, RATE, GRID = "#9a9a9a", "#1f4e9c", "#c8501e", "#e6e6e6"
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
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    errors, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for kind, color, label in (("train_error", TRAIN, "training"), ("top1_error", VALIDATION, "validation")):
        errors.plot(epochs, [record[kind] for record in metrics], color=color, marker=".", markersize=4, label=label)
    errors.axhline(run.final_error, color=VALIDATION, linewidth=0.7, linestyle=":")
    last = min(MEDIAN_OF, len(metrics))
    errors.annotate(
        f"{run.final_error:.2f} %, the median of the last {last} epoch{'s' * (last > 1)}",
        (epochs[-1], run.final_error),
        textcoords="offset points",
        xytext=(0, 7),
        ha="right",
        color=VALIDATION,
    )
    lowest = min(record["top1_error"] for record in metrics)
    errors.set_ylim(0, min(100.0, max(6 * lowest, 5.0)))
    errors.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    errors.set_ylabel("top-1 error, %")
    errors.legend(loc="upper right", framealpha=1, edgecolor="none")
    errors.set_title(
        f"{recipe.name}: minibatch {recipe.minibatch} = {recipe.workers.workers} workers × {recipe.per_worker},"
        f" seed {recipe.seed}",
        fontsize=10,
        loc="left",
    )
    points = [i * recipe.epochs / POINTS for i in range(POINTS)]
    rates.semilogy(points, [recipe.schedule(point) or float("nan") for point in points], color=RATE)
    rates.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    rates.yaxis.set_minor_locator(NullLocator())
    rates.set_ylabel("rate")
    rates.set_xlabel("epoch")
    rates.set_xlim(0, recipe.epochs)
    rates.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for axes in (errors, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    path = run.folder / "curve.png"
    figure.savefig(path, dpi=150)
    return path
