"""How a finished run compares with the recipe's committed reference, and its picture."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from onehour.files import replace_whole
from onehour.recipes import RECIPES
from onehour.study.advice import advice_of
from onehour.study.picture import ACCENT, ALERT, FAINT, INK, SOFT, looks
from onehour.study.wording import short
from onehour.training.record import MEDIAN_OF, Run

PICTURE = "curve.png"
POINTS = 2000  # at which the schedule is drawn, so that its drops look like the steps that they are


@dataclass(frozen=True)
class Reference:
    """Final errors of a recipe at its base minibatch, over seeds, and where a next run's should lie."""

    minibatch: int
    mean: float
    std: float
    seeds: int
    low: float  # the 95 % prediction interval mean ± t(0.975, n − 1) · std · √(1 + 1/n)
    high: float
    power: float  # the share of runs that lie outside of it where their true error is 2 std worse

    def verdict(self, error: float) -> str:
        """Whether a run's error is what another seed of the reference could have given, and what that is worth."""
        if self.low <= error <= self.high:
            apart = f"a run 2 std worse would be told apart in {100 * self.power:.0f} %"
            return f"not distinguishable from the reference; {apart}"
        return f"distinguishable from the reference: it is {'worse' if error > self.high else 'better'}"


def reference_of(name: str) -> Reference | None:
    """The committed reference of a named recipe; None where there is none."""
    text = (resources.files("onehour.study") / "references.json").read_text(encoding="utf-8")
    known = json.loads(text).get(name)
    return Reference(**known) if known else None


def outcome_lines(run: Run) -> Iterator[str]:
    """What `onehour train` says at the end."""
    summary = run.summary
    if not run.finished:
        yield f"{run.folder} ended as {summary.get('outcome', 'unfinished')}"
        return
    last = min(MEDIAN_OF, len(run.metrics))
    final = "final error  " if run.recipe.task is None else f"final {run.metric.name} "
    yield f"{final}{run.metric.of(run.final_error)} (median of the last {last} epoch{'s' * (last > 1)})"
    recipe, named = run.recipe, RECIPES.get(run.recipe.name, lambda: None)()
    task = ("model", "data", "task", "validation", "epochs", "init", "continues")
    same = all(getattr(recipe, name) == getattr(named, name, None) for name in task)
    reference = reference_of(recipe.name) if same else None  # of the named recipe's task, start and length
    if reference is not None:
        yield (
            f"reference    {reference.mean:.2f} ± {reference.std:.2f} % at minibatch {reference.minibatch}"
            f" ({reference.seeds} seeds), 95 % of runs between {reference.low:.2f} and {reference.high:.2f} %"
        )
        yield f"verdict      {reference.verdict(run.final_error)}"
    if speed := summary.get("images_per_second"):
        most = f"; most time goes to {summary['bottleneck']}" if "bottleneck" in summary else ""
        yield f"speed        {speed:,.0f} {'images' if recipe.task is None else 'samples'}/s{most}"
    with suppress(ValueError):  # it was not measured, or cannot tell
        yield from advice_of(run).lines()[:3:2]
    yield f"run          {run.folder}"
    curve = draw_curve(run)
    yield f"curve        {curve}" if curve else "curve        needs matplotlib: pip install 'onehour[report]'"


def draw_curve(run: Run) -> Path | None:
    """Draw a run's training and validation error and its rate into curve.png in its folder; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
    except ImportError:
        return None
    metrics, recipe = run.metrics, run.recipe
    epochs = [record["epoch"] for record in metrics]
    last, lowest = min(MEDIAN_OF, len(metrics)), min(record["top1_error"] for record in metrics)
    found = f"validation: {run.metric.of(run.final_error)}, the median of the last {last} epoch{'s' * (last > 1)}"
    size = f"minibatch {recipe.minibatch} = {recipe.workers.workers} workers × {recipe.per_worker}"
    with looks():
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        errors, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for kind, color, label in (("train_error", SOFT, "training"), ("top1_error", ACCENT, found)):
            values = [record[kind] for record in metrics]
            errors.plot(epochs, values, color=color, marker=".", markersize=4, label=label)
        errors.axhline(run.final_error, color=ACCENT, linewidth=0.7, linestyle=":")
        if recipe.task is None:
            errors.set_ylim(0, min(100.0, max(6 * lowest, 5.0)))
        errors.yaxis.set_major_locator(MaxNLocator(5, integer=recipe.task is None))
        errors.set_ylabel(run.metric.label, fontsize=10)
        errors.legend(loc="upper right", framealpha=1, edgecolor="none", fontsize=10)
        title = f"{short(recipe.name)}: {size}, seed {recipe.seed}"
        errors.set_title(title, fontsize=10, loc="left", color=INK)
        points = [i * recipe.epochs / POINTS for i in range(POINTS)]
        drawn = [recipe.schedule(point) or float("nan") for point in points]
        if recipe.continues:  # what came before had another schedule
            points, drawn = epochs, [record["lr"] for record in metrics]
        rates.semilogy(points, drawn, color=ALERT)
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
