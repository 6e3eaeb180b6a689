"""Whether a run's folder still says what its training wrote: people edit files, and disks lose ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onehour.config import Recipe
from onehour.sidefile import read_lines
from onehour.study.spec import SPEC
from onehour.training.record import MEDIAN_OF, Run, differences

__all__ = ["check_folders", "check_run"]


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
    _ = run.metrics, run.environment  # which look whether they are of the kinds that they should be
    _check_recipe(path, run.recipe)
    if run.finished:
        _check_whole(path, run)


def _check_recipe(path: Path, recipe: Recipe) -> None:
    """The first line of metrics.jsonl is the recipe that was trained."""
    lines = read_lines(path, {}, head=["recipe"])
    if not lines:
        return  # it may be cut within its first line: there is no evaluation
    try:
        trained = Recipe.from_dict(lines[0]["recipe"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}, line 1: expected the recipe that was trained ({error}); it was edited") from error
    changed = differences(trained, recipe)
    if changed:
        raise ValueError(f"{path.parent / 'recipe.toml'} is not what was trained ({'; '.join(changed)}); put it back")


def _check_whole(path: Path, run: Run) -> None:
    """A finished run's metrics go to its last epoch, and end with the errors that its summary knows."""
    metrics = run.metrics
    last = metrics[-1]["epoch"] if metrics else 0
    if last < run.recipe.epochs:
        raise ValueError(f"{path} ends at epoch {last} of {run.recipe.epochs}, but the run is finished: it was cut")
    known = run.summary.get("last_errors")
    found = [line["top1_error"] for line in metrics][-MEDIAN_OF:]
    if known is not None and known != found:
        raise ValueError(f"{path} ends with the errors {found}, but summary.json has {known}: one of them was edited")
