"""Folders of runs and sweeps that nothing trained: a truth is written down, so that a study must find it again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onehour.config import PITFALLS, Recipe
from onehour.recipes import digits
from onehour.study.spec import Cell, SweepSpec, label_of, pitfall_arms, table_arms

BASE = digits(classes=10)
CHANCE = 90.0
TRUTH = {32: 3.6, 64: 3.5, 128: 3.55, 256: 3.6, 512: 3.7, 1024: 12.0, 2048: 62.0}
"""Mean error at each minibatch: flat to 16×, broken beyond."""

COSTS: dict[str, float] = {
    "warmup=none": 0.9,
    "warmup=constant": 41.0,
    "scaling=fixed": 1.1,
    "scaling=sqrt": 0.35,
    "base_lr=0.1": 0.15,
    "base_lr=0.4": 4.2,
    **dict(zip([f"pitfall={name}" for name in PITFALLS], (80.0, 0.1, 7.0, 0.4, 0.25, 1.6, 0.6), strict=True)),
    "per_worker=512": 2.6,
    "zero_gamma=false": 0.05,
    "per_worker=4": 3.4,
    "per_worker=8": 0.8,
    "per_worker=32": 0.05,
    "per_worker=64": 0.3,
}
"""What each arm adds at 16×, in points."""

WOBBLE = (0.1, -0.1, 0.0, 0.05, -0.05)
"""Of the last five evaluations, around a run's error; their median is 0."""


def spread(seeds: int, std: float, key: str) -> list[float]:
    """Deviations of `seeds` runs: mean 0, and exactly this standard deviation (n − 1)."""
    draws = np.random.default_rng(list(key.encode())).normal(size=seeds)
    if seeds == 1:
        return [0.0]
    centred = draws - draws.mean()
    return (centred / centred.std(ddof=1) * std).tolist()


def curve(error: float, epochs: int, *, early: float = 0.0, key: str = "") -> list[tuple[float, float, float]]:
    """(epoch, validation error, training error) of a run that ends at `error`; drops at a third and at two thirds."""
    noise = np.random.default_rng(list(key.encode()) or 0)
    lines = []
    for epoch in range(1, epochs + 1):
        stage = 0 if 3 * epoch <= epochs else 1 if 3 * epoch <= 2 * epochs else 2
        floor, start = ((0.13, 0.8), (0.05, 0.09), (0.0, 0.05))[stage]
        since = 3 * epoch / epochs - stage
        above = 100 * (floor + (start - floor) * math.exp(-5 * since)) + early * (stage == 0)
        jitter = float(noise.normal(scale=0.04)) * above
        train = min(max(error + 0.8 * (above + jitter) - 1.5, 0.2), CHANCE)
        left = epochs - epoch
        shown = error + WOBBLE[left] if left < 5 else error + 0.6 * above + 1.5 * jitter
        lines.append((float(epoch), min(max(shown, 0.0), 100.0), train))
    return lines


def write_run(
    folder: Path,
    recipe: Recipe,
    error: float,
    *,
    early: float = 0.0,
    outcome: str = "finished",
    seconds: float | None = None,
    together: int = 1,
    environment: dict[str, Any] | None = None,
    noise: Sequence[Sequence[float]] = (),
) -> Path:
    """A run's folder, as training/record.py leaves it; "unfinished" and "non-finite" end after half of their epochs."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    lines = curve(error, int(recipe.epochs), early=early, key=folder.name)
    lines = lines if outcome == "finished" else lines[: int(recipe.epochs) // 2]
    metrics: list[dict[str, Any]] = [
        {"epoch": int(epoch), "iteration": int(epoch), "lr": 0.1, "train_error": train, "top1_error": shown}
        for epoch, shown, train in lines
    ]
    if noise:
        metrics[1]["noise"] = [list(point) for point in noise]
    _write_lines(folder / "metrics.jsonl", [{"recipe": recipe.as_dict()}, *metrics])
    seconds = 12 + 40 * 32 / recipe.minibatch if seconds is None else seconds
    each = [{"epoch": line["epoch"], "seconds": seconds / len(metrics)} for line in metrics]
    _write_lines(folder / "timing.jsonl", each)
    here = {"python": "3.11.7", "torch": "2.13.0+cpu", "processor": "AMD EPYC", "cores": 2, "device": "cpu"}
    here |= environment or {}
    (folder / "environment.json").write_text(json.dumps({"sessions": [here]}), encoding="utf-8")
    if outcome != "unfinished":
        ends = [line["top1_error"] for line in metrics][-5:]
        summary: dict[str, Any] = {"outcome": outcome, "seconds_training": seconds, "last_errors": ends}
        summary |= {"seeds_together": together} if together > 1 else {}
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def arms_of(recipe: Recipe = BASE, minibatch: int = 512) -> tuple[tuple[tuple[str, str], ...], ...]:
    """The paper's arms, the pitfalls and BatchNorm's n."""
    sizes = [(("per_worker", str(n)),) for n in (4, 8, 32, 64)]
    return (*table_arms(recipe), *pitfall_arms(recipe, minibatch), *sizes)


def write_sweep(
    folder: Path,
    *,
    recipe: Recipe = BASE,
    seeds: int = 5,
    minibatches: Iterable[int] = tuple(TRUTH),
    arms: Sequence[tuple[tuple[str, str], ...]] = arms_of(),
    together: int = 1,
    left_out: Sequence[str] = (),
    non_finite: Sequence[str] = ("2048-s1", "2048-s3"),
    unfinished: Sequence[str] = (),
) -> SweepSpec:
    """A sweep's folder whose entries are `TRUTH` and `COSTS`; some cells by name left out, broken or half done."""
    minibatches = tuple(minibatches)
    at = (512,) if arms else ()
    spec = SweepSpec(recipe=recipe, minibatches=minibatches, seeds=tuple(range(seeds)), arms=tuple(arms), arms_at=at)
    spec.write(folder)
    for cell in spec.cells():
        if cell.name not in left_out:
            outcome = "non-finite" if cell.name in non_finite else "finished"
            outcome = "unfinished" if cell.name in unfinished else outcome
            early = 9.0 * (cell.recipe.minibatch > 512)
            error = _error_of(cell, seeds)
            write_run(folder / "cells" / cell.name, cell.recipe, error, early=early, outcome=outcome, together=together)
    return spec


def write_csv(path: Path, errors: Sequence[float], **columns: Any) -> Path:
    """Somebody's CSV of epoch, error, and columns that hold one value each."""
    head = ["epoch", "error", *columns]
    rows = [[str(epoch), str(error), *map(str, columns.values())] for epoch, error in enumerate(errors, 1)]
    path.write_text("\n".join(",".join(row) for row in [head, *rows]) + "\n", encoding="utf-8")
    return path


def _error_of(cell: Cell, seeds: int) -> float:
    label, minibatch = label_of(cell.arm), cell.recipe.minibatch
    mean = TRUTH[minibatch] + COSTS.get(label, 0.5 * bool(label))
    std = 0.15 if mean < 5 else 0.12 * mean
    return min(mean + spread(seeds, std, f"{label}{minibatch}")[cell.recipe.seed % seeds], CHANCE)


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
