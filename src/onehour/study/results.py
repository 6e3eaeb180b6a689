"""Runs as a study sees them: grouped by minibatch and by what differs from the recipe (paper §5.1, Reporting)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from onehour.config import Recipe
from onehour.sidefile import read_lines
from onehour.study.spec import SPEC, SweepSpec, arm_of, label_of
from onehour.training.record import MEDIAN_OF, Run, differences

__all__ = ["Entry", "Point", "Result", "Study", "check_folders", "check_run", "read_study", "result_of", "study_of"]

Arm = tuple[tuple[str, str], ...]
SAME = ("model", "data", "samples", "classes", "epochs")
"""What runs must share to be compared: the task and its length."""


@dataclass(frozen=True)
class Point:
    """An evaluation of a run; errors in percent.

    >>> Point(epoch=1, top1_error=12.5).train_error is None
    True
    """

    epoch: float
    top1_error: float
    train_error: float | None = None


@dataclass(frozen=True)
class Result:
    """One run.

    Args:
        source: its folder or file, for messages.
        arm: (field, value) of what differs from the base recipe beside minibatch and seed; () for the recipe itself.
        error: in percent: the median of the last five epochs; chance where the run left the finite numbers; None
            while it is unfinished.
        seconds: of training, without evaluation.
        together: with how many seeds it was trained as one network; `seconds` is then its share.

    >>> Result("a", (), 32, 0, "unfinished", None).error is None
    True
    """

    source: str
    arm: Arm
    minibatch: int | None
    seed: int | None
    outcome: Literal["finished", "non-finite", "unfinished"]
    error: float | None
    curve: tuple[Point, ...] = ()
    seconds: float | None = None
    together: int = 1
    environment: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """The runs of one minibatch and arm, an entry of a table: mean ± std (n − 1) over seeds.

    >>> entry = Entry((), 32, (Result("a", (), 32, 0, "finished", 3.0), Result("b", (), 32, 1, "finished", 4.0)))
    >>> entry.mean, round(entry.std, 3), entry.n
    (3.5, 0.707, 2)
    """

    arm: Arm
    minibatch: int | None
    results: tuple[Result, ...]

    @property
    def label(self) -> str:
        """What differs from the recipe: "" for the recipe itself, "warmup=none" for an arm.

        >>> Entry((("warmup", "none"),), 512, ()).label
        'warmup=none'
        """
        return label_of(self.arm)

    @property
    def errors(self) -> tuple[float, ...]:
        """Of the runs that have ended; nothing is dropped.

        >>> Entry((), 32, (Result("a", (), 32, 0, "non-finite", 90.0),)).errors
        (90.0,)
        """
        return tuple(result.error for result in self.results if result.error is not None)

    @property
    def n(self) -> int:
        """How many runs have ended.

        >>> Entry((), 32, ()).n
        0
        """
        return len(self.errors)

    @property
    def mean(self) -> float:
        """Mean error; nan without any.

        >>> Entry((), 32, ()).mean
        nan
        """
        return statistics.fmean(self.errors) if self.errors else float("nan")

    @property
    def std(self) -> float:
        """Standard deviation with n − 1; nan for fewer than two runs.

        >>> Entry((), 32, (Result("a", (), 32, 0, "finished", 3.0),)).std
        nan
        """
        return statistics.stdev(self.errors) if self.n > 1 else float("nan")


@dataclass(frozen=True)
class Study:
    """Entries that belong together.

    Args:
        recipe: the base that arms are named against; None for others' curves.
        entries: sorted by arm (the recipe's own first, then as they came) and minibatch.
        spec: of a sweep: what was asked for.
    """

    recipe: Recipe | None
    entries: tuple[Entry, ...]
    spec: SweepSpec | None = None

    @property
    def flat(self) -> tuple[Entry, ...]:
        """The recipe itself, by minibatch: the paper's figure 1.

        >>> Study(None, (Entry((), 64, ()), Entry((("warmup", "none"),), 64, ()))).flat
        (Entry(arm=(), minibatch=64, results=()),)
        """
        return tuple(entry for entry in self.entries if not entry.arm)

    @property
    def arms(self) -> tuple[Entry, ...]:
        """The recipe with something else, each at its minibatch.

        >>> Study(None, (Entry((("warmup", "none"),), 64, ()),)).arms[0].label
        'warmup=none'
        """
        return tuple(entry for entry in self.entries if entry.arm)

    @cached_property
    def reference(self) -> Entry | None:
        """What the others are compared with: the base minibatch's entry, else the smallest's."""
        sized = [entry for entry in self.flat if entry.n and entry.minibatch is not None]
        base = [entry for entry in sized if self.recipe and entry.minibatch == self.recipe.base_minibatch]
        return (base or sized or [None])[0]

    def beside(self, arm: Entry) -> Entry | None:
        """The recipe's own entry at an arm's minibatch.

        >>> study = Study(None, (Entry((), 64, ()), Entry((("warmup", "none"),), 64, ())))
        >>> study.beside(study.arms[0])
        Entry(arm=(), minibatch=64, results=())
        """
        return next((entry for entry in self.flat if entry.minibatch == arm.minibatch), None)


def result_of(run: Run, base: Recipe) -> Result:
    """A run's folder as a result.

    Args:
        run: perhaps unfinished.
        base: the recipe that its arm is named against.

    Raises:
        ValueError: if it is of another task, or its files are damaged.
    """
    recipe = run.recipe
    other = [
        f"{name} {getattr(recipe, name)!r} instead of {getattr(base, name)!r}"
        for name in SAME
        if None not in (getattr(recipe, name), getattr(base, name)) and getattr(recipe, name) != getattr(base, name)
    ]
    if other:
        raise ValueError(
            f"{run.folder} has {', '.join(other)}: runs of different tasks cannot be compared; report them separately"
        )
    summary = run.summary
    outcome = summary.get("outcome", "unfinished")
    if outcome not in ("finished", "non-finite"):
        outcome = "unfinished"
    curve = tuple(Point(line["epoch"], line["top1_error"], line["train_error"]) for line in run.metrics)
    if outcome == "finished" and not curve:
        raise ValueError(f"{run.folder} says that it is finished, but metrics.jsonl holds no evaluation")
    error = {
        "finished": lambda: run.final_error,
        "non-finite": lambda: _chance(recipe, run.folder),
        "unfinished": lambda: None,
    }[outcome]()
    return Result(
        source=str(run.folder),
        arm=arm_of(recipe, base),
        minibatch=recipe.minibatch,
        seed=recipe.seed,
        outcome=outcome,
        error=error,
        curve=curve,
        seconds=summary.get("seconds_training") if outcome == "finished" else None,
        together=summary.get("seeds_together", 1),
        environment=run.environment,
    )


def study_of(results: Iterable[Result], recipe: Recipe | None, spec: SweepSpec | None = None) -> Study:
    """Group results into entries.

    Raises:
        ValueError: if a minibatch, arm and seed occur twice.

    >>> study_of([Result("a", (), 64, 0, "finished", 3.0), Result("b", (), 32, 0, "finished", 4.0)], None).flat[0].mean
    4.0
    """
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
    order = {arm: number for number, arm in enumerate(dict.fromkeys(arm for arm, _ in groups))}
    keys = sorted(groups, key=lambda key: (key[0] != (), order[key[0]], key[1] or 0))
    by_seed = {key: tuple(sorted(groups[key], key=lambda result: (result.seed or 0, result.source))) for key in keys}
    return Study(recipe, tuple(Entry(*key, by_seed[key]) for key in keys), spec)


def read_study(paths: Sequence[Path]) -> Study:
    """The study of a sweep's folder, or of runs' folders.

    The base recipe is the sweep's; of plain runs it is that of the smallest minibatch.

    Raises:
        ValueError: for a path that is neither, for mixed tasks and for damaged files.

    >>> read_study([Path("nowhere")])
    Traceback (most recent call last):
    ValueError: nowhere is neither a sweep's folder (it has no sweep.toml) nor a run's (it has no recipe.toml)
    """
    sweeps = [path for path in paths if (path / SPEC).is_file()]
    if sweeps and len(paths) > 1:
        raise ValueError(f"{sweeps[0]} is a sweep; report it alone, or give the runs in its folder cells")
    if sweeps:
        spec = SweepSpec.read(sweeps[0])
        folders = sorted(path.parent for path in (sweeps[0] / "cells").glob("*/recipe.toml"))
        results = [result_of(Run(folder), spec.recipe) for folder in folders]
        order = {arm: number for number, arm in enumerate(spec.arms)}
        results.sort(key=lambda result: order.get(result.arm, len(order)))
        return study_of(results, spec.recipe, spec)
    for path in paths:
        if not (path / "recipe.toml").is_file():
            raise ValueError(
                f"{path} is neither a sweep's folder (it has no {SPEC}) nor a run's (it has no recipe.toml)"
            )
    runs = [Run(path) for path in paths]
    base = min((run.recipe for run in runs), key=lambda recipe: (recipe.minibatch, recipe.pitfall is not None))
    return study_of([result_of(run, base) for run in runs], base)


def _chance(recipe: Recipe, folder: Path) -> float:
    if recipe.classes is None:
        raise ValueError(f"{folder / 'recipe.toml'} has no classes, which the error of chance needs")
    return 100 * (1 - 1 / recipe.classes)


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
