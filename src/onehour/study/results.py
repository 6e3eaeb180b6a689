"""Runs as a study sees them, read from their folders and from CSVs, grouped into entries (paper §5.1, Reporting)."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from onehour.config import Recipe
from onehour.rules.minibatch import parse_size
from onehour.sidefile import read_lines
from onehour.study.spec import SPEC, Arm, SweepSpec, arm_of, label_of, parse_arm
from onehour.training.record import MEDIAN_OF, TOP1_ERROR, Metric, Run, differences, final_error

SAME = ("model", "data", "task", "validation", "samples", "classes", "epochs")
"""What runs must share to be compared: the task and its length."""

NEEDED, CONSTANT = ("epoch", "error"), ("minibatch", "seed", "arm", "metric", "higher_is_better")
"""Columns that a CSV must have; columns that hold one value for a whole run."""


@dataclass(frozen=True)
class Point:
    """An evaluation of a run; errors in percent, or its metric's values."""

    epoch: float
    error: float
    train_error: float | None = None


@dataclass(frozen=True)
class Result:
    """One run, of a folder or a file."""

    source: str
    arm: Arm  # what differs from the base recipe beside minibatch and seed
    minibatch: int | None
    seed: int | None
    outcome: Literal["finished", "non-finite", "unfinished"]
    error: float | None
    """The median of the last five epochs; chance, or the untrained network's, of one that diverged; else None."""
    curve: tuple[Point, ...] = ()
    seconds: float | None = None  # of training, without evaluation
    together: int = 1  # with how many seeds it was trained as one network; `seconds` is then its share
    noise: tuple[tuple[float, float], ...] = ()  # (tr Σ, |G|²) of the points of its gradient noise
    environment: dict[str, Any] = field(default_factory=dict)
    metric: Metric = TOP1_ERROR
    untrained: float | None = None  # the error of its network before the first update, where the task is one's own

    @property
    def cost(self) -> float | None:
        """Its error, as its negative where higher is better: what is judged and drawn."""
        return None if self.error is None else self.metric.cost(self.error)


@dataclass(frozen=True)
class Entry:
    """The runs of one minibatch and arm, an entry of a table: mean ± std (n − 1) over seeds; nothing is dropped."""

    arm: Arm
    minibatch: int | None
    results: tuple[Result, ...]

    @property
    def label(self) -> str:
        """What differs from the recipe: "" for the recipe itself, "warmup=none" for an arm."""
        return label_of(self.arm)

    @property
    def errors(self) -> tuple[float, ...]:
        return tuple(result.error for result in self.results if result.error is not None)

    @property
    def n(self) -> int:
        return len(self.errors)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.errors) if self.errors else math.nan

    @property
    def cost(self) -> float:
        """The mean, as its negative where higher is better."""
        costs = [result.cost for result in self.results if result.cost is not None]
        return statistics.fmean(costs) if costs else math.nan

    @property
    def std(self) -> float:
        """Standard deviation with n − 1; nan for fewer than two runs."""
        return statistics.stdev(self.errors) if self.n > 1 else math.nan


@dataclass(frozen=True)
class Study:
    """Entries that belong together."""

    recipe: Recipe | None  # the base that arms are named against; None for others' curves
    entries: tuple[Entry, ...]  # sorted by arm (the recipe's own first, then as they came) and minibatch
    spec: SweepSpec | None = None  # of a sweep: what was asked for

    @property
    def results(self) -> list[Result]:
        return [result for entry in self.entries for result in entry.results]

    @cached_property
    def metric(self) -> Metric:
        """What the errors are, of all runs."""
        return next((result.metric for result in self.results if result.metric != TOP1_ERROR), TOP1_ERROR)

    @property
    def flat(self) -> tuple[Entry, ...]:
        """The recipe itself, by minibatch: the paper's figure 1."""
        return tuple(entry for entry in self.entries if not entry.arm)

    @property
    def arms(self) -> tuple[Entry, ...]:
        """The recipe with something else, each at its minibatch."""
        return tuple(entry for entry in self.entries if entry.arm)

    @cached_property
    def reference(self) -> Entry | None:
        """What the others are compared with: the base minibatch's entry, else the smallest's."""
        sized = [entry for entry in self.flat if entry.n and entry.minibatch is not None]
        base = [entry for entry in sized if self.recipe and entry.minibatch == self.recipe.base_minibatch]
        return (base or sized or [None])[0]

    def beside(self, arm: Entry) -> Entry | None:
        """The recipe's own entry at an arm's minibatch."""
        return next((entry for entry in self.flat if entry.minibatch == arm.minibatch), None)


