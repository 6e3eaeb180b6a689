"""Pictures of runs."""

from __future__ import annotations

from pathlib import Path

from onehour.train.record import Run

__all__ = ["draw_curve"]

TRAIN, VALIDATION, RATE = "#9a9a9a", "#1f4e9c", "#c8501e"


def draw_curve(run: Run) -> Path | None:
    """Draw a run's training and validation error and its rate into curve.png in its folder.

    Returns:
        The picture's path; None without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    metrics, recipe = run.metrics, run.recipe
    epochs = [record["epoch"] for record in metrics]
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    errors, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    errors.plot(epochs, [record["train_error"] for record in metrics], color=TRAIN, label="training")
    errors.plot(epochs, [record["top1_error"] for record in metrics], color=VALIDATION, label="validation")
    errors.axhline(run.final_error, color=VALIDATION, linewidth=0.7, linestyle=":")
    errors.annotate(
        f"{run.final_error:.2f} %",
        (epochs[-1], run.final_error),
        textcoords="offset points",
        xytext=(0, 6),
        ha="right",
        color=VALIDATION,
    )
    lowest = min(record["top1_error"] for record in metrics)
    errors.set_ylim(0, min(100.0, max(6 * lowest, 5.0)))
    errors.set_ylabel("top-1 error, %")
    errors.legend(frameon=False)
    errors.set_title(
        f"{recipe.name}: minibatch {recipe.minibatch} = {recipe.workers.workers} workers × {recipe.per_worker},"
        f" seed {recipe.seed}",
        fontsize=10,
        loc="left",
    )
    points = [i * recipe.epochs / 400 for i in range(400)]
    rates.semilogy(points, [recipe.schedule(point) or float("nan") for point in points], color=RATE)
    rates.set_ylabel("rate")
    rates.set_xlabel("epoch")
    for axes in (errors, rates):
        axes.spines[["top", "right"]].set_visible(False)
    path = run.folder / "curve.png"
    figure.savefig(path, dpi=150)
    return path
