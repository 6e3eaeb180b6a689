"""Whether a run's folder still says what its training wrote: people edit files, and disks lose ends."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onehour.config import Recipe
from onehour.study.spec import SPEC
from onehour.train.record import MEDIAN_OF, Run, differences

__all__ = ["check_folders", "check_run"]

NUMBERS = {"epoch": math.inf, "top1_error": 100.0, "train_error": 100.0}
"""What a line of metrics.jsonl must hold, and the largest it can be."""


def check_folders(paths: Sequence[Path]) -> None:
    """Check every run of a sweep's folder, or of runs' folders; what is neither is left to `read_study`.

    Raises:
        ValueError: naming the first file that is not as it was written.

    >>> check_folders([Path("nowhere")])
    """
    for path in paths:
        sweep = (path / SPEC).is_file()
        for recipe in sorted((path / "cells").glob("*/recipe.toml")) if sweep else [path / "recipe.toml"]:
            if recipe.is_file():
                check_run(recipe.parent)


def check_run(folder: Path) -> None:
    """Check that a run's files can be read, hold numbers, and are of one recipe.

    Raises:
        ValueError: naming the file, the line and what was expected.

    >>> check_run(Path("nowhere"))
    Traceback (most recent call last):
    ValueError: nowhere is not a run's folder: it has no recipe.toml
    """
    run = Run(folder)
    path = folder / "metrics.jsonl"
    for number, line in enumerate(run.metrics, 2):
        for name, most in NUMBERS.items():
            value: Any = line.get(name) if isinstance(line, dict) else None
            if not _is_number(value) or not 0 <= value <= most:
                expected = "a number from 0 to 100" if most == 100 else "a number"
                raise ValueError(f"{path}, line {number}: {name} is {value!r}; expected {expected}")
    _check_recipe(path, run.recipe)
    summary = _object(folder / "summary.json")
    _check_end(folder / "summary.json", summary)
    if summary.get("outcome") == "finished":
        _check_whole(path, run, summary)
    environment = _object(folder / "environment.json")
    sessions = environment.get("sessions", [{}])
    if not isinstance(sessions, list) or not sessions or not all(isinstance(session, dict) for session in sessions):
        raise ValueError(f"{folder / 'environment.json'}: sessions is not a list of objects; it was edited")


def _check_recipe(path: Path, recipe: Recipe) -> None:
    """The first line of metrics.jsonl is the recipe that was trained."""
    if not path.is_file():
        return
    head, end, _ = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    if not end:
        return  # cut within its first line: there is no evaluation
    try:
        trained = Recipe.from_dict(json.loads(head)["recipe"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}, line 1: expected the recipe that was trained ({error}); it was edited") from error
    changed = differences(trained, recipe)
    if changed:
        raise ValueError(f"{path.parent / 'recipe.toml'} is not what was trained ({'; '.join(changed)}); put it back")


def _check_whole(path: Path, run: Run, summary: dict[str, Any]) -> None:
    """A finished run's metrics go to its last epoch, and end with the errors that its summary knows."""
    metrics = run.metrics
    last = metrics[-1]["epoch"] if metrics else 0
    if last < run.recipe.epochs:
        raise ValueError(f"{path} ends at epoch {last} of {run.recipe.epochs}, but the run is finished: it was cut")
    known = summary.get("last_errors")
    found = [line["top1_error"] for line in metrics][-MEDIAN_OF:]
    if known is not None and known != found:
        raise ValueError(f"{path} ends with the errors {found}, but summary.json has {known}: one of them was edited")


def _check_end(path: Path, summary: dict[str, Any]) -> None:
    seconds, together = summary.get("seconds_training"), summary.get("seeds_together", 1)
    if not isinstance(summary.get("outcome", ""), str):
        raise ValueError(f"{path}: outcome is {summary['outcome']!r}; expected text")
    if seconds is not None and (not _is_number(seconds) or seconds < 0):
        raise ValueError(f"{path}: seconds_training is {seconds!r}; expected a number of seconds")
    if not isinstance(together, int) or together < 1:
        raise ValueError(f"{path}: seeds_together is {together!r}; expected a whole number of at least 1")


def _object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