def study_of(results: Iterable[Result], recipe: Recipe | None, spec: SweepSpec | None = None) -> Study:
    """Group results into entries."""
    results = list(results)
    known = [result for result in results if result.curve or result.error is not None]
    if other := next((result for result in known if result.metric != known[0].metric), None):
        raise ValueError(
            f"{known[0].source} has {known[0].metric} and {other.source} {other.metric}: different metrics cannot be"
            " compared; report them separately"
        )
    groups: dict[tuple[Arm, int | None], list[Result]] = {}
    for result in results:
        group = groups.setdefault((result.arm, result.minibatch), [])
        twin = next((r for r in group if r.seed is not None and r.seed == result.seed), None)
        if twin is not None:
            raise ValueError(
                f"{twin.source} and {result.source} are the same run (minibatch {result.minibatch}, seed"
                f" {result.seed}{', ' + label_of(result.arm) if result.arm else ''}); give one of them"
            )
        group.append(result)
    order = list(dict.fromkeys(arm for arm, _ in groups))
    keys = sorted(groups, key=lambda key: (key[0] != (), order.index(key[0]), key[1] or 0))
    by_seed = {key: tuple(sorted(groups[key], key=lambda result: (result.seed or 0, result.source))) for key in keys}
    return Study(recipe, tuple(Entry(*key, by_seed[key]) for key in keys), spec)


def read_paths(paths: Sequence[Path]) -> Study:
    """The study of a sweep's folder, of runs' folders, of CSVs, or of a mixture; every file is checked."""
    if not paths:
        raise ValueError("nothing to report; give a sweep's folder, runs' folders, or CSVs of epoch,error")
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{path} is given twice; give it once")
    files = [path for path in paths if path.is_file() or (path.suffix.lower() == ".csv" and not path.exists())]
    folders = [path for path in paths if path not in files]
    for folder in [run for path in folders for run in _runs_in(path)]:
        check_run(folder)
    study = read_study(folders) if folders else Study(None, ())
    stems = [path.stem for path in files]
    curves = [read_csv(path, f"{path.parent.name}/" * (stems.count(path.stem) > 1) + path.stem) for path in files]
    results = [*study.results, *curves]
    _check_lengths(curves, study)
    if not any(result.error is not None for result in results):
        raise ValueError(f"{', '.join(map(str, paths))}: no run has ended yet, so there is nothing to report")
    return study_of(results, study.recipe, study.spec) if files else study


def read_study(paths: Sequence[Path]) -> Study:
    """The study of a sweep's folder, or of runs' folders.

    The base recipe is the sweep's; of plain runs it is that of the smallest minibatch.
    """
    sweeps = [path for path in paths if (path / SPEC).is_file()]
    if sweeps and len(paths) > 1:
        raise ValueError(f"{sweeps[0]} is a sweep; report it alone, or give the runs in its folder cells")
    if sweeps:
        spec = SweepSpec.read(sweeps[0])
        results = [_result(Run(folder), spec.recipe) for folder in _runs_in(sweeps[0])]
        order = {arm: number for number, arm in enumerate(spec.arms)}
        results.sort(key=lambda result: order.get(result.arm, len(order)))
        return study_of(results, spec.recipe, spec)
    for path in paths:
        if not _runs_in(path):
            raise ValueError(
                f"{path} is neither a sweep's folder (it has no {SPEC}) nor a run's (it has no recipe.toml)"
            )
    runs = [Run(path) for path in paths]
    base = min((run.recipe for run in runs), key=lambda recipe: (recipe.minibatch, recipe.pitfall is not None))
    return study_of([_result(run, base) for run in runs], base)


def _runs_in(path: Path) -> list[Path]:
    found = (path / "cells").glob("*/recipe.toml") if (path / SPEC).is_file() else [path / "recipe.toml"]
    return sorted(recipe.parent for recipe in found if recipe.is_file())


def _result(run: Run, base: Recipe) -> Result:
    recipe, summary = run.recipe, run.summary
    pairs = {name: (getattr(recipe, name), getattr(base, name)) for name in SAME}
    other = [
        f"{name} {own!r} instead of {bases!r}"
        for name, (own, bases) in pairs.items()
        if None not in (own, bases) and own != bases
    ]
    if other:
        raise ValueError(
            f"{run.folder} has {', '.join(other)}: runs of different tasks cannot be compared; report them separately"
        )
    curve = tuple(Point(line["epoch"], line["top1_error"], line["train_error"]) for line in run.metrics)
    outcome, error, seconds = "unfinished", None, None
    if summary.get("outcome") == "finished":
        if not curve:
            raise ValueError(f"{run.folder} says that it is finished, but metrics.jsonl holds no evaluation")
        outcome, error = "finished", final_error([point.error for point in curve])
        if not math.isfinite(error):  # of a task of one's own
            outcome, error = "non-finite", _of_no_use(run)
        seconds = summary.get("seconds_training")
    elif summary.get("outcome") == "non-finite":
        outcome, error = "non-finite", _of_no_use(run)
    return Result(
        source=str(run.folder),
        arm=arm_of(recipe, base),
        minibatch=recipe.minibatch,
        seed=recipe.seed,
        outcome=outcome,
        error=error,
        curve=curve,
        seconds=seconds,
        together=summary.get("seeds_together", 1),
        noise=tuple((trace, square) for _, trace, square in run.noise),
        environment=run.environment,
        metric=run.metric,
        untrained=run.untrained["top1_error"] if run.untrained else None,
    )


