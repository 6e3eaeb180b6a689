"""Others' curves: a CSV of epoch and error for each run, alone or beside runs' folders."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from onehour.rules.minibatch import parse_size
from onehour.study.results import Arm, Point, Result, Study, check_folders, read_study, study_of
from onehour.study.spec import parse_arm
from onehour.study.text import short
from onehour.training.record import final_error

__all__ = ["read_csv", "read_paths"]

NEEDED, CONSTANT = ("epoch", "error"), ("minibatch", "seed", "arm")
"""Columns that must be there; columns that say one thing of a whole run."""


def read_paths(paths: Sequence[Path]) -> Study:
    """The study of a sweep's folder, of runs' folders, of CSVs, or of a mixture.

    Raises:
        ValueError: for what is none of these, for mixed tasks and lengths, for damaged files, and where no run has
            ended.
    """
    if not paths:
        raise ValueError("nothing to report; give a sweep's folder, runs' folders, or CSVs of epoch,error")
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{path} is given twice; give it once")
    files = [path for path in paths if path.is_file() or (path.suffix.lower() == ".csv" and not path.exists())]
    folders = [path for path in paths if path not in files]
    check_folders(folders)
    study = read_study(folders) if folders else Study(None, ())
    results = [result for entry in study.entries for result in entry.results]
    curves = [read_csv(path, label) for path, label in zip(files, _labels(files), strict=True)]
    _check_lengths(curves, results, None if study.recipe is None else study.recipe.epochs)
    results += curves
    if not any(result.error is not None for result in results):
        raise ValueError(f"{', '.join(map(str, paths))}: no run has ended yet, so there is nothing to report")
    return study_of(results, study.recipe, study.spec) if files else study


def read_csv(path: Path, label: str | None = None) -> Result:
    """A CSV as a run: a header, then a line an evaluation.

    Columns: `epoch` and `error` (in percent) must be there; `train_error`, and `minibatch`, `seed` and `arm`, which
    hold one value all through, may be. Others are left alone. A curve without a minibatch has no place on the axis.

    Args:
        label: what a curve without a minibatch is called; the file's name unless given.

    Raises:
        ValueError: naming the file, the line and what was expected.

    >>> read_csv(Path("nowhere.csv"))
    Traceback (most recent call last):
    ValueError: nowhere.csv cannot be read: No such file or directory
    """
    lines = _lines(path)
    try:
        first, head = next(lines)
    except StopIteration:
        raise ValueError(f"{path} is empty; expected a header line with epoch,error") from None
    columns = [name.strip().lower() for name in head]
    for name in NEEDED:
        if name not in columns:
            got = short(",".join(head))
            raise ValueError(f"{path}, line {first}: expected a header with the columns epoch and error, got {got!r}")
    curve: list[Point] = []
    said: dict[str, str] = {}
    for number, cells in lines:
        where = f"{path}, line {number}"
        if len(cells) < len(columns):
            raise ValueError(f"{where} has {len(cells)} of {len(columns)} values; expected {', '.join(columns)}")
        values = {name: cell.strip() for name, cell in zip(columns, cells, strict=False)}
        curve.append(_point(values, where, after=curve[-1].epoch if curve else None))
        for name in CONSTANT:
            value = values.get(name, "")
            if said.setdefault(name, value) != value:
                raise ValueError(f"{where}: {name} is {value!r} and was {said[name]!r} before; a file is one run")
    if not curve:
        raise ValueError(f"{path} has a header and no line under it; expected a line for each evaluation")
    minibatch = _size(said["minibatch"], path)
    arm = _arm(said["arm"])
    if minibatch is None and not arm:
        arm = (("curve", label or path.stem),)
    error = final_error([point.top1_error for point in curve])
    return Result(str(path), arm, minibatch, _seed(said["seed"], path), "finished", error, tuple(curve))


def _check_lengths(curves: Sequence[Result], runs: Sequence[Result], epochs: int | None) -> None:
    """Refuse curves on the axis that end at different epochs, or at another than runs' last, as runs are refused."""
    known = [(f"{runs[0].source} at epoch {epochs}", {float(epochs)})] if runs and epochs else []
    for curve in [curve for curve in curves if curve.minibatch is not None]:
        ends, last = _ends(curve), f"{curve.curve[-1].epoch:g}"
        for other, others in known:
            if min(abs(end - another) for end in ends for another in others) >= 0.5:
                raise ValueError(
                    f"{curve.source} ends at epoch {last} and {other}: runs of different lengths cannot be compared;"
                    " report them separately"
                )
        known.append((f"{curve.source} at epoch {last}", ends))


def _ends(result: Result) -> set[float]:
    """Epochs that a curve may have taken: one that begins at 0 may count from there, and ends a line's later then."""
    epochs = [point.epoch for point in result.curve]
    return {epochs[-1], *([2 * epochs[-1] - epochs[-2]] if epochs[0] == 0 and len(epochs) > 1 else [])}


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Lines that hold something, with their numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, cells
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file: it is not text; expected lines of epoch,error") from error


def _point(values: dict[str, str], where: str, after: float | None) -> Point:
    epoch = _number(values["epoch"])
    if epoch is None or (epoch < 0 if after is None else epoch <= after):
        expected = "of at least 0" if after is None else f"above {after:g}"
        raise ValueError(f"{where}: epoch is {values['epoch']!r}; expected a number {expected}")
    found: dict[str, float | None] = {}
    for name in ("error", "train_error"):
        text = values.get(name, "")
        found[name] = _number(text)
        given = name == "error" or bool(text)
        if given and not 0 <= (-1.0 if found[name] is None else found[name] or 0.0) <= 100:
            raise ValueError(f"{where}: {name} is {text!r}; expected percent, a number from 0 to 100")
    assert found["error"] is not None
    return Point(epoch, found["error"], found["train_error"])


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _size(text: str, path: Path) -> int | None:
    try:
        return parse_size(text) if text else None
    except ValueError as error:
        raise ValueError(f"{path}: minibatch: {error}") from error


def _seed(text: str, path: Path) -> int | None:
    try:
        return int(text) if text else None
    except ValueError:
        raise ValueError(f"{path}: seed is {text!r}; expected a whole number") from None


def _arm(text: str) -> Arm:
    """Fields of a recipe, as a sweep writes them; any other text as it is."""
    if not text:
        return ()
    try:
        return tuple(pair for part in text.split(",") for (pair,) in parse_arm(part.strip()))
    except ValueError:
        return (("arm", text),)


def _labels(files: Sequence[Path]) -> list[str]:
    """Files' names, with their folder's where two are alike."""
    stems = [path.stem for path in files]
    return [f"{path.parent.name}/{path.stem}" if stems.count(path.stem) > 1 else path.stem for path in files]