def _of_no_use(run: Run) -> float:
    """What a run has that has learnt nothing: chance, or the error of its untrained network."""
    if run.untrained is not None:
        untrained: float = run.untrained["top1_error"]
        if not math.isfinite(untrained):
            raise ValueError(
                f"{run.folder} diverged, and {run.metric.written} of its untrained network, which it counts as, is not"
                " finite; give it a finite value there"
            )
        return untrained
    if run.recipe.classes is None:
        raise ValueError(f"{run.folder / 'recipe.toml'} has no classes, which the error of chance needs")
    return 100 * (1 - 1 / run.recipe.classes)


def check_run(folder: Path) -> None:
    """Check that a run's files can be read, hold numbers, and are of one recipe."""
    run, path = Run(folder), folder / "metrics.jsonl"
    metrics, _ = run.metrics, run.environment  # which look whether they are of the kinds that they should be
    lines = read_lines(path, {}, head=["recipe"])
    if lines:  # else it was cut within its first line: there is no evaluation
        try:
            trained = Recipe.from_dict(lines[0]["recipe"])
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line 1: expected the recipe that was trained ({error}); it was edited"
            ) from error
        changed = differences(trained, run.recipe)
        if changed:
            raise ValueError(f"{folder / 'recipe.toml'} is not what was trained ({'; '.join(changed)}); put it back")
    if not run.finished:
        return
    last = metrics[-1]["epoch"] if metrics else 0
    if last < run.recipe.epochs:
        raise ValueError(f"{path} ends at epoch {last} of {run.recipe.epochs}, but the run is finished: it was cut")
    errors = [line["top1_error"] for line in metrics[-MEDIAN_OF:]]
    known, found = run.summary.get("last_errors"), [error if math.isfinite(error) else None for error in errors]
    if known is not None and known != found:
        raise ValueError(f"{path} ends with the errors {found}, but summary.json has {known}: one of them was edited")


def read_csv(path: Path, label: str | None = None) -> Result:
    """A CSV as a run: a header, then a line an evaluation.

    Columns: `epoch` and `error` (in percent) must be there; `train_error`, and `minibatch`, `seed` and `arm`, which
    hold one value all through, may be. Others are ignored. A curve without a minibatch has no place on the axis.
    Where `metric` names another metric, as `distance [m]`, errors are any numbers; `higher_is_better` is true or false.

    Args:
        label: what a curve without a minibatch is called; the file's name unless given.
    """
    lines = _lines(path)
    first, head = next(lines, (0, []))
    if not head:
        raise ValueError(f"{path} is empty; expected a header line with epoch,error")
    columns = [name.strip().lower() for name in head]
    if any(columns.count(name) != 1 for name in NEEDED):
        got = ",".join(head)[:48]
        raise ValueError(f"{path}, line {first}: expected a header with one column epoch and one error, got {got!r}")
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
    try:
        minibatch = parse_size(said["minibatch"]) if said["minibatch"] else None
    except ValueError as error:
        raise ValueError(f"{path}: minibatch: {error}") from error
    try:
        seed = int(said["seed"]) if said["seed"] else None
    except ValueError:
        raise ValueError(f"{path}: seed is {said['seed']!r}; expected a whole number") from None
    try:  # fields of a recipe, as a sweep writes them; any other text as it is
        arm = tuple(pair for part in said["arm"].split(",") for (pair,) in parse_arm(part.strip()))
    except ValueError:
        arm = (("arm", said["arm"]),) if said["arm"] else ()
    higher = said["higher_is_better"].lower()
    if higher not in ("", "true", "false"):
        raise ValueError(f"{path}: higher_is_better is {said['higher_is_better']!r}; expected true or false")
    name = said["metric"]
    metric = Metric.called(name, [name] if higher == "true" else ()) if name else TOP1_ERROR
    if minibatch is None and not arm:
        arm = (("curve", label or path.stem),)
    error = final_error([point.error for point in curve])
    return Result(str(path), arm, minibatch, seed, "finished", error, tuple(curve), metric=metric)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
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
    if not (epoch >= 0 if after is None else epoch > after):
        expected = "of at least 0" if after is None else f"above {after:g}"
        raise ValueError(f"{where}: epoch is {values['epoch']!r}; expected a number {expected}")
    given = {name: values[name] for name in ("error", "train_error") if name == "error" or values.get(name)}
    for name, text in given.items():
        if values.get("metric"):
            if math.isnan(_number(text)):
                raise ValueError(f"{where}: {name} is {text!r}; expected a finite number")
        elif not 0 <= _number(text) <= 100:
            raise ValueError(f"{where}: {name} is {text!r}; expected percent, a number from 0 to 100")
    return Point(epoch, *map(_number, given.values()))


def _number(text: str) -> float:
    try:
        return float(text) if math.isfinite(float(text)) else math.nan
    except ValueError:
        return math.nan


def _check_lengths(curves: Sequence[Result], runs: Study) -> None:
    """Refuse curves on the axis that end at different epochs, or at another than runs' last, as runs are refused."""
    known: list[tuple[str, set[float]]] = []
    if runs.recipe and runs.results:
        known = [(f"{runs.results[0].source} at epoch {runs.recipe.epochs}", {float(runs.recipe.epochs)})]
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
